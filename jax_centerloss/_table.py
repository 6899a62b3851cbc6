"""The class table: the one place that knows index modes and in-place writes."""

from collections.abc import Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AbstractMesh
from jax.typing import ArrayLike

from jax_centerloss import _placement

AxisName = Hashable | None

NO_SLOT = np.iinfo(np.int32).max
_HASH_START, _HASH_STEP = 1640531527, 747796405  # Odd, of mixed bits.


def compute_dtype(*arrays: jax.Array) -> Any:
    """float32, or float64 where an operand has it: half precision is never summed or counted in."""
    return jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32


def read_rows(centers: jax.Array, labels: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A row for each sample, placed as `x` is, and where the label names a class at all: elsewhere it is any.

    Reads by `labels` alone, in one form, so that every read of one step is the same read; masks come after.
    The rows are in the dtype that is computed in, so that their derivatives are summed in it too.
    """
    if not labels.ndim:  # JAX does not read a single row of a table that is split over Explicit axes.
        rows, known = read_rows(centers, labels[None], x[None])
        return rows[0], known[0]
    num_classes = centers.shape[0]
    known = (labels >= 0) & (labels < num_classes)
    return _rows_at(centers, jnp.clip(labels, 0, num_classes - 1), x), known


@jax.custom_jvp
def _rows_at(centers: jax.Array, index: jax.Array, x: jax.Array) -> jax.Array:
    rows = centers.at[index].get(mode="promise_in_bounds", out_sharding=_placement.sharding_of(x, centers))
    return rows.astype(compute_dtype(x, centers))


@partial(_rows_at.defjvp, symbolic_zeros=True)
def _rows_at_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The same read, but of a batch that is whole on every device: its transpose then is no sum of tables."""
    centers, index, x = primals
    rows = _rows_at(centers, index, x)
    if isinstance(tangents[0], SymbolicZero):  # Not made into a table of zeros.
        return rows, jnp.zeros_like(rows)
    mesh = _placement.mesh_of(centers, index, x)
    index = _placement.whole(mesh, index)
    moved = (
        tangents[0]
        .astype(rows.dtype)  # Before the read: its transpose, a sum over samples, then is in it.
        .at[index]
        .get(mode="promise_in_bounds", out_sharding=_placement.sharding_of(index[..., None], centers))
    )
    (moved,) = jax.linear_transpose(partial(_placement.whole, mesh), rows)(moved)
    return rows, moved


def sample(centers: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """At most `number` classes, all if there are no more and else evenly over the table, and their rows."""
    last = centers.shape[0] - 1
    classes = jnp.asarray(np.linspace(0, last, min(last + 1, number)).round(), jnp.int32)
    return classes, rows_of(centers, classes)


def gather_batch(
    axis_name: AxisName, mesh: AbstractMesh | None, labels: jax.Array, used: jax.Array, *values: jax.Array
) -> tuple[jax.Array, ...]:
    """The whole batch on every device, with the axes of the labels, and the mapped one, made one."""
    arrays, ndim = (labels, used, *values), labels.ndim
    if axis_name is not None:
        arrays, ndim = tuple(_over_axis(axis_name, a) for a in arrays), ndim + 1
    labels, used, *rest = (a.reshape(-1, *a.shape[ndim:]) for a in arrays)
    if mesh is not None:  # Else the sums of the values come out whole, as long as the labels are.
        rest = [_placement.whole(mesh, a) for a in rest]
    return _placement.whole(mesh, labels), _placement.whole(mesh, used), *rest


def _over_axis(axis_name: AxisName, a: jax.Array) -> jax.Array:
    # A sum of disjoint parts rather than all_gather: its result is known to be the same on every
    # device, which shard_map asks of centers that leave it replicated.
    parts = jnp.zeros((lax.psum(1, axis_name), *a.shape), jnp.int32 if a.dtype == jnp.bool_ else a.dtype)
    total: jax.Array = lax.psum(parts.at[lax.axis_index(axis_name)].set(a.astype(parts.dtype)), axis_name)
    return total.astype(a.dtype)


@partial(jax.jit, static_argnums=2)  # Else every call outside of jit would compile the search anew.
def slots(labels: jax.Array, used: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """One slot for each class of a flat batch, however often the class stands in it.

    There are as many as samples, or as classes if these are fewer. Returns the slot of each sample, `NO_SLOT`
    where it is not used, and the class that each slot would hold.
    """
    if _at_most(num_classes, labels.size):
        slot, classes = labels, jnp.arange(num_classes, dtype=labels.dtype)
    else:
        # One batch after the other under vmap: checkify knows no while loop that is mapped.
        search = jax.custom_batching.sequential_vmap(partial(_representatives, num_classes=num_classes))
        slot, classes = search(labels, used), labels
    return jnp.where(used, slot, NO_SLOT).astype(jnp.int32), classes


def _representatives(labels: jax.Array, used: jax.Array, num_classes: int) -> jax.Array:
    """For each used sample the position of the last used one of its class, in a flat batch.

    Samples meet in a hash table, where the last one to arrive at a place wins it for its class. Those of the
    other classes there try again at another place. No sorting, and no array as long as there are classes.
    """
    size = labels.size + 1 + labels.size % 2  # Odd: every bit of a label counts in the remainder.
    direct = _at_most(num_classes, size)
    position = jnp.arange(labels.size, dtype=jnp.int32)
    labels = labels.astype(jnp.int32)

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


def rows_of(table: ArrayLike, classes: jax.Array) -> jax.Array:
    """The rows of `classes`, zero for one that is not in the table. For a read that the write depends on."""
    table = jnp.asarray(table)
    rows = table.at[jnp.clip(classes, 0, table.shape[0] - 1)].get(mode="promise_in_bounds")
    there = (classes < table.shape[0]).reshape(-1, *(1,) * (rows.ndim - 1))
    return jnp.where(there, rows, jnp.zeros((), rows.dtype))


def add_rows(table: jax.Array, classes: jax.Array, steps: jax.Array) -> jax.Array:
    """`table` with `steps` added to the rows of `classes`, each of which stands there once."""
    if table.dtype == steps.dtype:
        return table.at[classes].add(steps, mode="drop")
    # Added in the precision of the steps, and rounded once.
    return write_rows(table, classes, rows_of(table, classes).astype(steps.dtype) + steps)


def write_rows(table: ArrayLike, classes: jax.Array, rows: jax.Array) -> jax.Array:
    """`table` with `rows` at `classes`, each of which stands there once; one not in the table is dropped."""
    table = jnp.asarray(table)
    return table.at[classes].set(rows.astype(table.dtype), mode="drop")


def always(after: Any) -> jax.Array:
    """True, but only known once every leaf of `after` has been computed.

    XLA drops an optimization barrier before it orders reads and writes; a value that it can't fold stays.
    """
    true = jnp.ones((), jnp.bool_)
    for leaf in jax.tree.leaves(after):
        total = jnp.sum(jnp.asarray(leaf).astype(jnp.float32))
        true = true & (jnp.isnan(total) | (total == total))
    return true
