"""The center loss and its relatives: pure functions of the centers and the features."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import normal
from jax.typing import ArrayLike, DTypeLike

from jax_centerloss import _checks, _table
from jax_centerloss._checks import Clip, ReduceFn
from jax_centerloss._table import AxisName

CLIP = (1e-12, 1e12)
_CLASS_BLOCK = 1024  # Classes that nearest_center looks at in one go.
_SAMPLED_CLASSES = 256  # Classes from which the shift of a distance map is taken, at most.


def init_centers(
    key: jax.Array,
    num_classes: int,
    feat_dim: int,
    *,
    initializer: jax.nn.initializers.Initializer = normal(1.0),
    dtype: DTypeLike = jnp.float32,
) -> dict[str, jax.Array]:
    """Draws one center per class.

    Args:
      key: a PRNG key.
      num_classes: C, at least 1.
      feat_dim: D, the size of a feature vector, at least 1.
      initializer: draws the table; N(0, 1) by default, as in the PyTorch module.
      dtype: floating-point dtype of the table.

    Returns:
      `{"centers": array}`, the array of shape `(C, D)`.

    Raises:
      ValueError: if a size is below 1.
      TypeError: if a size is not an integer or `dtype` is not floating point.

    Example:
      >>> import jax, jax_centerloss
      >>> params = jax_centerloss.init_centers(jax.random.key(0), num_classes=10, feat_dim=2)
      >>> params["centers"].shape
      (10, 2)
    """
    _checks.floating(dtype, "dtype", "Centers are drawn as floats: take jnp.float32 or jnp.bfloat16, say.")
    return {"centers": initializer(key, _checks.sizes(num_classes, feat_dim), dtype)}


def center_loss(
    params: Any,
    x: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
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
      reduce_fn: `jnp.mean` (over the used samples; 0 if there are none), `jnp.sum`, or `None` for the
        per-sample losses `(...)`, zero where ignored.
      clip: the range `(low, high)` of a squared distance, or `None` for the bare distance: no clamp, no
        constant.
      axis_name: inside `shard_map`, `pmap` or `vmap`, the mapped axis (or axes) that the batch is spread
        over: the mean or sum is then over the whole batch.

    Returns:
      The loss, a scalar or `(...)`, in float32 (float64 if an operand has it).

    Raises:
      ValueError: on a shape that does not fit, a known label `>= C`, another `reduce_fn`, or a bad `clip`.
      TypeError: on features or centers that are not floating point, labels that are not integers, or a
        `where` that is not boolean.

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
    x, labels, used = _checks.batch(x, labels, where, centers)
    _checks.reduction(reduce_fn)
    _checks.clip_range(clip)
    rows, known = _table.read_rows(centers, labels, x)
    losses = own_class_losses(rows, x, known, used, clip=clip, num_classes=centers.shape[0])
    if reduce_fn is None:
        return losses
    total = jnp.sum(losses)
    if axis_name is not None:
        total = lax.psum(total, axis_name)
    if reduce_fn is jnp.sum:
        return total
    return total / jnp.maximum(count(used, axis_name), 1).astype(total.dtype)


def count(used: jax.Array, axis_name: AxisName = None) -> jax.Array:
    """How many samples are used, over the whole batch."""
    number = jnp.sum(used, dtype=jnp.int32)
    return number if axis_name is None else lax.psum(number, axis_name)


def own_class_losses(
    rows: jax.Array, x: jax.Array, known: jax.Array, used: jax.Array, *, clip: Clip, num_classes: int
) -> jax.Array:
    """Per-sample losses from the rows already read: NaN for a used label without a class, 0 if unused."""
    dtype = _table.compute_dtype(x, rows)
    distance = squared_distance(x.astype(dtype), rows.astype(dtype), known, used)
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


def distance_map(params: Any, x: ArrayLike, *, precision: lax.PrecisionLike = "highest") -> jax.Array:
    """Squared distances between each feature vector and every center.

    The reference's `dist_map`: `|x|² + |c|² - 2 x·c`, one matrix product instead of a `(..., C, D)`
    difference. Here a point amid the centers is subtracted from both sides first, which changes no distance
    and keeps the digits that the expansion would cancel when features lie far from the origin.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      x: features `(..., D)`, floating point.
      precision: of the matrix product. Below `"highest"`, GPUs and TPUs round the factors to 8 to 11 bits.

    Returns:
      `(..., C)` squared distances, at least 0, in float32 (float64 if an operand has it). A center that
      is not finite makes its own column NaN and no other.

    Raises:
      ValueError: on a shape that does not fit.
      TypeError: on features or centers that are not floating point.

    Example:
      >>> import jax.numpy as jnp, jax_centerloss
      >>> centers = jnp.array([[0.0, 0.0], [3.0, 4.0]])
      >>> jax_centerloss.distance_map(centers, jnp.zeros(2)).tolist()
      [0.0, 25.0]
    """
    centers = _checks.table(params)
    x = _checks.features(x, centers)
    middle = _middle(centers, _table.compute_dtype(x, centers))
    x, centers = _less(x, middle), _less(centers, middle)
    cross = jnp.einsum("...d,cd->...c", x, centers, precision=precision)
    lead = (1,) * (x.ndim - 1)
    distances = (
        jnp.sum(x * x, -1, keepdims=True) + jnp.sum(centers * centers, -1).reshape(*lead, -1) - 2 * cross
    )
    # Rounding may leave a small negative; NaN stays.
    return jnp.where(distances < 0, jnp.zeros((), distances.dtype), distances)


def _middle(centers: jax.Array, dtype: DTypeLike) -> jax.Array:
    """A point `(D,)` amid the centers, by which both sides of a distance are shifted.

    Any shift is exact; this one keeps the digits where most centers are. The plain mean would not: one stray
    center drags it away. So it is a mean over some of the centers in which those farther from it than half
    of them weigh less, and those that are not finite nothing.
    """
    some = lax.stop_gradient(centers)[:: -(-centers.shape[0] // _SAMPLED_CLASSES)].astype(dtype)
    middle = jnp.zeros(centers.shape[1], dtype)
    for _ in range(5):
        difference = some - middle[None]
        away = jnp.sqrt(jnp.sum(difference * difference, axis=-1))
        away = jnp.where(jnp.isfinite(away), away, jnp.full((), jnp.inf, dtype))
        weights = 1 / jnp.maximum(jnp.maximum(away, jnp.median(away)), jnp.finfo(dtype).tiny)
        weighted = jnp.where(weights[:, None] > 0, weights[:, None] * some, jnp.zeros((), dtype))
        middle = jnp.sum(weighted, 0) / jnp.maximum(jnp.sum(weights), jnp.finfo(dtype).tiny)
    return middle


def _less(x: jax.Array, middle: jax.Array) -> jax.Array:
    return x.astype(middle.dtype) - middle.reshape((1,) * (x.ndim - 1) + middle.shape)


def nearest_center(params: Any, x: ArrayLike) -> jax.Array:
    """The class whose center is nearest, the lowest one at a tie.

    Classes are taken block by block: memory is a block of distances, at any number of classes.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      x: features `(..., D)`, floating point.

    Returns:
      int32 labels `(...)`; -1 where no distance is a number (a NaN or infinite feature).

    Raises:
      ValueError: on a shape that does not fit.
      TypeError: on features or centers that are not floating point.

    Example:
      >>> import jax.numpy as jnp, jax_centerloss
      >>> centers = jnp.array([[0.0, 0.0], [3.0, 4.0]])
      >>> jax_centerloss.nearest_center(centers, jnp.array([[1.0, 1.0], [3.0, 3.0]])).tolist()
      [0, 1]
    """
    centers = _checks.table(params)
    labels: jax.Array = _nearest(centers, _checks.features(x, centers))
    return labels


@jax.jit  # Else every call outside of jit would compile the loop anew.
def _nearest(centers: jax.Array, x: jax.Array) -> jax.Array:
    middle = _middle(centers, _table.compute_dtype(x, centers))
    x = _less(x, middle)
    num_classes = centers.shape[0]
    block = min(num_classes, _CLASS_BLOCK)

    def look(i: ArrayLike, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The last block slides back to fit, so it may look at some classes twice.
        start = jnp.minimum(jnp.asarray(i, jnp.int32) * block, num_classes - block)
        part = _less(lax.dynamic_slice_in_dim(centers, start, block), middle)
        cross = jnp.einsum("...d,cd->...c", x, part, precision="highest")
        # |x|² is the same for every class and only costs digits.
        score = jnp.sum(part * part, -1).reshape((1,) * (x.ndim - 1) + (-1,)) - 2 * cross
        score = jnp.where(jnp.isnan(score), jnp.full((), jnp.inf, score.dtype), score)
        index = jnp.argmin(score, axis=-1).astype(jnp.int32)
        value = jnp.min(score, axis=-1)
        return jnp.where(value < best[0], value, best[0]), jnp.where(value < best[0], index + start, best[1])

    none = jnp.full(x.shape[:-1], jnp.inf, x.dtype), jnp.full(x.shape[:-1], -1, jnp.int32)
    # The first block stands outside: inside shard_map it settles over which axes the result varies.
    _, labels = lax.fori_loop(1, -(-num_classes // block), look, look(0, none))
    return jnp.asarray(labels)
