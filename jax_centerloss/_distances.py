"""Distances to all centers: pure functions of the centers and the features."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from jax_centerloss import _batch, _checks, _placement, _table

_CLASS_BLOCK = 1024  # `nearest_center` scans at most this many classes at a time.
_SAMPLED_CLASSES = 256  # The origin of features and centers is computed from at most this many centers.


def distance_map(params: Any, x: ArrayLike, *, precision: lax.PrecisionLike = "highest") -> jax.Array:
    """Squared distances between each feature vector and every center.

    They are computed as `|x|² + |c|² - 2 x·c`, as in KaiyangZhou/pytorch-center-loss, which needs a matrix
    product and no `(..., C, D)` array. A point between the centers is subtracted from features and
    centers first. That changes no distance, and reduces cancellation when all are far from 0.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      x: features `(..., D)`, floating point.
      precision: of the matrix product. With `"default"`, GPUs round its factors to TF32 and TPUs to bfloat16.

    Returns:
      `(..., C)` squared distances, at least 0, in float32 (float64 if an operand is). A center that is NaN or
      infinite makes its own column NaN and no other, and such a feature vector its own row. Finite values
      whose squares overflow give infinity or NaN.

    Raises:
      ValueError: on a shape that does not fit.
      TypeError: on features or centers that are not floating point.

    Example:
      >>> import jax.numpy as jnp, jax_centerloss
      >>> centers = jnp.array([[0.0, 0.0], [3.0, 4.0]])
      >>> jax_centerloss.distance_map(centers, jnp.zeros(2)).tolist()
      [0.0, 25.0]
    """
    centers = _checks.as_table(params)
    x = _batch.as_features(x, centers)
    distances: jax.Array = distances_to(centers, x, precision=precision)
    return distances


def _map_sharding(centers: jax.Array, x: jax.Array) -> NamedSharding | None:
    """The sharding of a distance map: its sample axes as in `x`, its class axis as in the centers.

    If both are sharded over the same mesh axis, the class axis keeps it, and the samples are resharded.
    """
    batch, table = _placement.sharding_of(x, centers), _placement.sharding_of(centers, x)
    if batch is None or table is None:
        return None
    classes = table.spec[0]
    taken = _placement.mesh_axes(classes)
    leading = [tuple(a for a in _placement.mesh_axes(entry) if a not in taken) for entry in batch.spec[:-1]]
    return NamedSharding(batch.mesh, P(*leading, classes))


@_placement.jit_on_auto_axes(_map_sharding, static_argnames="precision")
def distances_to(centers: jax.Array, x: jax.Array, *, precision: lax.PrecisionLike) -> jax.Array:
    """`distance_map` of checked arguments."""
    origin = _robust_mean(centers, _table.compute_dtype(x, centers))
    x, centers = _subtract(x, origin), _subtract(centers, origin)
    cross = jnp.einsum("...d,cd->...c", x, centers, precision=precision)
    leading = (1,) * (x.ndim - 1)
    distances = (
        jnp.sum(x * x, -1, keepdims=True) + jnp.sum(centers * centers, -1).reshape(*leading, -1) - 2 * cross
    )
    # Rounding can make a distance negative. NaN is not below 0, and stays.
    distances = jnp.where(distances < 0, jnp.zeros((), distances.dtype), distances)
    finite = _all_finite(x)[..., None] & _all_finite(centers).reshape(*leading, -1)
    return jnp.where(finite, distances, np.full((), np.nan, distances.dtype))


def safe_sqrt(squared: jax.Array) -> jax.Array:
    """The square root, with a derivative of 0 instead of infinity at 0."""
    zero, one = np.zeros((), squared.dtype), np.ones((), squared.dtype)
    return jnp.where(squared == 0, zero, jnp.sqrt(jnp.where(squared == 0, one, squared)))


def _all_finite(vectors: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(vectors), axis=-1)


def _robust_mean(centers: jax.Array, dtype: DTypeLike) -> jax.Array:
    """A point `(D,)` between most of the centers, which one stray center does not drag away.

    It is the result of five Weiszfeld iterations on up to 256 centers: a mean with the weights 1 / distance
    from the last mean, but at most 1 / median distance, and 0 for a center that is NaN or infinite. It is 0
    if half of these centers or more are NaN or infinite.
    """
    sampled = lax.stop_gradient(_table.evenly_spaced_rows(centers, _SAMPLED_CLASSES)[1]).astype(dtype)
    mean = jnp.zeros(centers.shape[1], dtype)
    for _ in range(5):
        difference = sampled - mean[None]
        distance = jnp.sqrt(jnp.sum(difference * difference, axis=-1))
        distance = jnp.where(jnp.isfinite(distance), distance, jnp.full((), jnp.inf, dtype))
        weights = 1 / jnp.maximum(jnp.maximum(distance, jnp.median(distance)), jnp.finfo(dtype).tiny)
        weighted = jnp.where(weights[:, None] > 0, weights[:, None] * sampled, jnp.zeros((), dtype))
        mean = jnp.sum(weighted, 0) / jnp.maximum(jnp.sum(weights), jnp.finfo(dtype).tiny)
    # The mean is rounded to a multiple of a power of two, about the median distance. Subtracting it from
    # numbers of few digits, such as integers, is then exact, and equal distances stay equal.
    unit = jnp.ldexp(jnp.ones((), dtype), jnp.frexp(jnp.median(distance))[1])
    rounded = jnp.round(mean / unit) * unit
    return jnp.where(jnp.isfinite(rounded), rounded, mean)


def _subtract(x: jax.Array, origin: jax.Array) -> jax.Array:
    return x.astype(origin.dtype) - origin.reshape((1,) * (x.ndim - 1) + origin.shape)


def nearest_center(params: Any, x: ArrayLike) -> jax.Array:
    """The class of the nearest center. A tie, up to rounding, goes to the lowest class.

    Classes are scanned in blocks. Only one block of distances is in memory, whatever the number of classes.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      x: features `(..., D)`, floating point.

    Returns:
      int32 labels `(...)`: -1 for a feature vector that is NaN or infinite, or if all centers are. A center
      that is NaN or infinite is never the nearest, and neither is one so far from the other centers that the
      square of that distance overflows float32 (float64 if an operand is). For a feature vector whose
      products with centers overflow, the label may be wrong.

    Raises:
      ValueError: on a shape that does not fit.
      TypeError: on features or centers that are not floating point.

    Example:
      >>> import jax.numpy as jnp, jax_centerloss
      >>> centers = jnp.array([[0.0, 0.0], [3.0, 4.0]])
      >>> jax_centerloss.nearest_center(centers, jnp.array([[1.0, 1.0], [3.0, 3.0]])).tolist()
      [0, 1]
    """
    centers = _checks.as_table(params)
    labels: jax.Array = _nearest(centers, _batch.as_features(x, centers))
    return labels


@jax.jit
def _nearest(centers: jax.Array, x: jax.Array) -> jax.Array:
    sharding, label_sharding = _map_sharding(centers, x), _placement.per_sample_sharding(x, centers)
    if sharding is not None:
        # If both are sharded over the same mesh axis, the samples are resharded here. XLA might otherwise
        # reshard the classes, in every block.
        x = _placement.reshard(x, NamedSharding(sharding.mesh, P(*sharding.spec[:-1], None)))
    labels: jax.Array = _nearest_in_blocks(centers, x)
    return labels if label_sharding is None else _placement.reshard(labels, label_sharding)


@_placement.jit_on_auto_axes(lambda centers, x: _placement.per_sample_sharding(x, centers))
def _nearest_in_blocks(centers: jax.Array, x: jax.Array) -> jax.Array:
    origin, finite = _robust_mean(centers, _table.compute_dtype(x, centers)), _all_finite(x)
    x = _subtract(x, origin)
    # A block takes the same number of classes from each stripe. A stripe is a block of classes in one shard
    # (see `num_stripes`), so that each device scans only its own classes.
    stripes = _placement.num_stripes(centers)
    length = centers.shape[0] // stripes
    striped = centers.reshape(stripes, length, -1)
    block = min(length, max(1, _CLASS_BLOCK // stripes))
    offsets = jnp.arange(stripes, dtype=jnp.int32) * length
    leading = (1,) * (x.ndim - 1)

    def scan_block(i: ArrayLike, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The last block is moved back until it fits, and may scan some classes again.
        start = jnp.minimum(jnp.asarray(i, jnp.int32) * block, length - block)
        part = _subtract(lax.dynamic_slice_in_dim(striped, start, block, axis=1), origin)
        cross = jnp.einsum("...d,scd->...sc", x, part, precision="highest")
        # |x - c|² without |x|², which is the same for every class and would only add rounding errors.
        score = jnp.sum(part * part, -1).reshape(*leading, stripes, block) - 2 * cross
        score = jnp.where(jnp.isnan(score), jnp.full((), jnp.inf, score.dtype), score)
        index = jnp.argmin(score, axis=-1).astype(jnp.int32) + (offsets + start).reshape(*leading, stripes)
        value = jnp.min(score, axis=-1)
        return jnp.where(value < best[0], value, best[0]), jnp.where(value < best[0], index, best[1])

    shape = *x.shape[:-1], stripes
    initial = jnp.full(shape, jnp.inf, x.dtype), jnp.full(shape, -1, jnp.int32)
    # The first block is scanned before the loop for the reason given in `_update._add_in_blocks`.
    value, labels = lax.fori_loop(1, -(-length // block), scan_block, scan_block(0, initial))
    nearest = value == jnp.min(value, axis=-1, keepdims=True)
    label = jnp.min(jnp.where(nearest, labels, np.int32(centers.shape[0])), axis=-1)
    return jnp.where(finite, label, np.int32(-1))
