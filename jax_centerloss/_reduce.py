"""The squared distance of a sample to its center, and sums and means over the samples of a batch."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_centerloss._checks import ReduceFn, Weights
from jax_centerloss._rows import groups, placement
from jax_centerloss._rows.placement import AxisName

_FEW_FEATURES = 4  # Up to this many are summed one by one, if D is not symbolic.


@jax.custom_jvp
def squared_distance(x: jax.Array, rows: jax.Array, in_range: jax.Array, used: jax.Array) -> jax.Array:
    """`|x - row|²` of features `x (..., D)` and centers `rows (..., D)`; masks change its derivative alone.

    The derivative, with the masks `in_range (...)` and `used (...)`, is `2 (x - row) · (dx - drow)`. In it
    the differences of unused samples are set to 0 before they are multiplied, since 0 * NaN is NaN. A label
    out of range gives no gradient to a center. A `jnp.where` before the square would give the same
    derivative, but XLA would then compute `x - rows` several times.
    """
    del in_range, used
    difference = x - rows
    sharding = placement.sharding_of(difference)
    is_split = sharding is not None and sharding.spec[-1] is not None
    if is_split or not groups.known_at_most(x.shape[-1], _FEW_FEATURES):
        return jnp.sum(difference * difference, axis=-1)
    # On a CPU a reduction over two features takes longer than the rest of the loss. On GPUs and TPUs
    # neither form is faster throughout, by their compilers' kernels and estimates.
    columns = (difference[..., j] for j in range(x.shape[-1]))
    return sum((column * column for column in columns), start=jnp.zeros((), x.dtype))


@squared_distance.defjvp
def _squared_distance_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, rows, in_range, used = primals
    dx, drows = tangents[:2]
    zero = jnp.zeros((), x.dtype)
    difference = jnp.where(used[..., None], x - rows, zero)
    d_difference = dx - jnp.where(in_range[..., None], drows, zero)
    return squared_distance(*primals), 2 * jnp.sum(difference * d_difference, axis=-1)


def reduce(
    values: jax.Array,
    used: jax.Array,
    weights: Weights,
    reduce_fn: ReduceFn,
    axis_name: AxisName,
    counted: jax.Array | None = None,
) -> jax.Array:
    """The weighted values of samples, 0 for unused ones, or their sum or mean, over `axis_name` too.

    `counted` are the samples in the denominator of the mean, by default the used ones. The loss does not
    count labels `>= C`: their loss is NaN, but the gradients of other samples are as without them.
    """
    if reduce_fn is jnp.mean:
        total, number = total_and_number(values, used, weights, axis_name, counted)
        return total / number
    values = _weighted(values, used, weights)
    return values if reduce_fn is None else _psum(jnp.sum(values), axis_name)


def total_and_number(
    values: jax.Array, used: jax.Array, weights: Weights, axis_name: AxisName, counted: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum, and what a mean divides it by: the number of samples or sum of weights, 1 for 0."""
    values = _weighted(values, used, weights)
    ones = (used if counted is None else counted).astype(values.dtype)
    numbers = ones if weights is None else _weighted(ones, used, weights)
    total, number = _psum(_sum_both(values, numbers), axis_name)
    return total, jnp.where(number == 0, jnp.ones((), number.dtype), number)


@partial(jax.jit, inline=True)
def _sum_both(values: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
    if jax.__version_info__ < (0, 10):  # There `platform_dependent` has no derivative in `shard_map`.
        return _sum_both_on(values, numbers, platform="cpu")
    return placement.call_for_platform(_sum_both_on, values, numbers)


def _sum_both_on(values: jax.Array, numbers: jax.Array, *, platform: str) -> tuple[jax.Array, jax.Array]:
    if platform != "cpu":
        return jnp.sum(values), jnp.sum(numbers)
    # As the rows of one array: on a CPU XLA sums both in one kernel, but needs three for each sum of its own.
    both = jnp.sum(jnp.stack([values, numbers]), axis=tuple(range(1, values.ndim + 1)))
    return both[0], both[1]


def _weighted(values: jax.Array, used: jax.Array, weights: Weights) -> jax.Array:
    # Values are masked before they are weighted: 0 * NaN would reach the gradient of the weights.
    values = jnp.where(used, values, jnp.zeros((), values.dtype))
    return values if weights is None else values * weights.astype(values.dtype)


def _psum(totals: Any, axis_name: AxisName) -> Any:
    return totals if axis_name is None else lax.psum(totals, axis_name)
