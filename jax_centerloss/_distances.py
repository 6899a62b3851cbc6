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

_CLASS_BLOCK = 1024  # Classes that nearest_center looks at in one go.
_SAMPLED_CLASSES = 256  # Classes from which the shift of a distance map is taken, at most.


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
      `(..., C)` squared distances, at least 0, in float32 (float64 if an operand has it). A center that is
      NaN or infinite makes its own column NaN and no other, and such a feature vector its own row.

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
    x = _batch.features(x, centers)
    distances: jax.Array = distances_to(centers, x, precision=precision)
    return distances


def _placed(centers: jax.Array, x: jax.Array) -> NamedSharding | None:
    """Of a distance map: over samples as `x` and over classes as the centers, which come first.

    What lies over the same axis of the mesh can't both stay; it is the samples that travel.
    """
    batch, table = _placement.sharding_of(x, centers), _placement.sharding_of(centers, x)
    if batch is None or table is None:
        return None
    classes = table.spec[0]
    taken = _placement.axes_of(classes)
    lead = [tuple(a for a in _placement.axes_of(entry) if a not in taken) for entry in batch.spec[:-1]]
    return NamedSharding(batch.mesh, P(*lead, classes))


@_placement.any_mesh(_placed, static_argnames="precision")
def distances_to(centers: jax.Array, x: jax.Array, *, precision: lax.PrecisionLike) -> jax.Array:
    middle = _middle(centers, _table.compute_dtype(x, centers))
    x, centers = _less(x, middle), _less(centers, middle)
    cross = jnp.einsum("...d,cd->...c", x, centers, precision=precision)
    lead = (1,) * (x.ndim - 1)
    distances = (
        jnp.sum(x * x, -1, keepdims=True) + jnp.sum(centers * centers, -1).reshape(*lead, -1) - 2 * cross
    )
    # Rounding may leave a small negative; NaN stays.
    distances = jnp.where(distances < 0, jnp.zeros((), distances.dtype), distances)
    finite = _finite(x)[..., None] & _finite(centers).reshape(*lead, -1)
    return jnp.where(finite, distances, np.full((), np.nan, distances.dtype))


def root(squared: jax.Array) -> jax.Array:
    """The distance, by its square; its derivative at 0, where it has none, is 0 and not NaN."""
    zero, one = np.zeros((), squared.dtype), np.ones((), squared.dtype)
    return jnp.where(squared == 0, zero, jnp.sqrt(jnp.where(squared == 0, one, squared)))


def _finite(vectors: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(vectors), axis=-1)


def _middle(centers: jax.Array, dtype: DTypeLike) -> jax.Array:
    """A point `(D,)` amid the centers, by which both sides of a distance are shifted.

    Any shift is exact; this one keeps the digits where most centers are. The plain mean would not: one stray
    center drags it away. So it is a mean over some of the centers in which those farther from it than half
    of them weigh less, and those that are not finite nothing.
    """
    some = lax.stop_gradient(_table.sample(centers, _SAMPLED_CLASSES)[1]).astype(dtype)
    middle = jnp.zeros(centers.shape[1], dtype)
    for _ in range(5):
        difference = some - middle[None]
        away = jnp.sqrt(jnp.sum(difference * difference, axis=-1))
        away = jnp.where(jnp.isfinite(away), away, jnp.full((), jnp.inf, dtype))
        weights = 1 / jnp.maximum(jnp.maximum(away, jnp.median(away)), jnp.finfo(dtype).tiny)
        weighted = jnp.where(weights[:, None] > 0, weights[:, None] * some, jnp.zeros((), dtype))
        middle = jnp.sum(weighted, 0) / jnp.maximum(jnp.sum(weights), jnp.finfo(dtype).tiny)
    # On a grid of a power of two, as wide as the centers are apart: numbers of few digits, whole ones say,
    # then keep them, and distances that are the same stay the same.
    step = jnp.ldexp(jnp.ones((), dtype), jnp.frexp(jnp.median(away))[1])
    rounded = jnp.round(middle / step) * step
    return jnp.where(jnp.isfinite(rounded), rounded, middle)


def _less(x: jax.Array, middle: jax.Array) -> jax.Array:
    return x.astype(middle.dtype) - middle.reshape((1,) * (x.ndim - 1) + middle.shape)


def nearest_center(params: Any, x: ArrayLike) -> jax.Array:
    """The class whose center is nearest, the lowest one where distances are the same.

    Distances are rounded, and so a tie of numbers with many digits may go to either class. Classes are taken
    block by block: memory is a block of distances, at any number of classes.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      x: features `(..., D)`, floating point.

    Returns:
      int32 labels `(...)`; -1 of a feature vector that is NaN or infinite, and where every center is. A
      center that is NaN or infinite is never the nearest.

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
    labels: jax.Array = _nearest(centers, _batch.features(x, centers))
    return labels


@jax.jit
def _nearest(centers: jax.Array, x: jax.Array) -> jax.Array:
    placed, back = _placed(centers, x), _placement.samples_of(x, centers)
    if placed is not None:
        # Samples give way to classes over the same axis: XLA might move the classes, block by block.
        x = _placement.reshard(x, NamedSharding(placed.mesh, P(*placed.spec[:-1], None)))
    labels: jax.Array = _nearest_by_blocks(centers, x)
    return labels if back is None else _placement.reshard(labels, back)


@_placement.any_mesh(lambda centers, x: _placement.samples_of(x, centers))
def _nearest_by_blocks(centers: jax.Array, x: jax.Array) -> jax.Array:
    middle, finite = _middle(centers, _table.compute_dtype(x, centers)), _finite(x)
    x = _less(x, middle)
    # A shard is one stripe or several, so that each device looks at its own classes only.
    stripes = _placement.stripes(centers)
    length = centers.shape[0] // stripes
    striped = centers.reshape(stripes, length, -1)
    block = min(length, max(1, _CLASS_BLOCK // stripes))
    first = jnp.arange(stripes, dtype=jnp.int32) * length
    lead = (1,) * (x.ndim - 1)

    def look(i: ArrayLike, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The last block slides back to fit, so it may look at some classes twice.
        start = jnp.minimum(jnp.asarray(i, jnp.int32) * block, length - block)
        part = _less(lax.dynamic_slice_in_dim(striped, start, block, axis=1), middle)
        cross = jnp.einsum("...d,scd->...sc", x, part, precision="highest")
        # |x|² is the same for every class and only costs digits.
        score = jnp.sum(part * part, -1).reshape(*lead, stripes, block) - 2 * cross
        score = jnp.where(jnp.isnan(score), jnp.full((), jnp.inf, score.dtype), score)
        index = jnp.argmin(score, axis=-1).astype(jnp.int32) + (first + start).reshape(*lead, stripes)
        value = jnp.min(score, axis=-1)
        return jnp.where(value < best[0], value, best[0]), jnp.where(value < best[0], index, best[1])

    shape = *x.shape[:-1], stripes
    none = jnp.full(shape, jnp.inf, x.dtype), jnp.full(shape, -1, jnp.int32)
    # The first block stands outside: inside shard_map it settles over which axes the result varies.
    value, labels = lax.fori_loop(1, -(-length // block), look, look(0, none))
    nearest = value == jnp.min(value, axis=-1, keepdims=True)
    label = jnp.min(jnp.where(nearest, labels, np.int32(centers.shape[0])), axis=-1)
    return jnp.where(finite, label, np.int32(-1))
