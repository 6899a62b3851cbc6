"""Whether an optax transformation can work row by row: it is tried."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_centerloss import _row_steps, _table

# Rows that each step of the trial touches, and how large their gradients are: tiny, usual, and huge for what
# clips. Some come back, some come late.
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
# States that no trial of a few steps shows for what they are.
_OVER_CALLS = (optax.MultiStepsState, optax.ApplyEvery, optax.contrib.SAMState, optax.contrib.MechanicState)


class Verdict(NamedTuple):
    """Of a transformation, on rows of the table only."""

    fault: str | None = None  # Why it can't work by rows.
    in_parts: bool = False  # Whether it can take some rows first, and the others then: none sees the other.


def on_rows(tx: optax.GradientTransformation) -> Verdict:
    """Tries `tx` on a small table: by rows, it has to do what the dense one does to those rows.

    The table is large enough for Adafactor to factor, and gradients go from tiny to huge for what clips.
    Some are NaN on purpose, which the user's `debug_nans` is not meant to find.
    """
    num_classes, feat_dim = 130, 128
    rng = np.random.default_rng(0)
    with (
        jax.ensure_compile_time_eval(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.debug_nans(False),
        jax.debug_infs(False),
    ):
        centers = jnp.asarray(rng.normal(size=(num_classes, feat_dim)), jnp.float32)
        slope = rng.normal(size=centers.shape).astype(np.float32)
        try:
            state = _row_steps.init(tx, centers)
            if any(map(_over_calls, jax.tree.leaves(state, is_leaf=_over_calls))):
                return Verdict("it adds up or adapts over several calls, and each of them has other classes")
            in_parts = True
            shapes: list[tuple[int, ...]] = []
            _row_steps.map_rows(tx, lambda leaf: shapes.append(leaf.shape), state)
            for shape in shapes:
                if shape[0] != num_classes:
                    return Verdict(f"tried on centers {centers.shape}, it keeps state of shape {shape}")
            step, frozen_step = jax.jit(partial(_row_steps.step, tx)), jax.jit(partial(_frozen_step, tx))
            for touched, size in _TRIAL:
                gradient = np.zeros(centers.shape, np.float32)
                noise = rng.normal(size=(len(touched), feat_dim)).astype(np.float32)
                gradient[touched] = size * (slope[touched] + 0.5 * noise)
                chosen = jnp.array(touched, jnp.int32)
                others = [frozen_step(centers, state, chosen, gradient, far) for far in jnp.array([0.0, 1e6])]
                classes = jnp.append(chosen, jnp.int32(num_classes))  # The last slot is empty.
                rows = np.append(gradient[touched], np.zeros((1, feat_dim), np.float32), 0)
                alone = np.arange(len(rows)) == 0
                parts = [
                    step(centers, state, jnp.where(part, classes, num_classes), rows * part[:, None])[0]
                    for part in (alone, ~alone)
                ]
                steps, state = step(centers, state, classes, jnp.asarray(rows))
                in_parts &= _close(steps[:-1], jnp.where(alone[:, None], *parts)[:-1])
                in_parts &= _is_alone(step, tx, centers, state, classes, rows)
                if not all(_close((steps[:-1], state), other) for other in others):
                    return Verdict("the step of one row depends on other rows, or on their number")
                centers = _table.add_rows(centers, classes, steps)
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
            raise TypeError(
                "tx holds values that are being traced. Make the row optimizer outside of jit and vmap: "
                "a rate that changes is a schedule, or one of inject_hyperparams."
            ) from error
        except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            return Verdict(
                f"a step with a gradient, a state and params alone fails ({type(error).__name__}: {error})"
            )
    return Verdict(in_parts=in_parts)


def _is_alone(
    step: Callable[..., Any], tx: Any, centers: jax.Array, state: Any, classes: jax.Array, rows: np.ndarray
) -> bool:
    """Whether NaN in the gradient of one row, which gets through any norm, shows in that row only."""

    def others(gradient: np.ndarray) -> Any:
        steps, moved = step(centers, state, classes, jnp.asarray(gradient))
        return steps[1:-1], _row_steps.map_rows(tx, lambda leaf: leaf.at[classes[0]].set(0), moved)

    spoiled = rows.copy()
    spoiled[0] = np.nan
    return _close(others(spoiled), others(rows))


def _over_calls(node: Any) -> bool:
    return isinstance(node, _OVER_CALLS)


def _frozen_step(
    tx: optax.GradientTransformation,
    centers: jax.Array,
    state: Any,
    chosen: jax.Array,
    gradient: jax.Array,
    far: jax.Array,
) -> tuple[jax.Array, Any]:
    """The `chosen` rows of a dense step, and the state with all others put back.

    To the others' centers and state `far` is added first, which must not show.
    """

    def disturb(leaf: jax.Array) -> jax.Array:
        return (leaf + far.astype(leaf.dtype)).at[chosen].set(leaf[chosen])

    disturbed = _row_steps.map_rows(tx, disturb, state)
    steps, moved = tx.update({"centers": gradient}, disturbed, {"centers": disturb(centers)})
    state = _row_steps.map_rows(tx, lambda new, old: old.at[chosen].set(new[chosen]), moved, state)
    return steps["centers"][chosen], state


def _close(got: Any, want: Any) -> bool:
    def one(a: Any, b: Any) -> bool:
        return np.allclose(a, b, rtol=1e-4, atol=1e-5 * np.max(np.abs(b), initial=0))

    return all(map(one, jax.tree.leaves(got), jax.tree.leaves(want)))
