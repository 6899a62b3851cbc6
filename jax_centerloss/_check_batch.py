"""Names what is wrong with a batch: the one place that uses checkify."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.typing import ArrayLike

from jax_centerloss import _batch, _checks
from jax_centerloss._rows import table


def check_batch(
    params: Any,
    x: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> None:
    """Raises if a batch would make the loss NaN, and names why. Inside plain `jit` it does nothing.

    It looks at used samples for labels `>= C`, weights that are negative, NaN or infinite, features that are
    NaN or infinite, and centers of their classes that are NaN or infinite. Outside of `jit` it raises. Under
    `checkify`, or Flax's `nnx.checkify` around an NNX step, it adds to the error that checkify returns. The
    error names the label and the value. It reads O(N·D) numbers, and does not find a distance that overflows
    float32. Checkify has three limits:

    - JAX drops all checks inside a `scan` that is differentiated as a whole: differentiate inside of the
      `scan`.
    - It can't return a check from a `shard_map` over Explicit axes.
    - `errors=checkify.index_checks` reports indices that an update drops on purpose: use the default.

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
        x, labels, used, _ = _batch.as_batch(x, labels, where, weights, centers)
        if weights is not None:
            # In the batch negative weights are NaN, so the weights are taken as they were passed.
            passed = _batch.as_weights(weights, labels, x, centers.shape[0])
            used = used & (passed != 0)
            message = "the weight of a used sample, of class {label}, is {value}"
            _report(message, labels, used & ((passed < 0) | jnp.logical_not(jnp.isfinite(passed))), passed)
        message = f"label {{label}} is out of range for {centers.shape[0]} classes"
        _report(message, labels, used & (labels >= centers.shape[0]), jnp.zeros_like(used))
        message = "a feature of a used sample, of class {label}, is {value}"
        _report(message, labels, used[..., None] & jnp.logical_not(jnp.isfinite(x)), x)
        rows, in_range = table.gather_label_rows(centers, labels, x)
        message = "the center of class {label}, of a used sample, holds {value}"
        _report(message, labels, (used & in_range)[..., None] & jnp.logical_not(jnp.isfinite(rows)), rows)


def _report(message: str, labels: jax.Array, bad: jax.Array, values: jax.Array) -> None:
    """Raises, or adds to checkify's error, if anything is `bad`.

    The greatest label that has a bad value is the example. The value shown is NaN if a bad value of that
    label is NaN, else the greatest one. So the example is the same on every platform.
    """
    labels = labels.reshape(labels.shape + (1,) * (bad.ndim - labels.ndim))
    label = jnp.max(jnp.where(bad, labels, jnp.zeros((), labels.dtype)), initial=0)
    shown = bad & (labels == label)
    values = values.astype(jnp.float32)
    value = jnp.max(jnp.where(shown, values, np.float32(-np.inf)), initial=-np.inf)
    value = jnp.where(jnp.any(shown & jnp.isnan(values)), np.float32(np.nan), value)
    fine = jnp.logical_not(jnp.any(bad))
    if isinstance(fine, jax.core.Tracer):
        checkify.debug_check(fine, message, label=label, value=value)
    elif not fine:
        raise ValueError(message.format(label=label, value=value) + ".")
