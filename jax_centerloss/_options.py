"""Checks of sizes and options."""

import math
import operator
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jax_centerloss import _checks, _placement
from jax_centerloss._placement import OutSharding

AxisName = Hashable | None
Clip = tuple[float, float] | None
ReduceFn = Callable[..., Any] | None

# The bounds of a squared distance in the PyTorch module github.com/KaiyangZhou/pytorch-center-loss.
CLIP = (1e-12, 1e12)
RULES = ("paper", "gradient", "mean")  # The rules of `update_centers`.
CENTERS_AS = ("param", "state")  # What the centers of a Flax module are.
FLOAT_ADVICE = "Centers are floating point: use jnp.float32 or jnp.bfloat16, for example."


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def as_dtype(name: str, value: Any, allowed: tuple[str, ...], advice: str) -> Any:
    """Converts `value` to a dtype, and raises if its name is not in `allowed`. None stays None."""
    if value is None:
        return None
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in allowed:
        raise ValueError(f"{name} must be None or one of {', '.join(allowed)}, got {value!r}. {advice}")
    return dtype


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
    if reduce_fn is not None and reduce_fn is not jnp.mean and reduce_fn is not jnp.sum:
        raise ValueError(
            f"reduce_fn must be jnp.mean, jnp.sum or None (per-sample losses), got {reduce_fn!r}. "
            "For another reduction pass reduce_fn=None and reduce the per-sample losses."
        )


def as_shape(num_classes: int, feat_dim: int) -> tuple[int, int]:
    """The shape of a table of centers."""
    return _as_size("num_classes", num_classes), _as_size("feat_dim", feat_dim)


def _as_size(name: str, value: Any) -> int:
    try:
        size = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from error
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}.")
    return size


def check_declared_shape(centers: jax.Array, num_classes: int, feat_dim: int) -> None:
    if centers.shape != (num_classes, feat_dim):
        raise ValueError(
            f"this is CenterLoss({num_classes}, {feat_dim}), but its centers have shape {centers.shape}. "
            "Create the module with the num_classes and feat_dim of its centers."
        )


def check_module(
    num_classes: int,
    feat_dim: int,
    *,
    clip: Clip,
    reduce_fn: ReduceFn,
    centers_as: str,
    param_dtype: DTypeLike,
    centers_init: Any,
) -> None:
    """Checks options of both Flax modules. `init_centers` checks `out_sharding`, and JAX `axis_name`."""
    as_clip(clip)
    check_reduce_fn(reduce_fn)
    check_choice("centers_as", centers_as, CENTERS_AS)
    _checks.check_floating(param_dtype, "param_dtype", FLOAT_ADVICE)
    if not callable(centers_init):
        raise TypeError(
            "centers_init must be a function of a key, a shape and a dtype, got "
            f"{_checks.describe(centers_init)}. To start from existing centers, pass "
            "`lambda key, shape, dtype: centers`."
        )
    as_shape(num_classes, feat_dim)


def as_sharding(out_sharding: OutSharding, shape: tuple[int, int]) -> NamedSharding | Format:
    """`out_sharding`, checked against the shape. A `PartitionSpec` gets the mesh of `jax.set_mesh`."""
    if not isinstance(out_sharding, OutSharding):
        raise TypeError(
            "out_sharding must be a jax.sharding.PartitionSpec or NamedSharding, or a "
            f"jax.experimental.layout.Format, got {out_sharding!r}. "
            'PartitionSpec("classes", None) splits centers by class over the axis "classes" of a mesh.'
        )
    if isinstance(out_sharding, Format):  # JAX checks any other sharding of a `Format`.
        if isinstance(out_sharding.sharding, NamedSharding):
            _check_shards(out_sharding.sharding, shape)
        return out_sharding
    if isinstance(out_sharding, PartitionSpec):
        out_sharding = _on_context_mesh(out_sharding)
    _check_shards(out_sharding, shape)
    return out_sharding


def _on_context_mesh(spec: PartitionSpec) -> NamedSharding:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError(
            f"out_sharding={spec} needs a mesh: make the centers under `jax.set_mesh(mesh)`, or "
            "pass `jax.sharding.NamedSharding(mesh, spec)`."
        )
    unknown = [axis for entry in spec for axis in _placement.mesh_axes(entry) if axis not in mesh.axis_names]
    if unknown:
        raise ValueError(f"out_sharding={spec} names {unknown}, but the mesh has axes {[*mesh.axis_names]}.")
    return NamedSharding(mesh, spec)


def _check_shards(sharding: NamedSharding, shape: tuple[int, int]) -> None:
    spec = sharding.spec
    if len(spec) > 2:
        raise ValueError(f"out_sharding={spec} has {len(spec)} entries, centers (C, D) have two dimensions.")
    for name, size, entry in zip(("num_classes", "feat_dim"), shape, spec, strict=False):
        shards = math.prod(sharding.mesh.shape[axis] for axis in _placement.mesh_axes(entry))
        if size % shards:
            unused = "; the centers of additional classes are never used" if name == "num_classes" else ""
            raise ValueError(
                f"{name}={size} is not divisible by the {shards} shards of out_sharding={spec}. "
                f"Round it up to {-(-size // shards) * shards}{unused}."
            )
