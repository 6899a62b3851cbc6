"""The three rules: how a batch moves the center of each of its classes, for a rate alpha of 1."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_centerloss import _groups, _loss, _options, _placement, _table
from jax_centerloss._batch import Batch
from jax_centerloss._table import AxisName

_BLOCK_NUMBERS = 2**17  # In a block of sums on a CPU, which then stays in its cache.


class Samples(NamedTuple):
    """A flat batch, as `flatten_and_replicate` returns it, compared with the centers."""

    labels: jax.Array  # (N,)
    used: jax.Array  # (N,), False also for a label out of range and for a weight of 0.
    weighted_difference: jax.Array  # (N, D), x - c, times the weight of the sample.
    squared_distance: jax.Array  # (N,), |x - c|², not weighted.
    weights: jax.Array | None  # (N,)
    after: jax.Array  # The constant True, computed from everything that has to be read before the write.


def compare_with_centers(centers: jax.Array, batch: Batch, after: Any, axis_name: AxisName) -> Samples:
    """Computes the differences of a batch from the centers."""
    x, labels, used, weights = batch
    rows, in_range = _table.gather_own_rows(centers, labels, x)
    x = x.astype(rows.dtype)
    # Written as in the loss, so that XLA computes it once for both.
    difference, squared_distance = x - rows, _loss.squared_distance(x, rows, in_range, used)
    used = used & in_range
    values: tuple[jax.Array, ...] = difference, squared_distance
    if weights is not None:
        used, weights = used & (weights != 0), weights.astype(rows.dtype)
        values = difference * weights[..., None], squared_distance, weights
    mesh = _placement.mesh_of(centers, x, labels)
    labels, used, weighted_difference, squared_distance, *rest = _table.flatten_and_replicate(
        axis_name, mesh, labels, used, *values
    )
    weights = rest[0] if rest else None
    done = _table.true_after(after, axis_name)
    return Samples(labels, used, weighted_difference, squared_distance, weights, done)


class Directions(NamedTuple):
    """The direction of class `classes[s]` is `scale[s]` times the sum of the differences of its samples."""

    classes: jax.Array  # (S,), no class twice; `num_classes`, or higher, in slots that move no center.
    # (S,), NaN if a sample of the class has a distance or weight that is NaN or infinite. Under "gradient" of
    # a mean, one NaN weight makes all of them NaN.
    scale: jax.Array
    values: jax.Array  # (N, D) weighted differences, or on a GPU (S, D) sums of them.
    slots: Any  # (N,), of each sample, out of range if it is not summed; on a GPU None.

    def sums(self) -> jax.Array:
        """The sum of the differences in each slot."""
        return self.values if self.slots is None else self._sums_from(0, self.classes.shape[0])

    def _sums_from(self, first: ArrayLike, number: int) -> jax.Array:
        return jax.ops.segment_sum(self.values, self.slots - first, number)

    def block_size(self) -> int | None:
        """The number of slots in a block on a CPU, or None if one block would hold them all."""
        number, size = self.classes.shape[0], max(1, _BLOCK_NUMBERS // self.values.shape[1])
        return size if isinstance(number, int) and number > size else None

    def blocks(self, size: int) -> tuple[int, Callable[[ArrayLike], tuple[jax.Array, jax.Array]]]:
        """The number of blocks of `size` slots, and a function `block(i) -> (classes, directions)`."""
        number = -(-self.classes.shape[0] // size)
        padding = number * size - self.classes.shape[0]
        classes = jnp.pad(self.classes, (0, padding), constant_values=_groups.NO_CLASS)
        scale = jnp.pad(self.scale, (0, padding))

        def block(i: ArrayLike) -> tuple[jax.Array, jax.Array]:
            start = jnp.asarray(i, jnp.int32) * size
            own_classes, own_scale = (lax.dynamic_slice_in_dim(a, start, size) for a in (classes, scale))
            return own_classes, own_scale[:, None] * self._sums_from(start, size)

        return number, block


def directions_of(
    samples: Samples,
    num_classes: int,
    *,
    platform: str,
    rule: str,
    clip: _options.Clip = _options.CLIP,
    summed: bool = False,
) -> Directions:
    """The directions under `rule`; with `summed`, `"gradient"` is that of the sum of the losses.

    A sample whose distance or weight is NaN or infinite makes the count of its class NaN, and so the center,
    also where the clamp of the loss would hide an infinite distance.
    """
    labels, used, values, distance, weights, after = samples
    dtype = values.dtype
    groups = _groups.group_by_class(labels, used, num_classes, platform)
    # In float32 counts are exact up to 2**24 samples of a class.
    weight = np.ones((), dtype) if weights is None else weights
    finite = jnp.isfinite(distance) & jnp.isfinite(weight)
    counted = jnp.where(finite, weight, np.full((), np.nan, dtype))
    within_clip = None
    if rule == "gradient" and clip is not None:  # Beyond the clamp, the gradient of the loss is zero.
        within_clip = (distance >= clip[0]) & (distance <= clip[1])
    slots = None
    if platform == "gpu":
        # The barrier keeps the differences in memory. Without it XLA computes them again after the write to
        # the table, from a copy of the old table.
        values = lax.optimization_barrier(values)
        if within_clip is not None:
            values = jnp.where(within_clip[:, None], values, jnp.zeros((), dtype))
        sums = groups.sum(jnp.concatenate([values, counted[:, None]], axis=1))  # Both in one pass.
        values, counts = sums[:, :-1], sums[:, -1]
    else:
        counts = groups.sum(counted)
        slots = groups.slots
        if within_clip is not None:
            slots = jnp.where(within_clip, slots, _groups.NO_CLASS)
    number = jnp.ones((), dtype) if summed else _loss.mean_denominator(used, weights, None, dtype)
    scale = _scale(rule, counts, number)
    # `after` is True. As a part of the indices it makes the write wait for everything that `after` reads.
    moves = (counts != 0) & after
    return Directions(jnp.where(moves, groups.classes, num_classes), scale, values, slots)


def _scale(rule: str, counts: jax.Array, number: jax.Array) -> jax.Array:
    """The factor of `sum(x - c_j)` over the samples of class j.

    `counts` holds n_j, the number of the samples of class j, and `number` is N, the number of all samples.
    """
    if rule == "paper":  # Eq. 4: c_j - alpha * sum(c_j - x) / (1 + n_j).
        return 1 / (1 + counts)
    if rule == "mean":  # c_j - alpha * sum(c_j - x) / n_j.
        return 1 / jnp.where(counts == 0, jnp.ones_like(counts), counts)
    return jnp.where(jnp.isnan(counts), counts, 2 / number)  # c_j - alpha * 2 * sum(c_j - x) / N.
