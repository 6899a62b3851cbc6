"""A step of an optax transformation on some rows of the class table."""

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
    """The state of `tx` for centers in the compute dtype, with its tables cast to `state_dtype` if given."""
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
    """Returns the updates of `tx` for the rows of `classes`, and its new state with all rows."""
    dtype = _table.compute_dtype(centers)
    rows = _table.gather_class_rows(centers, classes).astype(dtype)
    row_state = map_tables(tx, lambda table: _table.gather_class_rows(table, classes), state)
    if state_dtype is not None:
        row_state = map_tables(tx, partial(_cast_floats, dtype=dtype), row_state)
    steps, new_state = tx.update({"centers": gradient.astype(dtype)}, row_state, {"centers": rows})

    table_numbers = itertools.count(1)  # For the rounding; the table of centers has number 0.

    def write(new_rows: jax.Array, old_rows: jax.Array, table: jax.Array) -> jax.Array:
        # Makes the write depend on the read. New rows need not depend on old ones, as in a state that keeps
        # the last gradient, and XLA could then write first and copy the table for the read.
        was_read = _table.true_after(old_rows.reshape(-1)[:1])
        at = jnp.where(was_read, classes, _groups.NO_CLASS)
        return _table.set_rows(table, at, new_rows, seed, next(table_numbers))

    return steps["centers"], map_tables(tx, write, new_state, row_state, state)


def move_rows(
    tx: optax.GradientTransformation,
    centers: jax.Array,
    state: Any,
    classes: jax.Array,
    gradient: jax.Array,
    seed: jax.Array | None,
    state_dtype: DTypeLike | None,
) -> tuple[jax.Array, Any]:
    """The centers after the step, and the new state."""
    steps, state = compute_steps(tx, centers, state, classes, gradient, seed, state_dtype)
    return _table.add_to_rows(centers, classes, steps, seed), state


def _cast_floats(leaf: jax.Array, dtype: DTypeLike) -> jax.Array:
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def with_tables_of(tx: optax.GradientTransformation, state: Any, other: Any) -> Any:
    """`state` with the tables of `other`."""
    return map_tables(tx, lambda _, table: table, state, other)


def tables_of(tx: optax.GradientTransformation, state: Any) -> list[jax.Array]:
    """The leaves of an optimizer's state that `tx` has made from the centers, unless they are scalars.

    If `tx` is row-separable, each has an entry for every row of the centers.
    """
    marks, leaves = jax.tree.leaves(_table_marks(tx, state)), jax.tree.leaves(state)
    return [leaf for is_table, leaf in zip(marks, leaves, strict=True) if is_table]


def map_tables(
    tx: optax.GradientTransformation, function: Callable[..., Any], state: Any, *others: Any
) -> Any:
    """`state` with `function` applied to its tables; all other leaves stay."""

    def apply(is_table: bool, leaf: Any, *rest: Any) -> Any:
        return function(leaf, *rest) if is_table else leaf

    return jax.tree.map(apply, _table_marks(tx, state), state, *others)


def _table_marks(tx: optax.GradientTransformation, state: Any) -> Any:
    return optax.tree_utils.tree_map_params(
        tx, lambda leaf: jnp.ndim(leaf) > 0, state, transform_non_params=lambda leaf: False
    )
