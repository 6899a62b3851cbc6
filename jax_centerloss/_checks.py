"""What is accepted, and the words of each error. Nothing here costs anything at run time under `jit`."""

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_centerloss import _placement
from jax_centerloss._placement import OutSharding

Clip = tuple[float, float] | None
ReduceFn = Callable[..., Any] | None

CENTERS_AS = ("param", "state")
DRAWN = "Centers are drawn as floats: take jnp.float32 or jnp.bfloat16, say."


def array(name: str, value: Any, advice: str, kind: str = "an array") -> jax.Array:
    """`value`, the argument of that name, as an array that the caller can't change any more.

    JAX takes an aligned NumPy array without a copy on a CPU, and may read it after the call has returned,
    when a loader has filled its buffer anew.
    """
    try:
        if on_host(value):
            value = np.asarray(value).copy()
            if value.dtype.kind in "iu":  # JAX would wrap around what 32 bits do not hold.
                kept = np.iinfo(jax.dtypes.canonicalize_dtype(value.dtype))
                value = value.clip(max(kept.min, np.iinfo(value.dtype).min), kept.max)
        return jnp.asarray(value)
    except jax.errors.JAXTypeError:  # Of a traced value, which JAX names.
        raise
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} must be {kind}, got {_described(value)}. {advice}") from error


def on_host(value: Any) -> bool:
    """Whether it is an array, or turns into one, that is not JAX's."""
    others = hasattr(value, "__array__") and not hasattr(value, "__jax_array__")
    return others and not isinstance(value, jax.Array)


def arrays(name: str, tree: Any, advice: str) -> Any:
    return jax.tree.map(lambda leaf: array(f"a leaf of {name}", leaf, advice), tree)


def _described(value: Any) -> str:
    if inspect.isroutine(value) or inspect.isclass(value):
        return f"the {'class' if inspect.isclass(value) else 'function'} {value.__name__}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(repr, value))}"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype.name}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(type(v).__name__ for v in value[:8])}"
    return "None" if value is None else type(value).__name__


def sizes(num_classes: int, feat_dim: int) -> tuple[int, int]:
    """The shape of a table of centers, refused where it would hold nothing."""
    return _size("num_classes", num_classes), _size("feat_dim", feat_dim)


def _size(name: str, value: Any) -> int:
    try:
        size = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from error
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}.")
    return size


def sharding(out_sharding: OutSharding, shape: tuple[int, int]) -> NamedSharding | Format:
    """Where a table of that shape is to lie, on the mesh of the context if `out_sharding` names none."""
    if not isinstance(out_sharding, OutSharding):
        raise TypeError(
            "out_sharding must be a jax.sharding.PartitionSpec or NamedSharding, or a "
            f"jax.experimental.layout.Format, got {out_sharding!r}. "
            'PartitionSpec("classes", None) splits centers by class over the axis "classes" of a mesh.'
        )
    if isinstance(out_sharding, Format):
        if isinstance(out_sharding.sharding, NamedSharding):
            sharding(out_sharding.sharding, shape)
        return out_sharding
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
        raise TypeError(f"{name} must be floating point, got {jnp.dtype(dtype).name}. {advice}")


def one_dtype(name: str, value: Any, allowed: tuple[str, ...], advice: str) -> Any:
    if value is None:
        return None
    try:
        dtype = jnp.dtype(value)
    except TypeError:  # Of a name that is not known.
        dtype = None
    if dtype is None or dtype.name not in allowed:
        raise ValueError(f"{name} must be None or one of {', '.join(allowed)}, got {value!r}. {advice}")
    return dtype


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
    centers = array(
        f"the leaf of {name}",
        leaves[0][1],
        'Pass the (C, D) centers. A Linen module holds none: pass its `variables["params"]`.',
    )
    if centers.ndim != 2 or 0 in centers.shape:
        name = "centers" if name == "params" else name
        raise ValueError(
            f"{name} must have shape (C, D) with at least one class and one feature, got {centers.shape}."
        )
    floating(centers.dtype, "centers")
    return centers


def concrete(value: ArrayLike | None) -> bool:
    """Whether the values can be looked at here: not traced, and not spread over other processes."""
    leaves = jax.tree.leaves(value)  # A list of labels may hold tracers.
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return False
    return all(leaf.is_fully_addressable for leaf in leaves if isinstance(leaf, jax.Array))


def previous(params: Any, earlier_params: Any, centers: jax.Array) -> jax.Array:
    """An earlier table, of the shape of the centers, and not the very array that `params` hold."""
    advice = "Keep a copy from before the steps: `previous = jax.tree.map(jnp.copy, params)`."
    leaves = [leaf for leaf in jax.tree.leaves(earlier_params) if isinstance(leaf, jax.Array)]
    if any(not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted() for leaf in leaves):
        raise ValueError(f"previous was donated to a step and is gone. {advice}")
    earlier = table(earlier_params, "previous")
    if any(one is other for one in jax.tree.leaves(params) for other in jax.tree.leaves(earlier_params)):
        raise ValueError(
            "previous holds the centers themselves, which shows no motion, whatever the steps did: an NNX "
            f"module's state, say, follows the module. {advice}"
        )
    if earlier.shape != centers.shape:
        raise ValueError(f"previous must be earlier centers {centers.shape}, got shape {earlier.shape}.")
    return earlier


def clip_range(clip: Any) -> Clip:
    if clip is None:
        return None
    try:
        low, high = map(float, clip)
    except (TypeError, ValueError) as error:
        raise ValueError(f"clip must be None or a pair of floats (low, high), got {clip!r}.") from error
    if not low <= high:
        raise ValueError(f"clip must have low <= high, got {clip!r}.")
    return low, high


def reduction(reduce_fn: ReduceFn) -> None:
    if reduce_fn is not None and reduce_fn is not jnp.mean and reduce_fn is not jnp.sum:
        raise ValueError(
            f"reduce_fn must be jnp.mean, jnp.sum or None (per-sample losses), got {reduce_fn!r}. "
            "For another reduction take reduce_fn=None and reduce what comes back."
        )


def module_options(
    num_classes: int,
    feat_dim: int,
    *,
    clip: Clip,
    reduce_fn: ReduceFn,
    centers_as: str,
    param_dtype: DTypeLike,
    centers_init: Any,
) -> tuple[int, int]:
    """What a module is made with, refused when it is given; returns the shape of its centers."""
    clip_range(clip)
    reduction(reduce_fn)
    choice("centers_as", centers_as, CENTERS_AS)
    floating(param_dtype, "dtype", DRAWN)
    if not callable(centers_init):
        raise TypeError(
            f"centers_init must be a function of a key, a shape and a dtype, got {_described(centers_init)}. "
            "Centers that are at hand are given by `lambda key, shape, dtype: centers`."
        )
    return sizes(num_classes, feat_dim)


def declared(centers: jax.Array, num_classes: int, feat_dim: int) -> None:
    """Refuses a table that is not of the size that its module declares."""
    if centers.shape != (num_classes, feat_dim):
        raise ValueError(
            f"this is CenterLoss({num_classes}, {feat_dim}), but its centers have shape {centers.shape}. "
            "Make the module of the size of the centers that it is given."
        )


def scalar(name: str, value: Any, advice: str | None = None) -> jax.Array:
    advice = advice or f"Pass a number; of a schedule, its value: `{name}=schedule(step)`."
    number = array(name, value, advice, "a number")
    if number.ndim:
        raise ValueError(f"{name} must be a number or a scalar array, got shape {number.shape}.")
    if not (jnp.issubdtype(number.dtype, jnp.floating) or jnp.issubdtype(number.dtype, jnp.integer)):
        raise TypeError(f"{name} must be a real number, got {number.dtype.name}.")
    return number


def key(name: str, value: Any) -> jax.Array | None:
    """One PRNG key, of either kind that JAX has, or None."""
    if value is None:
        return None
    advice = (
        "Pass another key in each step: `jax.random.fold_in(jax.random.key(0), step)`, say, or in NNX "
        "`rngs.rounding()`."
    )
    keys = array(name, value, advice, "a PRNG key")
    ndim = keys.ndim
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):  # Then it is an array of words.
        words = jax.eval_shape(jax.random.PRNGKey, 0)
        if keys.dtype != words.dtype or keys.shape[-1:] != words.shape:
            raise TypeError(
                f"{name} must be a PRNG key, got {keys.dtype.name} of shape {keys.shape}. {advice}"
            )
        ndim -= 1
    if ndim:
        raise ValueError(f"{name} must be one key, got keys of shape {keys.shape}. {advice}")
    return keys


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def state(got: Any, expected: Any, centers: jax.Array) -> None:
    """The state of an optimizer by rows, against the one that its `init` makes.

    Some transformations have states of one form, as Adam, Yogi and NAdam have, and can't be told apart.
    """
    shapes = [jax.tree.map(np.shape, tree) for tree in (got, expected)]
    structures = {jax.tree.structure(tree) for tree in (got, expected)}
    if len(structures) > 1 or shapes[0] != shapes[1]:
        raise ValueError(
            f"state is not of this optimizer and centers {centers.shape}: expected {shapes[1]}, got "
            f"{shapes[0]}. Make it with this row optimizer's `init(params)`, and pass on what `update` "
            "returns: `params, state = rows.update(params, state, x, labels)`."
        )
    # Of what is kept for each row; Python numbers may stand for scalars.
    for leaf, like in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if np.ndim(leaf) and jax.dtypes.canonicalize_dtype(leaf.dtype) != like.dtype:
            raise ValueError(
                f"state holds {leaf.dtype.name} where this optimizer keeps {like.dtype.name}: make it with "
                "the `state_dtype` that the state was made with, or cast the state."
            )
