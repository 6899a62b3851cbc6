"""The arguments of a batch, checked and brought to one form."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_centerloss import _arrays, _checks
from jax_centerloss._rows import placement


class Names(NamedTuple):
    """What the arguments of a batch are called in errors."""

    x: str = "x"
    labels: str = "labels"
    order: str = "Labels come after it: (params, x, labels)."
    arguments: str = "(params, x), or (params, x, labels)"
    advice: str = "Pass the features `(..., D)` alone, not a tuple of all outputs of the model."
    mismatch: str = "Pass one label for each sample of this batch, in the order (params, x, labels)."


FEATURES = Names()
GRADIENTS = Names(
    "gradients",
    "rows",
    order="The order is (params, state, rows, gradients).",
    arguments="(params, state, rows, gradients)",
    advice="Pass the gradients `(..., D)`, one for each index in `rows`.",
    mismatch="Pass the gradients with respect to the rows that were read, not that of the whole table.",
)


def as_features(x: ArrayLike, centers: jax.Array, names: Names = FEATURES) -> jax.Array:
    """`x` as an array `(..., D)` of floats, with the D of the centers."""
    advice = names.advice
    # A tree with one leaf, such as {"centers": array}, is probably the params.
    if not jax.tree_util.all_leaves([x]) and len(jax.tree.leaves(x)) == 1:
        advice += f" If you passed the centers as {names.x}: the order is {names.arguments}."
    given = _arrays.code_of(names.x, x)
    x = _arrays.as_array(names.x, x, advice)
    _checks.check_floating(x.dtype, names.x, f"{_checks.cast_advice(x.dtype, given)} {names.order}")
    if x.ndim == 0 or x.shape[-1] != centers.shape[-1]:
        raise ValueError(
            f"{names.x} must have shape (..., D) with D = {centers.shape[-1]}, the feature size of the "
            f"centers {centers.shape}, got shape {x.shape}."
        )
    return x


# The arguments `(x, labels, where, weights)`.
Given = tuple[ArrayLike, ArrayLike, ArrayLike | None, ArrayLike | None]


class Batch(NamedTuple):
    """A checked batch. Its arrays are sharded as `x` is, if they are on a mesh."""

    x: jax.Array  # (..., D)
    labels: jax.Array  # (...), integers of at least 32 bits.
    # (...), whether `where` selects the sample and its label is not negative. Weights do not count here.
    used: jax.Array
    weights: _checks.Weights  # (...), 0 for an unused sample, NaN for a negative weight.


def as_batch(
    x: ArrayLike,
    labels: ArrayLike,
    where: ArrayLike | None,
    weights: ArrayLike | None,
    centers: jax.Array,
    names: Names = FEATURES,
) -> Batch:
    """Checks the arguments of a batch and brings them to one form."""
    x = as_features(x, centers, names)
    indices = _as_class_indices(labels, x, names)
    used = indices >= 0
    if where is not None:
        mask = _arrays.as_array("where", where, "Pass booleans, one for each label.")
        if mask.dtype != jnp.bool_:
            raise TypeError(
                f"where must be boolean, got {mask.dtype.name}. Compare first, for example "
                f"`where={_arrays.code_of('where', where)} > 0`; weights go into `weights`."
            )
        used = used & _as_per_sample("where", mask, x, names)
    numbers = None if weights is None else as_weights(weights, labels, x, centers.shape[0])
    _check_concrete_values(labels, where, weights, centers.shape[0], names)
    if numbers is None:
        return Batch(x, indices, used, None)
    # NumPy constants: `jax_debug_nans` would report a NaN made by JAX, even if no weight is negative.
    numbers = jnp.where(numbers < 0, np.full((), np.nan, numbers.dtype), numbers)
    return Batch(x, indices, used, jnp.where(used, numbers, np.zeros((), numbers.dtype)))


def _as_class_indices(labels: ArrayLike, x: jax.Array, names: Names) -> jax.Array:
    advice = (
        "Pass integer classes, -1 for a missing one. Turn names into numbers once, for the whole data set: "
        "`names, labels = np.unique(all_names, return_inverse=True)`."
    )
    classes = _arrays.as_array(names.labels, labels, advice)
    if not jnp.issubdtype(classes.dtype, jnp.integer) or classes.shape != x.shape[:-1]:
        raise _class_indices_error(labels, classes, x, names)
    if classes.dtype.itemsize < 4:  # 8 and 16 bits may not hold the number of classes.
        classes = classes.astype(jnp.int32)
    return placement.reshard_like_samples(classes, x)


def _class_indices_error(labels: Any, classes: jax.Array, x: jax.Array, names: Names) -> Exception:
    """The error about labels that are no integers, or have another shape, with code that mends them."""
    # The code in the message has to run on what was passed: a JAX array may be traced, a list needs NumPy.
    numpy = "np" if _arrays.is_numpy_like(labels) else "jnp"
    given = _arrays.code_of(names.labels, labels)
    to_indices = (
        "One-hot or soft labels become class indices, and rows without a label -1, by "
        f"`{numpy}.where({given}.max(-1) > 0, {given}.argmax(-1), -1)`."
    )
    if classes.shape == (*x.shape[:-1], 1):
        to_indices = f"A column of labels is `{given}[..., 0]`."
    elif classes.ndim != x.ndim:
        to_indices = names.mismatch
    found = f"{names.labels} must be integers, got {classes.dtype.name}"
    if jnp.issubdtype(classes.dtype, jnp.integer):
        return ValueError(
            f"{names.labels} must have the leading dimensions of {names.x}, got {names.labels} "
            f"{classes.shape} and {names.x} {x.shape}: expected {names.labels} {x.shape[:-1]}. {to_indices}"
        )
    if classes.shape != x.shape[:-1]:
        return TypeError(f"{found}. {to_indices}")
    if _arrays.is_concrete(classes) and jnp.issubdtype(classes.dtype, jnp.floating):
        values = np.asarray(classes, np.float64)
        missing = np.isnan(values)
        is_whole = np.isfinite(values) & (np.floor(values) == values)
        if not (missing | is_whole).all():
            return TypeError(f"{found}, and some are no whole numbers. Weights go into `weights`.")
        if missing.any():
            found += f", {missing.sum()} of them missing (NaN)"
    return TypeError(
        f"{found}. Cast them, missing ones to -1: `{numpy}.nan_to_num({given}, nan=-1).astype(int)`. A mask "
        "of samples goes into `where`, weights into `weights`."
    )


def as_weights(weights: ArrayLike, labels: ArrayLike, x: jax.Array, num_classes: int) -> jax.Array:
    """`weights` in float32 or float64, one per sample."""
    given = _arrays.as_array("weights", weights, "Pass numbers, one for each label.")
    if _arrays.is_numpy_like(weights) and jnp.issubdtype(given.dtype, jnp.integer):
        # `as_array` may have clipped integers to 32 bits.
        given = jnp.asarray(_arrays.as_numpy(weights).astype(np.float64))
    if not (jnp.issubdtype(given.dtype, jnp.floating) or jnp.issubdtype(given.dtype, jnp.integer)):
        raise TypeError(f"weights must be real numbers, got {given.dtype.name}. A mask goes into `where`.")
    dtype = jnp.float64 if given.dtype == jnp.float64 else jnp.float32
    advice = ""
    if given.shape == (num_classes,):
        look_up = "[jnp.asarray(labels)]"
        if isinstance(labels, jax.Array) and placement.mesh_of(labels) is not None:
            look_up = ".at[labels].get(out_sharding=jax.typeof(labels).sharding)"
        advice = f" If these are weights of classes, pass `jnp.asarray(weights){look_up}`."
    return _as_per_sample("weights", given, x, FEATURES, advice).astype(dtype)


def _as_per_sample(name: str, array: jax.Array, x: jax.Array, names: Names, advice: str = "") -> jax.Array:
    """Returns `array` sharded like `x`, and raises unless it has one entry per sample."""
    if array.shape != x.shape[:-1]:
        raise ValueError(
            f"{name} must have the shape of {names.labels} {x.shape[:-1]}, got {array.shape}.{advice}"
        )
    return placement.reshard_like_samples(array, x)


def _check_concrete_values(labels: Any, where: Any, weights: Any, num_classes: int, names: Names) -> None:
    """Raises on a label `>= C` and on a negative weight, where the values are known to this process.

    Labels, masks and weights that are on a device are copied to the host for that. Samples that are left out
    are skipped. Nothing is checked if one of the three is traced: weights need the labels to be known, and a
    traced mask or weight may leave samples out.
    """
    if not all(map(_arrays.is_concrete, (labels, where, weights))):
        return
    values = _arrays.as_numpy(labels)
    if values.dtype.itemsize < 4:  # Fewer than 32 bits may not hold the number of classes.
        values = values.astype(np.int32)
    used = np.broadcast_to(True if where is None else _arrays.as_numpy(where), values.shape)
    if weights is not None:
        numbers = _arrays.as_numpy(weights)
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
            f"{names.labels[:-1]} {values[outside].flat[0]} is out of range for {num_classes} classes: "
            f"{names.labels} go from 0 to {num_classes - 1}; negative ones are ignored."
        )
