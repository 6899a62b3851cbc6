"""Where centers and batches may lie on eight devices, and what a compiled program moves between them."""

import contextlib
import math
import re
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


class Placement(NamedTuple):
    """A mesh of devices, and the axes over which classes and samples are spread."""

    kind: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    classes: Any
    samples: Any
    context: bool = False

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return jax.make_mesh(
            self.shape, self.names, axis_types=(getattr(AxisType, self.kind),) * len(self.names)
        )

    def of(self, name: str, ndim: int) -> NamedSharding:
        """The sharding of an argument: one that starts with "table" lies over classes, else over samples."""
        axis = self.classes if name.startswith("table") else self.samples
        return NamedSharding(self.mesh, P(*(axis, None, None)[:ndim]))

    def entered(self) -> Any:
        return jax.set_mesh(self.mesh) if self.context else contextlib.nullcontext()

    def __str__(self) -> str:
        words = [self.kind, *(["context"] if self.context else []), f"classes={self.classes}"]
        return "-".join([*words, f"samples={self.samples}"]).replace(" ", "")


def _layouts(kind: str, context: bool = False) -> list[Placement]:
    one, two = ((8,), ("d",)), ((2, 4), ("data", "classes"))
    return [
        Placement(kind, *one, "d", "d", context),
        Placement(kind, *two, "classes", "data", context),
        Placement(kind, *two, "classes", ("data", "classes"), context),
        Placement(kind, *two, None, "data", context),
        Placement(kind, *two, None, None, context),
    ]


PLACEMENTS = [
    *_layouts("Auto")[:-1],
    *_layouts("Explicit"),
    _layouts("Auto", context=True)[1],
    _layouts("Explicit", context=True)[1],
]

_SIZE = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
_COLLECTIVE = re.compile(
    r"= (\([^=]*?\)|\S+) ((?:all-|ragged-all-|reduce-scatter|collective-)[a-z-]*?)(?:-start)?\("
)


def collectives(text: str) -> Counter[tuple[str, int]]:
    """What travels between devices in a compiled program: kinds and bytes of its collectives.

    One in a loop raises, since it travels as often as the loop turns.
    """
    found: Counter[tuple[str, int]] = Counter()
    calls: dict[str, set[str]] = {}
    holds: dict[str, str] = {}
    computation = ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = head[1]
        calls.setdefault(computation, set()).update(re.findall(r"[\w.-]+", line))
        if match := _COLLECTIVE.search(line):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            size = sum(
                _SIZE[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in shapes
            )
            found[match[2], size] += 1
            holds[computation] = line.strip()[:200]
    waiting = re.findall(r"body=%?([\w.-]+)", text)
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in holds:
            raise AssertionError(f"in a loop, {name}: {holds[name]}")
        seen.add(name)
        waiting += [called for called in calls.get(name, ()) if called in calls and called not in seen]
    return found


def put(placement: Placement, arguments: dict[str, Any]) -> list[Any]:
    """Each array where it belongs, also those in a tree; scalars stay."""

    def one(name: str, leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        return jax.device_put(leaf, placement.of(name, leaf.ndim)) if leaf.ndim else leaf

    return [jax.tree.map(partial(one, name), tree) for name, tree in arguments.items()]


def shapes(placement: Placement, arguments: dict[str, Any], classes: int) -> list[Any]:
    """The same, as shapes, of which nothing is allocated, and with that many classes."""

    def one(name: str, leaf: Any) -> Any:
        shape = (classes, *leaf.shape[1:]) if name.startswith("table") and leaf.ndim else leaf.shape
        sharding = placement.of(name, leaf.ndim) if leaf.ndim else None
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

    return [jax.tree.map(partial(one, name), tree) for name, tree in arguments.items()]
