"""Applies a function to many samples in blocks, so that only one block of results per class is in memory."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_BLOCK_ENTRIES = 2**22  # A block of samples has at most so many distances, unless one sample has more.


def num_stripes(size: int, mesh: Any) -> int:
    """Into how many equal stripes an axis is cut, so that each lies in one shard.

    It is the gcd of the sizes of axis and mesh: the number of shards divides both. If the mesh is unknown,
    the number of devices is used: on a smaller mesh a stripe may span two shards, which costs speed.
    """
    return math.gcd(size, jax.device_count() if mesh is None else mesh.size)


def map_in_blocks(fn: Callable[..., Any], width: int, mesh: Any, x: jax.Array, *others: jax.Array) -> Any:
    """`fn(x, *others)`, one or more arrays `(..., K)`, in blocks of samples `(...)` if they are many.

    `fn` computes `width` numbers for each sample, and a copy of its features. It gets blocks with one sample
    axis more than `x`. Each axis of samples is cut into equal stripes, each within one shard. A block takes
    the same number of samples from every stripe, so that none travels.
    """
    shape = x.shape[:-1]
    # In an exported program a size may be symbolic. It has no blocks.
    if not all(isinstance(size, int) for size in (*x.shape, width)):
        return fn(x, *others)
    # Half-precision features need no blocks for their copies: a CPU makes all before the loop.
    if x.dtype.itemsize >= 4:
        width = max(width, x.shape[-1])
    if math.prod(shape) * width <= _BLOCK_ENTRIES:
        return fn(x, *others)
    rank = len(shape)
    stripes = [num_stripes(size, mesh) for size in shape]
    lengths = [size // number for size, number in zip(shape, stripes, strict=True)]
    # The order that brings the axes (stripe 0, length 0, stripe 1, ...) to (stripes, lengths).
    stripes_first = np.arange(2 * rank).reshape(rank, 2).T.reshape(-1)
    length = math.prod(lengths)
    block = max(1, min(length, _BLOCK_ENTRIES // (width * math.prod(stripes))))

    def split(array: jax.Array) -> jax.Array:  # To (*stripes, length, ...).
        rest = array.shape[rank:]
        pairs = [size for pair in zip(stripes, lengths, strict=True) for size in pair]
        array = array.reshape(*pairs, *rest).transpose(*stripes_first, *range(2 * rank, 2 * rank + len(rest)))
        return array.reshape(*stripes, -1, *rest)

    def join(blocks: jax.Array) -> jax.Array:  # From (blocks, *stripes, block, K).
        # The last block is kept whole. The others end where it begins.
        first = jnp.moveaxis(blocks[:-1], 0, rank).reshape(*stripes, -1, blocks.shape[-1])
        first = lax.slice_in_dim(first, 0, length - block, axis=rank)
        joined = jnp.concatenate([first, blocks[-1]], axis=rank).reshape(*stripes, *lengths, -1)
        return joined.transpose(*np.argsort(stripes_first), 2 * rank).reshape(*shape, -1)

    arrays = [split(array) for array in (x, *others)]
    # The last block is moved back until it fits, and computes some samples again.
    starts = jnp.minimum(jnp.arange(-(-length // block), dtype=jnp.int32) * block, length - block)

    @jax.checkpoint  # Gradients compute a block again, instead of keeping its distances.
    def compute(start: jax.Array) -> Any:
        return fn(*(lax.dynamic_slice_in_dim(array, start, block, axis=rank) for array in arrays))

    blocks = lax.map(compute, starts)
    return jax.tree.map(join, blocks)
