"""Stochastic rounding: a table in half precision moves by its exact steps, on average."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jax_centerloss import _groups


def seed_of(rounding_key: jax.Array | None, *tables: Any) -> jax.Array | None:
    """Two random words, from which the bits of each number are made, if any of the tables needs them."""
    if rounding_key is None or not any(is_narrow(leaf.dtype) for leaf in jax.tree.leaves(tables)):
        return None
    return jax.random.bits(rounding_key, (2,), jnp.uint32)


def round_rows(
    rows: jax.Array, classes: jax.Array, dtype: DTypeLike, seed: jax.Array | None, table: int = 0
) -> jax.Array:
    """`rows (S, ...)` in `dtype`: rounded to nearest, or stochastically if there is a seed.

    The bits of a number follow from the seed, its class, its place in the row and the number of the table,
    so they are the same on every platform, in every order of the batch and however classes are sharded.
    """
    if seed is None or not is_narrow(dtype) or not jnp.issubdtype(rows.dtype, jnp.floating):
        return rows.astype(dtype)
    flat = rows.reshape(rows.shape[0], -1).astype(jnp.float32)
    words = _hash_words(seed + np.uint32(table), classes, flat.shape[1])
    return _round(flat, words, jnp.dtype(dtype)).reshape(rows.shape)


def is_narrow(dtype: DTypeLike) -> bool:
    """Whether stochastic rounding is for it: float32 has digits enough for every step."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def _hash_words(seed: jax.Array, classes: jax.Array, number: int) -> jax.Array:
    """A random word `(S, number)` for each number of each row.

    `jax.random.bits` is a generator for all purposes, and on a CPU takes more than twice as long as the step
    that it would round. Rounding needs bits that are uniform and show no pattern between rows, columns and
    seeds, which a hash of these three gives.
    """
    rows = _mix(seed[0] + classes.astype(jnp.uint32) * np.uint32(0x9E3779B9))
    columns = jnp.arange(number, dtype=jnp.uint32) * np.uint32(0x85157AF5)
    return _mix((rows + seed[1])[:, None] + columns[None])


def _mix(word: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: each bit of the result depends on every bit of the word."""
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _round(x: jax.Array, words: jax.Array, dtype: Any) -> jax.Array:
    """float32 `x` rounded to one of its two neighbours in `dtype`, by chance the nearer one more often.

    With `u` uniform in [0, 1), from the random words, a magnitude of `q` units in the last place becomes
    `floor(q + u)` of them, whose mean is `q`. The units are counted in integers, where nothing is rounded.
    """
    info, wide = jnp.finfo(dtype), jnp.finfo(jnp.float32)
    x = _groups.by_platform(_computed_once, x)
    extra = wide.nmant - info.nmant  # Bits of the fraction that `dtype` does not keep.
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.uint32)
    up = ((bits + (words >> (32 - extra))) >> extra) << extra
    # The largest number stays finite, and what is beyond it, an infinity or NaN stays as it is.
    largest = np.asarray(info.max, np.float32).view(np.uint32)
    up = jnp.minimum(up, largest)
    rounded = lax.bitcast_convert_type(up, jnp.float32)
    if info.smallest_normal > wide.smallest_normal:
        # The subnormal numbers of `dtype` are evenly spaced.
        spare = 31 - info.nmant
        units = (jnp.abs(x) * np.float32(2.0**31 / float(info.smallest_normal))).astype(jnp.uint32)
        small = ((units + (words >> (32 - spare))) >> spare).astype(jnp.float32)
        small = small * np.float32(info.smallest_subnormal)
        rounded = jnp.where(jnp.abs(x) < np.float32(info.smallest_normal), small, rounded)
    overflows = bits >= largest + np.uint32(1 << extra)
    return jnp.where(overflows, x, jnp.copysign(rounded, x)).astype(dtype)


def _computed_once(x: jax.Array, *, platform: str) -> jax.Array:
    # Else XLA fuses it into each of its uses, and a CPU computes it several times.
    return lax.optimization_barrier(x) if platform == "cpu" else x


@_round.defjvp
def _round_jvp(dtype: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """That of the mean: bits alone have no derivative."""
    return _round(*primals, dtype), tangents[0].astype(dtype)
