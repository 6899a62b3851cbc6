"""Names what is wrong with a batch: the one place that uses checkify."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.typing import ArrayLike

from jax_centerloss import _batch, _checks, _table


def check_batch(
    params: Any,
    x: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> None:
    """Raises if a batch would make the loss NaN, and names the label and the value.

    It looks at used samples for labels `>= C`, weights that are negative, NaN or infinite, features that are
    NaN or infinite, and centers of their classes that are NaN or infinite. Outside of `jit` it raises. Under
    `checkify`, or Flax's `nnx.checkify` around an NNX step, it adds to the error that checkify returns.
    Inside plain `jit` it does nothing. It reads O(N·D) numbers, and does not find a distance that overflows
    float32. JAX drops all checks inside a `scan` that is differentiated as a whole: differentiate inside of
    the `scan`. checkify can't return a check from a `shard_map` over Explicit axes. Use its default,
    `errors=checkify.user_checks`: `index_checks` would report indices that an update drops on purpose.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      x: features `(..., D)`, floating point.
      labels: integer classes `(...)`. A negative label leaves its sample out.
      where: boolean `(...)`, the samples to use; all by default.
      weights: real numbers `(...)`. A weight of 0 leaves its sample out.

    Raises:
      ValueError: if something is wrong with the values, and on a shape that does not fit.
      TypeError: as `center_loss`.

    Example:
      >>> import jax, jax.numpy as jnp, jax_centerloss
      >>> from jax.experimental import checkify
      >>> def loss(params, x, labels):
      ...     jax_centerloss.check_batch(params, x, labels)
      ...     return jax_centerloss.center_loss(params, x, labels)
      >>> centers, x = jnp.zeros((10, 2)), jnp.array([[1.0, 1.0], [jnp.nan, 1.0]])
      >>> error, _ = checkify.checkify(jax.jit(loss))(centers, x, jnp.array([1, 9]))
      >>> print(str(error.get()).split(" (")[0])
      a feature of a used sample, of class 9, is nan
    """
    with jax.debug_nans(False), jax.debug_infs(False):  # These would raise first, and name no sample.
        centers = _checks.as_table(params)
        batch = _batch.as_batch(x, labels, where, weights, centers)
        # In the batch negative weights are NaN, so the weights are taken as they were passed.
        passed = None if weights is None else _batch.as_weights(weights, batch.x)
        faults = _find_faults(centers, batch, passed)
    for fault in faults:
        if isinstance(fault.found, jax.core.Tracer):
            fine = jnp.logical_not(fault.found)
            checkify.debug_check(fine, fault.message, label=fault.label, value=fault.value)
        elif fault.found:
            raise ValueError(fault.message.format(label=fault.label, value=fault.value) + ".")


class Fault(NamedTuple):
    """One kind of fault, with an example of it."""

    message: str  # With fields for the label and the value.
    found: jax.Array  # A bool, whether there is an example.
    label: jax.Array
    value: jax.Array


def _find_faults(centers: jax.Array, batch: _batch.Batch, weights: jax.Array | None) -> list[Fault]:
    x, labels, used, _ = batch
    faults = []
    if weights is not None:
        used = used & (weights != 0)
        message = "the weight of a used sample, of class {label}, is {value}"
        faults.append(_fault(message, labels, used & (weights < 0), weights, negative=True))
        faults.append(_fault(message, labels, used & jnp.logical_not(jnp.isfinite(weights)), weights))
    rows, in_range = _table.gather_label_rows(centers, labels, x)
    message = f"label {{label}} is out of range for {centers.shape[0]} classes"
    faults.append(_fault(message, labels, used & (labels >= centers.shape[0]), labels))
    message = "a feature of a used sample, of class {label}, is {value}"
    faults.append(_fault(message, labels, used[..., None] & jnp.logical_not(jnp.isfinite(x)), x))
    message = "the center of class {label}, of a used sample, holds {value}"
    broken = (used & in_range)[..., None] & jnp.logical_not(jnp.isfinite(rows))
    return [*faults, _fault(message, labels, broken, rows)]


def _fault(
    message: str, labels: jax.Array, bad: jax.Array, values: jax.Array, negative: bool = False
) -> Fault:
    """The fault where `bad` is True, with the greatest label that has it as the example.

    The example is then the same on every platform. Its value is the lowest weight of that label if weights
    are `negative`, else the first of NaN, infinity and minus infinity that the label has. The message on a
    label out of range shows no value.
    """
    of_sample = bad if bad.ndim == labels.ndim else jnp.any(bad, axis=-1)
    label = jnp.max(jnp.where(of_sample, labels, jnp.zeros((), labels.dtype)), initial=0)
    same = labels == label
    shown = bad & (same if bad.ndim == labels.ndim else same[..., None])
    values = values.astype(jnp.float32)
    if negative:
        value = jnp.min(jnp.where(shown, values, np.zeros((), np.float32)), initial=0)
    else:
        nan, infinite = jnp.any(shown & jnp.isnan(values)), jnp.any(shown & (values == jnp.inf))
        value = jnp.where(
            nan, np.float32(np.nan), jnp.where(infinite, np.float32(np.inf), np.float32(-np.inf))
        )
    return Fault(message, jnp.any(bad), label, value)
