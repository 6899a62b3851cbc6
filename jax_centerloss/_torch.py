"""Centers from and to PyTorch."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_centerloss import _checks, _torch_file

_SHOWN = 50  # Tensors that an error lists.

Source = Mapping[str, Any] | str | os.PathLike[str]


def from_torch(source: Source, *, key: str = "centers") -> dict[str, jax.Array]:
    """Centers from a PyTorch state dict.

    Args:
      source: a mapping such as `module.state_dict()` (tensors or arrays), or the path of a file: `.pt` or
        `.pth` as PyTorch writes it since 1.6, of which only tensors are read, so that no code in it runs, or
        `.safetensors` (needs safetensors). Neither needs torch.
      key: the name of the centers in it; `"center_loss.centers"` for a submodule, say.

    Returns:
      `{"centers": array}`, the array of shape `(C, D)` in the tensor's dtype (float64 becomes float32 unless
      `jax_enable_x64` is on).

    Raises:
      KeyError: if `key` is not there; the message lists what is.
      ValueError: if the tensor is not a `(C, D)` table, the file's name has another ending, or the file is
        broken or forged.
      TypeError: if the tensor is not floating point, or `source` is neither a mapping nor a path.

    Example:
      >>> import numpy as np, jax_centerloss
      >>> params = jax_centerloss.from_torch({"centers": np.zeros((10, 2), np.float32)})
      >>> params["centers"].shape
      (10, 2)
    """
    if isinstance(source, str | os.PathLike):
        source = _torch_file.load(os.fspath(source), key)
    if not isinstance(source, Mapping):
        raise TypeError(
            f"source must be a mapping or the path of a file, got {type(source).__name__}. For a module pass "
            "`module.state_dict()`."
        )
    held = ", ".join(_describe(name, value) for name, value in [*source.items()][:_SHOWN]) or "nothing"
    if len(source) > _SHOWN:
        held += f" and {len(source) - _SHOWN} more"
    if key not in source:
        raise KeyError(
            f"no {key!r} in the state dict, which holds: {held}. Name the centers with `key=`, or pass the "
            "state dict inside the checkpoint."
        )
    try:
        array = _numpy(source[key])
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise TypeError(f"{key!r} must be a tensor; the state dict holds: {held}.") from error
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{key!r} must have shape (C, D), got {array.shape}; the state dict holds: {held}.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{key!r} must be floating point, got {array.dtype.name}; the state dict holds: {held}."
        )
    return {"centers": jnp.array(array)}


def to_torch(params: Any) -> dict[str, Any]:
    """Centers as a PyTorch state dict, for `module.load_state_dict`. Needs torch.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.

    Returns:
      `{"centers": tensor}`, a copy on the CPU in the same dtype.

    Raises:
      ValueError: if `params` does not hold one `(C, D)` table.
      TypeError: if it is not floating point.

    Example:
      >>> import jax, jax_centerloss
      >>> params = jax_centerloss.init_centers(jax.random.key(0), 10, 2)
      >>> state_dict = jax_centerloss.to_torch(params)  # doctest: +SKIP
      >>> torch_module.load_state_dict(state_dict)  # doctest: +SKIP
    """
    import torch

    centers = _checks.table(params)
    array = np.array(centers.astype(jnp.float32) if centers.dtype == jnp.bfloat16 else centers)
    tensor = torch.from_numpy(array)
    return {"centers": tensor.bfloat16() if centers.dtype == jnp.bfloat16 else tensor}


def _describe(name: str, value: Any) -> str:
    if hasattr(value, "dtype"):
        return f"{name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"{name} ({type(value).__name__})"


def _numpy(value: Any) -> np.ndarray[Any, Any]:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy has no bfloat16 of its own, and torch refuses the conversion.
        half = str(value.dtype) == "torch.bfloat16"
        array: np.ndarray[Any, Any] = value.float().numpy().astype(jnp.bfloat16) if half else value.numpy()
        return array
    if not hasattr(value, "dtype"):
        raise TypeError("not a tensor")
    return np.asarray(value)
