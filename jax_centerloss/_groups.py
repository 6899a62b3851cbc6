"""Samples of one class brought together: the one place that knows what is fast on which platform.

On CPUs a sum by class is a scatter-add. So it is on TPUs, which add one row after the other. On GPUs all
samples of a class would contend for its row, in an order that differs from run to run: there they are sorted,
and summed side by side, or each of few classes looks through all samples.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NO_SLOT = np.iinfo(np.int32).max
_HASH_START, _HASH_STEP = 1640531527, 747796405  # Odd, of mixed bits.
_COMPARED = 2048  # Samples of which all pairs are compared; above, sorting is cheaper.
_BLOCK = 32  # Sorted samples of which all pairs are compared, to sum those of a class.
_NARROW = 32  # Values of a sample.
_FEW = 128  # Classes each of which looks through all samples on a GPU; above, sorting is cheaper.


def by_platform(function: Callable[..., Any], *arrays: Any) -> Any:
    """`function(*arrays, platform=...)`: "cpu", "tpu" or "gpu", as the program is compiled for."""
    return lax.platform_dependent(
        *arrays,
        cpu=partial(function, platform="cpu"),
        tpu=partial(function, platform="tpu"),
        default=partial(function, platform="gpu"),
    )


class Groups(NamedTuple):
    """A flat batch by class: a slot for each class that stands in it, and perhaps for others."""

    # (S,), the class of each slot, which no other slot has; `NO_SLOT` where it has none.
    classes: jax.Array
    # (N,), of each sample, out of range where it is not used. Where samples are sorted, of those.
    slot: jax.Array
    # (N, K) values to their (S, K) sums, anything where there is no class. Without K too, but not on GPUs.
    sum: Callable[[jax.Array], jax.Array]


def group(labels: jax.Array, used: jax.Array, num_classes: int, platform: str) -> Groups:
    """The used samples by class, all of whose labels are below `num_classes`."""
    if platform == "gpu" and not _at_most(num_classes, _FEW):
        return _sorted(labels, used)
    slot, classes = slots_on(labels, used, num_classes, platform)
    by_slot = _sum_chosen if platform == "gpu" else sum_by_slot
    return Groups(classes, slot, partial(by_slot, slot=slot, number=classes.shape[0]))


def _sorted(labels: jax.Array, used: jax.Array) -> Groups:
    """By sorting: the slot of a class is where it begins."""
    key, order = _by_class(labels, used)
    first = jnp.concatenate([jnp.ones_like(key[:1], jnp.bool_), key[1:] != key[:-1]])

    def total(values: jax.Array) -> jax.Array:
        ordered = values.at[order].get(mode="promise_in_bounds", unique_indices=True)
        if not _at_most(key.size, _COMPARED):
            # Fused into the sum, each row would be gathered for every row of its block. Of few samples that
            # costs less than a kernel more.
            ordered = lax.optimization_barrier(ordered)
        return _sum_runs(ordered, key)

    return Groups(jnp.where(first, key, NO_SLOT), key, total)


def _by_class(labels: jax.Array, used: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The labels in order, `NO_SLOT` last for what is not used, and the samples in that order."""
    position = jnp.arange(labels.size, dtype=jnp.int32)
    key, order = lax.sort((jnp.where(used, labels.astype(jnp.int32), NO_SLOT), position), num_keys=1)
    return key, order


def _sum_chosen(values: jax.Array, slot: jax.Array, number: int) -> jax.Array:
    """`sum_by_slot` of `(N, K)` values, where each slot looks through all of them."""
    mine = slot[None] == jnp.arange(number, dtype=jnp.int32)[:, None]
    return _sum_where(mine, values[None])


def _sum_where(chosen: jax.Array, values: jax.Array) -> jax.Array:
    """The sums over the samples, the last axis of `chosen` and the last but one of `values`.

    A sample is chosen rather than multiplied by 0 or 1: NaN stays in its class.
    """
    zero = jnp.zeros((), values.dtype)
    if values.shape[-1] > _NARROW:
        return jnp.sum(jnp.where(chosen[..., None], values, zero), axis=-2)
    # Along the samples: across few values XLA would write all the terms to memory.
    return jnp.sum(jnp.where(chosen[..., None, :], jnp.swapaxes(values, -1, -2), zero), axis=-1)


def _sum_runs(values: jax.Array, key: jax.Array) -> jax.Array:
    """Where a run of equal, sorted keys begins, the sum of its `(N, K)` values.

    In blocks all pairs are compared, and then each block's last run with how the later blocks begin.
    """
    number, width = values.shape
    size = _BLOCK if _at_most(number, 2**16) else 4 * _BLOCK  # All blocks are compared, too.
    blocks = (number + size - 1) // size
    spare = blocks * size - number
    key = jnp.pad(key, (0, spare), constant_values=NO_SLOT).reshape(blocks, size)
    values = jnp.pad(values, ((0, spare), (0, 0))).reshape(blocks, 1, size, width)
    sums = _sum_where(key[:, :, None] == key[:, None], values)
    block = jnp.arange(blocks, dtype=jnp.int32)
    goes_on = (key[None, :, 0] == key[:, -1, None]) & (block[None] > block[:, None])
    later = _sum_where(goes_on, sums[None, :, 0])
    sums = sums + jnp.where((key == key[:, -1:])[..., None], later[:, None], jnp.zeros((), sums.dtype))
    return sums.reshape(blocks * size, width)[:number]


def slots(labels: jax.Array, used: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """One slot for each class of a flat batch, however often the class stands in it.

    There are as many as samples, or as classes if these are fewer. Returns the slot of each sample, `NO_SLOT`
    where it is not used, and the class of each slot, `NO_SLOT` where it has none; no class has two slots.
    """
    found: tuple[jax.Array, jax.Array] = by_platform(partial(slots_on, num_classes=num_classes), labels, used)
    return found


@partial(jax.jit, static_argnames=("num_classes", "platform"))  # Else each call outside of jit would compile.
def slots_on(
    labels: jax.Array, used: jax.Array, num_classes: int, platform: str
) -> tuple[jax.Array, jax.Array]:
    """`slots`, as they are found on this platform."""
    labels = labels.astype(jnp.int32)
    if _at_most(num_classes, labels.size):
        return jnp.where(used, labels, NO_SLOT), jnp.arange(num_classes, dtype=jnp.int32)
    if platform == "cpu":
        # One batch after the other under vmap: checkify knows no while loop that is mapped.
        slot = jax.custom_batching.sequential_vmap(partial(_meet, num_classes=num_classes))(labels, used)
    else:
        # Without a loop, each of whose turns a GPU waits for.
        slot = (_compare if _at_most(labels.size, _COMPARED) else _sort)(labels, used)
    slot = jnp.where(used, slot, NO_SLOT).astype(jnp.int32)
    # Only the sample that gives the slot names its class: a GPU's write to a row that stands twice is lost.
    return slot, jnp.where(slot == jnp.arange(labels.size, dtype=jnp.int32), labels, NO_SLOT)


def _compare(labels: jax.Array, used: jax.Array) -> jax.Array:
    """For each used sample the position of the last used one of its class, in a flat batch: by all pairs."""
    same = (labels[None] == labels[:, None]) & used[None]
    position = jnp.arange(labels.size, dtype=jnp.int32)
    return jnp.max(jnp.where(same, position[None], -1), axis=1, initial=-1)


def _sort(labels: jax.Array, used: jax.Array) -> jax.Array:
    """The same by sorting: by class, and back."""
    key, order = _by_class(labels, used)
    last = jnp.concatenate([key[1:] != key[:-1], jnp.ones_like(key[:1], jnp.bool_)])
    position = jnp.arange(labels.size, dtype=jnp.int32)
    # Positions rise in a run; those of the runs are told apart by where they end.
    end = lax.cummin(jnp.where(last, position, NO_SLOT), reverse=True)
    winner = order.at[end].get(mode="promise_in_bounds")
    return lax.sort((order, winner), num_keys=1)[1]


def _meet(labels: jax.Array, used: jax.Array, num_classes: int) -> jax.Array:
    """The same by hashing.

    Samples meet in a hash table, where the last one to arrive at a place wins it for its class. Those of the
    other classes there try again at another place. No sorting, and no array as long as there are classes.
    """
    size = labels.size + 1 + labels.size % 2  # Odd: every bit of a label counts in the remainder.
    direct = _at_most(num_classes, size)
    position = jnp.arange(labels.size, dtype=jnp.int32)

    def meet(found: jax.Array, factor: jax.Array) -> jax.Array:
        waiting = found < 0
        # The product wraps around, which is what mixes the bits.
        place = (
            labels
            if direct
            else ((labels * factor).astype(jnp.uint32) % jnp.asarray(size, jnp.uint32)).astype(jnp.int32)
        )
        # The greatest, not any: the choice is then the same on every platform and in every run.
        table = jnp.zeros(size, jnp.int32).at[jnp.where(waiting, place, size)].max(position, mode="drop")
        winner = table.at[jnp.where(waiting, place, 0)].get(mode="promise_in_bounds")
        met = waiting & (labels.at[winner].get(mode="promise_in_bounds") == labels)
        return jnp.where(met, winner, found)

    found = meet(jnp.where(used, -1, position), jnp.int32(_HASH_START))
    if direct:
        return found

    def again(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        found, factor = state
        return meet(found, factor), factor * jnp.int32(_HASH_STEP)

    start = found, jnp.int32(_HASH_STEP)
    return lax.while_loop(lambda state: jnp.any(state[0] < 0), again, start)[0]


def _at_most(number: Any, limit: Any) -> bool:
    """Whether it is known to be; in an exported program a size may be a name."""
    return isinstance(number, int) and isinstance(limit, int) and number <= limit


def sum_by_slot(values: jax.Array, slot: jax.Array, number: int) -> jax.Array:
    """Sums of `values`, whose first axis is the samples', for slots 0 to `number`; the rest is left out."""
    # A negative index would wrap around.
    target = jnp.where((slot >= 0) & (slot < number), slot, number)
    return jnp.zeros((number, *values.shape[1:]), values.dtype).at[target].add(values, mode="drop")
