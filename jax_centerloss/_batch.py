"""The arguments of a batch: checked, brought to one form, and all-gathered from the devices that split it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh
from jax.typing import ArrayLike

from jax_centerloss import _checks, _placement
from jax_centerloss._options import AxisName


def as_features(x: ArrayLike, centers: jax.Array) -> jax.Array:
    """`x` as an array `(..., D)` of floats, with the D of the centers."""
    advice = "Pass the features `(..., D)` alone, not a tuple of all outputs of the model."
    if not jax.tree_util.all_leaves([x]) and len(jax.tree.leaves(x)) == 1:
        advice += " If you passed the centers as x: the order is (params, x), or (params, x, labels)."
    x = _checks.as_array("x", x, advice)
    advice = "Cast it first: `x.astype(jnp.float32)`. Labels come after it: (params, x, labels)."
    _checks.check_floating(x.dtype, "x", advice)
    if x.ndim == 0 or x.shape[-1] != centers.shape[-1]:
        raise ValueError(
            f"x must have shape (..., D) with D = {centers.shape[-1]}, the feature size of the centers "
            f"{centers.shape}, got shape {x.shape}."
        )
    return x


class Batch(NamedTuple):
    """A checked batch. Its arrays are sharded as `x` is, if they are on a mesh."""

    x: jax.Array  # (..., D)
    labels: jax.Array  # (...), integers of at least 32 bits.
    used: jax.Array  # (...), whether `where` selects the sample and its label is not negative.
    weights: jax.Array | None  # (...), 0 for an unused sample, NaN for a negative weight.


def as_batch(
    x: ArrayLike,
    labels: ArrayLike,
    where: ArrayLike | None,
    weights: ArrayLike | None,
    centers: jax.Array,
) -> Batch:
    """Checks the arguments of a batch and brings them to one form."""
    x = as_features(x, centers)
    indices = _as_class_indices(labels, x)
    used = indices >= 0
    if where is not None:
        mask = _checks.as_array("where", where, "Pass booleans, one for each label.")
        if mask.dtype != jnp.bool_:
            raise TypeError(
                f"where must be boolean, got {mask.dtype.name}. Compare first, for example `where=mask > 0`; "
                "weights go into `weights`."
            )
        used = used & _as_per_sample("where", mask, x)
    numbers = None if weights is None else as_weights(weights, x)
    _check_concrete_values(labels, where, weights, centers.shape[0])
    if numbers is None:
        return Batch(x, indices, used, None)
    # NumPy constants: `jax_debug_nans` would report a NaN made by JAX, even if no weight is negative.
    numbers = jnp.where(numbers < 0, np.full((), np.nan, numbers.dtype), numbers)
    return Batch(x, indices, used, jnp.where(used, numbers, np.zeros((), numbers.dtype)))


def _as_class_indices(labels: ArrayLike, x: jax.Array) -> jax.Array:
    advice = "Pass integer classes: `np.unique(names, return_inverse=True)[1]` converts names."
    classes = _checks.as_array("labels", labels, advice)
    if not jnp.issubdtype(classes.dtype, jnp.integer):
        advice = (
            "Cast them: `labels.astype(int)`. A mask of samples goes into `where`, weights into `weights`."
            if classes.shape == x.shape[:-1]
            else "One-hot or soft labels become class indices with `jnp.argmax(labels, -1)`."
        )
        raise TypeError(f"labels must be integers, got {classes.dtype.name}. {advice}")
    if classes.shape != x.shape[:-1]:
        raise ValueError(
            f"labels must have the leading dimensions of x, got labels {classes.shape} and x {x.shape}: "
            f"expected labels {x.shape[:-1]}. One-hot labels become class indices with "
            "`jnp.argmax(labels, -1)`, a column of labels with `labels[:, 0]`."
        )
    if classes.dtype.itemsize < 4:  # 8 and 16 bits may not hold the number of classes.
        classes = classes.astype(jnp.int32)
    return _placement.reshard_like_samples(classes, x)


def as_weights(weights: ArrayLike, x: jax.Array) -> jax.Array:
    """`weights` in float32 or float64, one per sample."""
    if _checks.is_numpy_like(weights) and np.asarray(weights).dtype.kind in "iu":
        weights = np.asarray(weights, np.float64)  # `as_array` may clip integers to 32 bits.
    given = _checks.as_array("weights", weights, "Pass numbers, one for each label.")
    if not (jnp.issubdtype(given.dtype, jnp.floating) or jnp.issubdtype(given.dtype, jnp.integer)):
        raise TypeError(f"weights must be real numbers, got {given.dtype.name}. A mask goes into `where`.")
    dtype = jnp.float64 if given.dtype == jnp.float64 else jnp.float32
    return _as_per_sample("weights", given, x).astype(dtype)


def _as_per_sample(name: str, array: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `array` sharded like `x`, and raises unless it has one entry per sample."""
    if array.shape != x.shape[:-1]:
        advice = " If these are weights of classes, pass `weights[labels]`." if name == "weights" else ""
        raise ValueError(f"{name} must have the shape of labels {x.shape[:-1]}, got {array.shape}.{advice}")
    return _placement.reshard_like_samples(array, x)


def _check_concrete_values(labels: ArrayLike, where: Any, weights: Any, num_classes: int) -> None:
    """Raises on a label `>= C` and on a negative weight, unless one of the arrays is traced.

    A masked sample may have any label and weight, a sample with a negative label any weight, and a sample of
    weight 0 any label.
    """
    if not (_checks.is_concrete(labels) and _checks.is_concrete(where)):
        return
    values = np.asarray(labels)
    used = np.broadcast_to(True if where is None else np.asarray(where), values.shape)
    if weights is not None:
        if not _checks.is_concrete(weights):
            return
        numbers = np.asarray(weights)
        negative = (numbers < 0) & used & (values >= 0)
        if negative.any():
            raise ValueError(
                f"weights must not be negative, got {numbers[negative].flat[0]} for a sample of class "
                f"{values[negative].flat[0]}."
            )
        used = used & (numbers != 0)
    outside = (values >= num_classes) & used
    if outside.any():
        raise ValueError(
            f"label {values[outside].flat[0]} is out of range for {num_classes} classes: labels go from 0 "
            f"to {num_classes - 1}; negative ones are ignored."
        )


def flatten_and_replicate(
    axis_name: AxisName, mesh: AbstractMesh | None, labels: jax.Array, used: jax.Array, *values: jax.Array
) -> tuple[jax.Array, ...]:
    """Flattens the sample axes of a batch, gathers it over `axis_name`, and replicates it on the mesh.

    If the mesh is unknown, only labels and mask are replicated. XLA then replicates the values itself,
    since the result of a scatter at replicated indices is replicated.
    """
    arrays, ndim = (labels, used, *values), labels.ndim
    if axis_name is not None:
        arrays, ndim = tuple(_all_gather(a, axis_name) for a in arrays), ndim + 1
    labels, used, *values_ = (a.reshape(-1, *a.shape[ndim:]) for a in arrays)
    if mesh is not None:
        values_ = [_placement.replicate(a, mesh) for a in values_]
    return _placement.replicate(labels, mesh), _placement.replicate(used, mesh), *values_


def _all_gather(a: jax.Array, axis_name: AxisName) -> jax.Array:
    """`lax.all_gather`, written as a `psum` of disjoint parts.

    Centers have to be replicated if their `out_specs` do not name the axis. `shard_map` knows that the result
    of a `psum` is replicated, but not that the result of `lax.all_gather` is.
    """
    dtype = jnp.int32 if a.dtype == jnp.bool_ else a.dtype
    parts = jnp.zeros((lax.psum(1, axis_name), *a.shape), dtype)
    gathered: jax.Array = lax.psum(parts.at[lax.axis_index(axis_name)].set(a.astype(dtype)), axis_name)
    return gathered.astype(a.dtype)
