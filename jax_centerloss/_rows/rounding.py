"""Stochastic rounding to bfloat16 or float16. On average it is exact, so that small steps are not lost."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jax_centerloss._rows import placement

Seed = jax.Array | None  # Two random words, or None for rounding to nearest.


def seed_of(rounding_key: jax.Array | None, *tables: Any) -> Seed:
    """Two random words, the seed of the rounding. None if there is no key, or no table in half precision."""
    if rounding_key is None or not any(is_below_float32(leaf.dtype) for leaf in jax.tree.leaves(tables)):
        return None
    return jax.random.bits(rounding_key, (2,), jnp.uint32)


def round_rows(
    rows: jax.Array, classes: jax.Array, dtype: DTypeLike, seed: Seed, table_index: int = 0
) -> jax.Array:
    """Casts `rows (S, ...)` of `classes (S,)` to `dtype`: stochastically if there is a seed, else to nearest.

    The random bits of an entry are a function of the seed, the class, the column and the index of the table,
    so that they are the same on every platform, in every order of the batch and for every sharding.
    """
    if seed is None or not is_below_float32(dtype) or not jnp.issubdtype(rows.dtype, jnp.floating):
        return rows.astype(dtype)
    flat = rows.reshape(rows.shape[0], math.prod(rows.shape[1:])).astype(jnp.float32)
    words = _random_words(seed + np.uint32(table_index), classes, flat.shape[1])
    return _round_stochastically(flat, words, jnp.dtype(dtype)).reshape(rows.shape)


def is_below_float32(dtype: DTypeLike) -> bool:
    """Whether `dtype` is a float of fewer than 32 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def _random_words(seed: jax.Array, classes: jax.Array, columns: int) -> jax.Array:
    """`(S, columns)` random words: a hash of seed, class and column.

    Rounding needs words that are uniform and show no pattern along rows, columns and seeds. On a CPU
    `jax.random.bits` is more than twice as slow as the whole update of the centers.
    """
    rows = _mix(seed[0] + classes.astype(jnp.uint32) * np.uint32(0x9E3779B9))
    offsets = jnp.arange(columns, dtype=jnp.uint32) * np.uint32(0x85157AF5)
    return _mix((rows + seed[1])[:, None] + offsets[None])


def _mix(word: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: each bit of the result depends on every bit of `word`."""
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _round_stochastically(x: jax.Array, words: jax.Array, dtype: Any) -> jax.Array:
    """Rounds float32 `x` to one of its two neighbours in `dtype`, so that the mean of the result is `x`.

    With `u` uniform in [0, 1), a magnitude of `q` units in the last place is rounded to `floor(q + u)`,
    whose mean is `q`. The code has `q` and `u` as the integers `bits` and `words`, which count `2**-dropped`
    units. Their sum is exact. A number above the largest finite one of `dtype`, but below the next power of
    two, becomes the largest finite one.
    """
    half = jnp.finfo(dtype)
    single = jnp.finfo(jnp.float32)
    x = placement.call_for_platform(_barrier_on_cpu, x)
    dropped = single.nmant - half.nmant  # Bits of the significand that `dtype` does not hold.
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.uint32)
    up = ((bits + (words >> (32 - dropped))) >> dropped) << dropped
    largest = np.asarray(half.max, np.float32).view(np.uint32)
    rounded = lax.bitcast_convert_type(jnp.minimum(up, largest), jnp.float32)
    if half.smallest_normal > single.smallest_normal:
        # Below its smallest normal number float16 has units of one size, and `units` is |x| in steps
        # of 2**-fraction of one. It is below 2**31, so that the sum with random bits fits 32 bits.
        fraction = 31 - half.nmant
        units = (jnp.abs(x) * np.float32(2.0**31 / float(half.smallest_normal))).astype(jnp.uint32)
        small = ((units + (words >> (32 - fraction))) >> fraction).astype(jnp.float32)
        small = small * np.float32(half.smallest_subnormal)
        rounded = jnp.where(jnp.abs(x) < np.float32(half.smallest_normal), small, rounded)
    # From the next power of two on, numbers are cast as usual, and so are infinity and NaN.
    overflows = bits >= largest + np.uint32(1 << dropped)
    return jnp.where(overflows, x, jnp.copysign(rounded, x)).astype(dtype)


def _barrier_on_cpu(x: jax.Array, *, platform: str) -> jax.Array:
    """An optimization barrier on CPUs, where XLA would compute `x` again for each of its uses."""
    return lax.optimization_barrier(x) if platform == "cpu" else x


@_round_stochastically.defjvp
def _round_jvp(dtype: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The derivative is the identity, since the mean of the rounded numbers is `x`."""
    return _round_stochastically(*primals, dtype), tangents[0].astype(dtype)
