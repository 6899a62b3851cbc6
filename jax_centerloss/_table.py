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

from jax_centerloss import _groups, _placement, _rounding

AxisName = Hashable | None


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
    # In this dtype before the read: so is its transpose then, a sum over samples.
    tangent = tangents[0].astype(rows.dtype)
    if mesh is not None and jax.__version_info__ < (0, 10):
        # Of a choice by platform JAX 0.7 takes no gradient on Explicit axes: they get the default one's.
        moved = _tangent_rows(tangent, index, platform=jax.default_backend())
    else:
        moved = _groups.by_platform(_tangent_rows, tangent, index)
    (moved,) = jax.linear_transpose(partial(_placement.whole, mesh), rows)(moved)
    return rows, moved


def _tangent_rows(tangent: jax.Array, index: jax.Array, *, platform: str) -> jax.Array:
    """`tangent[index]`, the transpose of which sums by class in the way of the platform."""
    placed = _placement.sharding_of(index[..., None], tangent)
    if platform != "gpu":
        return tangent.at[index].get(mode="promise_in_bounds", out_sharding=placed)
    flat = index.reshape(-1)
    groups = _groups.group(flat, jnp.ones_like(flat, jnp.bool_), tangent.shape[0], platform)
    rows = tangent.at[_once(tangent, groups.classes)].get(
        mode="fill",
        fill_value=0,
        unique_indices=True,
        out_sharding=_placement.sharding_of(flat[..., None], tangent),
    )
    # Each group's row given to all of its samples: what sums them, backwards.
    like = jnp.broadcast_to(flat[:, None], (flat.size, tangent.shape[1])).astype(tangent.dtype)
    (rows,) = jax.linear_transpose(groups.sum, like)(rows)
    spread: jax.Array = rows.reshape(*index.shape, tangent.shape[1])
    return spread


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


def rows_of(table: ArrayLike, classes: jax.Array) -> jax.Array:
    """The rows of `classes`, zero for one that is not in the table. For a read that the write depends on."""
    table = jnp.asarray(table)
    rows = table.at[jnp.clip(classes, 0, table.shape[0] - 1)].get(mode="promise_in_bounds")
    there = (classes < table.shape[0]).reshape(-1, *(1,) * (rows.ndim - 1))
    return jnp.where(there, rows, jnp.zeros((), rows.dtype))


def add_rows(
    table: jax.Array, classes: jax.Array, steps: jax.Array, seed: jax.Array | None = None
) -> jax.Array:
    """`table` with `steps` added to the rows of `classes`, each of which stands there once."""
    if table.dtype == steps.dtype:
        return table.at[_once(table, classes)].add(steps, mode="drop", unique_indices=True)
    # Added in the precision of the steps, and rounded once.
    return write_rows(table, classes, rows_of(table, classes).astype(steps.dtype) + steps, seed)


def write_rows(
    table: ArrayLike, classes: jax.Array, rows: jax.Array, seed: jax.Array | None = None, number: int = 0
) -> jax.Array:
    """`table` with `rows` at `classes`, each of which stands there once; one not in the table is dropped.

    With a seed, rows in half precision are rounded stochastically. Tables of one seed differ in `number`.
    """
    table = jnp.asarray(table)
    rows = _rounding.round_rows(rows, classes, table.dtype, seed, number)
    return table.at[_once(table, classes)].set(rows, mode="drop", unique_indices=True)


def _once(table: jax.Array, classes: jax.Array) -> jax.Array:
    """`classes` with another index beyond the table for each that is not in it: GPUs then need no atomics."""
    number = table.shape[0] + classes.shape[0]
    if isinstance(number, int) and number > 2**31:
        raise ValueError(f"classes and samples have to be at most 2**31 together, got {number:,}.")
    beyond = table.shape[0] + jnp.arange(classes.shape[0], dtype=jnp.int32)
    return jnp.where(classes < table.shape[0], classes, beyond)


def always(after: Any, axis_name: AxisName = None) -> jax.Array:
    """True, but only known once every leaf of `after` has been computed, on every device of the mapped axis.

    XLA drops an optimization barrier before it orders reads and writes; a value that it can't fold stays.
    """
    true = jnp.ones((), jnp.bool_)
    for leaf in jax.tree.leaves(after):
        total = jnp.sum(jnp.asarray(leaf).astype(jnp.float32))
        if axis_name is not None:  # Else shard_map would not know that the centers stay the same everywhere.
            total = lax.psum(total, axis_name)
        true = true & (jnp.isnan(total) | (total == total))
    return true
