"""Row optimizers: an optax transformation on the rows of a batch's classes only."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jax_centerloss import (
    _batch,
    _checks,
    _directions,
    _options,
    _placement,
    _rounding,
    _row_steps,
    _separability,
)
from jax_centerloss._batch import Batch
from jax_centerloss._directions import Directions, Samples
from jax_centerloss._options import AxisName

_STATE_DTYPES = ("bfloat16", "float32", "float64")
_FLOAT16_ADVICE = "float16 is not allowed: the squared gradients that Adam keeps often underflow in it."


class RowOptimizer(NamedTuple):
    """Two functions, as in `optax.GradientTransformation`: see `row_optimizer`."""

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


def check_transformation(name: str, tx: Any) -> None:
    if isinstance(tx, RowOptimizer) or not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"{name} must be an optax transformation, such as optax.sgd(0.5), got {tx!r}.")


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

    Construction tries `tx` on a small table, which takes up to a second. In a program of several processes it
    has to come after `jax.distributed.initialize()`. `tx` gets gradients and centers in float32 (float64 for
    float64 centers), also for centers in half precision, and chooses the dtypes of its state for these,
    unless `state_dtype` is given.

    Args:
      tx: an optax transformation.
      state_dtype: the dtype in which the state of the rows is stored between steps: `jnp.bfloat16`, which
        halves the memory of Adam's moments, `jnp.float32` or `jnp.float64`. With bfloat16, `update` needs a
        `rounding_key`: rounded to nearest, a moment that decays by a thousandth in a step would never decay.

    Returns:
      Two functions.

      `init(params) -> state`: the state of `tx` for `params`, a pytree with one leaf, the `(C, D)` centers.

      `update(params, state, x, labels, *, rule="gradient", where=None, weights=None, axis_name=None,
      after=None, rounding_key=None) -> (params, state)`: moved centers, in the tree structure and dtype of
      `params`, and the new state. `tx` gets minus the step that `rule` takes at alpha 1 as its gradient; the
      arguments are those of `update_centers`. No gradient is stopped. Under `jit`, donate `params` and
      `state`, so that both are written in place.

    Raises:
      TypeError: if `tx` is not an optax transformation, or holds traced values.
      ValueError: if the step of a row depends on other rows, or `state_dtype` is not supported; on `update`,
        if `state` does not belong to this optimizer and these centers, if its dtype needs a `rounding_key`,
        and what `update_centers` raises.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jax_centerloss
      >>> rows = jax_centerloss.row_optimizer(optax.sgd(0.5, momentum=0.9))
      >>> params = jax_centerloss.init_centers(jax.random.key(0), num_classes=1000, feat_dim=2)
      >>> state = rows.init(params)
      >>> params, state = rows.update(params, state, jnp.ones((4, 2)), jnp.array([3, 1, 3, -1]))
    """
    check_transformation("tx", tx)
    state_dtype = _options.as_dtype("state_dtype", state_dtype, _STATE_DTYPES, _FLOAT16_ADVICE)
    separability = _separability.find_separability(tx)
    if separability.problem is not None:
        raise ValueError(
            f"this transformation can't work row by row: {separability.problem}. Remove the part that "
            "does so, or give the centers a dense optimizer by `with_center_optimizer`."
        )

    init_state = partial(_row_steps.init_state, tx, state_dtype=state_dtype)
    update_rows = partial(_row_steps.update_rows, tx, state_dtype=state_dtype)
    update_in_blocks = partial(_update_in_blocks, tx, update_rows)

    def init(params: Any) -> Any:
        centers = _checks.as_table(params)
        seen = {id(centers)}

        def place(leaf: Any) -> Any:
            # Some states hold the centers themselves, or one array twice. For donation it has to be copied.
            is_shared = id(leaf) in seen
            seen.add(id(leaf))
            return jnp.copy(leaf) if is_shared else _placement.place_like_table(leaf, centers)

        return jax.tree.map(place, init_state(centers))

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
        centers = _checks.as_table(params)
        batch = _batch.as_batch(x, labels, where, weights, centers)
        _options.check_choice("rule", rule, _options.RULES)
        _checks.check_state(state, jax.eval_shape(init_state, centers), centers)
        state = _checks.as_arrays("state", state, "Pass on what `update` returns.")
        after = _checks.as_after(after)
        if rounding_key is None and state_dtype == jnp.bfloat16:
            raise ValueError(
                "a state in bfloat16 needs a rounding_key: without it, small changes of the state are lost. "
                "Pass a new key in each step, for example `jax.random.fold_in(jax.random.key(0), step)`."
            )
        seed = _rounding.seed_of(_checks.as_key("rounding_key", rounding_key), centers, state)
        centers, state = update_checked(centers, state, batch, after, seed, rule=rule, axis_name=axis_name)
        return jax.tree.unflatten(jax.tree.structure(params), [centers]), state

    def shardings(centers: jax.Array, state: Any, *others: Any) -> Any:
        return jax.tree.map(
            lambda leaf: _placement.centers_sharding(leaf, centers, *others), (centers, state)
        )

    @_placement.jit_on_auto_axes(shardings, static_argnames=("rule", "axis_name"))
    def update_checked(
        centers: jax.Array,
        state: Any,
        batch: Batch,
        after: Any,
        seed: jax.Array | None,
        *,
        rule: str,
        axis_name: AxisName,
    ) -> tuple[jax.Array, Any]:
        samples = _directions.compare_with_centers(centers, batch, after, axis_name)
        # On a mesh, the devices would communicate once for each block.
        mesh = _placement.mesh_of(centers, samples.labels)
        in_blocks = separability.in_blocks and (mesh is None or mesh.size == 1)
        step = partial(update_on_platform, rule=rule, in_blocks=in_blocks)
        moved: tuple[jax.Array, Any] = _placement.call_for_platform(step, centers, state, samples, seed)
        return moved

    def update_on_platform(
        centers: jax.Array,
        state: Any,
        samples: Samples,
        seed: jax.Array | None,
        *,
        platform: str,
        rule: str,
        in_blocks: bool,
    ) -> tuple[jax.Array, Any]:
        directions = _directions.directions_of(samples, centers.shape[0], platform=platform, rule=rule)
        size = directions.block_size() if platform == "cpu" and in_blocks else None
        if size is not None:
            moved: tuple[jax.Array, Any] = update_in_blocks(centers, state, directions, seed, size=size)
            return moved
        gradient = -directions.all_slots()
        if platform == "gpu":
            # On a GPU the sums of slots without a class have no meaning, and must not enter a norm over rows.
            has_class = (directions.classes < centers.shape[0])[:, None]
            gradient = jnp.where(has_class, gradient, jnp.zeros((), gradient.dtype))
        return update_rows(centers, state, directions.classes, gradient, seed)

    return RowOptimizer(init, update)


def _update_in_blocks(
    tx: optax.GradientTransformation,
    update_rows: Callable[..., tuple[jax.Array, Any]],
    centers: jax.Array,
    state: Any,
    directions: Directions,
    seed: jax.Array | None,
    *,
    size: int,
) -> tuple[jax.Array, Any]:
    """`update_rows` in blocks of `size` slots.

    Every block gets the old scalars of the state, such as Adam's count of steps. The new state has the
    scalars that the first block returned.
    """
    num_blocks, block = directions.blocks(size)

    def update_block(i: Any, centers: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        classes, direction = block(i)
        return update_rows(centers, state, classes, -direction, seed)

    def update_next(i: Any, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        centers, new_state = update_block(i, *carry)
        return centers, _row_steps.with_tables_of(tx, carry[1], new_state)

    centers, first = update_block(0, centers, state)
    carry = centers, _row_steps.with_tables_of(tx, state, first)
    centers, last = lax.fori_loop(1, num_blocks, update_next, carry)
    return centers, _row_steps.with_tables_of(tx, first, last)
