"""Finds out by a trial whether an optax transformation is "row-separable".

A transformation is row-separable if a step on some rows changes them and their state as a dense step would,
whatever the other rows hold and however many there are.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import GradientTransformation

from jax_centerloss._rows import table, transform
from jax_centerloss._rows.groups import NO_CLASS, Groups

# Large enough for Adafactor to factor its second moments.
_NUM_CLASSES, _FEAT_DIM = 130, 128
# The rows that each step of the trial touches: some are touched again, some appear late.
_TOUCHED = ([5, 2, 9], [5, 9, 77], [2, 9, 5], [2, 129, 0], [7, 5, 2], [9, 2, 1], [7, 3, 4], [5, 129, 9])
# The sizes of the steps' gradients: tiny, usual, or large enough for clipping.
_SIZES = (1e-3, 1.0, 1.0, 1e3, 1.0, 1e3, 1.0, 1e8)
# States of transformations that need several calls with the same rows. The trial does not look at
# rows that a step does not touch, which such a state would change later.
_ACCUMULATES = (optax.MultiStepsState, optax.ApplyEvery, optax.contrib.SAMState, optax.contrib.MechanicState)


def find_separability(tx: GradientTransformation) -> tuple[str | None, bool]:
    """Why `tx` is not row-separable, or None if it is, and whether a batch can be updated in blocks.

    It can be if no row depends on another. Steps of `tx` on some rows of a small table are compared with
    dense steps. Each step is also tried with NaN in a gradient, which the user's `jax_debug_nans` should not
    report.
    """
    with (
        jax.ensure_compile_time_eval(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.debug_nans(False),
        jax.debug_infs(False),
    ):
        try:
            return _run_trial(tx)
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
            raise TypeError(
                "tx holds values that are being traced. Make the row optimizer outside of jit and vmap: "
                "for a rate that changes use a schedule, or optax.inject_hyperparams."
            ) from error
        except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            return f"tx.update(gradients, state, params) fails ({type(error).__name__}: {error})", False


def _run_trial(tx: GradientTransformation) -> tuple[str | None, bool]:
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(_NUM_CLASSES, _FEAT_DIM)), jnp.float32)
    base_gradient = rng.normal(size=rows.shape).astype(np.float32)
    state = transform.init_state(tx, rows)
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, _ACCUMULATES))
    if any(isinstance(leaf, _ACCUMULATES) for leaf in leaves):
        return "it accumulates or adapts over several calls, which have different classes", False
    tables: list[jax.Array] = []
    transform.map_tables(tx, tables.append, state)
    for state_table in tables:
        if state_table.shape[0] != _NUM_CLASSES:
            return f"for rows {rows.shape} it keeps state of shape {state_table.shape}", False
    by_rows = jax.jit(partial(_step_by_rows, tx))
    disturbed_step = jax.jit(partial(_disturbed_step, tx))
    in_blocks = True
    for touched, size in zip(_TOUCHED, _SIZES, strict=True):
        gradient = np.zeros(rows.shape, np.float32)
        noise = rng.normal(size=(len(touched), _FEAT_DIM)).astype(np.float32)
        gradient[touched] = size * (base_gradient[touched] + 0.5 * noise)
        touched_rows = jnp.array(touched, jnp.int32)
        offsets = jnp.array([0.0, 1e6])
        expected = [disturbed_step(rows, state, touched_rows, gradient, offset) for offset in offsets]
        # NaN in the gradient of the first row: a norm over rows would spread it to the others.
        with_nan = gradient[touched]
        with_nan[0] = np.nan
        nan_steps, nan_state, _ = by_rows(rows, state, touched_rows, with_nan)
        steps, state, rows = by_rows(rows, state, touched_rows, gradient[touched])
        if not all(_all_close((steps, state), other) for other in expected):
            return "the step of a row depends on rows outside of the batch, or on num_classes", False
        without_first = partial(_with_zero_row, tx, touched[0])
        in_blocks &= _all_close((nan_steps[1:], without_first(nan_state)), (steps[1:], without_first(state)))
    return None, in_blocks


def _step_by_rows(
    tx: GradientTransformation, rows: jax.Array, state: Any, touched: jax.Array, gradients: jax.Array
) -> tuple[jax.Array, Any, jax.Array]:
    """The steps of the touched rows, the new state, and the whole table after the step."""
    # The last slot has no class, like some slots of a batch.
    classes = jnp.append(touched, NO_CLASS)
    gradients = jnp.append(gradients, jnp.zeros_like(gradients[:1]), 0)
    batch = Groups(classes, lambda values: values, whole_table=False)
    steps, state = transform.compute_steps(tx, None, rows, state, batch, gradients, None)
    return steps[:-1], state, table.add(rows, batch, steps)


def _with_zero_row(tx: GradientTransformation, row: int, state: Any) -> Any:
    """The state with one row of its tables set to 0, so that only the others are compared."""
    return transform.map_tables(tx, lambda state_table: state_table.at[row].set(0), state)


def _disturbed_step(
    tx: GradientTransformation, rows: jax.Array, state: Any, touched: Any, gradient: Any, offset: Any
) -> tuple[jax.Array, Any]:
    """A dense step, after `offset` was added to all rows that it does not touch.

    Returns the steps of the touched rows, and the state with the untouched rows restored. For a
    transformation that is row-separable neither depends on `offset`.
    """

    def disturb(array: jax.Array) -> Any:
        return (array + offset.astype(array.dtype)).at[touched].set(array[touched])

    def restore(new: jax.Array, old: jax.Array) -> Any:
        return old.at[touched].set(new[touched])

    disturbed = transform.map_tables(tx, disturb, state)
    steps, new_state = tx.update({"centers": gradient}, disturbed, {"centers": disturb(rows)})
    return steps["centers"][touched], transform.map_tables(tx, restore, new_state, state)


def _all_close(got: Any, want: Any) -> bool:
    def close(a: Any, b: Any) -> bool:
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        return np.allclose(a, b, rtol=1e-4, atol=1e-5 * np.max(np.abs(b), initial=0))

    return jax.tree.all(jax.tree.map(close, got, want))
