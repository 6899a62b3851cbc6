"""Sums by class, and one slot for each class of a batch, in the way that is fast on each platform.

A "slot" is the index of a class of the batch, in arrays with entries for these classes only.

On CPU and TPU a scatter-add is used, which adds one row after the other. On a GPU the samples of one class
would contend for its row with atomic adds, whose order, and with it the rounding, differs from run to run.
There samples are sorted by class and summed in parallel, or each of few classes sums all samples, masked.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_centerloss import _placement

SumByClass = Callable[[jax.Array], jax.Array]

# The class of a slot without a class, and the slot of a sample that is not used. No array has such an index.
NO_CLASS = np.iinfo(np.int32).max
_HASH_START, _HASH_STEP = 1640531527, 747796405  # Odd constants of a multiplicative hash.
_ALL_PAIRS_LIMIT = 2048  # Up to this many samples all pairs are compared; more are sorted.
_BLOCK = 32  # Sorted samples are compared in pairs within blocks of this length.
_NARROW = 32  # Up to this many columns, values are transposed to sum over the last axis.
_FEW_CLASSES = 128  # Up to this many classes, a GPU does not sort: each class reads all samples.


class Slots(NamedTuple):
    """One slot for each class of a batch of N samples, among S slots, of which some may have no class.

    If C <= N is known, S = C and each class is its own slot. Otherwise S = N and the slot of a class is the
    position of its last used sample.
    """

    classes: jax.Array  # (S,), the class of each slot, or `NO_CLASS`.
    slot_of_sample: jax.Array  # (N,), the slot of the sample's class, or `NO_CLASS` if it is not used.

    def sum(self, values: jax.Array) -> jax.Array:
        """Sums the `(N, ...)` values of samples by slot, and returns the `(S, ...)` sums."""
        return jax.ops.segment_sum(values, self.slot_of_sample, self.classes.shape[0])

    def num_samples(self) -> jax.Array:
        """The number of samples in each slot, `(S,)` int32."""
        return self.sum(jnp.ones(self.slot_of_sample.shape, jnp.int32))


def group_on_gpu(labels: jax.Array, used: jax.Array, num_classes: int) -> tuple[jax.Array, SumByClass]:
    """The classes `(S,)` of N samples, and a function that sums by class without atomic adds.

    It maps `(N, K)` values to `(S, K)` sums. The labels of used samples are in `[0, num_classes)`. `classes`
    are distinct except for `NO_CLASS`, where the sums have no meaning.

    If C <= 128 and C <= N are known, S = C, and the sum of a class without samples is 0. Otherwise S = N: a
    class and its sum stand at the position of its last used sample if C <= 128 is known, and else at the
    index, in the sorted batch, at which the run of the class begins.
    """
    if _known_at_most(num_classes, _FEW_CLASSES):
        slots = assign_slots_on(labels, used, num_classes, platform="gpu")
        return slots.classes, partial(_sum_by_masking, slots=slots)
    sorted_labels, order = _sort_by_class(labels, used)
    is_first, _ = _run_bounds(sorted_labels)

    def sum_by_class(values: jax.Array) -> jax.Array:
        values = values.at[order].get(mode="promise_in_bounds", unique_indices=True)
        if not _known_at_most(order.size, _ALL_PAIRS_LIMIT):
            # Without the barrier XLA fuses this gather into the sum, and repeats it for every row of a block.
            # With few samples that is still cheaper than one more kernel.
            values = lax.optimization_barrier(values)
        return _sum_runs(values, sorted_labels)

    return jnp.where(is_first, sorted_labels, NO_CLASS), sum_by_class


def _sort_by_class(labels: jax.Array, used: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sorted labels, with `NO_CLASS` at the end for unused samples, and the order that sorts them."""
    position = jnp.arange(labels.size, dtype=jnp.int32)
    unsorted = jnp.where(used, labels.astype(jnp.int32), NO_CLASS)
    sorted_labels, order = lax.sort((unsorted, position), num_keys=1)
    return sorted_labels, order


def _run_bounds(sorted_labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether a label is the first one of its run of equal labels, and whether it is the last one."""
    changes, at_end = sorted_labels[1:] != sorted_labels[:-1], jnp.ones_like(sorted_labels[:1], jnp.bool_)
    return jnp.concatenate([at_end, changes]), jnp.concatenate([changes, at_end])


def _sum_by_masking(values: jax.Array, slots: Slots) -> jax.Array:
    """`slots.sum` of `(N, K)` values without atomic adds: each slot sums a masked copy of all values."""
    slot = jnp.arange(slots.classes.shape[0], dtype=jnp.int32)
    return _masked_sum(slots.slot_of_sample[None] == slot[:, None], values[None])


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
    """Sums the `(N, K)` values of each run of equal labels.

    Of the `(N, K)` result, the first sample of a run holds the sum of the run; other rows have no meaning.
    Within a block all pairs of labels are compared. If the last run of a block continues in later blocks, the
    sums of the first runs of these blocks are added to it.
    """
    num_samples, width = values.shape
    # All pairs of blocks are compared as well, so that with many samples the blocks are larger.
    size = _BLOCK if _known_at_most(num_samples, 2**16) else 4 * _BLOCK
    num_blocks = (num_samples + size - 1) // size
    padding = num_blocks * size - num_samples
    # In the comments M blocks have B samples each.
    labels = jnp.pad(sorted_labels, (0, padding), constant_values=NO_CLASS)
    labels = labels.reshape(num_blocks, size)  # (M, B)
    values = jnp.pad(values, ((0, padding), (0, 0))).reshape(num_blocks, 1, size, width)  # (M, 1, B, K)
    sums = _masked_sum(labels[:, :, None] == labels[:, None], values)  # (M, B, K)
    first, last, block = labels[:, 0], labels[:, -1], jnp.arange(num_blocks, dtype=jnp.int32)
    # (M, M), True at [i, j] if the last run of block i goes on in block j.
    goes_on = (block[:, None] < block[None, :]) & (last[:, None] == first[None, :])
    rest = _masked_sum(goes_on, sums[None, :, 0])  # (M, K), what later blocks add to the last run of each.
    in_last_run = (labels == last[:, None])[..., None]  # (M, B, 1)
    sums = sums + jnp.where(in_last_run, rest[:, None], jnp.zeros((), sums.dtype))
    return sums.reshape(num_blocks * size, width)[:num_samples]


def assign_slots(labels: jax.Array, used: jax.Array, num_classes: int) -> Slots:
    """Gives each class of a flat batch a slot."""
    assign = partial(assign_slots_on, num_classes=num_classes)
    slots: Slots = _placement.call_for_platform(assign, labels, used)
    return slots


# Jitted, since outside of `jit` the loop in it would be compiled again in each call.
@partial(jax.jit, static_argnames=("num_classes", "platform"))
def assign_slots_on(labels: jax.Array, used: jax.Array, num_classes: int, platform: str) -> Slots:
    """`assign_slots`, with the algorithm that is fast on `platform`."""
    labels = labels.astype(jnp.int32)
    if _known_at_most(num_classes, labels.size):
        return Slots(jnp.arange(num_classes, dtype=jnp.int32), jnp.where(used, labels, NO_CLASS))
    # The slot of a class is the position of its last used sample.
    if platform == "cpu":
        # Under vmap it runs for one batch after the other: checkify does not support a batched while loop.
        last = jax.custom_batching.sequential_vmap(_last_of_class_by_hashing)(labels, used)
    elif _known_at_most(labels.size, _ALL_PAIRS_LIMIT):
        # Hashing needs a loop that depends on the data: in each iteration a GPU would wait for the host.
        last = _last_of_class_by_comparing(labels, used)
    else:
        last = _last_of_class_by_sorting(labels, used)
    slot_of_sample = jnp.where(used, last, NO_CLASS).astype(jnp.int32)
    # The positions of a class's other samples are slots without a class. If they named the class too, a write
    # with `unique_indices=True` would lose all but one of the rows.
    owns_slot = slot_of_sample == jnp.arange(labels.size, dtype=jnp.int32)
    return Slots(jnp.where(owns_slot, labels, NO_CLASS), slot_of_sample)


def _last_of_class_by_comparing(labels: jax.Array, used: jax.Array) -> jax.Array:
    """For each used sample the position of the last used sample of its class, by comparing all pairs."""
    same = (labels[None] == labels[:, None]) & used[None]
    position = jnp.arange(labels.size, dtype=jnp.int32)
    return jnp.max(jnp.where(same, position[None], -1), axis=1, initial=-1)


def _last_of_class_by_sorting(labels: jax.Array, used: jax.Array) -> jax.Array:
    """For each used sample the position of the last used sample of its class, by sorting."""
    sorted_labels, order = _sort_by_class(labels, used)
    _, is_last = _run_bounds(sorted_labels)
    position = jnp.arange(labels.size, dtype=jnp.int32)
    # A sample's run ends at the nearest position, at or after it, where `is_last` holds. The sort is stable,
    # so that the last sample of a run is also the last one of its class in the batch.
    end = lax.cummin(jnp.where(is_last, position, NO_CLASS), reverse=True)
    last = order.at[end].get(mode="promise_in_bounds")
    return lax.sort((order, last), num_keys=1)[1]


def _last_of_class_by_hashing(labels: jax.Array, used: jax.Array) -> jax.Array:
    """For each used sample the position of the last used sample of its class, by hashing.

    The hash table has about N entries, and nothing is sorted. Samples write their position into the entry of
    their label, and the last one wins. A sample that finds the position of another class there tries again,
    with another hash. The loop ends, since in each iteration the winner of an entry finds its own class.
    """
    size = labels.size + 1 + labels.size % 2  # Odd, so that a change of any one bit changes the remainder.
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

    initial_state = jnp.where(used, -1, position), jnp.int32(_HASH_START)
    return lax.while_loop(lambda state: jnp.any(state[0] < 0), probe, initial_state)[0]


def _known_at_most(size: Any, limit: Any) -> bool:
    """Whether `size <= limit` is known. In an exported program a size may be symbolic."""
    return isinstance(size, int) and isinstance(limit, int) and size <= limit
