"""Checks of array arguments, at trace time: under `jit` they cost nothing when the program runs.

A "table" is an array with one row for each class: the `(C, D)` centers, or a leaf of an optimizer's state.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike


def as_array(name: str, value: Any, advice: str, kind: str = "an array") -> jax.Array:
    """Returns the argument `name` as a JAX array. A NumPy array is copied.

    On a CPU JAX would use the memory of an aligned NumPy array, and might read it after the call has
    returned. A data loader may have overwritten it by then.
    """
    try:
        if is_numpy_like(value):
            value = np.asarray(value).copy()
            if value.dtype.kind in "iu":
                # Without x64 JAX converts int64 to int32 modulo 2**32, and a huge label could become a valid
                # one. A clipped label stays out of range.
                limits = np.iinfo(jax.dtypes.canonicalize_dtype(value.dtype))
                value = value.clip(limits.min, limits.max)
        return jnp.asarray(value)
    except jax.errors.JAXTypeError:  # JAX's error about a tracer says more.
        raise
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} must be {kind}, got {describe(value)}. {advice}") from error


def is_numpy_like(value: Any) -> bool:
    """Whether `value` is a NumPy array, or converts to one, and is not a JAX array."""
    converts = hasattr(value, "__array__") and not hasattr(value, "__jax_array__")
    return converts and not isinstance(value, jax.Array)


def as_arrays(name: str, tree: Any, advice: str) -> Any:
    """`as_array` of each leaf."""
    return jax.tree.map(lambda leaf: as_array(f"a leaf of {name}", leaf, advice), tree)


def as_after(after: Any) -> Any:
    """Checks `after`, the values that must be computed before the centers are overwritten."""
    return as_arrays("after", after, "Pass the loss, or a tree of what is computed from the centers.")


def describe(value: Any) -> str:
    """A short description of `value` for an error."""
    if inspect.isroutine(value) or inspect.isclass(value):
        return f"the {'class' if inspect.isclass(value) else 'function'} {value.__name__}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(repr, value))}"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype.name}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(type(v).__name__ for v in value[:8])}"
    return "None" if value is None else type(value).__name__


def check_floating(dtype: DTypeLike, name: str, advice: str | None = None) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        advice = advice or f"Cast it first, for example `{name}.astype(jnp.float32)`."
        raise TypeError(f"{name} must be floating point, got {jnp.dtype(dtype).name}. {advice}")


def as_table(params: Any, name: str = "params") -> jax.Array:
    """Returns the one leaf of `params`, and raises unless it is a `(C, D)` table of floats."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if len(leaves) != 1:
        found = ", ".join(jax.tree_util.keystr(path) for path, _ in leaves[:8]) or "none"
        raise ValueError(
            f"{name} must hold exactly one array, the (C, D) centers, got {len(leaves)} leaves: {found}"
            f"{', ...' if len(leaves) > 8 else ''}. Pass the part of the tree that holds the centers alone: "
            'a dict {"centers": array}, an NNX module or its state, or for Linen '
            '`variables["params"]["<module>"]` (`variables["centers"]["<module>"]` if centers are state).'
        )
    centers = as_array(
        f"the leaf of {name}",
        leaves[0][1],
        'Pass the (C, D) centers. A Linen module holds none: pass its `variables["params"]`.',
    )
    if centers.ndim != 2 or 0 in centers.shape:
        shown = "centers" if name == "params" else name
        raise ValueError(
            f"{shown} must have shape (C, D) with at least one class and one feature, got {centers.shape}."
        )
    check_floating(centers.dtype, "centers")
    return centers


def is_concrete(value: ArrayLike | None) -> bool:
    """Whether the values can be read: they are not traced, and fully addressable by this process."""
    leaves = jax.tree.leaves(value)  # A list of labels may hold tracers.
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return False
    return all(leaf.is_fully_addressable for leaf in leaves if isinstance(leaf, jax.Array))


def as_scalar(name: str, value: Any, advice: str | None = None) -> jax.Array:
    """Returns `value` as a scalar array, and raises unless it is one real number."""
    advice = advice or f"Pass a number. If it is a schedule, pass its value: `{name}=schedule(step)`."
    number = as_array(name, value, advice, "a number")
    if number.ndim:
        raise ValueError(f"{name} must be a number or a scalar array, got shape {number.shape}.")
    if not (jnp.issubdtype(number.dtype, jnp.floating) or jnp.issubdtype(number.dtype, jnp.integer)):
        raise TypeError(f"{name} must be a real number, got {number.dtype.name}.")
    return number


def as_key(name: str, value: Any) -> jax.Array | None:
    """Returns one PRNG key, new-style typed or legacy uint32. None stays None."""
    if value is None:
        return None
    advice = (
        "Pass a new key in each step, for example `jax.random.fold_in(jax.random.key(0), step)`, or in NNX "
        "`rngs.rounding()`, from a stream of your `nnx.Rngs`."
    )
    keys = as_array(name, value, advice, "a PRNG key")
    ndim = keys.ndim
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        raw = jax.eval_shape(jax.random.PRNGKey, 0)
        if keys.dtype != raw.dtype or keys.shape[-1:] != raw.shape:
            raise TypeError(
                f"{name} must be a PRNG key, got {keys.dtype.name} of shape {keys.shape}. {advice}"
            )
        ndim -= 1
    if ndim:
        raise ValueError(f"{name} must be one key, got keys of shape {keys.shape}. {advice}")
    return keys


def as_previous_table(params: Any, previous: Any, centers: jax.Array) -> jax.Array:
    """Returns the table in `previous`, and raises if it has another shape or is the array in `params`."""
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


def check_state(state: Any, expected: Any, centers: jax.Array) -> None:
    """Compares the state of a row optimizer with the shapes and dtypes that its `init` makes.

    It can't tell optimizers apart if their states have the same structure, such as Adam and Yogi.
    """
    shapes = [jax.tree.map(np.shape, tree) for tree in (state, expected)]
    structures = {jax.tree.structure(tree) for tree in (state, expected)}
    if len(structures) > 1 or shapes[0] != shapes[1]:
        raise ValueError(
            f"state does not belong to this optimizer and centers {centers.shape}: expected {shapes[1]}, got "
            f"{shapes[0]}. Make it with this row optimizer's `init(params)`, and pass on what `update` "
            "returns: `params, state = rows.update(params, state, x, labels)`."
        )
    # Only the dtypes of tables are compared, since a scalar may be a Python number.
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        if np.ndim(leaf) and jax.dtypes.canonicalize_dtype(leaf.dtype) != like.dtype:
            raise ValueError(
                f"state holds {leaf.dtype.name} where this optimizer keeps {like.dtype.name}: create the row "
                "optimizer with the `state_dtype` of this state, or cast the state."
            )
