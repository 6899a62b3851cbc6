"""Any row-separable optax transformation on the touched rows of the table only."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jax_centerloss import _batch, _checks, _groups, _placement, _rounding, _row_steps, _trial
from jax_centerloss._batch import Batch
from jax_centerloss._pulls import Pulls, Samples, look, pull
from jax_centerloss._table import AxisName
from jax_centerloss._update import AFTER, RULES

STATE_DTYPES = ("bfloat16", "float32", "float64")
NO_FLOAT16 = "The squares of gradients that Adam keeps are often below the smallest number of float16."


class RowOptimizer(NamedTuple):
    """A pair of functions, as an `optax.GradientTransformation` is: see `row_optimizer`."""

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


def row_optimizer(tx: optax.GradientTransformation, *, state_dtype: DTypeLike | None = None) -> RowOptimizer:
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
    `rule="paper"`, while the rate is constant and every class is in every batch.

    Construction tries `tx` on a small table, which takes up to a second, and in several processes has to come
    after `jax.distributed.initialize()`. `tx` works in float32 (float64 for float64 centers), and so is the
    state of centers in half precision, unless `state_dtype` says otherwise.

    Args:
      tx: an optax transformation.
      state_dtype: the dtype in which what `tx` keeps for each row is stored between steps: `jnp.bfloat16`
        halves Adam's moments, `jnp.float32` and `jnp.float64` are the others. With bfloat16, `update` needs a
        `rounding_key`: rounded to nearest, a moment that decays by a thousandth a step would never decay.

    Returns:
      Two functions.

      `init(params) -> state`: the state of `tx` for `params`, a pytree with one leaf, the `(C, D)` centers.

      `update(params, state, x, labels, *, rule="gradient", where=None, weights=None, axis_name=None,
      after=None, rounding_key=None) -> (params, state)`: moved centers, in the tree structure and dtype of
      `params`, and the new state. The direction is that of `rule`; the arguments are those of
      `update_centers`. Under `jit`, donate both `params` and `state` so that they are written in place.

    Raises:
      TypeError: if `tx` is not an optax transformation.
      ValueError: if `tx` can't work row by row, or `state_dtype` is another one; on `update`, if `state` is
        not of this optimizer and these centers, if its dtype needs a `rounding_key`, and what
        `update_centers` raises.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jax_centerloss
      >>> centers = jax_centerloss.row_optimizer(optax.sgd(0.5, momentum=0.9))
      >>> params = jax_centerloss.init_centers(jax.random.key(0), num_classes=1000, feat_dim=2)
      >>> state = centers.init(params)
      >>> params, state = centers.update(params, state, jnp.ones((4, 2)), jnp.array([3, 1, 3, -1]))
    """
    if isinstance(tx, RowOptimizer) or not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"tx must be an optax transformation, such as optax.sgd(0.5), got {tx!r}.")
    state_dtype = _checks.one_dtype("state_dtype", state_dtype, STATE_DTYPES, NO_FLOAT16)
    verdict = _trial.on_rows(tx)
    if verdict.fault is not None:
        raise ValueError(
            f"this transformation can't work row by row: {verdict.fault}. Leave out the part of it that does "
            "so, or give the centers the dense optimizer by `with_center_optimizer`."
        )

    new_state = partial(_row_steps.init, tx, state_dtype=state_dtype)
    move_rows = partial(_row_steps.move, tx, state_dtype=state_dtype)
    in_blocks = jax.jit(partial(_move_blocks, tx, move_rows), static_argnames="size")

    def init(params: Any) -> Any:
        centers = _checks.table(params)
        held = {id(centers)}

        def own(leaf: Any) -> Any:
            # Some states hold the centers themselves, or one array twice, which then can't be donated.
            again = id(leaf) in held
            held.add(id(leaf))
            return jnp.copy(leaf) if again else _placement.beside(centers, leaf)

        return jax.tree.map(own, new_state(centers))

    def update(
        params: Any,
        state: Any,
        x: ArrayLike,
        labels: ArrayLike,
        *,
        rule: str = "gradient",
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        axis_name: AxisName = None,
        after: Any = None,
        rounding_key: jax.Array | None = None,
    ) -> tuple[Any, Any]:
        centers = _checks.table(params)
        batch = _batch.batch(x, labels, where, weights, centers)
        _checks.choice("rule", rule, RULES)
        _checks.state(state, jax.eval_shape(new_state, centers), centers)
        state = _checks.arrays("state", state, "Pass on what `update` returns.")
        after = _checks.arrays("after", after, AFTER)
        if rounding_key is None and state_dtype == jnp.bfloat16:
            raise ValueError(
                "a state in bfloat16 needs a rounding_key: rounded to nearest, small steps of it are lost. "
                "Pass another key in each step: `jax.random.fold_in(jax.random.key(0), step)`, say."
            )
        seed = _rounding.seed_of(_checks.key("rounding_key", rounding_key), centers, state)
        centers, state = moved(centers, state, batch, after, seed, rule=rule, axis_name=axis_name)
        return jax.tree.unflatten(jax.tree.structure(params), [centers]), state

    def placed(centers: jax.Array, state: Any, *others: Any) -> Any:
        return jax.tree.map(lambda leaf: _placement.as_table(leaf, centers, *others), (centers, state))

    @_placement.any_mesh(placed, static_argnames=("rule", "axis_name"))
    def moved(
        centers: jax.Array,
        state: Any,
        batch: Batch,
        after: Any,
        seed: jax.Array | None,
        *,
        rule: str,
        axis_name: AxisName,
    ) -> tuple[jax.Array, Any]:
        samples = look(centers, batch, after, axis_name)
        new: tuple[jax.Array, Any] = _groups.by_platform(
            partial(move, rule=rule), centers, state, samples, seed
        )
        return new

    def move(
        centers: jax.Array,
        state: Any,
        samples: Samples,
        seed: jax.Array | None,
        *,
        platform: str,
        rule: str,
    ) -> tuple[jax.Array, Any]:
        pulls = pull(centers, samples, platform=platform, rule=rule)
        # On a mesh, the rows of each block would travel by themselves.
        mesh = _placement.mesh_of(centers, samples.labels)
        in_parts = verdict.in_parts and (mesh is None or mesh.size == 1)
        if platform == "cpu" and in_parts and (size := pulls.block_size()):
            moved: tuple[jax.Array, Any] = in_blocks(centers, state, pulls, seed, size=size)
            return moved
        direction = -pulls.scale[:, None] * pulls.sums()
        if platform == "gpu":
            # What stands where there is no class must not show in a norm over all rows.
            there = (pulls.classes < centers.shape[0])[:, None]
            direction = jnp.where(there, direction, jnp.zeros((), direction.dtype))
        return move_rows(centers, state, pulls.classes, direction, seed)

    return RowOptimizer(init, update)


def _move_blocks(
    tx: optax.GradientTransformation,
    move_rows: Callable[..., tuple[jax.Array, Any]],
    centers: jax.Array,
    state: Any,
    pulls: Pulls,
    seed: jax.Array | None,
    *,
    size: int,
) -> tuple[jax.Array, Any]:
    """The same, block by block of classes, all of them from the same state of what is not kept by rows."""
    blocks, block = pulls.blocks(size)

    def move(i: Any, held: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        classes, far = block(i)
        return move_rows(*held, classes, -far, seed)

    def again(i: Any, held: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        centers, new = move(i, held)
        return centers, _row_steps.tables_from(tx, held[1], new)

    centers, first = move(0, (centers, state))
    start = centers, _row_steps.tables_from(tx, state, first)
    centers, last = lax.fori_loop(1, blocks, again, start)
    return centers, _row_steps.tables_from(tx, first, last)
