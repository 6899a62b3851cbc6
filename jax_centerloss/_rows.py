"""Any row-separable optax transformation on the touched rows of the table only."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jax_centerloss import _checks, _placement, _row_steps, _table, _trial
from jax_centerloss._table import AxisName
from jax_centerloss._update import RULES, pull


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
    reason = _trial.why_not_by_rows(tx)
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

        return jax.tree.map(own, _row_steps.init(tx, centers))

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
        _checks.state(state, jax.eval_shape(partial(_row_steps.init, tx), centers), centers)
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
        steps, state = _row_steps.step(tx, centers, state, pulls.classes, -pulls.scale[:, None] * sums)
        return _table.add_rows(centers, pulls.classes, steps), state

    return RowOptimizer(init, update)
