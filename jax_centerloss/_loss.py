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
    """Draws one center per class.

    Args:
      key: a PRNG key.
      num_classes: C, at least 1.
      feat_dim: D, the size of a feature vector, at least 1.
      initializer: draws the table; N(0, 1) by default, as in the PyTorch module.
      dtype: floating-point dtype of the table.
      out_sharding: the sharding of the table: a `NamedSharding`, or under `jax.set_mesh(mesh)` a
        `PartitionSpec`. By default JAX chooses: one device, or replicated on the devices of the mesh.
        `PartitionSpec("classes", None)` shards it by class over the mesh axis "classes". Each device draws
        its own shard, and the numbers are those of the table without a mesh. A
        `jax.experimental.layout.Format` also sets the memory layout, for a TPU that keeps rows together.
        Inside of `jit` the layout is that of the outermost program's `out_shardings`.

    Returns:
      `{"centers": array}`, the array of shape `(C, D)`.

    Raises:
      ValueError: if a size is below 1 or not divisible by its number of shards, or a `PartitionSpec` is
        given without a mesh.
      TypeError: if a size is not an integer, `dtype` is not floating point, or `out_sharding` is of another
        type.

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

    def draw(key: jax.Array) -> Any:  # A partitioned initializer of Linen returns the array in a box.
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

    Added to softmax cross-entropy it makes features compact within each class:
    `loss = cross_entropy + lam * center_loss(params, x, labels)`. Per sample, with `c = centers[labels]`,

      `d = sum((x - c)**2)`, `loss = clamp(d, low, high) + (C - 1) * clamp(0, low, high)`

    without a factor ½, and with the small constant that the clamp of the PyTorch module adds for the other
    classes. The gradient is zero where `d` is outside of `[low, high]`. Only the centers of the samples'
    own classes are read. Differences and sums are in float32 (float64 if an operand is), whatever the dtype
    of `x`.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      x: features `(..., D)`, floating point.
      labels: integer classes `(...)`. Negative ones are ignored. A label `>= C` raises; under `jit`, where
        its value is not known, it makes the loss and the gradient of its row of `x` NaN.
      where: boolean `(...)`, the samples to use; all by default.
      weights: real numbers `(...)`, not negative: a sample of weight k counts as k samples, of weight 0 as
        none. A negative weight raises; under `jit` it makes the loss NaN.
      reduce_fn: `jnp.mean` (the sum of weights times losses over the sum of weights; 0 if that is 0),
        `jnp.sum`, or `None` for the weighted per-sample losses `(...)`, zero for ignored samples.
      clip: the range `(low, high)` of a squared distance, or `None` for no clamp and no constant.
      axis_name: inside `shard_map`, `pmap` or `vmap`, the mapped axis (or axes) over which the batch is
        split: the mean or sum is then over the whole batch.

    Returns:
      The loss, a scalar or `(...)`, in float32 (float64 if an operand is).

    Raises:
      ValueError: on a shape that does not fit, a label `>= C` or negative weight outside of `jit`, another
        `reduce_fn`, or a bad `clip`.
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
    """
    centers = _checks.as_table(params)
    x, labels, used, weights = _batch.as_batch(x, labels, where, weights, centers)
    _options.check_reduce_fn(reduce_fn)
    clip = _options.as_clip(clip)
    rows, in_range = _table.gather_own_rows(centers, labels, x)
    if weights is not None:
        # A sample of weight 0 stays in, so that the derivative by its weight is right. It is left out if its
        # loss is NaN or infinite, since 0 * NaN is NaN.
        distance = lax.stop_gradient(_reduce.squared_distance(x.astype(rows.dtype), rows, in_range, used))
        used = used & ((weights != 0) | (in_range & jnp.isfinite(distance)))
    losses = _sample_losses(rows, x, in_range, used, clip=clip, num_classes=centers.shape[0])
    if reduce_fn is None:
        return losses if weights is None else losses * weights.astype(losses.dtype)
    reduce = _reduce.weighted_sum if reduce_fn is jnp.sum else _reduce.weighted_mean
    return reduce(losses, used, weights, axis_name)


def _sample_losses(
    rows: jax.Array, x: jax.Array, in_range: jax.Array, used: jax.Array, *, clip: Clip, num_classes: int
) -> jax.Array:
    """The loss of each sample: NaN for a used label that is out of range, 0 for an unused sample."""
    dtype = rows.dtype
    distance = _reduce.squared_distance(x.astype(dtype), rows, in_range, used)
    # An infinite distance has to surface as NaN, in the gradient too, where the clamp would make it 1e12.
    # NumPy constants: an eager NaN made by JAX would trip `jax_debug_nans` on a clean batch.
    valid = (jnp.isfinite(distance) & in_range) | jnp.logical_not(used)
    distance = distance * jnp.where(valid, np.ones((), dtype), np.full((), np.nan, dtype))
    if clip is not None:
        low, high = (jnp.asarray(bound, dtype) for bound in clip)
        # `jnp.clip` halves the gradient at the bounds, where the clamp of PyTorch passes all of it.
        distance = jnp.where(distance < low, low, jnp.where(distance > high, high, distance))
        clamped_zero = jnp.minimum(jnp.maximum(jnp.zeros((), dtype), low), high)
        distance = distance + (num_classes - 1) * clamped_zero
    return jnp.where(used, distance, jnp.zeros((), dtype))
