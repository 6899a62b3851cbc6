"""Distances to all centers: pure functions of the centers and the features."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jax_centerloss import _checks, _table

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
