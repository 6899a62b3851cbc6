"""How a batch moves the rows of a table: by a step for the sum of each class, or sample by sample."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jax_centerloss._rows import groups, table
from jax_centerloss._rows.groups import NO_CLASS, Groups
from jax_centerloss._rows.rounding import Seed

_BLOCK_ENTRIES = 2**17  # The sums of a block of slots have so many entries, which fit the cache of a CPU.
_CLASSES_PER_SAMPLE = 16  # With more classes for each sample, samples are counted by hashing.

ScaleFn = Callable[[jax.Array], jax.Array]  # From the counts of classes to the factors of their sums.
Moved = tuple[jax.Array, Any]  # A table of rows, and the state of an optimizer of them.
# `compute_steps(table, state, batch, sums, seed) -> (steps, state)`, with the scaled `(S, D)` sums of the
# slots of `batch`, a `Groups`.
StepsFn = Callable[..., Moved]


class Samples(NamedTuple):
    """A flat batch of N samples, the same on all devices of a mesh."""

    classes: jax.Array  # (N,) int32, the class whose row a sample moves, or `NO_CLASS`.
    values: jax.Array  # (N, D), summed by class.
    # (N,), its weight in the count of its class, not 0 if it has one. NaN makes that row NaN.
    counted: jax.Array
    kept: jax.Array | None  # (N,) bool, or None for all. Other samples count, but add no value.
    ready: jax.Array  # Always True, computed from what has to be read before rows are written.


def add_sums(
    rows: jax.Array, samples: Samples, scale: ScaleFn, seed: Seed, *, by_count: bool, platform: str
) -> jax.Array:
    """The table `rows (C, D)` with the scaled sum of each class added to its row, or its terms one by one.

    `by_count` is False if `scale` uses a count only to pass on NaN.
    """
    # The sum comes first if classes are few or rows are in half precision: each addition to a row is rounded,
    # and hundreds of samples may meet in one. The sum also comes first on a GPU, whose order of additions
    # differs from run to run, and on a TPU if samples have to be counted, which is slow there.
    many_classes = groups.known_at_most(samples.classes.shape[0] + 1, rows.shape[0])  # C > N, and known.
    sums_first = platform == "gpu" or (platform == "tpu" and by_count) or rows.dtype != samples.values.dtype
    if not many_classes or sums_first:
        return move_rows(rows, (), samples, scale, seed, platform=platform)[0]
    classes, values, counts = samples.classes, samples.values, samples.counted
    if by_count:
        # An array with an entry for every class pays while it is small, and no larger than the values.
        entries_per_sample = min(_CLASSES_PER_SAMPLE, rows.shape[1])
        counts = groups.count_class_of_sample(classes, counts, rows.shape[0], entries_per_sample)
    factor = scale(counts)
    if samples.kept is not None:
        factor = jnp.where(samples.kept | jnp.isnan(factor), factor, jnp.zeros((), factor.dtype))
    # The value of a sample without a class may be NaN. It is not added, but would enter the derivative of
    # `factor` as 0 * NaN.
    values = jnp.where((classes != NO_CLASS)[:, None], values, jnp.zeros((), values.dtype))
    return rows.at[table.classes_where(samples.ready, classes)].add(factor[:, None] * values, mode="drop")


def move_rows(
    rows: jax.Array,
    state: Any,
    samples: Samples,
    scale: ScaleFn,
    seed: Seed,
    *,
    compute_steps: StepsFn = lambda rows, state, batch, sums, seed: (sums, state),
    in_blocks: bool = True,
    platform: str,
) -> Moved:
    """The table `rows (C, D)` and its state after a step of the rows of the batch's classes.

    By default the step of a row is the scaled sum of its class. `in_blocks` says whether rows can be updated
    block by block, since no row depends on another.
    """
    batch = groups.group(samples.classes, rows.shape[0], platform)
    if platform == "gpu":
        # Values and counts are summed in one pass. The barrier keeps the values in memory. Otherwise XLA
        # computes them again after the table is written, and for that keeps a copy of the old table.
        values = lax.optimization_barrier(samples.values)
        if samples.kept is not None:
            values = jnp.where(samples.kept[:, None], values, jnp.zeros((), values.dtype))
        both = batch.sum(jnp.concatenate([values, samples.counted[:, None]], axis=1))
        sums, counts = both[:, :-1], both[:, -1]
    else:
        counts = batch.sum(samples.counted)
    factor = scale(counts)
    batch = batch._replace(classes=table.classes_where((counts != 0) & samples.ready, batch.classes))

    def update(rows: jax.Array, state: Any, block: Groups, sums: jax.Array, factor: jax.Array) -> Moved:
        steps, state = compute_steps(rows, state, block, factor[:, None] * sums, seed)
        return table.add(rows, block, steps, seed), state

    size = max(1, _BLOCK_ENTRIES // rows.shape[1])
    num_slots = batch.classes.shape[0]
    many_slots = in_blocks and groups.known_at_most(size + 1, num_slots)
    if platform != "cpu" or batch.whole_table or not many_slots:
        if platform != "gpu":
            sums = batch.sum(samples.values, kept=samples.kept)
        return update(rows, state, batch, sums, factor)

    # Blocks of slots are updated one after the other, so that their sums stay in the cache of a CPU.
    num_blocks = -(-num_slots // size)
    padding = num_blocks * size - num_slots
    classes = jnp.pad(batch.classes, (0, padding), constant_values=NO_CLASS)
    factor = jnp.pad(factor, (0, padding))

    def update_block(i: ArrayLike, carry: Moved) -> Moved:
        rows, new_state = carry
        # Each block gets the old scalars of the state, such as Adam's count of steps. A leaf with C
        # rows is a table: C is so large here that no other leaf has that length.
        num_rows = rows.shape[:1]
        mixed = jax.tree.map(lambda a, b: b if jnp.shape(b)[:1] == num_rows else a, state, new_state)
        first = jnp.asarray(i, jnp.int32) * size
        block = batch._replace(classes=lax.dynamic_slice_in_dim(classes, first, size))
        sums = batch.sum(samples.values, kept=samples.kept, block=(first, size))
        return update(rows, mixed, block, sums, lax.dynamic_slice_in_dim(factor, first, size))

    # The first block is updated before the loop: `shard_map` requires that a carry varies over the same mesh
    # axes before an iteration and after it.
    return lax.fori_loop(1, num_blocks, update_block, update_block(0, (rows, state)))
