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

_CLASS_BLOCK = 1024  # Classes in a block of `nearest_center`.
_SAMPLED_CLASSES = 256  # Classes, at most, from which the shift of both sides is computed.


def distance_map(params: Any, x: ArrayLike, *, precision: lax.PrecisionLike = "highest") -> jax.Array:
    """Squared distances between each feature vector and every center.

    This is `dist_map` of the PyTorch module: `|x|² + |c|² - 2 x·c`, which needs a matrix product and no
    `(..., C, D)` array. Features and centers are shifted by a point between the centers first. That changes
    no distance, and keeps the digits that cancel in the expansion when features are far from the origin.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      x: features `(..., D)`, floating point.
      precision: of the matrix product. With `"default"`, GPUs and TPUs round the factors to 8 to 11 bits.

    Returns:
      `(..., C)` squared distances, at least 0, in float32 (float64 if an operand is). A center that is NaN or
      infinite makes its own column NaN and no other, and such a feature vector its own row.

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

    Where both are sharded over one mesh axis, the class axis keeps it and the samples are resharded.
    """
    batch, table = _placement.sharding_of(x, centers), _placement.sharding_of(centers, x)
    if batch is None or table is None:
        return None
    classes = table.spec[0]
    taken = _placement.mesh_axes(classes)
    lead = [tuple(a for a in _placement.mesh_axes(entry) if a not in taken) for entry in batch.spec[:-1]]
    return NamedSharding(batch.mesh, P(*lead, classes))


@_placement.jit_on_auto_axes(_map_sharding, static_argnames="precision")
def distances_to(centers: jax.Array, x: jax.Array, *, precision: lax.PrecisionLike) -> jax.Array:
    """`distance_map` of checked arguments."""
    middle = _robust_mean(centers, _table.compute_dtype(x, centers))
    x, centers = _shift(x, middle), _shift(centers, middle)
    cross = jnp.einsum("...d,cd->...c", x, centers, precision=precision)
    lead = (1,) * (x.ndim - 1)
    distances = (
        jnp.sum(x * x, -1, keepdims=True) + jnp.sum(centers * centers, -1).reshape(*lead, -1) - 2 * cross
    )
    # Rounding can make a distance negative. NaN is not below 0, and stays.
    distances = jnp.where(distances < 0, jnp.zeros((), distances.dtype), distances)
    finite = _all_finite(x)[..., None] & _all_finite(centers).reshape(*lead, -1)
    return jnp.where(finite, distances, np.full((), np.nan, distances.dtype))


def safe_sqrt(squared: jax.Array) -> jax.Array:
    """The square root, with a derivative of 0 at 0, where it has none."""
    zero, one = np.zeros((), squared.dtype), np.ones((), squared.dtype)
    return jnp.where(squared == 0, zero, jnp.sqrt(jnp.where(squared == 0, one, squared)))


def _all_finite(vectors: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(vectors), axis=-1)


def _robust_mean(centers: jax.Array, dtype: DTypeLike) -> jax.Array:
    """A point `(D,)` between most of the centers, which one stray center does not drag away.

    It is a mean of up to 256 centers, with new weights in each of five rounds: 1 / distance from the last
    mean, at most 1 / (the median distance), and 0 for a center that is NaN or infinite.
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
    # Rounded to a multiple of a power of two that is about the median distance. It can then be subtracted
    # exactly from numbers of few digits, such as integers, and equal distances stay equal.
    step = jnp.ldexp(jnp.ones((), dtype), jnp.frexp(jnp.median(distance))[1])
    rounded = jnp.round(mean / step) * step
    return jnp.where(jnp.isfinite(rounded), rounded, mean)


def _shift(x: jax.Array, middle: jax.Array) -> jax.Array:
    return x.astype(middle.dtype) - middle.reshape((1,) * (x.ndim - 1) + middle.shape)


def nearest_center(params: Any, x: ArrayLike) -> jax.Array:
    """The class whose center is nearest, and the lowest of several at the same distance.

    Rounding may break a tie of distances. Classes are scanned in blocks, so that the memory is that of one
    block of distances, whatever the number of classes.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      x: features `(..., D)`, floating point.

    Returns:
      int32 labels `(...)`: -1 for a feature vector that is NaN or infinite, or if all centers are. A center
      that is NaN or infinite is never the nearest, and neither is one whose squared distance overflows
      float32.

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
        # If both are sharded over one mesh axis, the samples are resharded. XLA might choose to
        # reshard the classes, in every block.
        x = _placement.reshard(x, NamedSharding(sharding.mesh, P(*sharding.spec[:-1], None)))
    labels: jax.Array = _nearest_in_blocks(centers, x)
    return labels if label_sharding is None else _placement.reshard(labels, label_sharding)


@_placement.jit_on_auto_axes(lambda centers, x: _placement.per_sample_sharding(x, centers))
def _nearest_in_blocks(centers: jax.Array, x: jax.Array) -> jax.Array:
    middle, finite = _robust_mean(centers, _table.compute_dtype(x, centers)), _all_finite(x)
    x = _shift(x, middle)
    # A block takes equally many classes from every stripe. Each stripe is in one shard, so that each device
    # scans its own classes only.
    stripes = _placement.num_stripes(centers)
    length = centers.shape[0] // stripes
    striped = centers.reshape(stripes, length, -1)
    block = min(length, max(1, _CLASS_BLOCK // stripes))
    offsets = jnp.arange(stripes, dtype=jnp.int32) * length
    lead = (1,) * (x.ndim - 1)

    def scan_block(i: ArrayLike, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The last block is moved back until it fits, and may scan some classes again.
        start = jnp.minimum(jnp.asarray(i, jnp.int32) * block, length - block)
        part = _shift(lax.dynamic_slice_in_dim(striped, start, block, axis=1), middle)
        cross = jnp.einsum("...d,scd->...sc", x, part, precision="highest")
        # |x - c|² without |x|², which is the same for every class and would only cost digits.
        score = jnp.sum(part * part, -1).reshape(*lead, stripes, block) - 2 * cross
        score = jnp.where(jnp.isnan(score), jnp.full((), jnp.inf, score.dtype), score)
        index = jnp.argmin(score, axis=-1).astype(jnp.int32) + (offsets + start).reshape(*lead, stripes)
        value = jnp.min(score, axis=-1)
        return jnp.where(value < best[0], value, best[0]), jnp.where(value < best[0], index, best[1])

    shape = *x.shape[:-1], stripes
    worst = jnp.full(shape, jnp.inf, x.dtype), jnp.full(shape, -1, jnp.int32)
    # The first block is scanned before the loop: `shard_map` requires that what goes into a loop varies over
    # the same mesh axes as what comes out.
    value, labels = lax.fori_loop(1, -(-length // block), scan_block, scan_block(0, worst))
    nearest = value == jnp.min(value, axis=-1, keepdims=True)
    label = jnp.min(jnp.where(nearest, labels, np.int32(centers.shape[0])), axis=-1)
    return jnp.where(finite, label, np.int32(-1))
