"""Sums by class, and one slot for each class of a batch, in the way that is fast on each platform.

A CPU and a TPU scatter-add, one row after the other. On a GPU the samples of one class would contend for its
row with atomic adds, whose order, and with it the rounding, differs from run to run. There samples are sorted
by class and summed in parallel, or each of few classes reads all samples.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NO_CLASS = np.iinfo(np.int32).max  # For a slot without a class, and a sample without a slot.
_HASH_START, _HASH_STEP = 1640531527, 747796405  # Odd multipliers with irregular bits.
_MOST_COMPARED = 2048  # Samples up to which comparing all pairs is cheaper than sorting.
_BLOCK = 32  # Length of the blocks in which sorted samples are compared in pairs.
_NARROW = 32  # Numbers per sample up to which samples are made the last axis of a sum.
_FEW_CLASSES = 128  # Up to which each class reads all samples on a GPU, which is cheaper than sorting.


def call_for_platform(function: Callable[..., Any], *arrays: Any) -> Any:
    """`function(*arrays, platform=...)` with the platform that the program is compiled for."""
    return lax.platform_dependent(
        *arrays,
        cpu=partial(function, platform="cpu"),
        tpu=partial(function, platform="tpu"),
        default=partial(function, platform="gpu"),
    )


class Slots(NamedTuple):
    """Numbers for the classes of a batch, from 0 to S - 1, with S = min(N, C). No class has two slots."""

    classes: jax.Array  # (S,), the class of each slot, or `NO_CLASS`. If C <= N, the slots are the classes.
    of_samples: jax.Array  # (N,), the slot of each sample's class, or `NO_CLASS` if the sample is not used.

    def sum(self, values: jax.Array) -> jax.Array:
        """From `(N, ...)` values of samples to their `(S, ...)` sums by slot."""
        return jax.ops.segment_sum(values, self.of_samples, self.classes.shape[0])

    def num_samples(self) -> jax.Array:
        """The number of samples in each slot, `(S,)` int32."""
        return self.sum(jnp.ones(self.of_samples.shape, jnp.int32))


class GpuGroups(NamedTuple):
    """The classes of a batch and how to sum by class on a GPU."""

    classes: jax.Array  # (S,), none twice; some are `NO_CLASS`.
    # From the (N, K) values of samples to (S, K) sums, which are arbitrary where `classes` is `NO_CLASS`.
    sum: Callable[[jax.Array], jax.Array]


def group_on_gpu(labels: jax.Array, used: jax.Array, num_classes: int) -> GpuGroups:
    """Groups the used samples, whose labels are in `[0, num_classes)`, by class, without atomic adds.

    If C <= min(N, 128), `classes` are all C classes, and the sum of one without samples is 0. Otherwise there
    are N entries, of which the first sample of a class, in sorted order, holds the class and its sum.
    """
    if _known_at_most(num_classes, _FEW_CLASSES):
        slots = assign_slots_on(labels, used, num_classes, platform="gpu")
        return GpuGroups(slots.classes, partial(_sum_by_reading_all, slots=slots))
    sorted_labels, order = _sort_by_class(labels, used)
    is_first = jnp.concatenate(
        [jnp.ones_like(sorted_labels[:1], jnp.bool_), sorted_labels[1:] != sorted_labels[:-1]]
    )

    def sum_by_class(values: jax.Array) -> jax.Array:
        values = values.at[order].get(mode="promise_in_bounds", unique_indices=True)
        if not _known_at_most(order.size, _MOST_COMPARED):
            # XLA would fuse this gather into the sum, which then gathers each row again for every row of its
            # block. With few samples that is cheaper than one more kernel, so there is no barrier.
            values = lax.optimization_barrier(values)
        return _sum_runs(values, sorted_labels)

    return GpuGroups(jnp.where(is_first, sorted_labels, NO_CLASS), sum_by_class)


def _sort_by_class(labels: jax.Array, used: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sorted labels, with `NO_CLASS` at the end for unused samples, and the order that sorts them."""
    position = jnp.arange(labels.size, dtype=jnp.int32)
    unsorted = jnp.where(used, labels.astype(jnp.int32), NO_CLASS)
    sorted_labels, order = lax.sort((unsorted, position), num_keys=1)
    return sorted_labels, order


def _sum_by_reading_all(values: jax.Array, slots: Slots) -> jax.Array:
    """`slots.sum` of `(N, K)` values, in which each slot reads all of them."""
    slot = jnp.arange(slots.classes.shape[0], dtype=jnp.int32)
    return _masked_sum(slots.of_samples[None] == slot[:, None], values[None])


def _masked_sum(mask: jax.Array, values: jax.Array) -> jax.Array:
    """Sums `values (..., N, K)` over the samples N that `mask (..., N)` selects.

    Values are selected, not multiplied by 0 or 1, so that a NaN stays in its class.
    """
    zero = jnp.zeros((), values.dtype)
    if values.shape[-1] > _NARROW:
        return jnp.sum(jnp.where(mask[..., None], values, zero), axis=-2)
    # With few numbers per sample, XLA would write all terms to memory before it sums them, unless the samples
    # are the last axis.
    return jnp.sum(jnp.where(mask[..., None, :], jnp.swapaxes(values, -1, -2), zero), axis=-1)


def _sum_runs(values: jax.Array, sorted_labels: jax.Array) -> jax.Array:
    """The `(N, K)` sums of the `(N, K)` values of each run of equal labels, at the first sample of the run.

    Within a block all pairs of labels are compared. To the last run of a block the first runs of later blocks
    are added, if they have the same label.
    """
    num_samples, width = values.shape
    # All pairs of blocks are compared, too: with many samples there are fewer and larger blocks.
    size = _BLOCK if _known_at_most(num_samples, 2**16) else 4 * _BLOCK
    num_blocks = (num_samples + size - 1) // size
    padding = num_blocks * size - num_samples
    # In the comments M blocks have B samples each.
    labels = jnp.pad(sorted_labels, (0, padding), constant_values=NO_CLASS).reshape(
        num_blocks, size
    )  # (M, B)
    values = jnp.pad(values, ((0, padding), (0, 0))).reshape(num_blocks, 1, size, width)  # (M, 1, B, K)
    sums = _masked_sum(labels[:, :, None] == labels[:, None], values)  # (M, B, K)
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    is_later = block[None] > block[:, None]  # (M, M)
    continues = is_later & (
        labels[None, :, 0] == labels[:, -1, None]
    )  # (M, M), whether the last run of a block does.
    rest = _masked_sum(continues, sums[None, :, 0])  # (M, K), what later blocks add to the last run of each.
    in_last_run = (labels == labels[:, -1:])[..., None]  # (M, B, 1)
    sums = sums + jnp.where(in_last_run, rest[:, None], jnp.zeros((), sums.dtype))
    return sums.reshape(num_blocks * size, width)[:num_samples]


def assign_slots(labels: jax.Array, used: jax.Array, num_classes: int) -> Slots:
    """Gives each class of a flat batch a slot."""
    assign = partial(assign_slots_on, num_classes=num_classes)
    slots: Slots = call_for_platform(assign, labels, used)
    return slots


# Jitted, since outside of `jit` the loop in it would be compiled again in each call.
@partial(jax.jit, static_argnames=("num_classes", "platform"))
def assign_slots_on(labels: jax.Array, used: jax.Array, num_classes: int, platform: str) -> Slots:
    """`assign_slots`, as is fast on `platform`."""
    labels = labels.astype(jnp.int32)
    if _known_at_most(num_classes, labels.size):
        return Slots(jnp.arange(num_classes, dtype=jnp.int32), jnp.where(used, labels, NO_CLASS))
    # The slot of a class is the position of its last used sample.
    if platform == "cpu":
        # vmap runs it for one batch after the other: checkify does not support a batched while loop.
        last = jax.custom_batching.sequential_vmap(_last_of_class_by_hashing)(labels, used)
    elif _known_at_most(labels.size, _MOST_COMPARED):
        # A loop that depends on the data, as hashing has, makes a GPU wait for the host at each turn.
        last = _last_of_class_by_comparing(labels, used)
    else:
        last = _last_of_class_by_sorting(labels, used)
    of_samples = jnp.where(used, last, NO_CLASS).astype(jnp.int32)
    # The positions of a class's other samples are slots without a class. If they named the class too, a GPU
    # without atomics would lose all but one of the writes to its row.
    owns_slot = of_samples == jnp.arange(labels.size, dtype=jnp.int32)
    return Slots(jnp.where(owns_slot, labels, NO_CLASS), of_samples)


def _last_of_class_by_comparing(labels: jax.Array, used: jax.Array) -> jax.Array:
    """For each used sample the position of the last used sample of its class, by comparing all pairs."""
    same = (labels[None] == labels[:, None]) & used[None]
    position = jnp.arange(labels.size, dtype=jnp.int32)
    return jnp.max(jnp.where(same, position[None], -1), axis=1, initial=-1)


def _last_of_class_by_sorting(labels: jax.Array, used: jax.Array) -> jax.Array:
    """The same, by sorting."""
    sorted_labels, order = _sort_by_class(labels, used)
    is_last = jnp.concatenate(
        [sorted_labels[1:] != sorted_labels[:-1], jnp.ones_like(sorted_labels[:1], jnp.bool_)]
    )
    position = jnp.arange(labels.size, dtype=jnp.int32)
    # A sample's run ends at the first last sample at or after it. The sort is stable, so that the last sample
    # of a run is also the last one of its class in the batch.
    end = lax.cummin(jnp.where(is_last, position, NO_CLASS), reverse=True)
    last = order.at[end].get(mode="promise_in_bounds")
    return lax.sort((order, last), num_keys=1)[1]


def _last_of_class_by_hashing(labels: jax.Array, used: jax.Array) -> jax.Array:
    """The same, by a hash table of some N places: it needs no sort, and no array of C entries.

    Samples write their position to the place of their label, and the last one wins. A sample that finds the
    position of another class there tries again, at the place of another hash.
    """
    size = labels.size + 1 + labels.size % 2  # Odd, so that every bit of a label changes the remainder.
    position = jnp.arange(labels.size, dtype=jnp.int32)

    def probe(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        last, factor = state
        waiting = last < 0
        # The product overflows on purpose, which mixes the bits.
        place = ((labels * factor).astype(jnp.uint32) % jnp.asarray(size, jnp.uint32)).astype(jnp.int32)
        # The maximum makes the winner the same in every run.
        table = jnp.zeros(size, jnp.int32).at[jnp.where(waiting, place, size)].max(position, mode="drop")
        winner = table.at[jnp.where(waiting, place, 0)].get(mode="promise_in_bounds")
        found = waiting & (labels.at[winner].get(mode="promise_in_bounds") == labels)
        return jnp.where(found, winner, last), factor * jnp.int32(_HASH_STEP)

    start = jnp.where(used, -1, position), jnp.int32(_HASH_START)
    return lax.while_loop(lambda state: jnp.any(state[0] < 0), probe, start)[0]


def _known_at_most(size: Any, limit: Any) -> bool:
    """Whether `size <= limit` is known. In an exported program a size may be symbolic."""
    return isinstance(size, int) and isinstance(limit, int) and size <= limit
