"""A step of an optax transformation on some rows of the centers.

The "tables" of its state are the leaves that it made from the centers and that are no scalars.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jax_centerloss import _groups, _table


def init_state(
    tx: optax.GradientTransformation, centers: jax.Array, state_dtype: DTypeLike | None = None
) -> Any:
    """The state of `tx` for centers in the compute dtype, its floating-point tables cast to `state_dtype`."""
    # With centers in half precision, some transformations would change the dtype of their state in the first
    # step, and raise.
    state = tx.init({"centers": centers.astype(_table.compute_dtype(centers))})
    return state if state_dtype is None else map_tables(tx, partial(_cast_floats, dtype=state_dtype), state)


def compute_steps(
    tx: optax.GradientTransformation,
    centers: jax.Array,
    state: Any,
    classes: jax.Array,
    gradient: jax.Array,
    seed: jax.Array | None = None,
    state_dtype: DTypeLike | None = None,
) -> tuple[jax.Array, Any]:
    """Returns the steps of `tx` for the rows of `classes`, and the whole state, updated at these rows."""
    dtype = _table.compute_dtype(centers)
    rows = _table.gather_class_rows(centers, classes).astype(dtype)
    row_state = map_tables(tx, lambda table: _table.gather_class_rows(table, classes), state)
    if state_dtype is not None:
        row_state = map_tables(tx, partial(_cast_floats, dtype=dtype), row_state)
    steps, new_state = tx.update({"centers": gradient.astype(dtype)}, row_state, {"centers": rows})

    table_indices = itertools.count(1)  # For `set_rows`; the table of centers has index 0.

    def write(new_rows: jax.Array, old_rows: jax.Array, table: jax.Array) -> jax.Array:
        # Makes the write depend on the read. Where new rows do not depend on old ones, as in a state that
        # keeps the last gradient, XLA could otherwise write first, and copy the table for the read.
        was_read = _table.true_after(old_rows.reshape(-1)[:1])
        at = jnp.where(was_read, classes, _groups.NO_CLASS)
        return _table.set_rows(table, at, new_rows, seed, next(table_indices))

    return steps["centers"], map_tables(tx, write, new_state, row_state, state)


def update_rows(
    tx: optax.GradientTransformation,
    centers: jax.Array,
    state: Any,
    classes: jax.Array,
    gradient: jax.Array,
    seed: jax.Array | None,
    state_dtype: DTypeLike | None,
) -> tuple[jax.Array, Any]:
    """Returns the centers with a step at the rows of `classes`, and the new state."""
    steps, state = compute_steps(tx, centers, state, classes, gradient, seed, state_dtype)
    return _table.add_to_rows(centers, classes, steps, seed), state


def _cast_floats(leaf: jax.Array, dtype: DTypeLike) -> jax.Array:
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def with_tables_of(tx: optax.GradientTransformation, state: Any, other: Any) -> Any:
    """`state` with its tables replaced by those of `other`."""
    return map_tables(tx, lambda _, table: table, state, other)


def tables_of(tx: optax.GradientTransformation, state: Any) -> list[jax.Array]:
    """The tables of the state.

    If `tx` is row-separable (see `_separability`), each has an entry for every row of the centers.
    """
    marks, leaves = jax.tree.leaves(_table_mask(tx, state)), jax.tree.leaves(state)
    return [leaf for is_table, leaf in zip(marks, leaves, strict=True) if is_table]


def map_tables(
    tx: optax.GradientTransformation, function: Callable[..., Any], state: Any, *others: Any
) -> Any:
    """`state` with `function` applied to its tables; all other leaves stay."""

    def apply(is_table: bool, leaf: Any, *rest: Any) -> Any:
        return function(leaf, *rest) if is_table else leaf

    return jax.tree.map(apply, _table_mask(tx, state), state, *others)


def _table_mask(tx: optax.GradientTransformation, state: Any) -> Any:
    """A tree of booleans: whether a leaf of `state` is a table."""
    return optax.tree_utils.tree_map_params(
        tx, lambda leaf: jnp.ndim(leaf) > 0, state, transform_non_params=lambda leaf: False
    )
