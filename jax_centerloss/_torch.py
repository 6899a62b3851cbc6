"""Centers from PyTorch and to PyTorch."""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_centerloss import _arrays, _checks

_LISTED = 50  # An error lists at most this many tensors.

Source = Mapping[str, Any] | str | os.PathLike[str]


def from_torch(source: Source | Any, *, key: str = "centers") -> dict[str, jax.Array]:
    """Centers from a PyTorch state dict, checkpoint, parameter or tensor.

    Args:
      source: a mapping of tensors or arrays, such as `module.state_dict()`; a tensor; or the path of a file
        that holds one of these. A file whose name ends in `.safetensors` is read by the safetensors library,
        and a file of any other name by `torch.load(..., weights_only=True)`, which needs torch.
      key: the name of the centers, such as `"center_loss.centers"` in a submodule, or in a nested checkpoint
        `"state_dict.center_loss.centers"`. It is not used for a bare tensor.

    Returns:
      `{"centers": array}`, a copy of shape `(C, D)` in the tensor's dtype (float64 becomes float32 unless
      `jax_enable_x64` is on).

    Raises:
      KeyError: if there is no `key`; the message lists the names.
      ValueError: if the tensor is not of shape `(C, D)`, or the file can't be read: it is broken, or holds
        more than tensors and plain containers, such as a pickled `nn.Module`.
      TypeError: if the tensor is not floating point, or `source` has another type.
      ImportError: if torch or safetensors is needed and not installed.
      OSError: if the file can't be opened: a FileNotFoundError, or for a folder an IsADirectoryError.

    Example:
      >>> import numpy as np, jax_centerloss
      >>> params = jax_centerloss.from_torch({"centers": np.zeros((10, 2), np.float32)})
      >>> params["centers"].shape
      (10, 2)
    """
    if isinstance(source, str | os.PathLike):
        source = _load(os.fspath(source), key)
    name, tensor, ending = "source", source, "."
    if isinstance(source, Mapping):
        tensors = _flatten(source)
        listed = _list_tensors(tensors)
        if key not in tensors:
            alike = [name for name in tensors if name.split(".")[-1] == key.split(".")[-1]]
            advice = f", perhaps `key={alike[0]!r}`" if alike else ""
            raise KeyError(
                f"no {key!r} in the state dict, which holds: {listed}. Name the centers with `key=`{advice}."
            )
        name, tensor, ending = repr(key), tensors[key], f"; the state dict holds: {listed}."
    _arrays.check_plain(name, tensor)
    try:
        array = _to_numpy(tensor)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        if tensor is source:
            ending = (
                ", a mapping such as `module.state_dict()` or the path of a file, got "
                f"{type(source).__name__}."
            )
        raise TypeError(f"{name} must be a tensor{ending}") from error
    _arrays.check_plain(name, array)  # Some arrays show a mask only when they are converted.
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must have shape (C, D), got {array.shape}{ending}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {array.dtype.name}{ending}")
    # A copy, since a module may go on to train the tensor in place.
    return {"centers": jnp.asarray(np.array(array))}


def to_torch(params: Any) -> dict[str, Any]:
    """Centers as a PyTorch state dict, for `module.load_state_dict`. Needs torch.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.

    Returns:
      `{"centers": tensor}`, a copy on the CPU in the same dtype.

    Raises:
      ImportError: if torch is not installed.
      ValueError: if `params` does not hold one array of shape `(C, D)`.
      TypeError: if the centers are not floating point.

    Example:
      >>> import jax, jax_centerloss
      >>> params = jax_centerloss.init_centers(jax.random.key(0), 10, 2)
      >>> state_dict = jax_centerloss.to_torch(params)  # doctest: +SKIP
      >>> torch_module.load_state_dict(state_dict)  # doctest: +SKIP
    """
    import torch

    centers = _checks.as_table(params)
    array = np.array(centers.astype(jnp.float32) if centers.dtype == jnp.bfloat16 else centers)
    tensor = torch.from_numpy(array)
    return {"centers": tensor.bfloat16() if centers.dtype == jnp.bfloat16 else tensor}


def _load(path: str, key: str) -> Any:
    """The content of the file. Of a safetensors file only the tensor named `key` is read."""
    os.stat(path)  # Raises FileNotFoundError.
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path!r} is a folder: pass the file in it that holds the centers.")
    try:
        if path.lower().endswith(".safetensors"):
            return _read_safetensors(path, key)
        return _read_by_torch(path)
    except (OSError, MemoryError, ImportError):  # The system's errors are raised as they are.
        raise
    except Exception as error:  # The loaders raise errors of many types over a broken file.
        reason = f"{type(error).__name__}: {_arrays.first_line(error)}"
        # A refusal is a `pickle.UnpicklingError`. Its name is compared, so that pickle need not be imported.
        if type(error).__name__ == "UnpicklingError":
            found = re.search(r"GLOBAL (\S+)", str(error))
            cause = f"it holds {found[1]}" if found else "it is no pickle of tensors"
            reason = (
                f"PyTorch's safe loader refuses it, since {cause}. If a whole module was saved by "
                "`torch.save(net, path)`, save `net.state_dict()` instead. If it is a checkpoint with other "
                "objects beside the tensors, and you trust it, pass what "
                "`torch.load(path, weights_only=False)` returns."
            )
        raise ValueError(f"{path!r} can't be read: {reason}") from error


def _read_by_torch(path: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"reading {path!r} needs torch. Without it, pass arrays, or a .safetensors file."
        ) from error
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: str, key: str) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        names = file.keys()
        return {name: file.get_tensor(name) if name == key else _Unread(file, name) for name in names}


class _Unread:
    """Shape and dtype of a tensor that was not read: it may be large, or of a dtype unknown to NumPy."""

    def __init__(self, file: Any, name: str) -> None:
        part = file.get_slice(name)
        self.shape, self.dtype = part.get_shape(), part.get_dtype()


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings, by dotted names."""
    found: dict[str, Any] = {}
    for name, value in mapping.items():
        path = f"{prefix}{name}"
        found |= _flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return found


def _list_tensors(tensors: dict[str, Any]) -> str:
    listed = ", ".join(_describe(name, value) for name, value in [*tensors.items()][:_LISTED]) or "nothing"
    return listed + (f" and {len(tensors) - _LISTED} more" if len(tensors) > _LISTED else "")


def _describe(name: str, value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"{name} ({type(value).__name__})"


def _to_numpy(value: Any) -> np.ndarray[Any, Any]:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # torch can't convert bfloat16, which NumPy itself does not have.
        half = str(value.dtype) == "torch.bfloat16"
        array: np.ndarray[Any, Any] = value.float().numpy() if half else value.numpy()
        return array.astype(jnp.bfloat16) if half else array
    if not hasattr(value, "dtype"):
        raise TypeError("not a tensor")
    return _arrays.as_numpy(value)
