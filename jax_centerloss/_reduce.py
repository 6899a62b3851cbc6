"""The squared distance of a sample to its center, and sums and means over the samples of a batch."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jax_centerloss._options import AxisName


@jax.custom_jvp
def squared_distance(x: jax.Array, rows: jax.Array, in_range: jax.Array, used: jax.Array) -> jax.Array:
    """`|x - row|²` of each sample. The masks do not change it, only its derivative.

    In the derivative the differences of unused samples are set to 0 before they are multiplied, since
    0 * NaN is NaN, and a label out of range gives no gradient to a center. Without this custom JVP the mask
    would have to be inside of the square, and XLA would compute `x - rows` several times.
    """
    del in_range, used
    difference = x - rows
    return jnp.sum(difference * difference, axis=-1)


@squared_distance.defjvp
def _squared_distance_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, rows, in_range, used = primals
    zero = jnp.zeros((), x.dtype)
    difference = jnp.where(used[..., None], x - rows, zero)
    step = tangents[0] - jnp.where(in_range[..., None], tangents[1], zero)
    return squared_distance(*primals), 2 * jnp.sum(difference * step, axis=-1)


def weighted_sum(
    values: jax.Array, used: jax.Array, weights: jax.Array | None = None, axis_name: AxisName = None
) -> jax.Array:
    """The weighted sum over the used samples of the whole batch."""
    if weights is not None:
        values = values * weights.astype(values.dtype)
    total = jnp.sum(jnp.where(used, values, jnp.zeros((), values.dtype)))
    return total if axis_name is None else lax.psum(total, axis_name)


def weighted_mean(
    values: jax.Array, used: jax.Array, weights: jax.Array | None = None, axis_name: AxisName = None
) -> jax.Array:
    """The weighted mean over the used samples of the whole batch; 0 if there are none."""
    denominator = mean_denominator(used, weights, axis_name, values.dtype)
    return weighted_sum(values, used, weights, axis_name) / denominator


def mean_denominator(
    used: jax.Array, weights: jax.Array | None, axis_name: AxisName, dtype: DTypeLike
) -> jax.Array:
    """The denominator of a mean: the number of used samples, or the sum of their weights; 1 instead of 0."""
    if weights is None:
        return jnp.maximum(count(used, axis_name), 1).astype(dtype)
    total = weighted_sum(weights.astype(dtype), used, axis_name=axis_name)
    return jnp.where(total == 0, jnp.ones((), dtype), total)


def count(used: jax.Array, axis_name: AxisName = None) -> jax.Array:
    """The number of used samples of the whole batch."""
    total = jnp.sum(used, dtype=jnp.int32)
    return total if axis_name is None else lax.psum(total, axis_name)
