"""The three rules: how a batch moves the center of each of its classes.

The "direction" of a class is the step of its center for a rate alpha of 1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_centerloss import _batch, _groups, _options, _placement, _reduce, _table
from jax_centerloss._batch import Batch
from jax_centerloss._options import AxisName

_BLOCK_ENTRIES = 2**17  # The sums of a block of slots have so many entries, which fit the cache of a CPU.


class Samples(NamedTuple):
    """A flat batch of N samples, replicated on the mesh, and its differences from the centers."""

    labels: jax.Array  # (N,)
    used: jax.Array  # (N,), False also for a label out of range and for a weight of 0.
    weighted_difference: jax.Array  # (N, D), x - c, times the weight of the sample.
    squared_distance: jax.Array  # (N,), |x - c|², not weighted.
    weights: jax.Array | None  # (N,)
    ready: jax.Array  # Always True, but computed from `after`, so that a write that uses it comes later.


def compare_with_centers(centers: jax.Array, batch: Batch, after: Any, axis_name: AxisName) -> Samples:
    """Computes the differences of a batch from the centers."""
    x, labels, used, weights = batch
    rows, in_range = _table.gather_label_rows(centers, labels, x)
    x = x.astype(rows.dtype)
    # Written as in the loss, so that XLA computes it once for both.
    difference, squared_distance = x - rows, _reduce.squared_distance(x, rows, in_range, used)
    used = used & in_range
    values: tuple[jax.Array, ...] = difference, squared_distance
    if weights is not None:
        used, weights = used & (weights != 0), weights.astype(rows.dtype)
        values = difference * weights[..., None], squared_distance, weights
    mesh = _placement.mesh_of(centers, x, labels)
    labels, used, weighted_difference, squared_distance, *rest = _batch.flatten_and_replicate(
        axis_name, mesh, labels, used, *values
    )
    weights = rest[0] if rest else None
    ready = _table.true_after(after, axis_name)
    return Samples(labels, used, weighted_difference, squared_distance, weights, ready)


class Directions(NamedTuple):
    """How the centers of a batch's classes move.

    The direction of class `classes[s]` is `scale[s]` times the sum of `weighted_difference` over its samples.
    Under `"gradient"` samples outside of the clip are left out of that sum. In slots without a class the sums
    of a GPU have no meaning.
    """

    classes: jax.Array  # (S,), distinct except for `NO_CLASS`, in slots that move no center.
    # (S,), NaN if a sample of the class has a distance or weight that is NaN or infinite. With the "gradient"
    # of a mean, one NaN weight makes all of them NaN, since it enters the denominator.
    scale: jax.Array
    feat_dim: int
    # `sum_slots(first, number)` returns the `(number, D)` sums of the slots `first` to `first + number - 1`.
    sum_slots: Callable[[ArrayLike, int], jax.Array]

    def all_slots(self) -> jax.Array:
        """The `(S, D)` directions of all slots."""
        return self.scale[:, None] * self.sum_slots(0, self.classes.shape[0])

    def block_size(self) -> int | None:
        """The number of slots in a block on a CPU. None if one block holds them all, or if S is symbolic."""
        num_slots, size = self.classes.shape[0], max(1, _BLOCK_ENTRIES // self.feat_dim)
        return size if isinstance(num_slots, int) and num_slots > size else None

    def blocks(self, size: int) -> tuple[int, Callable[[ArrayLike], tuple[jax.Array, jax.Array]]]:
        """The number of blocks of `size` slots, and a function `block(i) -> (classes, directions)`."""
        num_slots = self.classes.shape[0]
        num_blocks = -(-num_slots // size)
        padding = num_blocks * size - num_slots
        classes = jnp.pad(self.classes, (0, padding), constant_values=_groups.NO_CLASS)
        scale = jnp.pad(self.scale, (0, padding))

        def block(i: ArrayLike) -> tuple[jax.Array, jax.Array]:
            first = jnp.asarray(i, jnp.int32) * size
            own_classes, own_scale = (lax.dynamic_slice_in_dim(a, first, size) for a in (classes, scale))
            return own_classes, own_scale[:, None] * self.sum_slots(first, size)

        return num_blocks, block


def directions_of(
    samples: Samples,
    num_classes: int,
    *,
    platform: str,
    rule: str,
    clip: _options.Clip = _options.CLIP,
    summed: bool = False,
) -> Directions:
    """The directions under `rule`.

    The rule `"gradient"` takes the gradient of the mean of the losses, or with `summed` of their sum. A
    distance or weight that is NaN or infinite makes the count of its class NaN, and with it the center, even
    if the clamp of the loss would cap an infinite distance.
    """
    _, used, difference, distance, weights, ready = samples
    dtype = difference.dtype
    # In float32 counts are exact up to 2**24 samples of a class.
    weight = np.ones((), dtype) if weights is None else weights
    finite = jnp.isfinite(distance) & jnp.isfinite(weight)
    counted = jnp.where(finite, weight, np.full((), np.nan, dtype))
    within_clip = None
    if rule == "gradient" and clip is not None:  # Beyond the clamp, the gradient of the loss is zero.
        within_clip = (distance >= clip[0]) & (distance <= clip[1])
    sum_by_class = _sum_on_gpu if platform == "gpu" else partial(_sum_by_scattering, platform=platform)
    classes, counts, sum_slots = sum_by_class(samples, num_classes, counted, within_clip)
    denominator = jnp.ones((), dtype) if summed else _reduce.mean_denominator(used, weights, None, dtype)
    # `ready` enters the indices, so that the write of the centers waits for `after`.
    moves = (counts != 0) & ready
    classes = jnp.where(moves, classes, _groups.NO_CLASS)
    return Directions(classes, _scale(rule, counts, denominator), difference.shape[1], sum_slots)


def _scale(rule: str, counts: jax.Array, denominator: jax.Array) -> jax.Array:
    """The factor of `sum(x - c_j)` over the samples of class j.

    `counts` holds n_j, the number of used samples of class j, and `denominator` is N, the number of all used
    samples, or 1 for the gradient of a sum. With weights, both are sums of weights.
    """
    if rule == "paper":  # Eq. 4: c_j - alpha * sum(c_j - x) / (1 + n_j).
        return 1 / (1 + counts)
    if rule == "mean":  # c_j - alpha * sum(c_j - x) / n_j.
        return 1 / jnp.where(counts == 0, jnp.ones_like(counts), counts)
    return jnp.where(jnp.isnan(counts), counts, 2 / denominator)  # c_j - alpha * 2 * sum(c_j - x) / N.


_Sums = tuple[jax.Array, jax.Array, Callable[[ArrayLike, int], jax.Array]]


def _sum_by_scattering(
    samples: Samples, num_classes: int, counted: jax.Array, within_clip: jax.Array | None, *, platform: str
) -> _Sums:
    """Scatter-adds: the class of each slot, the sum of `counted` in it, and `Directions.sum_slots`."""
    slots = _groups.assign_slots_on(samples.labels, samples.used, num_classes, platform)
    slot_of_sample = slots.slot_of_sample
    if within_clip is not None:
        slot_of_sample = jnp.where(within_clip, slot_of_sample, _groups.NO_CLASS)

    def sum_slots(first: ArrayLike, number: int) -> jax.Array:
        return jax.ops.segment_sum(samples.weighted_difference, slot_of_sample - first, number)

    return slots.classes, slots.sum(counted), sum_slots


def _sum_on_gpu(
    samples: Samples, num_classes: int, counted: jax.Array, within_clip: jax.Array | None
) -> _Sums:
    """Sums without atomic adds: the class of each slot, its sum of `counted`, and `Directions.sum_slots`."""
    classes, sum_by_class = _groups.group_on_gpu(samples.labels, samples.used, num_classes)
    # The barrier keeps the differences in memory. Without it XLA would compute them again after the write to
    # the table, for which it would copy the old table.
    difference = lax.optimization_barrier(samples.weighted_difference)
    if within_clip is not None:
        difference = jnp.where(within_clip[:, None], difference, jnp.zeros((), difference.dtype))
    both = sum_by_class(jnp.concatenate([difference, counted[:, None]], axis=1))  # In one pass.
    sums, counts = both[:, :-1], both[:, -1]
    return classes, counts, partial(lax.dynamic_slice_in_dim, sums)
