"""What is accepted, and the words of each error. Nothing here costs anything at run time under `jit`."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_centerloss import _placement
from jax_centerloss._checkify import Check, debug_check

Clip = tuple[float, float] | None
ReduceFn = Callable[..., Any] | None

CENTERS_AS = ("param", "state")


def sizes(num_classes: int, feat_dim: int) -> tuple[int, int]:
    """The shape of a table of centers, refused where it would hold nothing."""
    shape = operator.index(num_classes), operator.index(feat_dim)
    for name, size in zip(("num_classes", "feat_dim"), shape, strict=True):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")
    return shape


def sharding(out_sharding: NamedSharding | PartitionSpec, shape: tuple[int, int]) -> NamedSharding:
    """Where a table of that shape is to lie, on the mesh of the context if `out_sharding` names none."""
    if not isinstance(out_sharding, NamedSharding | PartitionSpec):
        raise TypeError(
            f"out_sharding must be a jax.sharding.PartitionSpec or NamedSharding, got {out_sharding!r}. "
            'PartitionSpec("classes", None) splits centers by class over the axis "classes" of a mesh.'
        )
    if isinstance(out_sharding, PartitionSpec):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            raise ValueError(
                f"out_sharding={out_sharding} needs a mesh: make the centers under `jax.set_mesh(mesh)`, or "
                "pass `jax.sharding.NamedSharding(mesh, spec)`."
            )
        unknown = [a for entry in out_sharding for a in _placement.axes_of(entry) if a not in mesh.axis_names]
        if unknown:
            raise ValueError(
                f"out_sharding={out_sharding} names {unknown}, but the mesh has axes {[*mesh.axis_names]}."
            )
        return sharding(NamedSharding(mesh, out_sharding), shape)
    spec, sizes_of = out_sharding.spec, out_sharding.mesh.shape
    if len(spec) > 2:
        raise ValueError(f"out_sharding={spec} has {len(spec)} entries, centers (C, D) have two dimensions.")
    for name, size, entry in zip(("num_classes", "feat_dim"), shape, spec, strict=False):
        shards = math.prod(sizes_of[axis] for axis in _placement.axes_of(entry))
        if size % shards:
            raise ValueError(
                f"{name}={size} does not divide into {shards} shards, by out_sharding={spec}. "
                f"Round it up to {-(-size // shards) * shards}: a class that no label names stays as it is."
            )
    return out_sharding


def floating(dtype: DTypeLike, name: str, advice: str | None = None) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        advice = advice or f"Cast it first, for example `{name}.astype(jnp.float32)`."
        raise TypeError(f"{name} must be floating point, got {np.dtype(dtype).name}. {advice}")


def table(params: Any, name: str = "params") -> jax.Array:
    """The one array in `params`, the argument of that name, checked to be a `(C, D)` table of floats."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if len(leaves) != 1:
        found = ", ".join(jax.tree_util.keystr(path) for path, _ in leaves[:8]) or "none"
        raise ValueError(
            f"{name} must hold exactly one array, the (C, D) centers, got {len(leaves)} leaves: {found}"
            f"{', ...' if len(leaves) > 8 else ''}. Pass the part of the tree that holds the centers alone: "
            'a dict {"centers": array}, an NNX module or its state, or of Linen variables the part of this '
            'module in "params" (in "centers", if they are state).'
        )
    leaf = leaves[0][1]
    try:
        centers = jnp.asarray(leaf)
    except TypeError as error:
        raise TypeError(
            f"{name} must hold the (C, D) centers as an array, got {type(leaf).__name__}. A Linen module "
            'holds none: pass its `variables["params"]`.'
        ) from error
    if centers.ndim != 2 or 0 in centers.shape:
        raise ValueError(
            f"centers must have shape (C, D) with at least one class and one feature, got {centers.shape}."
        )
    floating(centers.dtype, "centers")
    return centers


def features(x: ArrayLike, centers: jax.Array) -> jax.Array:
    """`x` as an array `(..., D)` of floats, D being the centers'."""
    x = jnp.asarray(x)
    floating(x.dtype, "x")
    if x.ndim == 0 or x.shape[-1] != centers.shape[-1]:
        raise ValueError(
            f"x must have shape (..., D) with D = {centers.shape[-1]}, the feature size of the centers "
            f"{centers.shape}, got shape {x.shape}."
        )
    return x


def batch(
    x: ArrayLike, labels: ArrayLike, where: ArrayLike | None, centers: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`x`, `labels` and the mask of the samples that count (selected, and the label not negative)."""
    x = features(x, centers)
    given, labels = labels, jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"labels must be integers, got {labels.dtype.name}. One-hot or soft labels become class "
            "indices with `jnp.argmax(labels, -1)`; a mask of samples goes into `where`."
        )
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"labels must have the leading dimensions of x, got labels {labels.shape} and x {x.shape}: "
            f"expected labels {x.shape[:-1]}. One-hot labels become class indices with "
            "`jnp.argmax(labels, -1)`, a column of labels with `labels[:, 0]`."
        )
    if labels.dtype.itemsize < 4:  # Too narrow to hold every number of classes.
        labels = labels.astype(jnp.int32)
    labels = _placement.along(x, labels)
    used = labels >= 0
    if where is not None:
        mask = jnp.asarray(where)
        if mask.dtype != jnp.bool_:
            raise TypeError(
                f"where must be boolean, got {mask.dtype.name}. Compare first, for example `where=mask > 0`; "
                "weights go onto the per-sample losses of `center_loss(..., reduce_fn=None)`."
            )
        if mask.shape != labels.shape:
            raise ValueError(f"where must have the shape of labels {labels.shape}, got {mask.shape}.")
        used = used & _placement.along(x, mask)
    labels = _labels_in_range(given, where, labels, used, centers.shape[0])
    if not (_concrete(x) and _concrete(centers)):  # Else it shows in the result, and no one looks here.
        message = "a feature of a used sample, of class {label}, is {value}"
        labels = debug_check(labels, message, _finite, labels, used, x)
    return x, labels, used


def _labels_in_range(
    given: ArrayLike, where: ArrayLike | None, labels: jax.Array, used: jax.Array, num_classes: int
) -> jax.Array:
    """Refuses labels >= C: at once where their values are at hand, else under `checkify`."""
    if _concrete(given) and _concrete(where):
        values = np.asarray(given)
        out = values >= num_classes
        if where is not None:
            out = out & np.asarray(where)
        if out.any():
            raise ValueError(
                f"label {values[out].flat[0]} is out of range for {num_classes} classes: labels go from 0 "
                f"to {num_classes - 1}; negative ones are ignored."
            )
        return labels
    message = f"label {{label}} is out of range for {num_classes} classes"
    return debug_check(labels, message, _below(num_classes), labels, used)


@functools.cache
def _below(num_classes: int) -> Check:
    def below(labels: jax.Array, used: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        bad = used & (labels >= num_classes)
        return jnp.logical_not(jnp.any(bad)), {"label": _greatest(labels, bad)}

    return below


def _finite(labels: jax.Array, used: jax.Array, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    bad = used[..., None] & jnp.logical_not(jnp.isfinite(x))
    label = _greatest(labels, jnp.any(bad, axis=-1))
    # By a sum: the greatest of several devices' numbers is no NaN.
    value = jnp.sum(jnp.where(bad & (labels == label)[..., None], x, jnp.zeros((), x.dtype)))
    return jnp.logical_not(jnp.any(bad)), {"label": label, "value": value}


def _greatest(labels: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.max(jnp.where(where, labels, jnp.zeros((), labels.dtype)), initial=0)


def _concrete(value: ArrayLike | None) -> bool:
    """Whether the values can be looked at here: not traced, and not spread over other processes."""
    leaves = jax.tree.leaves(value)  # A list of labels may hold tracers.
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return False
    return all(leaf.is_fully_addressable for leaf in leaves if isinstance(leaf, jax.Array))


def previous(params: Any, centers: jax.Array) -> jax.Array:
    """An earlier table, of the shape of the centers."""
    leaves = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    if any(not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted() for leaf in leaves):
        raise ValueError(
            "previous was donated to a step and is gone. Keep a copy: "
            "`previous = jax.tree.map(jnp.copy, params)`."
        )
    earlier = table(params, "previous")
    if earlier.shape != centers.shape:
        raise ValueError(f"previous must be earlier centers {centers.shape}, got shape {earlier.shape}.")
    return earlier


def clip_range(clip: Clip) -> None:
    if clip is None:
        return
    try:
        low, high = map(float, clip)
    except (TypeError, ValueError) as error:
        raise ValueError(f"clip must be None or a pair of floats (low, high), got {clip!r}.") from error
    if not low <= high:
        raise ValueError(f"clip must have low <= high, got {clip!r}.")


def reduction(reduce_fn: ReduceFn) -> None:
    if reduce_fn is not None and reduce_fn is not jnp.mean and reduce_fn is not jnp.sum:
        raise ValueError(
            f"reduce_fn must be jnp.mean, jnp.sum or None (per-sample losses), got {reduce_fn!r}. "
            "For another reduction take reduce_fn=None and reduce what comes back."
        )


def scalar(name: str, value: ArrayLike) -> None:
    if np.ndim(value):
        raise ValueError(f"{name} must be a number or a scalar array, got shape {np.shape(value)}.")


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def state(got: Any, expected: Any, centers: jax.Array) -> None:
    """The state of an optimizer by rows, against the one that its `init` makes."""
    got, expected = (jax.tree.map(np.shape, tree) for tree in (got, expected))
    if got != expected:
        raise ValueError(
            f"state is not of this optimizer and centers {centers.shape}: expected {expected}, got {got}. "
            "Make it with this row optimizer's `init(params)`, and pass on what `update` returns: "
            "`params, state = rows.update(params, state, x, labels)`."
        )
