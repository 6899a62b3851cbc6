"""Gathers and scatters of the rows of a table, written so that XLA updates the table in place."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jax_centerloss import _groups, _placement, _rounding
from jax_centerloss._options import AxisName


def compute_dtype(*arrays: jax.Array) -> Any:
    """float32, or float64 if an operand has it: sums and counts are never in half precision."""
    return jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32


def gather_label_rows(centers: jax.Array, labels: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The center of each sample's class, sharded like `x`, and whether the label is in `[0, C)`.

    Only the sharding and the dtype of `x` are used. The row of a label out of range is arbitrary. No mask
    enters the gather, so that loss and update issue the same gather, which XLA then runs once. Rows are in
    the compute dtype: their gradients are summed by class in that dtype, and cast to the dtype of the centers
    after that.
    """
    if not labels.ndim:  # JAX can't gather a single row of a table that is sharded over Explicit axes.
        rows, in_range = gather_label_rows(centers, labels[None], x[None])
        return rows[0], in_range[0]
    num_classes = centers.shape[0]
    in_range = (labels >= 0) & (labels < num_classes)
    return _gather(centers, jnp.clip(labels, 0, num_classes - 1), x), in_range


@jax.custom_jvp
def _gather(centers: jax.Array, index: jax.Array, x: jax.Array) -> jax.Array:
    rows = centers.at[index].get(mode="promise_in_bounds", out_sharding=_placement.sharding_of(x, centers))
    return rows.astype(compute_dtype(x, centers))


@partial(_gather.defjvp, symbolic_zeros=True)
def _gather_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Gathers rows of the tangent.

    The index is replicated, and in the backward pass the cotangents are. The backward pass then scatters into
    the table once, and not into a full table per shard.
    """
    centers, index, x = primals
    rows = _gather(centers, index, x)
    if isinstance(tangents[0], SymbolicZero):  # The centers are constant: no (C, D) tangent is made.
        return rows, jnp.zeros_like(rows)
    mesh = _placement.mesh_of(centers, index, x)
    index = _placement.replicate(index, mesh)
    # The cast comes before the gather, so that the transpose sums over samples before it casts back.
    tangent = tangents[0].astype(rows.dtype)
    if mesh is not None and jax.__version_info__ < (0, 10):
        # JAX before 0.10 can't differentiate `lax.platform_dependent` on Explicit axes. On any mesh the
        # default backend stands for the platform.
        gathered = _gather_tangent(tangent, index, platform=jax.default_backend())
    else:
        gathered = _placement.call_for_platform(_gather_tangent, tangent, index)
    # The backward pass is the transpose of this function, and has to apply `replicate` to the cotangents. So
    # here the transpose of `replicate` is applied.
    return rows, _transpose(partial(_placement.replicate, mesh=mesh), rows)(gathered)


def _gather_tangent(tangent: jax.Array, index: jax.Array, *, platform: str) -> jax.Array:
    """`tangent[index]`. Its transpose sums by class, with the algorithm that is fast on `platform`."""
    out_sharding = _placement.sharding_of(index[..., None], tangent)
    if platform != "gpu":
        return tangent.at[index].get(mode="promise_in_bounds", out_sharding=out_sharding)
    flat = index.reshape(-1)
    classes, sum_by_class = _groups.group_on_gpu(flat, jnp.ones_like(flat, jnp.bool_), tangent.shape[0])
    rows = tangent.at[_unique_indices(tangent, classes)].get(
        mode="fill",
        fill_value=0,
        unique_indices=True,
        out_sharding=_placement.sharding_of(flat[..., None], tangent),
    )
    # The transpose of `sum_by_class` looks up the rows of samples, (S, D) to (N, D), and the backward pass
    # transposes it back. Of `like` only the type is used. It is made from `flat`, since inside of `shard_map`
    # it has to vary over the same mesh axes.
    like = jnp.broadcast_to(flat[:, None], (flat.size, tangent.shape[1])).astype(tangent.dtype)
    return _transpose(sum_by_class, like)(rows).reshape(*index.shape, tangent.shape[1])


def _transpose(linear: Callable[[jax.Array], jax.Array], like: jax.Array) -> Callable[..., jax.Array]:
    """The transpose of a linear function, whose argument has the type of `like`."""
    transpose: Any = jax.linear_transpose(linear, like)
    return lambda cotangent: transpose(cotangent)[0]


def evenly_spaced_rows(centers: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """At most `most` classes, evenly spaced over the table, and their centers."""
    last = centers.shape[0] - 1
    classes = jnp.asarray(np.linspace(0, last, min(last + 1, most)).round(), jnp.int32)
    return classes, gather_class_rows(centers, classes)


def gather_class_rows(table: ArrayLike, classes: jax.Array) -> jax.Array:
    """The rows of `classes`, and zeros for a class `>= C`. No class may be negative.

    Indices are clipped, since `checkify.index_checks` reports an index out of bounds even with
    `mode="fill"`. Where an index is dropped (in sums by slot, `set_rows` and `add_to_rows`), it still
    reports one.
    """
    table = jnp.asarray(table)
    rows = table.at[jnp.clip(classes, 0, table.shape[0] - 1)].get(mode="promise_in_bounds")
    in_table = (classes < table.shape[0]).reshape(-1, *(1,) * (rows.ndim - 1))
    return jnp.where(in_table, rows, jnp.zeros((), rows.dtype))


def add_to_rows(
    table: jax.Array, classes: jax.Array, steps: jax.Array, seed: jax.Array | None = None
) -> jax.Array:
    """`table` with `steps` added at `classes`, which may not repeat a class. Classes `>= C` are dropped.

    With a seed, rows of another dtype than the steps are rounded stochastically.
    """
    if table.dtype == steps.dtype:
        return table.at[_unique_indices(table, classes)].add(steps, mode="drop", unique_indices=True)
    # A sum with rows in half precision is computed in the dtype of the steps, and rounded once.
    return set_rows(table, classes, gather_class_rows(table, classes).astype(steps.dtype) + steps, seed)


def set_rows(
    table: ArrayLike, classes: jax.Array, rows: jax.Array, seed: jax.Array | None = None, table_index: int = 0
) -> jax.Array:
    """`table` with `rows` written at `classes`, which may not repeat a class. Classes `>= C` are dropped.

    With a seed, rows in half precision are rounded stochastically. Pass another `table_index` for each table
    that is written with the same seed.
    """
    table = jnp.asarray(table)
    rows = _rounding.round_rows(rows, classes, table.dtype, seed, table_index)
    return table.at[_unique_indices(table, classes)].set(rows, mode="drop", unique_indices=True)


def _unique_indices(table: jax.Array, classes: jax.Array) -> jax.Array:
    """`classes`, with a distinct index beyond the end of the table for each class that is not in it.

    All indices are then unique. With `unique_indices=True` a GPU needs no atomic operations.
    """
    end = table.shape[0] + classes.shape[0]
    if isinstance(end, int) and end > 2**31:
        raise ValueError(f"num_classes plus the number of samples must be at most 2**31, got {end:,}.")
    beyond = table.shape[0] + jnp.arange(classes.shape[0], dtype=jnp.int32)
    return jnp.where(classes < table.shape[0], classes, beyond)


def true_after(tree: Any, axis_name: AxisName = None) -> jax.Array:
    """Always True, but computed from every leaf of `tree`, so that what uses it runs after them.

    XLA removes an optimization barrier before it orders reads and writes, but keeps a value that it can't
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
