"""The center loss, and the centers it is taken to: pure functions of the centers and the features."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import normal
from jax.typing import ArrayLike, DTypeLike

from jax_centerloss import _batch, _checks, _placement, _table
from jax_centerloss._checks import Clip, ReduceFn
from jax_centerloss._placement import OutSharding
from jax_centerloss._table import AxisName

CLIP = (1e-12, 1e12)


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
      out_sharding: where the table lies: a `PartitionSpec`, under `jax.set_mesh(mesh)`, or a `NamedSharding`.
        By default it is JAX's choice: one device, or under a mesh a whole table on each of its devices.
        `PartitionSpec("classes", None)` splits it by class over the axis "classes" of the mesh. Every device
        draws its own part, with the numbers that the whole table has without a mesh. A
        `jax.experimental.layout.Format` says as well how the table lies in memory: on a TPU, row by row
        (inside of `jit` that is up to the outermost program's `out_shardings`).

    Returns:
      `{"centers": array}`, the array of shape `(C, D)`.

    Raises:
      ValueError: if a size is below 1 or does not divide by its shards, or a `PartitionSpec` comes without
        a mesh.
      TypeError: if a size is not an integer, `dtype` is not floating point, or `out_sharding` is none of
        these.

    Example:
      >>> import jax, jax_centerloss
      >>> params = jax_centerloss.init_centers(jax.random.key(0), num_classes=10, feat_dim=2)
      >>> params["centers"].shape
      (10, 2)
    """
    _checks.floating(dtype, "dtype", _checks.DRAWN)
    shape = _checks.sizes(num_classes, feat_dim)

    def drawn(leaf: Any) -> jax.Array:
        centers = _checks.array("what initializer returns", leaf, "Return the (C, D) centers.")
        if centers.shape != shape:
            raise ValueError(f"initializer must return centers of shape {shape}, got {centers.shape}.")
        return centers.astype(dtype)

    def draw(key: jax.Array) -> Any:  # Of Linen's initializers some return the array in a box.
        return jax.tree.map(drawn, initializer(key, shape, dtype))

    if out_sharding is None:
        return {"centers": draw(key)}
    return {"centers": _placement.drawn(draw, key, _checks.sharding(out_sharding, shape))}


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

    without a factor ½, and with the small constant that the PyTorch module's clamp adds for the other
    classes. The gradient is zero where `d` leaves `[low, high]`. Only the rows of the samples' own classes
    are read. Differences and sums are taken in float32 (float64 if an operand has it) in every dtype of `x`.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      x: features `(..., D)`, floating point.
      labels: integer classes `(...)`. Negative ones are ignored. One that is `>= C` raises where its value
        is known; under `jit` it makes the loss and the gradient of its row of `x` NaN.
      where: boolean `(...)`, the samples to use; all by default.
      weights: real numbers `(...)`, not negative, one for each sample: a weight of k counts as k samples, 0
        as none. A negative one raises where its value is known; under `jit` it makes the loss NaN.
      reduce_fn: `jnp.mean` (the sum of weights times losses over the sum of weights; 0 if that is 0),
        `jnp.sum`, or `None` for the weighted per-sample losses `(...)`, zero where ignored.
      clip: the range `(low, high)` of a squared distance, or `None` for the bare distance: no clamp, no
        constant.
      axis_name: inside `shard_map`, `pmap` or `vmap`, the mapped axis (or axes) that the batch is spread
        over: the mean or sum is then over the whole batch.

    Returns:
      The loss, a scalar or `(...)`, in float32 (float64 if an operand has it).

    Raises:
      ValueError: on a shape that does not fit, a known label `>= C` or negative weight, another `reduce_fn`,
        or a bad `clip`.
      TypeError: on features or centers that are not floating point, labels that are not integers, a `where`
        that is not boolean, or what is no array at all.

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
    centers = _checks.table(params)
    x, labels, used, weights = _batch.batch(x, labels, where, weights, centers)
    _checks.reduction(reduce_fn)
    clip = _checks.clip_range(clip)
    rows, known = _table.read_rows(centers, labels, x)
    if weights is not None:
        # The loss of a sample of weight 0 still is the derivative by its weight; but where it is not finite,
        # the sample is left out, since zero times NaN is NaN.
        distance = lax.stop_gradient(squared_distance(x.astype(rows.dtype), rows, known, used))
        used = used & ((weights != 0) | (known & jnp.isfinite(distance)))
    losses = own_class_losses(rows, x, known, used, clip=clip, num_classes=centers.shape[0])
    if reduce_fn is None:
        return losses if weights is None else losses * weights.astype(losses.dtype)
    return (total if reduce_fn is jnp.sum else mean)(losses, used, weights, axis_name)


def total(
    values: jax.Array, used: jax.Array, weights: jax.Array | None = None, axis_name: AxisName = None
) -> jax.Array:
    """Their weighted sum over the used samples of the whole batch."""
    if weights is not None:
        values = values * weights.astype(values.dtype)
    number = jnp.sum(jnp.where(used, values, jnp.zeros((), values.dtype)))
    return number if axis_name is None else lax.psum(number, axis_name)


def mean(
    values: jax.Array, used: jax.Array, weights: jax.Array | None = None, axis_name: AxisName = None
) -> jax.Array:
    """Their weighted mean over the used samples of the whole batch; 0 if there are none."""
    return total(values, used, weights, axis_name) / number_of(used, weights, axis_name, values.dtype)


def number_of(used: jax.Array, weights: jax.Array | None, axis_name: AxisName, dtype: DTypeLike) -> jax.Array:
    """How many samples of the whole batch are used, or the sum of their weights; 1 instead of 0."""
    if weights is None:
        return jnp.maximum(count(used, axis_name), 1).astype(dtype)
    number = total(weights.astype(dtype), used, axis_name=axis_name)
    return jnp.where(number == 0, jnp.ones((), dtype), number)


def count(used: jax.Array, axis_name: AxisName = None) -> jax.Array:
    """How many samples are used, over the whole batch."""
    number = jnp.sum(used, dtype=jnp.int32)
    return number if axis_name is None else lax.psum(number, axis_name)


def own_class_losses(
    rows: jax.Array, x: jax.Array, known: jax.Array, used: jax.Array, *, clip: Clip, num_classes: int
) -> jax.Array:
    """Per-sample losses from the rows already read: NaN for a used label without a class, 0 if unused."""
    dtype = rows.dtype
    distance = squared_distance(x.astype(dtype), rows, known, used)
    # Infinity, which the clamp would hide as 1e12, has to surface as NaN does, in the gradient too. The
    # constants are NumPy's: an eager NaN of JAX's would trip jax_debug_nans on a clean batch.
    proper = (jnp.isfinite(distance) & known) | jnp.logical_not(used)
    distance = distance * jnp.where(proper, np.ones((), dtype), np.full((), np.nan, dtype))
    if clip is not None:
        low, high = (jnp.asarray(bound, dtype) for bound in clip)
        # jnp.clip would halve the gradient at the ends, where the reference passes all of it.
        distance = jnp.where(distance < low, low, jnp.where(distance > high, high, distance))
        other = jnp.minimum(jnp.maximum(jnp.zeros((), dtype), low), high)
        distance = distance + (num_classes - 1) * other
    return jnp.where(used, distance, jnp.zeros((), dtype))


@jax.custom_jvp
def squared_distance(x: jax.Array, rows: jax.Array, known: jax.Array, used: jax.Array) -> jax.Array:
    """`|x - row|²` of each sample, whatever the sample holds; the masks count in its derivative only.

    The derivative is the plain one, with what is not used or has no class left out before it is multiplied:
    zero times NaN is NaN. Were the mask inside of the square, as it would have to be without a rule of its
    own, XLA would make the difference several times over.
    """
    del known, used
    difference = x - rows
    return jnp.sum(difference * difference, axis=-1)


@squared_distance.defjvp
def _squared_distance_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, rows, known, used = primals
    zero = jnp.zeros((), x.dtype)
    difference = jnp.where(used[..., None], x - rows, zero)
    step = tangents[0] - jnp.where(known[..., None], tangents[1], zero)
    return squared_distance(*primals), 2 * jnp.sum(difference * step, axis=-1)
