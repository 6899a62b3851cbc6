"""Distances to all centers: pure functions of the centers and the features."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from jax_centerloss import _batch, _blocks, _checks
from jax_centerloss._rows import placement, table

_CLASS_BLOCK = 1024  # `nearest_center` scans at most this many classes at a time.
_SAMPLED_CLASSES = 32  # The origin of features and centers is one of at most this many centers.


def distance_map(params: Any, x: ArrayLike, *, precision: lax.PrecisionLike = "highest") -> jax.Array:
    """Squared distances between each feature vector and every center.

    They are computed as `|x|² + |c|² - 2 x·c`, as in KaiyangZhou/pytorch-center-loss: by a matrix product,
    without a `(..., C, D)` array. One of the centers, amid the others, is subtracted from features and
    centers first. That changes no distance, and reduces cancellation when all are far from 0.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      x: features `(..., D)`, floating point.
      precision: of the matrix product. With `"default"`, GPUs round its factors to TF32 and TPUs to bfloat16.

    Returns:
      `(..., C)` squared distances, at least 0, in float32 (float64 if an operand is). A center that is NaN or
      infinite makes its own column NaN and no other, and such a feature vector its own row. Such a center
      adds nothing to the gradients of other columns. Finite values whose squares overflow give infinity or
      NaN.

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
    return squared_distances_to(centers, x, precision=precision)


def _map_sharding(centers: jax.Array, x: jax.Array) -> NamedSharding | None:
    """The sharding of a distance map: its sample axes as in `x`, its class axis as in the centers.

    If both are sharded over the same mesh axis, the class axis keeps it, and the samples are resharded.
    """
    x_sharding = placement.sharding_of(x, centers)
    centers_sharding = placement.sharding_of(centers, x)
    if x_sharding is None or centers_sharding is None:
        return None
    classes = centers_sharding.spec[0]
    taken = placement.mesh_axes(classes)
    leading = [
        tuple(a for a in placement.mesh_axes(entry) if a not in taken) for entry in x_sharding.spec[:-1]
    ]
    return NamedSharding(x_sharding.mesh, P(*leading, classes))


@placement.jit_on_auto_axes(_map_sharding, static_argnames="precision")
def squared_distances_to(centers: jax.Array, x: jax.Array, *, precision: lax.PrecisionLike) -> jax.Array:
    """`distance_map` of checked arguments."""
    origin = _origin(centers, table.compute_dtype(x, centers))
    x, centers = _subtract(x, origin), _subtract(centers, origin)
    finite = _all_finite(centers)
    # A center that is not finite is 0 in the product, so that no gradient of another one is NaN. Its own
    # column becomes NaN below.
    centers = jnp.where(finite[:, None], centers, jnp.zeros((), x.dtype))
    cross = jnp.einsum("...d,cd->...c", x, centers, precision=precision)
    leading = (1,) * (x.ndim - 1)
    center_norms = jnp.sum(centers * centers, -1).reshape(*leading, -1)
    distances = jnp.sum(x * x, -1, keepdims=True) + center_norms - 2 * cross
    # Rounding can make a distance negative. NaN is not below 0, and stays.
    distances = jnp.where(distances < 0, jnp.zeros((), distances.dtype), distances)
    finite = _all_finite(x)[..., None] & finite.reshape(*leading, -1)
    return jnp.where(finite, distances, np.full((), np.nan, distances.dtype))


def _all_finite(vectors: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(vectors), axis=-1)


def _origin(centers: jax.Array, dtype: DTypeLike) -> jax.Array:
    """A center `(D,)` amid the others, which no stray center can drag away.

    Of up to 32 centers it is the one whose median distance to the others is the least. It is 0 if half of
    these centers or more are NaN or infinite.
    """
    sampled = lax.stop_gradient(table.evenly_spaced_rows(centers, _SAMPLED_CLASSES)[1]).astype(dtype)
    difference = sampled[:, None] - sampled[None]
    distance = jnp.sqrt(jnp.sum(difference * difference, axis=-1))
    distance = jnp.where(jnp.isfinite(distance), distance, jnp.full((), jnp.inf, dtype))
    spread = jnp.median(distance, axis=1)
    return jnp.where(jnp.isfinite(jnp.min(spread)), sampled[jnp.argmin(spread)], jnp.zeros((), dtype))


def _subtract(x: jax.Array, origin: jax.Array) -> jax.Array:
    # Ranks are written out: users may set `jax_numpy_rank_promotion` to "raise".
    return x.astype(origin.dtype) - origin.reshape((1,) * (x.ndim - 1) + origin.shape)


def nearest_center(params: Any, x: ArrayLike) -> jax.Array:
    """The class of the nearest center. A tie, up to rounding, goes to the lowest class.

    Classes are scanned in blocks, and samples too if they are many. Only one block of distances is in memory,
    whatever the number of classes and samples. Under `vmap` there is one for each mapped element: pass
    features `(..., D)` as they are instead.

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
    return _nearest(centers, _batch.as_features(x, centers))


@jax.jit  # Outside of `jit` an array on one device can't be resharded to a mesh.
def _nearest(centers: jax.Array, x: jax.Array) -> jax.Array:
    sharding = _map_sharding(centers, x)
    placed = x
    if sharding is not None:
        # If both are sharded over the same mesh axis, the samples are resharded here. XLA might otherwise
        # reshard the classes, in every block.
        placed = placement.reshard(x, NamedSharding(sharding.mesh, P(*sharding.spec[:-1], None)))
    return placement.reshard_like_samples(_nearest_in_blocks(centers, placed), x)


@placement.jit_on_auto_axes(lambda centers, x: placement.per_sample_sharding(x, centers))
def _nearest_in_blocks(centers: jax.Array, x: jax.Array) -> jax.Array:
    origin = _origin(centers, table.compute_dtype(x, centers))
    # A block takes the same number of classes from each stripe. Stripes are equal, contiguous blocks of
    # classes, each in one shard, so that each device scans only its own classes.
    stripes = _blocks.num_stripes(centers.shape[0], placement.mesh_of(centers))
    length = centers.shape[0] // stripes
    striped = centers.reshape(stripes, length, -1)
    block = min(length, max(1, _CLASS_BLOCK // stripes))
    offsets = jnp.arange(stripes, dtype=jnp.int32) * length

    def nearest_in_stripes(x: jax.Array) -> Any:
        """The least score in each stripe of classes, and its class, `(..., stripes)`."""
        x = _subtract(x, origin)
        leading = (1,) * (x.ndim - 1)

        def scan_block(i: ArrayLike, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            # The last block is moved back until it fits, and may scan some classes again.
            start = jnp.minimum(jnp.asarray(i, jnp.int32) * block, length - block)
            part = _subtract(lax.dynamic_slice_in_dim(striped, start, block, axis=1), origin)
            cross = jnp.einsum("...d,scd->...sc", x, part, precision="highest")
            # |x - c|² without |x|², which is the same for every class and would only add rounding errors.
            score = jnp.sum(part * part, -1).reshape(*leading, stripes, block) - 2 * cross
            score = jnp.where(jnp.isnan(score), jnp.full((), jnp.inf, score.dtype), score)
            index = jnp.argmin(score, -1).astype(jnp.int32) + (offsets + start).reshape(*leading, stripes)
            value = jnp.min(score, -1)
            return jnp.where(value < best[0], value, best[0]), jnp.where(value < best[0], index, best[1])

        shape = *x.shape[:-1], stripes
        initial = jnp.full(shape, jnp.inf, x.dtype), jnp.full(shape, -1, jnp.int32)
        # The first block is scanned before the loop: `shard_map` requires that a carry varies over the same
        # mesh axes before an iteration and after it.
        return lax.fori_loop(1, -(-length // block), scan_block, scan_block(0, initial))

    mesh = placement.mesh_of(centers, x)
    value, labels = _blocks.map_in_blocks(nearest_in_stripes, stripes * block, mesh, x)
    nearest = value == jnp.min(value, axis=-1, keepdims=True)
    label = jnp.min(jnp.where(nearest, labels, np.int32(centers.shape[0])), axis=-1)
    return jnp.where(_all_finite(x), label, np.int32(-1))
