"""The centers' own optimizer, inside the model's."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jax_centerloss._rows import RowOptimizer

Path = tuple[str | int, ...]


def with_center_optimizer(
    tx: optax.GradientTransformation,
    centers: optax.GradientTransformation | None = None,
    *,
    select: Callable[[Path, Any], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gives the centers their own optax chain and leaves everything else to `tx`.

    The centers are the leaves below a key `"centers"`, wherever it sits in the model's tree: Flax NNX
    modules and state, Linen params, dicts, several tables in one model.

    The gradient of `cross_entropy + lam * center_loss` holds `lam`, and so do the centers' steps. Divide it
    out, as PyTorch users do by hand: `centers=optax.chain(optax.scale(1 / lam), optax.sgd(0.5))`.
    Clip gradients inside `tx`, not around this: the centers' gradient would enter the norm.

    Args:
      tx: the model's optimizer.
      centers: the centers' optimizer; `optax.sgd(0.5)` by default, which leaves `lam` in.
      select: `select(path, leaf)` says whether a leaf holds centers, for a model in which the key alone
        does not tell. `path` is the tuple of the keys, attribute names and indices that lead to the leaf,
        such as `("loss", "centers")`.

    Returns:
      An optax transformation, for `nnx.Optimizer`, `TrainState` or a loop of one's own.

    Raises:
      TypeError: if `tx` or `centers` is not an optax transformation.
      ValueError: on `init` and `update`, if no leaf holds centers.

    Example:
      >>> import jax.numpy as jnp, optax, jax_centerloss
      >>> lam = 0.01
      >>> tx = jax_centerloss.with_center_optimizer(
      ...     optax.adam(1e-3), centers=optax.chain(optax.scale(1 / lam), optax.sgd(0.5))
      ... )
      >>> params = {"dense": jnp.ones((4, 2)), "loss": {"centers": jnp.zeros((10, 2))}}
      >>> opt_state = tx.init(params)
    """
    chosen = _has_centers_key if select is None else select

    def label(params: Any) -> Any:
        paths = []

        def one(key_path: tuple[Any, ...], leaf: Any) -> str:
            path = _plain(key_path)
            paths.append(path)
            return "centers" if chosen(path, leaf) else "model"

        labels = jax.tree_util.tree_map_with_path(one, params)
        if "centers" not in jax.tree.leaves(labels):
            found = ", ".join("/".join(map(str, path)) or "a bare array" for path in paths) or "no parameters"
            rule = 'is below a key "centers"' if select is None else "was picked by select"
            raise ValueError(
                f"no parameter {rule}: this model has {found}. Put the center loss module (or the dict from "
                "init_centers) into the tree that is optimized, or name the centers with select. Centers "
                'that are state (centers_as="state") have no optimizer: they are moved by rule or by rows.'
            )
        return labels

    own = optax.sgd(0.5) if centers is None else centers
    for name, given in {"tx": tx, "centers": own}.items():
        if isinstance(given, RowOptimizer) or not (hasattr(given, "init") and hasattr(given, "update")):
            raise TypeError(f"{name} must be an optax transformation, such as optax.sgd(0.5), got {given!r}.")
    split = optax.partition({"centers": own, "model": tx}, label)

    def init(params: Any) -> Any:
        return split.init(_bare(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        moved, state = split.update(_bare(updates), state, _bare(params), **extra)
        return jax.tree.unflatten(jax.tree.structure(updates), jax.tree.leaves(moved)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _bare(tree: Any) -> Any:
    """The tree with the arrays in place of Flax's Variables, which can't stand around a masked leaf."""

    def variable(node: Any) -> bool:
        return hasattr(node, "get_metadata")

    return jax.tree.map(lambda n: jax.tree.leaves(n)[0] if variable(n) else n, tree, is_leaf=variable)


def _has_centers_key(path: Path, leaf: Any) -> bool:
    del leaf
    return "centers" in path


def _plain(key_path: tuple[Any, ...]) -> Path:
    """The keys, attribute names and indices of a JAX key path."""
    return tuple(
        next(getattr(entry, name) for name in ("key", "name", "idx") if hasattr(entry, name))
        for entry in key_path
    )
