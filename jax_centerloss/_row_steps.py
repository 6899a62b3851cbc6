"""One step of an optax transformation on some rows of the table."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jax_centerloss import _table


def init(tx: optax.GradientTransformation, centers: jax.Array, state_dtype: DTypeLike | None = None) -> Any:
    # In the precision of the sums: some transformations insist on one dtype from their first step on.
    state = tx.init({"centers": centers.astype(_table.compute_dtype(centers))})
    return state if state_dtype is None else map_rows(tx, partial(_cast, dtype=state_dtype), state)


def step(
    tx: optax.GradientTransformation,
    centers: jax.Array,
    state: Any,
    classes: jax.Array,
    direction: jax.Array,
    seed: jax.Array | None = None,
    state_dtype: DTypeLike | None = None,
) -> tuple[jax.Array, Any]:
    """What `tx` adds to the rows of `classes`, by `direction` as their gradient, and its new state."""
    dtype = _table.compute_dtype(centers)
    rows = _table.rows_of(centers, classes).astype(dtype)
    row_state = map_rows(tx, lambda leaf: _table.rows_of(leaf, classes), state)
    if state_dtype is not None:
        row_state = map_rows(tx, partial(_cast, dtype=dtype), row_state)
    steps, new_state = tx.update({"centers": direction.astype(dtype)}, row_state, {"centers": rows})

    numbers = itertools.count(1)  # Of the tables: that of the centers is 0.

    def write(new: jax.Array, read: jax.Array, old: jax.Array) -> jax.Array:
        # After its read: else a table whose new rows do not depend on its old ones, as where the last
        # gradient is kept, would be copied.
        done = _table.always(read.reshape(-1)[:1])
        return _table.write_rows(old, jnp.where(done, classes, centers.shape[0]), new, seed, next(numbers))

    return steps["centers"], map_rows(tx, write, new_state, row_state, state)


def move(
    tx: optax.GradientTransformation,
    centers: jax.Array,
    state: Any,
    classes: jax.Array,
    direction: jax.Array,
    seed: jax.Array | None,
    state_dtype: DTypeLike | None,
) -> tuple[jax.Array, Any]:
    """The centers after that step, and the new state."""
    steps, state = step(tx, centers, state, classes, direction, seed, state_dtype)
    return _table.add_rows(centers, classes, steps, seed), state


def _cast(leaf: jax.Array, dtype: DTypeLike) -> jax.Array:
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def tables_from(tx: optax.GradientTransformation, state: Any, other: Any) -> Any:
    """`state`, but with what is kept for each row from the `other` one."""
    return map_rows(tx, lambda _, table: table, state, other)


def map_rows(tx: optax.GradientTransformation, function: Callable[..., Any], state: Any, *others: Any) -> Any:
    """`function` on the leaves of an optimizer's state that hold something for each row."""
    by_row = optax.tree_utils.tree_map_params(
        tx, lambda leaf: jnp.ndim(leaf) > 0, state, transform_non_params=lambda leaf: False
    )
    return jax.tree.map(
        lambda rows, leaf, *rest: function(leaf, *rest) if rows else leaf, by_row, state, *others
    )
