"""The center loss: a pure function of centers and features."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_centerloss import _batch, _checks, _reduce
from jax_centerloss._checks import CLIP, Clip, ReduceFn
from jax_centerloss._rows import table
from jax_centerloss._rows.placement import AxisName


def center_loss(
    params: Any,
    x: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduce_fn: ReduceFn = jnp.mean,
    clip: Clip = CLIP,
    axis_name: AxisName = None,
) -> jax.Array:
    """Mean squared distance between each feature vector and the center of its class.

    Per sample, with `c = centers[labels]`,

      `d = sum((x - c)**2)`, `loss = clamp(d, low, high) + (C - 1) * clamp(0, low, high)`

    without a factor ½. The second term is a constant, which the PyTorch module adds for the other classes.
    The gradient is zero where `d` is outside of `[low, high]`. An infinite `d` makes loss and gradient NaN.

    Added to softmax cross-entropy it makes features compact within each class:
    `loss = cross_entropy + lam * center_loss(params, x, labels)`. Only the centers of the samples' classes
    are read. Differences and sums are in float32 (float64 if an operand is), whatever the dtype of `x`.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      x: features `(..., D)`, floating point.
      labels: integer classes `(...)`. A negative label leaves its sample out. A label `>= C` raises, unless
        `where` or a weight of 0 leaves its sample out; under `jit`, where labels are not known, it makes the
        loss and the gradient of its row of `x` NaN.
      where: boolean `(...)`, the samples to use; all by default.
      weights: real numbers `(...)`, not negative: a sample of weight k counts as k samples, and a weight of 0
        leaves its sample out. A negative weight raises; under `jit` it makes the loss NaN.
      reduce_fn: `jnp.mean` (the sum of weights times losses over the sum of weights; 0 if no sample is used),
        `jnp.sum`, or `None` for the weighted per-sample losses `(...)`, zero for samples that are left out.
      clip: the range `(low, high)` of a squared distance, or `None` for no clamp and no constant.
      axis_name: inside `shard_map`, `pmap` or `vmap`, the mapped axis (or axes) over which the batch is
        split: the mean or sum is then over the whole batch.

    Returns:
      The loss, a scalar or `(...)`, in float32 (float64 if an operand is).

    Raises:
      ValueError: on a shape that does not fit, an unsupported `reduce_fn`, a bad `clip`, or outside of `jit`
        a label `>= C` or a negative weight.
      TypeError: on features or centers that are not floating point, labels that are not integers, a `where`
        that is not boolean, or an argument that is no array.

    Example:
      >>> import jax.numpy as jnp, jax_centerloss
      >>> params = {"centers": jnp.array([[0.0, 0.0], [1.0, 1.0]])}
      >>> x = jnp.array([[3.0, 4.0], [1.0, 2.0]])
      >>> float(jax_centerloss.center_loss(params, x, jnp.array([0, 1])))
      13.0

    References:
      Wen et al, A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV 2016
      (https://doi.org/10.1007/978-3-319-46478-7_31), whose Eq. 2 has a factor ½ and a sum over the batch.
      The PyTorch module is https://github.com/KaiyangZhou/pytorch-center-loss.
    """
    centers = _checks.as_table(params)
    x, labels, used, weights = _batch.as_batch(x, labels, where, weights, centers)
    _checks.check_reduce_fn(reduce_fn)
    clip = _checks.as_clip(clip)
    rows, in_range = table.gather_label_rows(centers, labels, x)
    x = x.astype(rows.dtype)
    if weights is not None:
        # A sample of weight 0 is left out if its loss is not finite, since 0 * NaN is NaN. Otherwise it stays
        # in, so that the derivative with respect to its weight is right.
        has_weight = weights != 0
        distance = lax.stop_gradient(_reduce.squared_distance(x, rows, in_range, used))
        used = used & (has_weight | (in_range & jnp.isfinite(distance)))
    losses = sample_losses(x, rows, in_range, used, clip=clip, num_classes=centers.shape[0])
    return _reduce.reduce(losses, used, weights, reduce_fn, axis_name, counted=used & in_range)


def sample_losses(
    x: jax.Array, rows: jax.Array, in_range: jax.Array, used: jax.Array, *, clip: Clip, num_classes: int
) -> jax.Array:
    """The loss of each sample: 0 if unused, else NaN for a label out of range or an infinite distance."""
    dtype = rows.dtype
    distance = _reduce.squared_distance(x, rows, in_range, used)
    # An infinite distance becomes NaN, in the gradient too. The clamp would make it 1e12, with gradient 0.
    # NumPy constants: `jax_debug_nans` would report a NaN that JAX makes.
    valid = (jnp.isfinite(distance) & in_range) | jnp.logical_not(used)
    distance = distance * jnp.where(valid, np.ones((), dtype), np.full((), np.nan, dtype))
    losses = distance
    zero = jnp.zeros((), dtype)
    if clip is not None:
        low, high = (jnp.asarray(bound, dtype) for bound in clip)
        losses = _clamp(distance, low, high) + (num_classes - 1) * _clamp(zero, low, high)
    # `reduce` masks again. With one mask alone XLA makes one more kernel on an A100 (benchmarks/compiled.py).
    return jnp.where(used, losses, zero)


def _clamp(d: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """`torch.clamp`. At the bounds it passes the whole gradient, of which `jnp.clip` would pass one half."""
    return jnp.where(d < low, low, jnp.where(d > high, high, d))
