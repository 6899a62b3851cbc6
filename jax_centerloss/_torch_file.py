"""Tensors from files, which are not trusted: they run no code, and take memory only for bytes they have."""

import io
import math
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def load(path: str, key: str) -> Any:
    """What the file holds: of the tensor named `key` the numbers, of all others shape and dtype."""
    ending = os.path.splitext(path)[1].lower()
    if ending not in (".pt", ".pth", ".safetensors"):
        raise ValueError(f"the file must end in .pt, .pth or .safetensors, got {path!r}.")
    os.stat(path)  # One that is not there raises as it does everywhere.
    try:
        return _safetensors(path, key) if ending == ".safetensors" else _archive(path, key)
    except (ImportError, OSError, MemoryError):
        raise
    except Exception as error:  # Torn and forged files make the readers fail in every way there is.
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"{path!r} can't be read: {type(error).__name__}: {reason}") from error


def _safetensors(path: str, key: str) -> Any:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        names = file.keys()
        return {name: file.get_tensor(name) if name == key else _Described(file, name) for name in names}


class _Described:
    """Shape and dtype of a tensor that was not read: it may be large, or of a dtype that NumPy has not."""

    def __init__(self, file: Any, name: str) -> None:
        part = file.get_slice(name)
        self.shape, self.dtype = part.get_shape(), part.get_dtype()


def _archive(path: str, key: str) -> Any:
    """PyTorch's own format: a zip of a pickle and of the bytes of each tensor, uncompressed.

    PyTorch's loader is not asked: files have made it take memory, and run code.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(
            "it is no archive as `torch.save` writes it since PyTorch 1.6; of an older file, pass what "
            "`torch.load(path, weights_only=True)` returns"
        )
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        # So that no bytes are unpacked, and none are read twice.
        if sum(member.file_size for member in members.values()) > os.path.getsize(path):
            raise ValueError("it unpacks to more than its size")
        name = next((name for name in members if name.endswith("/data.pkl")), "data.pkl")
        folder = name.removesuffix("data.pkl")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("it was written on a machine of another order of bytes")
        state = _unpickled(archive.read(name))
        if isinstance(state, dict) and isinstance(state.get(key), _Stored):
            state[key] = state[key].read(archive.read(f"{folder}data/{state[key].storage.member}"))
        return state


class _Storage(NamedTuple):
    kind: str
    member: str


class _Stored(NamedTuple):
    """A tensor as the pickle tells of it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> str:
        kind = self.storage.kind
        return np.dtype(_STORAGES[kind]).name if kind in _STORAGES else kind

    def read(self, content: bytes) -> np.ndarray[Any, Any]:
        numbers = np.frombuffer(content, _STORAGES[self.storage.kind])
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        least = min(self.offset, *self.shape, *self.strides)
        if least < 0 or max(math.prod(self.shape), last + 1) > len(numbers):
            raise ValueError(f"a tensor of shape {self.shape} is larger than what is stored of it")
        steps = [step * numbers.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, steps).copy()


class _Unknown:
    """Stands for whatever is not a tensor, and does nothing that the pickle asks of it."""

    def __init__(self, *_: Any) -> None: ...
    def __setstate__(self, state: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def extend(self, items: Any) -> None: ...
    def add(self, item: Any) -> None: ...


def _unpickled(content: bytes) -> Any:
    argument: Any
    for opcode, argument, _ in pickletools.genops(content):
        # These make room for as much as they say, before it is there.
        if opcode.name == "BYTEARRAY8" or ("PUT" in opcode.name and argument > len(content)):
            raise ValueError("its pickle is forged")
    return _Unpickler(io.BytesIO(content)).load()


class _Unpickler(pickle.Unpickler):
    """Knows how tensors are put together, and makes nothing of anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):
            return name
        known = {
            "collections.OrderedDict": lambda: OrderedDict(),  # No copies of what is there.
            "torch._utils._rebuild_tensor_v2": lambda *parts: _Stored(*parts[:4]),
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        }
        return known.get(f"{module}.{name}") or type(f"{module}.{name}", (_Unknown,), {})

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, member, _, _ = pid
        return _Storage(kind, member)
