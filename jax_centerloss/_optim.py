"""The centers' own optimizer, inside the model's."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_centerloss import _checks, _table
from jax_centerloss._rows import RowOptimizer

Path = tuple[str | int, ...]

# Metadata of the Variables of `nnx.CenterLoss`, which no other layer's have.
OWNER = {"owner": "jax_centerloss.CenterLoss"}


class CenterOptimizerState(NamedTuple):
    """`centers` is the model's tree, with an `EmptyState` for each leaf that is centers, else a `MaskedNode`.

    It is told by the structure alone, which needs no memory and passes through `jit` and checkpoints. An
    update could not tell: NNX hands it bare arrays.
    """

    centers: Any
    inner: Any


class DividedState(NamedTuple):
    """How many updates there were, and the state of the optimizer behind the division."""

    step: jax.Array
    inner: Any


def with_center_optimizer(
    tx: optax.GradientTransformation,
    centers: optax.GradientTransformation | None = None,
    *,
    weight: float | optax.Schedule | None = None,
    select: Callable[[Path, Any], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gives the centers their own optax chain and leaves everything else to `tx`.

    In Flax NNX the centers are the parameters of the `nnx.CenterLoss` modules, however many. Linen params and
    plain dicts show keys only: there it is the one leaf below a key `"centers"`. Other layers have parameters
    of that name too (radial basis functions, clustering), so with several such leaves `select` has to
    say which.

    The gradient of `cross_entropy + lam * center_loss` holds `lam`. `weight=lam` divides it out, so that
    the centers' rate means the same whatever `lam` is. Without it, centers move `lam` times as far.
    Clip gradients inside `tx`, not around this: the centers' gradient would enter the norm.

    Args:
      tx: the model's optimizer.
      centers: the centers' optimizer; `optax.sgd(0.5)` by default.
      weight: the weight of the center loss, `lam`, to divide the centers' gradient by: a number, or a
        schedule of the number of updates so far, as optax's are. Where it is 0, centers and the state of
        their optimizer rest. By default nothing is divided.
      select: `select(path, leaf)` says whether a leaf holds centers. `path` is the tuple of the keys,
        attribute names and indices that lead to the leaf, such as `("loss", "centers")`. It is asked by
        `init` only.

    Returns:
      An optax transformation, for `nnx.Optimizer`, `TrainState` or a loop of one's own.

    Raises:
      TypeError: if `tx` or `centers` is not an optax transformation, `weight` is neither a number nor a
        function, or `select` is no function.
      ValueError: on `init`, if no leaf holds centers, or it can't be told which one does.

    Example:
      >>> import jax.numpy as jnp, optax, jax_centerloss
      >>> lam = optax.linear_schedule(0.0, 0.01, transition_steps=1000)
      >>> tx = jax_centerloss.with_center_optimizer(optax.adam(1e-3), optax.sgd(0.5), weight=lam)
      >>> params = {"dense": jnp.ones((4, 2)), "loss": {"centers": jnp.zeros((10, 2))}}
      >>> opt_state = tx.init(params)
    """
    own = optax.sgd(0.5) if centers is None else centers
    for name, given in {"tx": tx, "centers": own}.items():
        if isinstance(given, RowOptimizer) or not (hasattr(given, "init") and hasattr(given, "update")):
            raise TypeError(f"{name} must be an optax transformation, such as optax.sgd(0.5), got {given!r}.")
    if select is not None and not callable(select):
        raise TypeError(
            f"select must be a function of a path and a leaf, got {select!r}. For one leaf: "
            '`select=lambda path, leaf: path == ("center_loss", "centers")`.'
        )
    if weight is not None:
        if not callable(weight):
            number = _checks.scalar("weight", weight, "Pass λ as a number, or as an optax schedule.")
            if _checks.concrete(number) and not number >= 0:
                raise ValueError(f"weight must not be negative or NaN, got {weight}.")
        own = _divide_out(weight, own)
    chains = {"centers": own, "model": tx}

    def split_by(labels: Any) -> optax.GradientTransformationExtraArgs:
        # By a function: labels have the model's own type, which may be callable, and optax would call it.
        return optax.partition(chains, lambda _: labels)

    def init(params: Any) -> CenterOptimizerState:
        bare = _bare(params)
        if jax.tree.leaves(bare) or _is_container(bare):
            marks = _marks(params, select)
            labels = _labels(marks)
        else:  # The placeholder by which optax.tree.map_params finds the params in a state.
            marks = labels = bare
        return CenterOptimizerState(marks, split_by(labels).init(bare))

    def update(
        updates: Any, state: CenterOptimizerState, params: Any = None, **extra: Any
    ) -> tuple[Any, CenterOptimizerState]:
        split = split_by(_labels(state.centers))
        moved, inner = split.update(_bare(updates), state.inner, _bare(params), **extra)
        moved = jax.tree.unflatten(jax.tree.structure(updates), jax.tree.leaves(moved))
        return moved, CenterOptimizerState(state.centers, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _divide_out(
    weight: float | optax.Schedule, tx: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """`tx` on the gradient divided by `weight`; where that is 0, nothing moves."""
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> DividedState:
        return DividedState(jnp.zeros((), jnp.int32), tx.init(params))

    def update(
        updates: Any, state: DividedState, params: Any = None, **extra: Any
    ) -> tuple[Any, DividedState]:
        lam = _checks.scalar("weight", weight(state.step) if callable(weight) else weight)
        rests = lam == 0

        def divided(gradient: jax.Array) -> jax.Array:
            # In float32: float16 holds neither 1e-5 nor its inverse.
            wide = gradient.astype(_table.compute_dtype(gradient))
            quotient = wide / jnp.where(rests, jnp.ones((), wide.dtype), lam.astype(wide.dtype))
            return quotient.astype(gradient.dtype)

        moved, inner = tx.update(jax.tree.map(divided, updates), state.inner, params, **extra)
        moved = jax.tree.map(lambda step: jnp.where(rests, jnp.zeros_like(step), step), moved)
        inner = jax.tree.map(lambda new, old: jnp.where(rests, old, new), inner, state.inner)
        return moved, DividedState(optax.safe_increment(state.step), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _marks(params: Any, select: Callable[[Path, Any], bool] | None) -> Any:
    """The tree of params, with an `EmptyState` for each leaf that is centers, else a `MaskedNode`."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_variable)
    paths = [_plain(path) for path, _ in leaves]
    if select is None:
        chosen = _owned(paths, [leaf for _, leaf in leaves])
    else:
        chosen = [bool(select(path, _content(leaf))) for path, (_, leaf) in zip(paths, leaves, strict=True)]
        if not any(chosen):
            raise ValueError(f"no parameter was picked by select: this model has {_named(paths)}.")
    marks = [optax.EmptyState() if centers else optax.MaskedNode() for centers in chosen]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=_is_variable), marks)


def _owned(paths: list[Path], leaves: list[Any]) -> list[bool]:
    """Which leaves belong to a center loss: NNX Variables say so, of others the key has to tell."""
    owned = [_is_variable(leaf) and OWNER.items() <= leaf.get_metadata().items() for leaf in leaves]
    keyed = ["centers" in path and not _is_variable(leaf) for path, leaf in zip(paths, leaves, strict=True)]
    chosen = [a or b for a, b in zip(owned, keyed, strict=True)]
    found = [path for path, centers in zip(paths, chosen, strict=True) if centers]
    if len(found) > 1 and any(keyed):
        raise ValueError(
            f'several parameters are below a key "centers": {_named(found)}. Other layers have parameters of '
            "that name too. Say which are a center loss's by `select`, such as "
            '`select=lambda path, leaf: path == ("center_loss", "centers")`.'
        )
    if not found:
        others = [path for path in paths if "centers" in path]
        reason = (
            f"no parameter is known to belong to an nnx.CenterLoss; {_named(others)} may be another layer's "
            "(if it does hold the centers of a loss, or its Variable was replaced, say so by `select`)"
            if others
            else 'no parameter is below a key "centers"'
        )
        raise ValueError(
            f"{reason}: this model has {_named(paths)}. Put the center loss module (or the dict from "
            "init_centers) into the tree that is optimized, or name the centers with select. Centers "
            'that are state (centers_as="state") have no optimizer: they are moved by rule or by rows.'
        )
    return chosen


def _labels(marks: Any) -> Any:
    """What `optax.partition` asks for, by the marks of an `init`."""

    def is_mark(node: Any) -> bool:
        return isinstance(node, optax.EmptyState | optax.MaskedNode)

    return jax.tree.map(
        lambda mark: "centers" if isinstance(mark, optax.EmptyState) else "model", marks, is_leaf=is_mark
    )


def _bare(tree: Any) -> Any:
    """The tree with the arrays in place of Flax's Variables, which can't stand around a masked leaf."""
    return jax.tree.map(lambda node: _content(node), tree, is_leaf=_is_variable)


def _is_variable(node: Any) -> bool:
    return hasattr(node, "get_metadata")


def _content(node: Any) -> Any:
    """What a Variable holds: an array, or the `MaskedNode` that a masked one has instead."""
    return jax.tree.leaves(node, is_leaf=lambda inner: inner is not node)[0] if _is_variable(node) else node


def _is_container(tree: Any) -> bool:
    return tree is None or isinstance(tree, Mapping | tuple | list)


def _named(paths: list[Path]) -> str:
    return ", ".join("/".join(map(str, path)) or "a bare array" for path in paths) or "no parameters"


def _plain(key_path: tuple[Any, ...]) -> Path:
    """The keys, attribute names and indices of a JAX key path."""
    return tuple(
        next(getattr(entry, name) for name in ("key", "name", "idx") if hasattr(entry, name))
        for entry in key_path
    )
