"""Numbers the classes of a batch (a number is called a slot), and sums samples by class.

Arrays with one entry per class of the batch are indexed by slot. On a CPU or TPU samples are summed by a
scatter-add, one after the other. On a GPU the samples of one class would contend for its row with atomic
adds, whose order, and with it the rounding, differs from run to run. There, samples are sorted by class and
summed in parallel; with few classes, each class sums all samples under a mask.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NO_CLASS = np.iinfo(np.int32).max  # The class of a sample or slot that has none. No table has such a row.
NO_SLOT = NO_CLASS  # The slot of a sample without a class.
_HASH_START, _HASH_STEP = 1640531527, 747796405  # Odd constants of a multiplicative hash.
_ALL_PAIRS_LIMIT = 2048  # Up to this many samples all pairs are compared; more are sorted.
_BLOCK = 32  # Sorted samples are compared in pairs within blocks of this length.
_NARROW = 32  # Up to this many columns, values are transposed to sum over the last axis.
_FEW_CLASSES = 128  # Up to this many classes, a GPU does not sort: each class reads all samples.


class Groups(NamedTuple):
    """The classes of a batch of N samples, each with one of S slots. Some slots may have no class."""

    # (S,) int32, the class of each slot, or `NO_CLASS`. No class stands twice. Where classes are few, every
    # class of the table has a slot, even one without samples.
    classes: jax.Array
    # Sums the `(N, K)` values of samples by slot, `(S, K)`. On a GPU the sums of slots without a class have
    # no meaning. Elsewhere `kept (N,)`, if given, selects samples, `block=(first, size)` returns the sums of
    # the slots `first` to `first + size - 1` only, and values may be `(N,)`.
    sum: Callable[..., jax.Array]
    # Whether the whole table is read and written at once, since slot j is class j. Always False on a GPU,
    # where it takes fewer kernels to index rows.
    whole_table: bool


def group(labels: jax.Array, num_classes: int, platform: str) -> Groups:
    """Groups a batch with `labels (N,)` int32, each in `[0, num_classes)` or `NO_CLASS`."""
    few = known_at_most(num_classes, labels.size)
    if few and (platform != "gpu" or num_classes <= _FEW_CLASSES):
        # Inside of `shard_map` the classes have to vary over the same mesh axes as the labels.
        classes = jnp.arange(num_classes, dtype=jnp.int32) + jnp.zeros_like(labels, shape=(num_classes,))
        if platform == "gpu":
            mask = labels[None] == classes[:, None]
            return Groups(classes, lambda values: _masked_sum(mask, values[None]), whole_table=False)
        return Groups(classes, partial(_sum_by_scattering, num_classes, labels), whole_table=True)
    if platform == "gpu":
        sorted_labels, order = _sort_by_class(labels)
        # The first sample of each class names it. Labels are not negative, so the very first differs from -1.
        is_first = jnp.diff(sorted_labels, prepend=-1) != 0
        classes = jnp.where(is_first, sorted_labels, NO_CLASS)
        return Groups(classes, partial(_sum_sorted, sorted_labels, order), whole_table=False)
    slots = _slot_of_sample(labels, platform)
    # A slot is the position of the last sample of its class. Other positions name no class: if one stood
    # twice, a write with `unique_indices=True` would lose all but one of the rows.
    owns_slot = slots == jnp.arange(labels.size, dtype=jnp.int32)
    classes = jnp.where(owns_slot, labels, NO_CLASS)
    return Groups(classes, partial(_sum_by_scattering, labels.size, slots), whole_table=False)


def count_class_of_sample(
    labels: jax.Array, counted: jax.Array, num_classes: int, classes_per_sample: int
) -> jax.Array:
    """For each sample the sum of `counted (N,)` over its class, `(N,)`; 0 without a class. Fast on a CPU.

    If C <= `classes_per_sample` * N, it is summed in an array with an entry for every class, else by hashing.
    """
    by_class = known_at_most(num_classes, classes_per_sample * labels.size)
    slots = labels if by_class else _slot_of_sample(labels, "cpu")
    counts = _sum_by_scattering(num_classes if by_class else labels.size, slots, counted)
    return counts.at[slots].get(mode="fill", fill_value=0)


def known_at_most(size: Any, limit: Any) -> bool:
    """Whether `size <= limit` is known. In an exported program a size may be symbolic."""
    return isinstance(size, int) and isinstance(limit, int) and size <= limit


def _sum_by_scattering(
    num_slots: int, slots: jax.Array, values: jax.Array, *, kept: jax.Array | None = None, block: Any = None
) -> jax.Array:
    first, size = (0, num_slots) if block is None else block
    slots = slots if kept is None else jnp.where(kept, slots, NO_SLOT)
    # `segment_sum` drops slots that are negative or beyond the block.
    return jax.ops.segment_sum(values, slots - first, size)


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


def _sort_by_class(labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sorted labels, and the order that sorts them. Samples without a class are the last ones."""
    return lax.sort_key_val(labels, jnp.arange(labels.size, dtype=jnp.int32))


def _sum_sorted(sorted_labels: jax.Array, order: jax.Array, values: jax.Array) -> jax.Array:
    """Sums `(N, K)` values of samples that `order` sorts by class. A class's sum is where its run begins."""
    values = values.at[order].get(mode="promise_in_bounds", unique_indices=True)
    if not known_at_most(order.size, _ALL_PAIRS_LIMIT):
        # Without the barrier XLA fuses this gather into the sum, and repeats it for every row of a block.
        # With few samples that is still cheaper than one more kernel.
        values = lax.optimization_barrier(values)
    return _sum_runs(values, sorted_labels)


def _sum_runs(values: jax.Array, sorted_labels: jax.Array) -> jax.Array:
    """Sums the `(N, K)` values of each run of equal labels.

    Of the `(N, K)` result, the first sample of a run holds the sum of the run; other rows have no meaning.
    Within a block all pairs of labels are compared. If the last run of a block continues in later blocks, the
    sums of the first runs of these blocks are added to it.
    """
    num_samples, width = values.shape
    # Pairs of blocks are compared too. With many samples larger blocks keep their number down.
    size = _BLOCK if known_at_most(num_samples, 2**16) else 4 * _BLOCK
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


# Jitted, since outside of `jit` the loop in it would be compiled again in each call.
@partial(jax.jit, static_argnames="platform")
def _slot_of_sample(labels: jax.Array, platform: str) -> jax.Array:
    """For each sample the position of the last sample of its class, or `NO_SLOT` for one without a class."""
    if platform == "cpu":
        # Under vmap it runs for one batch after the other: checkify does not support a batched while loop.
        last = jax.custom_batching.sequential_vmap(_last_by_hashing)(labels)
    elif known_at_most(labels.size, _ALL_PAIRS_LIMIT):
        # Hashing needs a loop that depends on the data, which accelerators are slow at.
        last = _last_by_comparing(labels)
    else:
        last = _last_by_sorting(labels)
    return jnp.where(labels == NO_CLASS, NO_SLOT, last)


def _last_by_comparing(labels: jax.Array) -> jax.Array:
    """The position of the last sample of the same class, by comparing all pairs."""
    position = jnp.arange(labels.size, dtype=jnp.int32)
    return jnp.max(jnp.where(labels[None] == labels[:, None], position[None], -1), axis=1, initial=-1)


def _last_by_sorting(labels: jax.Array) -> jax.Array:
    """The position of the last sample of the same class, by sorting."""
    sorted_labels, order = _sort_by_class(labels)
    position = jnp.arange(labels.size, dtype=jnp.int32)
    # A sample's run of equal labels ends at the next position, its own included, where `is_last` holds. The
    # sort is stable, so that the last sample of a run is also the last one of its class in the batch.
    is_last = jnp.diff(sorted_labels, append=-1) != 0
    end = lax.cummin(jnp.where(is_last, position, NO_SLOT), reverse=True)
    last = order.at[end].get(mode="promise_in_bounds")
    return lax.sort_key_val(order, last)[1]


def _last_by_hashing(labels: jax.Array) -> jax.Array:
    """The position of the last sample of the same class, by hashing.

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

    # Inside of `shard_map` the loop's state has to vary over the same mesh axes as the labels.
    initial_state = jnp.full_like(labels, -1), jnp.int32(_HASH_START)
    return lax.while_loop(lambda state: jnp.any(state[0] < 0), probe, initial_state)[0]
