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


class Groups(NamedTuple):
    """The S slots of a flat batch. Each class of the batch has exactly one.

    If C <= N (on a GPU also C <= 128), the slots are all C classes; one that is not in the batch has a sum of
    0. Otherwise there are N slots, some of them without a class.
    """

    classes: jax.Array  # (S,), the class of each slot, or `NO_CLASS`.
    slots: Any  # (N,), of each sample, `NO_CLASS` if it is not used; None on a GPU that sorts.
    # From (N, K) values to (S, K) sums, which are arbitrary where `classes` is `NO_CLASS`. On a CPU or TPU
    # the values may also be (N,).
    sum: Callable[[jax.Array], jax.Array]


def group_by_class(labels: jax.Array, used: jax.Array, num_classes: int, platform: str) -> Groups:
    """Groups the used samples, whose labels are in `[0, num_classes)`, by class."""
    if platform == "gpu" and not _known_at_most(num_classes, _FEW_CLASSES):
        return _group_by_sorting(labels, used)
    slots, classes = assign_slots_on(labels, used, num_classes, platform)
    number = classes.shape[0]
    if platform == "gpu":
        return Groups(classes, slots, partial(_sum_by_reading_all, slots=slots, number=number))
    return Groups(classes, slots, lambda values: jax.ops.segment_sum(values, slots, number))


def _group_by_sorting(labels: jax.Array, used: jax.Array) -> Groups:
    """Slots are positions in sorted order, and that of a class is the position of its first sample."""
    key, order = _sort_by_class(labels, used)
    is_first = jnp.concatenate([jnp.ones_like(key[:1], jnp.bool_), key[1:] != key[:-1]])

    def sum_by_class(values: jax.Array) -> jax.Array:
        values = values.at[order].get(mode="promise_in_bounds", unique_indices=True)
        if not _known_at_most(key.size, _MOST_COMPARED):
            # XLA would fuse this gather into the sum, which then gathers each row again for every row of its
            # block. With few samples that is cheaper than one more kernel, so there is no barrier.
            values = lax.optimization_barrier(values)
        return _sum_runs(values, key)

    return Groups(jnp.where(is_first, key, NO_CLASS), None, sum_by_class)


def _sort_by_class(labels: jax.Array, used: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sorted labels, with `NO_CLASS` at the end for unused samples, and the order that sorts them."""
    position = jnp.arange(labels.size, dtype=jnp.int32)
    key, order = lax.sort((jnp.where(used, labels.astype(jnp.int32), NO_CLASS), position), num_keys=1)
    return key, order


def _sum_by_reading_all(values: jax.Array, slots: jax.Array, number: int) -> jax.Array:
    """`jax.ops.segment_sum` of `(N, K)` values, in which each segment reads all of them."""
    mask = slots[None] == jnp.arange(number, dtype=jnp.int32)[:, None]
    return _masked_sum(mask, values[None])


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


def _sum_runs(values: jax.Array, key: jax.Array) -> jax.Array:
    """The sum of the `(N, K)` values of each run of equal sorted keys, at the first sample of the run.

    Within a block all pairs of keys are compared. To the last run of a block the first runs of later blocks
    are added, if they have the same key.
    """
    number, width = values.shape
    size = _BLOCK if _known_at_most(number, 2**16) else 4 * _BLOCK  # The blocks are compared in pairs, too.
    blocks = (number + size - 1) // size
    padding = blocks * size - number
    key = jnp.pad(key, (0, padding), constant_values=NO_CLASS).reshape(blocks, size)
    values = jnp.pad(values, ((0, padding), (0, 0))).reshape(blocks, 1, size, width)
    sums = _masked_sum(key[:, :, None] == key[:, None], values)
    block = jnp.arange(blocks, dtype=jnp.int32)
    continues = (key[None, :, 0] == key[:, -1, None]) & (block[None] > block[:, None])
    rest = _masked_sum(continues, sums[None, :, 0])
    in_last_run = (key == key[:, -1:])[..., None]
    sums = sums + jnp.where(in_last_run, rest[:, None], jnp.zeros((), sums.dtype))
    return sums.reshape(blocks * size, width)[:number]


def assign_slots(labels: jax.Array, used: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """Assigns one of min(N, C) slots to each class of a flat batch.

    Returns the slot of each sample, `NO_CLASS` if the sample is not used, and the class of each slot,
    `NO_CLASS` if the slot has none. No class has two slots. Where C <= N, the slots are the classes.
    """
    assign = partial(assign_slots_on, num_classes=num_classes)
    assigned: tuple[jax.Array, jax.Array] = call_for_platform(assign, labels, used)
    return assigned


# Jitted, since outside of `jit` the loop in it would be compiled again in each call.
@partial(jax.jit, static_argnames=("num_classes", "platform"))
def assign_slots_on(
    labels: jax.Array, used: jax.Array, num_classes: int, platform: str
) -> tuple[jax.Array, jax.Array]:
    """`assign_slots`, as is fast on `platform`."""
    labels = labels.astype(jnp.int32)
    if _known_at_most(num_classes, labels.size):
        return jnp.where(used, labels, NO_CLASS), jnp.arange(num_classes, dtype=jnp.int32)
    if platform == "cpu":
        # vmap runs it for one batch after the other: checkify does not support a batched while loop.
        last = jax.custom_batching.sequential_vmap(_last_of_class_by_hashing)(labels, used)
    elif _known_at_most(labels.size, _MOST_COMPARED):
        # A loop that depends on the data, as hashing has, makes a GPU wait for the host at each turn.
        last = _last_of_class_by_comparing(labels, used)
    else:
        last = _last_of_class_by_sorting(labels, used)
    slots = jnp.where(used, last, NO_CLASS).astype(jnp.int32)
    # Only the slot of a class names it, and not those of its other samples: of several writes to one row, a
    # GPU without atomics would lose all but one.
    owns_slot = slots == jnp.arange(labels.size, dtype=jnp.int32)
    return slots, jnp.where(owns_slot, labels, NO_CLASS)


def _last_of_class_by_comparing(labels: jax.Array, used: jax.Array) -> jax.Array:
    """For each used sample the position of the last used sample of its class, by comparing all pairs."""
    same = (labels[None] == labels[:, None]) & used[None]
    position = jnp.arange(labels.size, dtype=jnp.int32)
    return jnp.max(jnp.where(same, position[None], -1), axis=1, initial=-1)


def _last_of_class_by_sorting(labels: jax.Array, used: jax.Array) -> jax.Array:
    """The same, by sorting."""
    key, order = _sort_by_class(labels, used)
    is_last = jnp.concatenate([key[1:] != key[:-1], jnp.ones_like(key[:1], jnp.bool_)])
    position = jnp.arange(labels.size, dtype=jnp.int32)
    # The end of a sample's run is the next end at or after it. The sort is stable, so that within a run the
    # last sample is the one of the highest position.
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

    def probe(last: jax.Array, factor: jax.Array) -> jax.Array:
        waiting = last < 0
        # The product overflows on purpose, which mixes the bits.
        place = (labels * factor).astype(jnp.uint32) % jnp.asarray(size, jnp.uint32)
        place = place.astype(jnp.int32)
        # The maximum makes the winner the same in every run.
        table = jnp.zeros(size, jnp.int32).at[jnp.where(waiting, place, size)].max(position, mode="drop")
        winner = table.at[jnp.where(waiting, place, 0)].get(mode="promise_in_bounds")
        found = waiting & (labels.at[winner].get(mode="promise_in_bounds") == labels)
        return jnp.where(found, winner, last)

    def probe_again(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        last, factor = state
        return probe(last, factor), factor * jnp.int32(_HASH_STEP)

    last = probe(jnp.where(used, -1, position), jnp.int32(_HASH_START))
    start = last, jnp.int32(_HASH_STEP)
    return lax.while_loop(lambda state: jnp.any(state[0] < 0), probe_again, start)[0]


def _known_at_most(number: Any, limit: Any) -> bool:
    """Whether `number <= limit` is known. In an exported program a size may be symbolic."""
    return isinstance(number, int) and isinstance(limit, int) and number <= limit
