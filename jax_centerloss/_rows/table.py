"""Reads and writes the rows of a table, such that XLA updates it in place.

Ranks are written out, as in `mask[:, None]`: users may set `jax_numpy_rank_promotion` to "raise".
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jax_centerloss._rows import groups, placement, rounding
from jax_centerloss._rows.groups import NO_CLASS, Groups
from jax_centerloss._rows.placement import AxisName
from jax_centerloss._rows.rounding import Seed


def compute_dtype(*arrays: jax.Array) -> Any:
    """float32, or float64 if an operand has it: sums and counts are never in half precision."""
    return jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32


def gather_label_rows(table: jax.Array, labels: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The row of each sample's class, sharded like `x`, and whether the label is in `[0, C)`.

    Only the sharding and the dtype of `x` are used. The row of a label out of range is arbitrary. No mask
    enters the gather. So all callers in a program issue the same gather, and XLA runs it once. Rows are in
    the compute dtype: their gradients are summed by class in that dtype, and then cast to that of the table.
    """
    if not labels.ndim:  # JAX can't gather a single row of a table that is sharded over Explicit axes.
        rows, in_range = gather_label_rows(table, labels[None], x[None])
        return rows[0], in_range[0]
    num_classes = table.shape[0]
    in_range = (labels >= 0) & (labels < num_classes)
    return _gather(table, jnp.clip(labels, 0, num_classes - 1), x), in_range


@jax.custom_jvp
def _gather(table: jax.Array, index: jax.Array, x: jax.Array) -> jax.Array:
    rows = table.at[index].get(mode="promise_in_bounds", out_sharding=placement.sharding_of(x, table))
    return rows.astype(compute_dtype(x, table))


@partial(_gather.defjvp, symbolic_zeros=True)
def _gather_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    table, index, x = primals
    rows = _gather(table, index, x)
    if isinstance(tangents[0], SymbolicZero):  # The table is constant: no (C, D) tangent is made.
        return rows, jnp.zeros_like(rows)
    mesh = placement.mesh_of(table, index, x)
    index = placement.replicate(index, mesh)
    # The cast comes before the gather, so that the backward pass sums over samples before it casts back.
    tangent = tangents[0].astype(rows.dtype)
    return rows, placement.call_for_platform(partial(_gather_tangent, mesh=mesh), tangent, index, rows)


def _gather_tangent(
    tangent: jax.Array, index: jax.Array, rows: jax.Array, *, mesh: Any, platform: str
) -> Any:
    """`tangent[index]`, with the sharding of `rows`. JAX transposes it to get the backward pass.

    The backward pass has to (1) replicate the gradients of samples, (2) on a GPU sum them by class, and (3)
    add them to rows of one table of zeros, not of one for each shard. This function is the transpose of
    these steps, in reverse order: a gather for (3), then the transpose of (1) and (2). A function that does
    all three steps can't be transposed on every mesh.
    """
    flat = index.reshape(-1)
    if platform == "gpu":
        by_class = groups.group(flat.astype(jnp.int32), tangent.shape[0], platform)
        classes = _unique_indices(tangent, by_class.classes)
        out = placement.sharding_of(flat[..., None], tangent)
        class_rows = tangent.at[classes].get(mode="fill", fill_value=0, unique_indices=True, out_sharding=out)
    else:
        out = placement.sharding_of(index[..., None], tangent)
        class_rows = tangent.at[index].get(mode="promise_in_bounds", out_sharding=out)

    def replicate_and_sum(gradients: jax.Array) -> jax.Array:
        gradients = placement.replicate(gradients, mesh)
        if platform != "gpu":
            return gradients
        return by_class.sum(gradients.reshape(-1, gradients.shape[-1]))

    return jax.linear_transpose(replicate_and_sum, rows)(class_rows)[0]


def evenly_spaced_rows(table: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """At most `most` classes, evenly spaced over the table, and their rows."""
    last = table.shape[0] - 1
    classes = jnp.asarray(np.linspace(0, last, min(last + 1, most)).round(), jnp.int32)
    return classes, table.at[classes].get(mode="promise_in_bounds")


def read(table: jax.Array, batch: Groups) -> jax.Array:
    """The row of each slot, and zeros for a slot of a class `>= C`.

    Indices are clipped, since `checkify.index_checks` reports an index out of bounds even with `mode="fill"`.
    In sums by class and writes of rows, which drop such indices on purpose, it still reports them.
    """
    rows = table
    if not batch.whole_table:
        rows = table.at[jnp.clip(batch.classes, 0, table.shape[0] - 1)].get(mode="promise_in_bounds")
    return jnp.where(_per_row(batch.classes < table.shape[0], rows), rows, jnp.zeros((), rows.dtype))


def add(table: jax.Array, batch: Groups, steps: jax.Array, seed: Seed = None) -> jax.Array:
    """`table` with the step of each slot added to its row. Slots of a class `>= C` are left out.

    With a seed, a table in half precision gets its rows rounded stochastically.
    """
    if table.dtype == steps.dtype and not batch.whole_table:
        classes = _unique_indices(table, batch.classes)
        return table.at[classes].add(steps, mode="drop", unique_indices=True)
    # A sum with rows in half precision is computed in the dtype of the steps, and rounded once.
    return write(table, batch, read(table, batch).astype(steps.dtype) + steps, seed)


def write(
    table: jax.Array, batch: Groups, rows: jax.Array, seed: Seed = None, table_index: int = 0
) -> jax.Array:
    """`table` with the row of each slot. Slots of a class `>= C` are left out.

    With a seed, a table in half precision gets its rows rounded stochastically. Pass another `table_index`
    for each table that is written with the same seed.
    """
    rows = rounding.round_rows(rows, batch.classes, table.dtype, seed, table_index)
    if batch.whole_table:
        return jnp.where(_per_row(batch.classes < table.shape[0], rows), rows, table)
    return table.at[_unique_indices(table, batch.classes)].set(rows, mode="drop", unique_indices=True)


def _per_row(mask: jax.Array, rows: jax.Array) -> jax.Array:
    return mask.reshape(-1, *(1,) * (rows.ndim - 1))


def _unique_indices(table: jax.Array, classes: jax.Array) -> jax.Array:
    """`classes`, with a distinct index beyond the end of the table for each class that is not in it.

    All indices are then unique. With `unique_indices=True` a GPU needs no atomic operations.
    """
    end = table.shape[0] + classes.shape[0]
    if isinstance(end, int) and end > 2**31:
        raise ValueError(f"num_classes plus the number of samples must be at most 2**31, got {end:,}.")
    beyond = table.shape[0] + jnp.arange(classes.shape[0], dtype=jnp.int32)
    return jnp.where(classes < table.shape[0], classes, beyond)


def classes_where(condition: jax.Array, classes: jax.Array) -> jax.Array:
    """`classes` where `condition` holds, else `NO_CLASS`."""
    return jnp.where(condition, classes, NO_CLASS)


def true_after(tree: Any, axis_name: AxisName = None) -> jax.Array:
    """Always True, but computed from every leaf of `tree`, so that what uses it runs after them.

    A barrier does not work: XLA removes it before it orders reads and writes. It keeps a value that it can't
    fold (https://github.com/jax-ml/jax/issues/25399; tests/test_in_place.py looks for the copies). With
    `axis_name` it uses the leaves of all devices, and `shard_map` knows that a `psum` is the same on each.
    """
    true = jnp.ones((), jnp.bool_)
    for leaf in jax.tree.leaves(tree):
        total = jnp.sum(jnp.asarray(leaf).astype(jnp.float32))
        if axis_name is not None:
            total = lax.psum(total, axis_name)
        true = true & (jnp.isnan(total) | (total == total))  # Holds for every number, and for NaN.
    return true
