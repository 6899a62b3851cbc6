"""Makes JAX arrays of array-likes, and refuses those whose mask or unit would be lost.

A "NumPy-like" value is an array of NumPy or of another library that converts to one, such as a torch tensor.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# Code that errors advise, to leave out the masked samples of these arguments.
_LEFT_OUT = "np.ma.masked_invalid({}.astype(float)).filled(-1).astype(int)"
_FILLED = {"labels": _LEFT_OUT, "rows": _LEFT_OUT, "where": "{}.filled(False)", "weights": "{}.filled(0)"}
# The indices that go with features or gradients.
_INDICES = {"x": "labels", "gradients": "rows"}
_UNITS = ("unit", "units")


def as_array(name: str, value: Any, advice: str, kind: str = "an array") -> jax.Array:
    """Returns the argument `name` as a JAX array. A NumPy array is copied.

    On a CPU JAX would use the memory of an aligned NumPy array, and might read it after the call has
    returned. A data loader may have overwritten it by then.
    """
    check_plain(name, value)
    array = value
    try:
        if is_numpy_like(value):
            array = as_numpy(value)
            result = jnp.asarray(_within_dtypes(np.array(array)))
        else:
            result = jnp.asarray(value)
    except jax.errors.JAXTypeError:  # JAX's error about a tracer says more.
        raise
    except (TypeError, ValueError, RuntimeError, OverflowError, BufferError) as error:
        # Other libraries say what to do, for example about a tensor that requires a gradient.
        is_foreign = hasattr(value, "__array__") and not isinstance(value, np.ndarray | jax.Array)
        cause = f" ({first_line(error)})" if is_foreign else ""
        raise TypeError(f"{name} must be {kind}, got {describe(value)}{cause}. {advice}") from error
    if array is not value:
        # Some arrays show a mask or a unit only when they are converted.
        check_plain(name, array, code=f"np.asanyarray({name})")
    return result


def _within_dtypes(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Clips integers to what JAX can hold.

    Without x64 JAX converts int64 to int32 modulo 2**32, and a huge label could become a valid one. A clipped
    label stays out of range.
    """
    if array.dtype.kind not in "iu":
        return array
    limits = np.iinfo(jax.dtypes.canonicalize_dtype(array.dtype))
    return array.clip(limits.min, limits.max)


def is_numpy_like(value: Any) -> bool:
    """Whether `value` is a NumPy array or converts to one, as a list does, and holds no JAX array."""
    if isinstance(value, list | tuple):
        leaves = jax.tree.leaves(value)
        return not any(isinstance(leaf, jax.Array) or hasattr(leaf, "__jax_array__") for leaf in leaves)
    # JAX itself converts a value with `__jax_array__`, such as an `nnx.Param`.
    converts = hasattr(value, "__array__") and not hasattr(value, "__jax_array__")
    return converts and not isinstance(value, jax.Array)


def first_line(error: Exception) -> str:
    return next((line for line in map(str.strip, str(error).splitlines()) if line), type(error).__name__)


def as_numpy(value: Any) -> np.ndarray[Any, Any]:
    """`np.asanyarray` in the machine's byte order. Long double becomes float64; other dtypes stay."""
    try:
        array: np.ndarray[Any, Any] = np.asanyarray(value)
    except TypeError:  # A torch tensor in bfloat16, which NumPy does not have, or on another device.
        if not hasattr(value, "__dlpack__"):
            raise
        array = np.asarray(jnp.from_dlpack(value))
    if array.dtype == np.longdouble:
        return array.astype(np.float64)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def check_plain(name: str, value: Any, code: str | None = None) -> None:
    """Raises for an array, or a list with one, whose mask or unit `np.asarray` would drop.

    In the advice `code` stands for the argument, or its name.
    """
    code = code or name
    for leaf in jax.tree.leaves(value, is_leaf=has_unit) if isinstance(value, list | tuple) else [value]:
        if isinstance(leaf, np.ndarray) and hasattr(leaf, "mask"):
            advice = "Pass plain numbers."
            if name in _FILLED and leaf is value:
                advice = f"`{_FILLED[name].format(code)}` leaves masked samples out."
            elif name in _INDICES and leaf is value:
                masked = f"np.ma.getmaskarray({code}).any(-1)"
                indices = _INDICES[name]
                advice = (
                    f"To leave masked samples out, first `{indices} = np.where({masked}, -1, {indices})`, if "
                    f"the function takes {indices}, and then pass `{code}.filled(np.nan)`."
                )
            raise TypeError(f"{name} must not be a masked array, of which JAX would drop the mask. {advice}")
        if has_unit(leaf):
            raise TypeError(
                f"{name} must be plain numbers, got {type(leaf).__name__}, whose unit would be dropped. Pass "
                "the numbers in one unit for features and centers."
            )


def has_unit(value: Any) -> bool:
    """Whether `value`, or the array inside of it, as of an xarray.DataArray, says what unit it is in."""
    if isinstance(value, np.ndarray):
        return any(getattr(value, attribute, None) is not None for attribute in _UNITS)
    if not hasattr(value, "__array__") or isinstance(value, np.generic | jax.Array):
        return False
    # `getattr` would find the entry of that name in a pandas Series.
    holders = value, getattr(value, "data", None)
    return any(inspect.getattr_static(h, name, None) is not None for h in holders for name in _UNITS)


def code_of(name: str, value: Any) -> str:
    """The argument as code for advice: its name, or an array made of it if it is none, so that it runs."""
    if isinstance(value, jax.Array | np.ndarray):
        return name
    return f"{'np' if is_numpy_like(value) else 'jnp'}.asarray({name})"


def as_arrays(name: str, tree: Any, advice: str) -> Any:
    """`as_array` of each leaf."""
    return jax.tree.map(lambda leaf: as_array(f"a leaf of {name}", leaf, advice), tree)


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


def is_concrete(value: ArrayLike | None) -> bool:
    """Whether the values can be read: they are not traced, and fully addressable by this process."""
    # A list of labels may hold tracers.
    arrays = [leaf for leaf in jax.tree.leaves(value) if isinstance(leaf, jax.Array)]
    return not any(isinstance(a, jax.core.Tracer) or not a.is_fully_addressable for a in arrays)
