"""What is wrong with a batch: the one place that knows checkify."""

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

    Of the used samples it looks for labels `>= C`, weights that are negative or not finite, features that
    are NaN or infinite, and centers of their classes that are. Where all values are known it raises. Under
    `checkify`, or Flax's `nnx.checkify` around an NNX step, it is an error of checkify's; inside plain
    `jit` it does nothing. It reads O(N·D) numbers. A distance beyond the largest float32 it does not find.
    JAX drops every check inside a `scan` that is differentiated as a whole: differentiate inside of it; and
    it can't show one of a `shard_map` over Explicit axes.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      x: features `(..., D)`, floating point.
      labels: integer classes `(...)`. Negative ones are ignored.
      where: boolean `(...)`, the samples to use; all by default.
      weights: real numbers `(...)`, one for each sample.

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
    with jax.debug_nans(False), jax.debug_infs(False):  # Else JAX would complain first, and name nothing.
        centers = _checks.table(params)
        batch = _batch.batch(x, labels, where, weights, centers)
        # As they were given: in the batch, negative ones are NaN.
        given = None if weights is None else _batch.numbers(weights, batch.x)
        faults = _faults(centers, batch, given)
    for fault in faults:
        if isinstance(fault.found, jax.core.Tracer):
            well = jnp.logical_not(fault.found)
            checkify.debug_check(well, fault.message, label=fault.label, value=fault.value)
        elif fault.found:
            raise ValueError(fault.message.format(label=fault.label, value=fault.value) + ".")


class Fault(NamedTuple):
    """Whether there is one, and the label and the value to show of it."""

    message: str
    found: jax.Array
    label: jax.Array
    value: jax.Array


def _faults(centers: jax.Array, batch: _batch.Batch, weights: jax.Array | None) -> list[Fault]:
    x, labels, used, _ = batch
    faults = []
    if weights is not None:
        used = used & (weights != 0)
        message = "the weight of a used sample, of class {label}, is {value}"
        faults.append(_fault(message, labels, used & (weights < 0), weights, negative=True))
        faults.append(_fault(message, labels, used & jnp.logical_not(jnp.isfinite(weights)), weights))
    rows, known = _table.read_rows(centers, labels, x)
    message = f"label {{label}} is out of range for {centers.shape[0]} classes"
    faults.append(_fault(message, labels, used & (labels >= centers.shape[0]), labels))
    message = "a feature of a used sample, of class {label}, is {value}"
    faults.append(_fault(message, labels, used[..., None] & jnp.logical_not(jnp.isfinite(x)), x))
    message = "the center of class {label}, of a used sample, holds {value}"
    broken = (used & known)[..., None] & jnp.logical_not(jnp.isfinite(rows))
    return [*faults, _fault(message, labels, broken, rows)]


def _fault(
    message: str, labels: jax.Array, bad: jax.Array, values: jax.Array, negative: bool = False
) -> Fault:
    """Of the greatest label that has one, so that the choice is the same on every platform."""
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
