"""Row optimizers: an optax transformation on the rows of a batch's classes only."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from jax_centerloss import _arrays, _checks, _rules, _update
from jax_centerloss._batch import Given
from jax_centerloss._rows import moves, separability, transform
from jax_centerloss._rows.placement import AxisName
from jax_centerloss._rules import Rule

_NO_TRANSFORMATION = (
    "A row optimizer moves the centers alone, by its own `update(params, state, x, labels)`, and is no optax "
    "transformation: give nnx.Optimizer and TrainState the model's own optimizer, or for centers that are "
    "parameters `with_center_optimizer(model_tx, centers=tx)`, with the tx that you gave to row_optimizer."
)
_STATE_DTYPES = tuple(map(jnp.dtype, ("bfloat16", "float32", "float64")))


class RowOptimizer(NamedTuple):
    """See `row_optimizer`. Unlike optax's, `update` takes a batch and returns moved centers."""

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    apply_gradients: Callable[..., tuple[Any, Any]]


def check_transformation(name: str, tx: Any) -> None:
    of_rows = isinstance(tx, RowOptimizer)
    if of_rows or not (hasattr(tx, "init") and hasattr(tx, "update")):
        found = "a row optimizer: pass the transformation that you gave to it" if of_rows else repr(tx)
        raise TypeError(f"{name} must be an optax transformation, such as optax.sgd(0.5), got {found}.")


def row_optimizer(tx: optax.GradientTransformation, *, state_dtype: DTypeLike | None = None) -> RowOptimizer:
    """Moves the centers of the batch's classes with an optax transformation, and touches no other row.

    It does to these rows what `tx` would do with a dense gradient, at a cost that does not grow with the
    number of classes. Of the centers and of the optimizer's state (momentum, Adam's moments) it writes only
    the rows of the batch's classes, each once, however many samples a class has. All other rows keep
    their center and their state, while a dense optimizer would also move them by momentum or weight decay.
    Scalars of the state, such as Adam's count of steps, change in every step.

    `tx` sees `{"centers": rows}`. Its learning rate is that of the centers, and does not depend on the weight
    of the loss. SGD, momentum, Adam and its relatives, AdaGrad, RMSProp, Lion, weight decay, schedules,
    clipping by value and by the global norm (of the batch's rows), `inject_hyperparams` and chains of them
    work. A transformation is refused if the step of a row depends on rows outside of the batch, or needs more
    than gradients, state and centers: LAMB, LARS, Muon, Adafactor, clipping by the norm of a block, added
    noise, `MultiSteps`, or one that needs the `value` of the loss.

    With the same `rule`, `row_optimizer(optax.sgd(alpha))` gives the centers that `update_centers` gives; the
    default here is `"gradient"`. The paper's Caffe layer corresponds to `rule="paper"` with
    `row_optimizer(optax.sgd(alpha, momentum=0.9))`: they agree only if the rate is constant and every class
    is in every batch.

    `apply_gradients` is the same step for gradients of any kind, such as those of the weights of a softmax
    over a million classes, or of an embedding: `params` is then any `(C, D)` table.

    Construction compiles and runs `tx` on a small table, which takes up to a second. It starts JAX's backend,
    so in a program of several processes it has to come after `jax.distributed.initialize()`. `tx` gets
    gradients and centers in float32 (float64 for float64 centers), also for centers in half precision, and
    chooses the dtypes of its state for these, unless `state_dtype` is given.

    Args:
      tx: an optax transformation.
      state_dtype: the dtype in which the state of the rows is stored between steps: `jnp.bfloat16`, which
        halves the memory of Adam's moments, `jnp.float32` or `jnp.float64`. With bfloat16, each step needs a
        `rounding_key`: rounded to nearest, a moment that decays by a thousandth in a step would never decay.

    Returns:
      Three functions. Under `jit`, donate `params` and `state`, so that both are written in place.

      - `init(params)`: the state of `tx` for these centers.
      - `update(params, state, x, labels)`: moved centers and the new state, by a rule on features of a batch.
      - `apply_gradients(params, state, rows, gradients)`: the same, by gradients with respect to some rows.

    Raises:
      TypeError: if `tx` is not an optax transformation, or holds traced values.
      ValueError: if the step of a row depends on other rows, or `state_dtype` is not supported.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jax_centerloss
      >>> rows = jax_centerloss.row_optimizer(optax.sgd(0.5, momentum=0.9))
      >>> params = jax_centerloss.init_centers(jax.random.key(0), num_classes=1000, feat_dim=2)
      >>> state = rows.init(params)
      >>> params, state = rows.update(params, state, jnp.ones((4, 2)), jnp.array([3, 1, 3, -1]))
      >>> gradients = jnp.array([[1.0, 0.0], [2.0, 0.0]])
      >>> params, state = rows.apply_gradients(params, state, jnp.array([7, 7]), gradients)
    """
    check_transformation("tx", tx)
    state_dtype = _as_state_dtype(state_dtype)
    problem, in_blocks = separability.find_separability(tx)
    if problem is not None:
        raise ValueError(
            f"this transformation can't work row by row: {problem}. Remove the part that does so, or "
            "give the centers a dense optimizer by `with_center_optimizer`."
        )
    init_state = partial(transform.init_state, tx, state_dtype=state_dtype)
    compute_steps = partial(transform.compute_steps, tx, state_dtype)
    step = partial(moves.move_rows, compute_steps=compute_steps, in_blocks=in_blocks)
    program = _update.jit_move(step)

    def init(params: Any) -> Any:
        """The state of the transformation for these centers.

        Args:
          params: a pytree with one leaf, the `(C, D)` centers.

        Returns:
          The state of `tx`. What it holds for each row is in `state_dtype`, if that is given.
        """
        centers = _checks.as_table(params, advice=f" {_NO_TRANSFORMATION}")
        return transform.place_state(init_state(centers), centers)

    def update(
        params: Any,
        state: Any,
        x: ArrayLike,
        labels: ArrayLike | None = None,  # None if called like optax's: `update(updates, state, params)`.
        *,
        rule: str = "gradient",
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        axis_name: AxisName = None,
        after: Any = None,
        rounding_key: jax.Array | None = None,
    ) -> tuple[Any, Any]:
        """Moves the centers of the batch's classes. Gradients pass through it.

        Args:
          params: a pytree with one leaf, the `(C, D)` centers.
          state: what `init` or the last step returned.
          x: features `(..., D)`, floating point.
          labels: integer classes `(...)`.
          rule: `tx` gets as its gradient the negative of the step that this rule of `update_centers` takes at
            alpha = 1.
          where, weights, axis_name, after, rounding_key: as in `update_centers`.

        Returns:
          `(params, state)`: moved centers, in the tree structure and dtype of `params`, and the new state.

        Raises:
          ValueError: if `state` does not belong to this optimizer and these centers, if its dtype needs a
            `rounding_key`, and what `update_centers` raises.
        """
        if labels is None:
            raise TypeError(f"labels are missing. {_NO_TRANSFORMATION}")
        given = x, labels, where, weights
        # As its gradient, `tx` gets the negative of the step.
        return move(params, state, given, _rules.as_rule(rule, -1.0), axis_name, after, rounding_key)

    def apply_gradients(
        params: Any,
        state: Any,
        rows: ArrayLike,
        gradients: ArrayLike,
        *,
        where: ArrayLike | None = None,
        axis_name: AxisName = None,
        after: Any = None,
        rounding_key: jax.Array | None = None,
    ) -> tuple[Any, Any]:
        """Moves rows of any `(C, D)` table by gradients with respect to them.

        Args:
          params: a pytree with one leaf, the `(C, D)` table.
          state: what `init` or the last step returned.
          rows: integer indices `(...)` of rows. A negative index leaves its gradient out. An index `>= C`
            raises; under `jit`, where it is not known, it leaves its gradient out.
          gradients: `(..., D)`, floating point. Gradients of a row that stands twice are summed.
          where: boolean `(...)`, the gradients to use; all by default.
          axis_name, after, rounding_key: as in `update_centers`.

        Returns:
          `(params, state)`: the moved table, in the tree structure and dtype of `params`, and the new state.

        Raises:
          ValueError: as `update`.
        """
        return move(params, state, (gradients, rows, where, None), None, axis_name, after, rounding_key)

    def move(
        params: Any, state: Any, given: Given, rule: Rule | None, axis_name: AxisName, after: Any, key: Any
    ) -> tuple[Any, Any]:
        centers = _checks.as_table(params)
        _check_state(state, jax.eval_shape(init_state, centers), centers)
        state = _arrays.as_arrays("state", state, "Pass on what `update` returns.")
        if key is None and state_dtype == jnp.bfloat16:
            raise ValueError(
                "a state in bfloat16 needs a rounding_key: without it, small changes of the state are lost. "
                + _checks.KEY_ADVICE
            )
        moved, state = _update.move(centers, state, given, rule, axis_name, after, key, program=program)
        return jax.tree.unflatten(jax.tree.structure(params), [moved]), state

    return RowOptimizer(init, update, apply_gradients)


def _as_state_dtype(value: Any) -> Any:
    if value is None:
        return None
    for dtype in _STATE_DTYPES:
        if dtype == value:
            return dtype
    raise ValueError(
        f"state_dtype must be None or one of {', '.join(map(str, _STATE_DTYPES))}, got {value!r}. float16 is "
        "not allowed: the squared gradients that Adam keeps often underflow in it."
    )


def _check_state(state: Any, expected: Any, centers: jax.Array) -> None:
    """Compares the state of a row optimizer with the shapes and dtypes that its `init` makes.

    It can't tell optimizers apart if their states have the same structure, such as Adam and Yogi.
    """
    found, wanted = (jax.tree.map(np.shape, tree) for tree in (state, expected))
    if jax.tree.flatten(found) != jax.tree.flatten(wanted):
        raise ValueError(
            f"state does not belong to this optimizer and centers {centers.shape}: expected {wanted}, got "
            f"{found}. Make it with this row optimizer's `init(params)`, and pass on what `update` "
            "returns: `params, state = rows.update(params, state, x, labels)`."
        )
    # Only the dtypes of tables are compared, since a scalar may be a Python number.
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        if np.ndim(leaf) and jax.dtypes.canonicalize_dtype(leaf.dtype) != like.dtype:
            raise ValueError(
                f"state holds {leaf.dtype.name} where this optimizer keeps {like.dtype.name}: create the row "
                "optimizer with the `state_dtype` of this state, or cast the state."
            )
