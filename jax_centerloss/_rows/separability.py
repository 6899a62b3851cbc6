"""Finds out by a trial whether an optax transformation is "row-separable".

A transformation is row-separable if a step on some rows changes them and their state as a dense step would,
whatever the other rows hold and however many there are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_centerloss._rows import table, transform
from jax_centerloss._rows.groups import NO_CLASS, Groups

# Large enough for Adafactor to factor its second moments.
_NUM_CLASSES, _FEAT_DIM = 130, 128
# The rows that each step of the trial touches, and the size of their gradients. Some rows are touched again,
# some appear late. Gradients are tiny, usual, or large enough for clipping.
_TRIAL = (
    ([5, 2, 9], 1e-3),
    ([5, 9, 77], 1.0),
    ([2, 9, 5], 1.0),
    ([2, 129, 0], 1e3),
    ([7, 5, 2], 1.0),
    ([9, 2, 1], 1e3),
    ([7, 3, 4], 1.0),
    ([5, 129, 9], 1e8),
)
# States of transformations that need several calls with the same rows. The trial restores the rows that a
# step does not touch, and so can't see what such a state would do to them.
_ACCUMULATES = (optax.MultiStepsState, optax.ApplyEvery, optax.contrib.SAMState, optax.contrib.MechanicState)


class Separability(NamedTuple):
    problem: str | None = None  # Why the transformation is not row-separable, or None if it is.
    in_blocks: bool = False  # Whether a batch can be updated in blocks, since no row depends on another.


def find_separability(tx: optax.GradientTransformation) -> Separability:
    """Compares steps of `tx` on some rows of a small table with dense steps.

    Each step is also tried with NaN in a gradient, which the user's `jax_debug_nans` should not report.
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
            return Separability(
                f"tx.update(gradients, state, params) fails ({type(error).__name__}: {error})"
            )


def _run_trial(tx: optax.GradientTransformation) -> Separability:
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(_NUM_CLASSES, _FEAT_DIM)), jnp.float32)
    base_gradient = rng.normal(size=rows.shape).astype(np.float32)
    state = transform.init_state(tx, rows)
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, _ACCUMULATES))
    if any(isinstance(leaf, _ACCUMULATES) for leaf in leaves):
        return Separability("it accumulates or adapts over several calls, which have different classes")
    tables: list[jax.Array] = []
    transform.map_tables(tx, tables.append, state)
    for state_table in tables:
        if state_table.shape[0] != _NUM_CLASSES:
            return Separability(f"for rows {rows.shape} it keeps state of shape {state_table.shape}")
    by_rows = jax.jit(partial(_step_by_rows, tx))
    dense = jax.jit(partial(_disturbed_step, tx))
    in_blocks = True
    for touched, size in _TRIAL:
        gradient = np.zeros(rows.shape, np.float32)
        noise = rng.normal(size=(len(touched), _FEAT_DIM)).astype(np.float32)
        gradient[touched] = size * (base_gradient[touched] + 0.5 * noise)
        touched_rows = jnp.array(touched, jnp.int32)
        expected = [dense(rows, state, touched_rows, gradient, offset) for offset in jnp.array([0.0, 1e6])]
        # The last slot has no class, like some slots of a batch.
        classes = jnp.append(touched_rows, NO_CLASS)
        gradients = np.append(gradient[touched], np.zeros((1, _FEAT_DIM), np.float32), 0)
        in_blocks &= _nan_stays_in_its_row(by_rows, tx, rows, state, classes, gradients)
        steps, state = by_rows(rows, state, classes, jnp.asarray(gradients))
        if not all(_all_close((steps[:-1], state), other) for other in expected):
            return Separability("the step of a row depends on rows outside of the batch, or on num_classes")
        rows = table.add(rows, _groups_of(classes), steps)
    return Separability(in_blocks=in_blocks)


def _groups_of(classes: jax.Array) -> Groups:
    return Groups(classes, lambda values: values, whole_table=False)


def _step_by_rows(
    tx: optax.GradientTransformation, rows: jax.Array, state: Any, classes: jax.Array, gradients: jax.Array
) -> tuple[jax.Array, Any]:
    return transform.compute_steps(tx, rows, state, _groups_of(classes), gradients)


def _disturbed_step(
    tx: optax.GradientTransformation,
    rows: jax.Array,
    state: Any,
    touched: jax.Array,
    gradient: jax.Array,
    offset: jax.Array,
) -> tuple[jax.Array, Any]:
    """A dense step, after `offset` was added to all rows that it does not touch.

    Returns the steps of the touched rows, and the state with the untouched rows restored. For a
    transformation that is row-separable neither depends on `offset`.
    """

    def disturb(array: jax.Array) -> jax.Array:
        return (array + offset.astype(array.dtype)).at[touched].set(array[touched])

    def restore(new: jax.Array, old: jax.Array) -> jax.Array:
        return old.at[touched].set(new[touched])

    disturbed = transform.map_tables(tx, disturb, state)
    steps, new_state = tx.update({"centers": gradient}, disturbed, {"centers": disturb(rows)})
    return steps["centers"][touched], transform.map_tables(tx, restore, new_state, state)


def _nan_stays_in_its_row(
    by_rows: Callable[..., Any],
    tx: optax.GradientTransformation,
    rows: jax.Array,
    state: Any,
    classes: jax.Array,
    gradients: np.ndarray,
) -> bool:
    """Whether NaN in the gradient of the first row changes no other row. A norm over rows would spread it."""

    def other_rows(gradients: np.ndarray) -> Any:
        steps, new_state = by_rows(rows, state, classes, jnp.asarray(gradients))
        without_first = transform.map_tables(tx, lambda array: array.at[classes[0]].set(0), new_state)
        return steps[1:-1], without_first

    with_nan = gradients.copy()
    with_nan[0] = np.nan
    return _all_close(other_rows(with_nan), other_rows(gradients))


def _all_close(got: Any, want: Any) -> bool:
    def close(a: Any, b: Any) -> bool:
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        return np.allclose(a, b, rtol=1e-4, atol=1e-5 * np.max(np.abs(b), initial=0))

    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return all(close(a, b) for a, b in pairs)
