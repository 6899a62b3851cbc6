"""What is accepted, and the words of each error.

Checks run at trace time: under `jit` they cost nothing when the program runs. A "table" is an array with one
row for each class: the `(C, D)` centers, or a leaf of an optimizer's state.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_centerloss import _arrays

Clip = tuple[float, float] | None
ReduceFn = Callable[..., Any] | None  # jnp.mean, jnp.sum or None, and no other function.
Weights = jax.Array | None  # One number per sample, or None if all count alike.

# The bounds of a squared distance in the PyTorch module github.com/KaiyangZhou/pytorch-center-loss.
CLIP = (1e-12, 1e12)
RULES = ("paper", "gradient", "mean")  # The rules of `update_centers`.
KEY_ADVICE = (
    "Pass a new key in each step, for example `jax.random.fold_in(jax.random.key(0), step)`, or in NNX "
    "`rngs.rounding()`, from a stream of your `nnx.Rngs`."
)
FLOAT_ADVICE = "Centers are floating point: use jnp.float32 or jnp.bfloat16, for example."


def as_after(after: Any) -> Any:
    """The leaves of `after` as arrays: they are computed before the centers are written."""
    return _arrays.as_arrays("after", after, "Pass the loss, or a tree of what is computed from the centers.")


def check_floating(dtype: DTypeLike, name: str, advice: str) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {jnp.dtype(dtype).name}. {advice}")


def cast_advice(dtype: DTypeLike, code: str) -> str:
    """How to make floats of an array of another dtype, for which `code` stands."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return f"Pass real and imaginary parts: `jnp.concatenate([{code}.real, {code}.imag], axis=-1)`."
    return f"Cast it first: `{code}.astype(jnp.float32)`."


def as_table(params: Any, name: str = "params", advice: str = "") -> jax.Array:
    """Returns the one leaf of `params`, and raises unless it is a `(C, D)` table of floats.

    If `params` does not have exactly one leaf, the error ends with `advice`.
    """
    # Flattening a quantity with a unit would drop the unit.
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_arrays.has_unit)
    if len(leaves) != 1:
        found = ", ".join(jax.tree_util.keystr(path) for path, _ in leaves[:8]) or "none"
        raise ValueError(
            f"{name} must hold exactly one array, the (C, D) centers, got {len(leaves)} leaves: {found}"
            f"{', ...' if len(leaves) > 8 else ''}. Pass the part of the tree that holds the centers alone: "
            'a dict {"centers": array}, an NNX module or its state, or for Linen '
            '`variables["params"]["<module>"]` (`variables["centers"]["<module>"]` if centers are state).'
            f"{advice}"
        )
    leaf = leaves[0][1]
    # A `jax.Ref`, as in `nnx.vars_as(model, ref=True)`, is read.
    is_ref = hasattr(getattr(leaf, "aval", None), "inner_aval")
    leaf = leaf[...] if is_ref else leaf
    mend = 'Pass the (C, D) centers. A Linen module holds none: pass its `variables["params"]`.'
    centers = _arrays.as_array(f"the leaf of {name}", leaf, mend)
    if centers.ndim != 2 or 0 in centers.shape:
        shown, order = ("centers", " They come first.") if name == "params" else (name, "")
        raise ValueError(
            f"{shown} must have shape (C, D) with at least one class and one feature, got {centers.shape}."
            f"{order}"
        )
    check_floating(centers.dtype, "centers", cast_advice(centers.dtype, "centers"))
    return centers


def as_scalar(name: str, value: Any, advice: str | None = None) -> float | jax.Array:
    """Returns a Python float or a scalar array, and raises unless `value` is one real number.

    Of a plain number no array is made: that would start JAX's backend, which modules need not do when built.
    """
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        return float(value)
    advice = advice or f"Pass a number. If it is a schedule, pass its value: `{name}=schedule(step)`."
    number = _arrays.as_array(name, value, advice, "a number")
    if number.ndim:
        raise ValueError(f"{name} must be a number or a scalar array, got shape {number.shape}.")
    if not (jnp.issubdtype(number.dtype, jnp.floating) or jnp.issubdtype(number.dtype, jnp.integer)):
        raise TypeError(f"{name} must be a real number, got {number.dtype.name}.")
    return number


def as_rounding_key(value: Any) -> jax.Array | None:
    """Returns one typed PRNG key, also of a legacy uint32 one. None stays None."""
    if value is None:
        return None
    keys = _arrays.as_array("rounding_key", value, KEY_ADVICE, "a PRNG key")
    found = f"of shape {keys.shape}. {KEY_ADVICE}"
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        try:
            keys = jax.random.wrap_key_data(keys)
        except TypeError as error:
            raise TypeError(f"rounding_key must be a PRNG key, got {keys.dtype.name} {found}") from error
    if keys.shape:
        raise ValueError(f"rounding_key must be one key, got keys {found}")
    return keys


def as_previous_table(params: Any, previous: Any, centers: jax.Array) -> jax.Array:
    """The table in `previous`. Raises if it was donated, has another shape, or is the one in `params`."""
    advice = "Keep a copy from before the steps: `previous = jax.tree.map(jnp.copy, params)`."
    leaves = [leaf for leaf in jax.tree.leaves(previous) if isinstance(leaf, jax.Array)]
    if any(not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted() for leaf in leaves):
        raise ValueError(f"previous was donated to a step and is gone. {advice}")
    earlier = as_table(previous, "previous")
    if any(one is other for one in jax.tree.leaves(params) for other in jax.tree.leaves(previous)):
        raise ValueError(
            "previous holds the centers themselves, so that nothing has moved since: the state of an NNX "
            f"module, for example, changes with the module. {advice}"
        )
    if earlier.shape != centers.shape:
        raise ValueError(f"previous must be earlier centers {centers.shape}, got shape {earlier.shape}.")
    return earlier


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def as_clip(clip: Any) -> Clip:
    if clip is None:
        return None
    try:
        low, high = map(float, clip)
    except (TypeError, ValueError) as error:
        raise ValueError(f"clip must be None or a pair of floats (low, high), got {clip!r}.") from error
    if not low <= high:
        raise ValueError(f"clip must have low <= high, got {clip!r}.")
    return low, high


def check_reduce_fn(reduce_fn: ReduceFn) -> None:
    """Raises unless `reduce_fn` is `jnp.mean`, `jnp.sum` or None."""
    if reduce_fn is not None and reduce_fn is not jnp.mean and reduce_fn is not jnp.sum:
        raise ValueError(
            f"reduce_fn must be jnp.mean, jnp.sum or None (per-sample losses), got {reduce_fn!r}. "
            "For another reduction pass reduce_fn=None: the losses of samples that are left out are 0."
        )


def as_shape(num_classes: int, feat_dim: int) -> tuple[int, int]:
    """The shape of a table of centers, of sizes that are checked."""
    return _as_size("num_classes", num_classes), _as_size("feat_dim", feat_dim)


def _as_size(name: str, value: Any) -> int:
    try:
        size = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from error
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}.")
    return size


def as_module_table(centers: Any, num_classes: int, feat_dim: int) -> jax.Array:
    """`as_table` of a module's centers. Raises unless they have the shape that the module was made with."""
    table = as_table(centers, "centers")
    if table.shape != (num_classes, feat_dim):
        raise ValueError(
            f"this is CenterLoss({num_classes}, {feat_dim}), but its centers have shape {table.shape}. "
            "Create the module with the num_classes and feat_dim of its centers."
        )
    return table


def check_module(
    clip: Clip, reduce_fn: ReduceFn, centers_as: str, param_dtype: DTypeLike, centers_init: Any
) -> None:
    """Checks options of both Flax modules: all but the sizes, `out_sharding`, and `axis_name`."""
    as_clip(clip)
    check_reduce_fn(reduce_fn)
    check_choice("centers_as", centers_as, ("param", "state"))
    check_floating(param_dtype, "param_dtype", FLOAT_ADVICE)
    if not callable(centers_init):
        raise TypeError(
            f"centers_init must be a function of key, shape and dtype, got {_arrays.describe(centers_init)}. "
            "To start from existing centers, pass `lambda key, shape, dtype: centers`."
        )
