"""The center loss and the initial centers: pure functions of centers and features."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import normal
from jax.typing import ArrayLike, DTypeLike

from jax_centerloss import _batch, _checks, _options, _placement, _reduce, _table
from jax_centerloss._options import CLIP, AxisName, Clip, ReduceFn
from jax_centerloss._placement import OutSharding


def init_centers(
    key: jax.Array,
    num_classes: int,
    feat_dim: int,
    *,
    initializer: jax.nn.initializers.Initializer = normal(1.0),
    dtype: DTypeLike = jnp.float32,
    out_sharding: OutSharding | None = None,
) -> dict[str, jax.Array]:
    """Makes the initial centers, one random vector for each class.

    Args:
      key: a PRNG key.
      num_classes: C, at least 1.
      feat_dim: D, the size of a feature vector, at least 1.
      initializer: returns the `(C, D)` centers; N(0, 1) by default, as in KaiyangZhou/pytorch-center-loss.
      dtype: floating-point dtype of the centers.
      out_sharding: the sharding of the centers: a `NamedSharding`, or under `jax.set_mesh(mesh)` a
        `PartitionSpec`. By default JAX chooses: one device, or replicated on the devices of the mesh.
        `PartitionSpec("classes", None)` shards them by class over the mesh axis "classes". Each device makes
        its own shard, with the values that there are without a mesh. A `jax.experimental.layout.Format` also
        sets the memory layout, such as contiguous rows on a TPU. Inside of `jit` it does not: pass it in the
        `out_shardings` of the outermost `jit`.

    Returns:
      `{"centers": array}`, the array of shape `(C, D)`.

    Raises:
      ValueError: if a size is below 1 or not divisible by its number of shards, `out_sharding` does not fit
        the mesh or there is none, or `initializer` returns another shape.
      TypeError: if a size is not an integer, `dtype` is not floating point, or `out_sharding` or what
        `initializer` returns is of another type.

    Example:
      >>> import jax, jax_centerloss
      >>> params = jax_centerloss.init_centers(jax.random.key(0), num_classes=10, feat_dim=2)
      >>> params["centers"].shape
      (10, 2)
    """
    _checks.check_floating(dtype, "dtype", _options.FLOAT_ADVICE)
    shape = _options.as_shape(num_classes, feat_dim)

    def check(leaf: Any) -> jax.Array:
        centers = _checks.as_array("what initializer returns", leaf, "Return the (C, D) centers.")
        if centers.shape != shape:
            raise ValueError(f"initializer must return centers of shape {shape}, got {centers.shape}.")
        return centers.astype(dtype)

    def draw(key: jax.Array) -> Any:
        # `nn.with_partitioning` of Linen returns the array in a box, which is a pytree.
        return jax.tree.map(check, initializer(key, shape, dtype))

    if out_sharding is None:
        return {"centers": draw(key)}
    return {"centers": _placement.draw_sharded(draw, key, _options.as_sharding(out_sharding, shape))}


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
    _options.check_reduce_fn(reduce_fn)
    clip = _options.as_clip(clip)
    rows, in_range = _table.gather_label_rows(centers, labels, x)
    x = x.astype(rows.dtype)
    if weights is not None:
        used = used & ((weights != 0) | _has_finite_loss(x, rows, in_range, used))
    losses = _sample_losses(x, rows, in_range, used, clip=clip, num_classes=centers.shape[0])
    return _reduce.reduce(losses, used, weights, reduce_fn, axis_name)


def _has_finite_loss(x: jax.Array, rows: jax.Array, in_range: jax.Array, used: jax.Array) -> jax.Array:
    """Whether the loss of a sample is finite, without a derivative.

    A sample of weight 0 is left out if its loss is not finite, since 0 * NaN is NaN. Otherwise it stays in,
    so that the derivative with respect to its weight is right.
    """
    distance = lax.stop_gradient(_reduce.squared_distance(x, rows, in_range, used))
    return in_range & jnp.isfinite(distance)


def _sample_losses(
    x: jax.Array, rows: jax.Array, in_range: jax.Array, used: jax.Array, *, clip: Clip, num_classes: int
) -> jax.Array:
    """The loss of each sample: 0 if unused, else NaN for a label out of range or an infinite distance."""
    dtype = rows.dtype
    distance = _reduce.squared_distance(x, rows, in_range, used)
    # An infinite distance becomes NaN, in the gradient too. The clamp would make it 1e12, with gradient 0.
    # The constants are NumPy's for the reason given in `_batch.as_batch`.
    valid = (jnp.isfinite(distance) & in_range) | jnp.logical_not(used)
    distance = distance * jnp.where(valid, np.ones((), dtype), np.full((), np.nan, dtype))
    losses, zero = distance, jnp.zeros((), dtype)
    if clip is not None:
        low, high = (jnp.asarray(bound, dtype) for bound in clip)
        losses = _clamp(distance, low, high) + (num_classes - 1) * _clamp(zero, low, high)
    # `reduce` masks again. With one mask alone XLA makes one more kernel on an A100 (benchmarks/compiled.py).
    return jnp.where(used, losses, zero)


def _clamp(d: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """`torch.clamp`. At the bounds it passes the whole gradient, of which `jnp.clip` would pass one half."""
    return jnp.where(d < low, low, jnp.where(d > high, high, d))
