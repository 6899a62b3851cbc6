"""A step of an optax transformation on some rows of a table.

A table of the state is a leaf that `tx.init` made from the table of rows, such as a moment; scalars are not
tables. The transformation sees `{"centers": rows}`.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jax_centerloss._rows import table
from jax_centerloss._rows.groups import Groups
from jax_centerloss._rows.rounding import Seed


def init_state(
    tx: optax.GradientTransformation, rows: jax.Array, state_dtype: DTypeLike | None = None
) -> Any:
    """The state of `tx` for a table in the compute dtype, its floating-point tables cast to `state_dtype`."""
    # With a table in half precision, some transformations would change the dtype of their state in the first
    # step, and raise.
    state = tx.init({"centers": rows.astype(table.compute_dtype(rows))})
    return state if state_dtype is None else map_tables(tx, partial(_cast_floats, dtype=state_dtype), state)


def place_state(state: Any, rows: jax.Array) -> Any:
    """Gives an initial state the placement that it has after the first step, and copies shared arrays.

    Without this the second step would be compiled again, or fail since a donated array stands in it twice.
    """
    seen = {id(rows)}

    def place(leaf: Any) -> Any:
        # Some states hold the table itself, or one array twice. A copy keeps the placement of its original.
        is_shared = id(leaf) in seen
        seen.add(id(leaf))
        return jnp.copy(leaf) if is_shared else _place_leaf(leaf, rows)

    return jax.tree.map(place, state)


def _place_leaf(leaf: Any, rows: Any) -> Any:  # `jax.Array` has no type for `format`.
    """A scalar is replicated on the devices of the rows. A table gets their memory layout."""
    if any(isinstance(a, jax.core.Tracer) or not isinstance(a, jax.Array) for a in (leaf, rows)):
        return leaf
    if not leaf.ndim and isinstance(rows.sharding, NamedSharding):
        return jax.device_put(leaf, NamedSharding(rows.sharding.mesh, P()))
    if leaf.shape != rows.shape:
        return leaf
    order = rows.format.layout.major_to_minor
    if leaf.format.layout.major_to_minor == order:
        return leaf
    return jax.device_put(leaf, Format(Layout(order), leaf.sharding))


def compute_steps(
    tx: optax.GradientTransformation,
    state_dtype: DTypeLike | None,
    rows: jax.Array,
    state: Any,
    batch: Groups,
    gradient: jax.Array,
    seed: Seed,
) -> tuple[jax.Array, Any]:
    """The steps `(S, D)` of `tx` for the slots of `batch`, and the whole state, updated at their rows."""
    # On a GPU the sums of slots without a class have no meaning, and must not enter a norm over rows.
    has_class = (batch.classes < rows.shape[0])[:, None]
    gradient = jnp.where(has_class, gradient, jnp.zeros((), gradient.dtype))
    dtype = table.compute_dtype(rows)
    batch_rows = table.read(rows, batch).astype(dtype)
    row_state = map_tables(tx, partial(table.read, batch=batch), state)
    if state_dtype is not None:
        row_state = map_tables(tx, partial(_cast_floats, dtype=dtype), row_state)
    steps, new_state = tx.update({"centers": gradient.astype(dtype)}, row_state, {"centers": batch_rows})

    table_indices = itertools.count(1)  # For `table.write`; that of the rows themselves is 0.

    def write(new_rows: jax.Array, old_rows: jax.Array, state_table: jax.Array) -> jax.Array:
        # Makes the write depend on the read. Where new rows do not depend on old ones, as in a state that
        # keeps the last gradient, XLA could otherwise write first, and copy the table for the read.
        was_read = table.true_after(old_rows.reshape(-1)[:1])
        after = batch._replace(classes=table.classes_where(was_read, batch.classes))
        return table.write(state_table, after, new_rows, seed, next(table_indices))

    return steps["centers"], map_tables(tx, write, new_state, row_state, state)


def _cast_floats(leaf: jax.Array, dtype: DTypeLike) -> jax.Array:
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def map_tables(
    tx: optax.GradientTransformation, function: Callable[..., Any], state: Any, *others: Any
) -> Any:
    """`state` with `function` applied to its tables; all other leaves stay."""

    # `is_table` is the number of axes of a leaf made from the table, and 0 for any other.
    def apply(is_table: int, leaf: Any, *rest: Any) -> Any:
        return function(leaf, *rest) if is_table else leaf

    are_tables = optax.tree_utils.tree_map_params(tx, jnp.ndim, state, transform_non_params=lambda leaf: 0)
    return jax.tree.map(apply, are_tables, state, *others)
