"""Any row-separable optax transformation on the touched rows of the table only."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jax_centerloss import _checks, _placement, _table
from jax_centerloss._table import AxisName
from jax_centerloss._update import RULES, pull

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


class RowOptimizer(NamedTuple):
    """A pair of functions, as an `optax.GradientTransformation` is: see `row_optimizer`."""

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


def row_optimizer(tx: optax.GradientTransformation) -> RowOptimizer:
    """Moves the centers of the batch's classes by an optax transformation, and touches no other row.

    What `tx` does to a dense gradient, at a cost that does not grow with the number of classes: of the table
    and of the optimizer's state (momentum, Adam's moments) the rows of the batch's classes are read, moved
    and written, each once, however often its class stands in the batch. All other rows keep their center and
    their state, where a dense optimizer would go on to move them by momentum or weight decay. Scalars of the
    state, such as Adam's count of steps, go on with every step.

    `tx` sees `{"centers": rows}`. Its learning rate is the centers' own, and nothing is scaled by the loss's
    weight. SGD, momentum, Adam and its relatives, AdaGrad, RMSProp, Lion, weight decay, schedules, clipping
    by value and by the global norm, `inject_hyperparams` and chains of them work. What needs more than the
    row's own gradient, state and center is refused: LAMB, LARS, Muon, Adafactor, clipping by the norm of a
    block, added noise, `MultiSteps`, a loss's `value`.

    With the same `rule`, `row_optimizer(optax.sgd(alpha))` is `update_centers`; the default here is
    `"gradient"`. The paper's Caffe layer is `row_optimizer(optax.sgd(alpha, momentum=0.9))` with
    `rule="paper"`.

    Construction tries `tx` on a small table, which takes up to a second, and in several processes has to come
    after `jax.distributed.initialize()`. `tx` works in float32 (float64 for float64 centers), and so is the
    state of centers in half precision.

    Args:
      tx: an optax transformation.

    Returns:
      Two functions.

      `init(params) -> state`: the state of `tx` for `params`, a pytree with one leaf, the `(C, D)` centers.

      `update(params, state, x, labels, *, rule="gradient", where=None, axis_name=None, after=None) ->
      (params, state)`: moved centers, in the tree structure and dtype of `params`, and the new state. The
      direction is that of `rule`; the arguments are those of `update_centers`. Under `jit`, donate
      both `params` and `state` so that they are written in place.

    Raises:
      TypeError: if `tx` is not an optax transformation.
      ValueError: if `tx` can't work row by row; on `update`, if `state` is not of this optimizer and these
        centers, and what `update_centers` raises.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jax_centerloss
      >>> centers = jax_centerloss.row_optimizer(optax.sgd(0.5, momentum=0.9))
      >>> params = jax_centerloss.init_centers(jax.random.key(0), num_classes=1000, feat_dim=2)
      >>> state = centers.init(params)
      >>> params, state = centers.update(params, state, jnp.ones((4, 2)), jnp.array([3, 1, 3, -1]))
    """
    if isinstance(tx, RowOptimizer) or not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"tx must be an optax transformation, such as optax.sgd(0.5), got {tx!r}.")
    reason = _why_not_by_rows(tx)
    if reason is not None:
        raise ValueError(
            f"this transformation can't work row by row: {reason}. Leave out the part of it that does so, or "
            "give the centers the dense optimizer by `with_center_optimizer`."
        )

    def init(params: Any) -> Any:
        centers = _checks.table(params)
        held = {id(centers)}

        def own(leaf: Any) -> Any:
            # Some states hold the centers themselves, or one array twice, which then can't be donated.
            again = id(leaf) in held
            held.add(id(leaf))
            return jnp.copy(leaf) if again else _placement.beside(centers, leaf)

        return jax.tree.map(own, _init(tx, centers))

    def update(
        params: Any,
        state: Any,
        x: ArrayLike,
        labels: ArrayLike,
        *,
        rule: str = "gradient",
        where: ArrayLike | None = None,
        axis_name: AxisName = None,
        after: Any = None,
    ) -> tuple[Any, Any]:
        centers = _checks.table(params)
        batch = _checks.batch(x, labels, where, centers)
        _checks.choice("rule", rule, RULES)
        _checks.state(state, jax.eval_shape(partial(_init, tx), centers), centers)
        centers, state = moved(centers, state, *batch, after, rule=rule, axis_name=axis_name)
        return jax.tree.unflatten(jax.tree.structure(params), [centers]), state

    def placed(centers: jax.Array, state: Any, *others: Any) -> Any:
        return jax.tree.map(lambda leaf: _placement.as_table(leaf, centers, *others), (centers, state))

    @_placement.any_mesh(placed, static_argnames=("rule", "axis_name"))
    def moved(
        centers: jax.Array,
        state: Any,
        x: jax.Array,
        labels: jax.Array,
        used: jax.Array,
        after: Any,
        *,
        rule: str,
        axis_name: AxisName,
    ) -> tuple[jax.Array, Any]:
        pulls = pull(centers, x, labels, used, after, rule=rule, axis_name=axis_name)
        sums = _table.sum_by_slot(pulls.difference, pulls.slot, pulls.classes.shape[0])
        steps, state = _step(tx, centers, state, pulls.classes, -pulls.scale[:, None] * sums)
        return _table.add_rows(centers, pulls.classes, steps), state

    return RowOptimizer(init, update)


def _init(tx: optax.GradientTransformation, centers: jax.Array) -> Any:
    # In the precision of the sums: some transformations insist on one dtype from their first step on.
    return tx.init({"centers": centers.astype(_table.compute_dtype(centers))})


def _step(
    tx: optax.GradientTransformation, centers: jax.Array, state: Any, classes: jax.Array, direction: jax.Array
) -> tuple[jax.Array, Any]:
    """What `tx` adds to the rows of `classes`, by `direction` as their gradient, and its new state."""
    dtype = _table.compute_dtype(centers)
    rows = _table.rows_of(centers, classes).astype(dtype)
    row_state = _map_rows(tx, lambda leaf: _table.rows_of(leaf, classes), state)
    steps, new_state = tx.update({"centers": direction.astype(dtype)}, row_state, {"centers": rows})

    def write(new: jax.Array, read: jax.Array, old: jax.Array) -> jax.Array:
        # After its read: else a table whose new rows do not depend on its old ones, as where the last
        # gradient is kept, would be copied.
        done = _table.always(read.reshape(-1)[:1])
        return _table.write_rows(old, jnp.where(done, classes, centers.shape[0]), new)

    return steps["centers"], _map_rows(tx, write, new_state, row_state, state)


def _map_rows(
    tx: optax.GradientTransformation, function: Callable[..., Any], state: Any, *others: Any
) -> Any:
    """`function` on the leaves of an optimizer's state that hold something for each row."""
    by_row = optax.tree_utils.tree_map_params(
        tx, lambda leaf: jnp.ndim(leaf) > 0, state, transform_non_params=lambda leaf: False
    )
    return jax.tree.map(
        lambda rows, leaf, *rest: function(leaf, *rest) if rows else leaf, by_row, state, *others
    )


def _why_not_by_rows(tx: optax.GradientTransformation) -> str | None:
    """Tries `tx` on a small table: by rows, it has to do what the dense one does to those rows.

    The table is large enough for Adafactor to factor, and gradients go from tiny to huge for what clips.
    """
    num_classes, feat_dim = 130, 128
    rng = np.random.default_rng(0)
    with (
        jax.ensure_compile_time_eval(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        centers = jnp.asarray(rng.normal(size=(num_classes, feat_dim)), jnp.float32)
        slope = rng.normal(size=centers.shape).astype(np.float32)
        try:
            state = _init(tx, centers)
            if any(map(_over_calls, jax.tree.leaves(state, is_leaf=_over_calls))):
                return "it adds up or adapts over several calls, and each of them has other classes"
            shapes: list[tuple[int, ...]] = []
            _map_rows(tx, lambda leaf: shapes.append(leaf.shape), state)
            for shape in shapes:
                if shape[0] != num_classes:
                    return f"tried on centers {centers.shape}, it keeps state of shape {shape}"
            step, frozen_step = jax.jit(partial(_step, tx)), jax.jit(partial(_frozen_step, tx))
            for touched, size in _TRIAL:
                gradient = np.zeros(centers.shape, np.float32)
                noise = rng.normal(size=(len(touched), feat_dim)).astype(np.float32)
                gradient[touched] = size * (slope[touched] + 0.5 * noise)
                chosen = jnp.array(touched, jnp.int32)
                others = [frozen_step(centers, state, chosen, gradient, far) for far in (0.0, 1e6)]
                classes = jnp.append(chosen, jnp.int32(num_classes))  # The last slot is empty.
                rows = np.append(gradient[touched], np.zeros((1, feat_dim), np.float32), 0)
                steps, state = step(centers, state, classes, jnp.asarray(rows))
                if not all(_close((steps[:-1], state), other) for other in others):
                    return "the step of one row depends on other rows, or on their number"
                centers = _table.add_rows(centers, classes, steps)
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
            raise TypeError(
                "tx holds values that are being traced. Make the row optimizer outside of jit and vmap: "
                "a rate that changes is a schedule, or one of inject_hyperparams."
            ) from error
        except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            return f"a step with a gradient, a state and params alone fails ({type(error).__name__}: {error})"
    return None


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

    disturbed = _map_rows(tx, disturb, state)
    steps, moved = tx.update({"centers": gradient}, disturbed, {"centers": disturb(centers)})
    state = _map_rows(tx, lambda new, old: old.at[chosen].set(new[chosen]), moved, state)
    return steps["centers"][chosen], state


def _close(got: Any, want: Any) -> bool:
    def one(a: Any, b: Any) -> bool:
        if jnp.issubdtype(jnp.asarray(a).dtype, jax.dtypes.prng_key):
            return True  # Noise shows in the centers.
        return np.allclose(a, b, rtol=1e-4, atol=1e-5 * np.max(np.abs(b), initial=0))

    return all(map(one, jax.tree.leaves(got), jax.tree.leaves(want)))
