"""A separate optimizer for the centers."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jax_centerloss import _arrays, _checks
from jax_centerloss._row_optimizer import check_transformation
from jax_centerloss._rows import table

Path = tuple[str | int, ...]
# The marks that stand for a leaf of centers, and for any other, and the names of their chains.
_CHAINS = {optax.EmptyState: "centers", optax.MaskedNode: "model"}

# Metadata by which the Variables of `nnx.CenterLoss` are told from those of other layers.
OWNER = {"owner": "jax_centerloss.CenterLoss"}


class CenterOptimizerState(NamedTuple):
    """Which leaves are centers, and the state of the two optimizers.

    `centers` is the tree of the params with the mark `EmptyState` in place of each leaf of centers, and the
    mark `MaskedNode` in place of any other. `init` stores it, since NNX passes bare arrays to `update`,
    without the metadata that tells which are centers. These marks have no arrays: `jit` and checkpoints
    accept them.
    """

    centers: Any
    inner: Any


class DividedState(NamedTuple):
    """The number of updates so far, and the state of the optimizer that gets the divided gradient."""

    center_step: jax.Array
    inner: Any


def with_center_optimizer(
    tx: optax.GradientTransformation,
    centers: optax.GradientTransformation | None = None,
    *,
    weight: float | optax.Schedule | None = None,
    select: Callable[[Path, Any], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gives the centers an optax chain of their own, and everything else to `tx`.

    In Flax NNX the centers are the parameters of all `nnx.CenterLoss` modules. Linen params and plain dicts
    have keys only: there the centers are the one leaf below a key `"centers"`. Other layers have parameters
    of that name too (radial basis functions, clustering), so that with several such leaves `select` has to
    say which are centers.

    The gradient of the centers is as large as their table. From some ten thousand classes on, move them by
    `update_centers` or a `row_optimizer` instead.

    The gradient of `cross_entropy + lam * center_loss` with respect to the centers is proportional to `lam`.
    `weight=lam` divides by `lam`, so that the learning rate of the centers does not depend on it. Without
    `weight`, SGD moves the centers `lam` times as far. If `lam` is a schedule, the loss and this
    transformation have to take it at the same step. In the loss, use the step that this transformation
    counts: `lam(optax.tree_utils.tree_get(opt_state, "center_step"))`. Other counters, such as
    `optimizer.step` or that of a `TrainState`, count calls: under `optax.MultiSteps` or
    `optax.apply_if_finite`, or with a new optimizer, they run ahead. Chain the clipping of gradients into
    `tx`: around this transformation, the norm would include the gradient of the centers.

    Args:
      tx: the model's optimizer.
      centers: the centers' optimizer; `optax.sgd(0.5)` by default.
      weight: the weight `lam` of the center loss, by which the gradient of the centers is divided: a number,
        or an optax schedule of the number of updates so far, which the state holds as `"center_step"`. While
        it is 0, the centers and the state of their optimizer do not change. By default nothing is divided.
      select: `select(path, leaf)` returns whether a leaf holds centers. `path` is the tuple of the keys,
        attribute names and indices that lead to the leaf, such as `("loss", "centers")`. Only `init` calls
        it.

    Returns:
      An optax transformation, for `nnx.Optimizer`, `TrainState` or your own loop.

    Raises:
      TypeError: if `tx` or `centers` is not an optax transformation, `weight` is neither a number nor a
        function, or `select` is no function.
      ValueError: if `weight` is negative or NaN (of a schedule, on `update` outside of `jit`); on `init`, if
        no leaf holds centers, or it is unclear which of several leaves do.

    Example:
      >>> import jax.numpy as jnp, optax, jax_centerloss
      >>> lam = optax.linear_schedule(0.0, 0.01, transition_steps=1000)
      >>> tx = jax_centerloss.with_center_optimizer(optax.adam(1e-3), optax.sgd(0.5), weight=lam)
      >>> params = {"dense": jnp.ones((4, 2)), "loss": {"centers": jnp.zeros((10, 2))}}
      >>> opt_state = tx.init(params)
    """
    center_tx = optax.sgd(0.5) if centers is None else centers
    for name, given in {"tx": tx, "centers": center_tx}.items():
        check_transformation(name, given)
    if select is not None and not callable(select):
        raise TypeError(
            f"select must be a function of a path and a leaf, got {select!r}. For one leaf: "
            '`select=lambda path, leaf: path == ("center_loss", "centers")`.'
        )
    if weight is not None:
        if not callable(weight):
            _as_weight(weight)
        center_tx = _divide_out(weight, center_tx)
    chains = {"centers": center_tx, "model": tx}

    def split_by(marks: Any) -> optax.GradientTransformationExtraArgs:
        labels = jax.tree.map(lambda m: _CHAINS[type(m)], marks, is_leaf=lambda m: type(m) in _CHAINS)
        # The lambda is needed, since `labels` may be a callable module, and optax would call that.
        return optax.partition(chains, lambda _: labels)

    def init(params: Any) -> CenterOptimizerState:
        # `optax.tree.map_params` calls `init` with a placeholder without leaves, which takes the place of the
        # marks. An empty container is not a placeholder, and `_marks` raises on it.
        is_tree = jax.tree.leaves(params) or isinstance(params, Mapping | tuple | list | None)
        marks = _marks(params, select) if is_tree else params
        return CenterOptimizerState(marks, split_by(marks).init(params))

    def update(
        updates: Any, state: CenterOptimizerState, params: Any = None, **extra: Any
    ) -> tuple[Any, CenterOptimizerState]:
        new_updates, inner = split_by(state.centers).update(updates, state.inner, params, **extra)
        return new_updates, CenterOptimizerState(state.centers, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _as_weight(weight: Any) -> float | jax.Array:
    """λ as a number or scalar array. Raises if it is negative, NaN or a function."""
    lam = _checks.as_scalar("weight", weight, "Pass λ as a number, or as an optax schedule that returns one.")
    if _arrays.is_concrete(lam) and not np.asarray(lam) >= 0:  # In `jit`, `jnp` would trace it.
        raise ValueError(f"weight must not be negative or NaN, got {float(lam):g}.")
    return lam


def _divide_out(
    weight: float | optax.Schedule, tx: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """`tx` with its gradient divided by `weight`. While that is 0, updates are 0 and its state is kept."""
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> DividedState:
        return DividedState(jnp.zeros((), jnp.int32), tx.init(params))

    def update(
        updates: Any, state: DividedState, params: Any = None, **extra: Any
    ) -> tuple[Any, DividedState]:
        lam = jnp.asarray(_as_weight(weight(state.center_step) if callable(weight) else weight))
        is_zero = lam == 0

        def divide(gradient: jax.Array) -> jax.Array:
            # In float32, since float16 holds a small `lam` with few digits, or as 0.
            wide = gradient.astype(table.compute_dtype(gradient))
            quotient = wide / jnp.where(is_zero, jnp.ones((), wide.dtype), lam.astype(wide.dtype))
            return quotient.astype(gradient.dtype)

        new_updates, inner = tx.update(jax.tree.map(divide, updates), state.inner, params, **extra)
        new_updates = jax.tree.map(lambda u: jnp.where(is_zero, jnp.zeros_like(u), u), new_updates)
        inner = jax.tree.map(lambda new, old: jnp.where(is_zero, old, new), inner, state.inner)
        return new_updates, DividedState(optax.safe_increment(state.center_step), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _marks(params: Any, select: Callable[[Path, Any], bool] | None) -> Any:
    """The tree of marks in `CenterOptimizerState.centers`."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_variable)
    leaves = [(_as_path(key_path), leaf) for key_path, leaf in leaves]
    if select is None:
        found = _find_centers(leaves)
    else:
        found = {path for path, leaf in leaves if select(path, _content(leaf))}
        if not found:
            paths = _list_paths(path for path, _ in leaves)
            raise ValueError(f"no parameter was picked by select: this model has {paths}.")
    marks = [optax.EmptyState() if path in found else optax.MaskedNode() for path, _ in leaves]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=_is_variable), marks)


def _find_centers(leaves: list[tuple[Path, Any]]) -> set[Path]:
    """The paths of centers: the Variables of every `nnx.CenterLoss`, or one leaf below a key "centers".

    Raises if there is none, or if a leaf found by its key, which is no Variable, is not the only one.
    """
    named = [path for path, _ in leaves if "centers" in path]
    keyed = [path for path, leaf in leaves if "centers" in path and not _is_variable(leaf)]
    found = [path for path, leaf in leaves if path in keyed or is_owned(leaf)]
    if len(found) > 1 and keyed:
        raise ValueError(
            f'several parameters are below a key "centers": {_list_paths(found)}. Other layers have '
            "parameters of that name too. Say by `select` which hold centers, for example "
            '`select=lambda path, leaf: path == ("center_loss", "centers")`.'
        )
    if not found:
        reason = 'no parameter is below a key "centers"'
        if named:
            reason = "no parameter is known to belong to an nnx.CenterLoss; "
            reason += f"{_list_paths(named)} may be another layer's parameters"
        raise ValueError(
            f"{reason}: this model has {_list_paths(path for path, _ in leaves)}. Put the center loss module "
            "(or the dict from init_centers) into the tree that is optimized. If the centers are in it, for "
            "example in a Variable of your own, name them by `select`. Centers that are state "
            '(centers_as="state") are not optimized: update_centers or a row_optimizer moves them.'
        )
    return set(found)


def is_owned(variable: Any) -> bool:
    """Whether a Variable was made by an `nnx.CenterLoss`."""
    return isinstance(variable, nnx.Variable) and OWNER.items() <= variable.get_metadata().items()


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _content(node: Any) -> Any:
    """The value of a Variable, which is an array or a `MaskedNode`. Any other node is returned as it is."""
    # `is_leaf` makes the Variable's value a leaf: a `MaskedNode` would have none.
    return jax.tree.leaves(node, is_leaf=lambda inner: inner is not node)[0] if _is_variable(node) else node


def _list_paths(paths: Iterable[Path]) -> str:
    return ", ".join("/".join(map(str, path)) or "a bare array" for path in paths) or "no parameters"


def _as_path(key_path: tuple[Any, ...]) -> Path:
    """The keys, attribute names and indices of a JAX key path."""
    return tuple(
        next(getattr(entry, name) for name in ("key", "name", "idx") if hasattr(entry, name))
        for entry in key_path
    )
