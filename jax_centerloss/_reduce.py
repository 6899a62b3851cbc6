"""The squared distance of a sample to its center, and sums and means over the samples of a batch."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jax_centerloss._options import AxisName, ReduceFn


@jax.custom_jvp
def squared_distance(x: jax.Array, rows: jax.Array, in_range: jax.Array, used: jax.Array) -> jax.Array:
    """`|x - row|²` `(...)` of features `x (..., D)` and their centers `rows (..., D)`.

    The masks `in_range (...)` and `used (...)` affect only the derivative, `2 (x - row) · (dx - drow)`. In it
    the differences of unused samples are set to 0 before they are multiplied, since 0 * NaN is NaN. A label
    out of range gives no gradient to a center. Without this custom JVP the difference would have to be masked
    before it is squared, and XLA would compute `x - rows` several times.
    """
    del in_range, used
    difference = x - rows
    return jnp.sum(difference * difference, axis=-1)


@squared_distance.defjvp
def _squared_distance_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, rows, in_range, used = primals
    dx, drows = tangents[:2]
    zero = jnp.zeros((), x.dtype)
    difference = jnp.where(used[..., None], x - rows, zero)
    d_difference = dx - jnp.where(in_range[..., None], drows, zero)
    return squared_distance(*primals), 2 * jnp.sum(difference * d_difference, axis=-1)


def count(used: jax.Array, axis_name: AxisName = None) -> jax.Array:
    """The number of used samples, on all devices if there is an `axis_name`."""
    return _psum(jnp.sum(used, dtype=jnp.int32), axis_name)


def mean_denominator(
    used: jax.Array, weights: jax.Array | None, axis_name: AxisName, dtype: DTypeLike
) -> jax.Array:
    """The denominator of a mean: the number of used samples, or the sum of their weights. If that is 0, 1."""
    if weights is None:
        return jnp.maximum(count(used, axis_name), 1).astype(dtype)
    total = _psum(jnp.sum(jnp.where(used, weights.astype(dtype), jnp.zeros((), dtype))), axis_name)
    return jnp.where(total == 0, jnp.ones((), dtype), total)


def reduce(
    values: jax.Array, used: jax.Array, weights: jax.Array | None, reduce_fn: ReduceFn, axis_name: AxisName
) -> jax.Array:
    """The weighted values of samples, 0 for unused ones, or their sum or mean on all devices.

    Values are masked before they are weighted: 0 * NaN would reach the gradient of the weights.
    """
    values = jnp.where(used, values, jnp.zeros((), values.dtype))
    if weights is not None:
        values = values * weights.astype(values.dtype)
    if reduce_fn is None:
        return values
    if reduce_fn is jnp.sum:
        return _psum(jnp.sum(values), axis_name)
    denominator = mean_denominator(used, weights, axis_name, values.dtype)
    return _psum(jnp.sum(values), axis_name) / denominator


def _psum(total: jax.Array, axis_name: AxisName) -> jax.Array:
    return total if axis_name is None else lax.psum(total, axis_name)
