"""The class table: the one place that knows index modes, placement and in-place writes."""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

AxisName = Hashable | None


def compute_dtype(*arrays: jax.Array) -> Any:
    """float32, or float64 where an operand has it: half precision is never summed or counted in."""
    return jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32


def read_rows(centers: jax.Array, labels: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rows of the samples' own classes, and where the label names a class at all.

    Reads by `labels` alone, in one form, so that every read of one step is the same read; masks come after.
    A label without a class reads zeros, and no gradient goes back to any row. `like` gives the placement.
    """
    num_classes = centers.shape[0]
    known = (labels >= 0) & (labels < num_classes)
    rows = centers.at[jnp.clip(labels, 0, num_classes - 1)].get(
        mode="promise_in_bounds", out_sharding=jax.typeof(like).sharding
    )
    return jnp.where(known[..., None], rows, jnp.zeros((), rows.dtype)), known


def gather_batch(axis_name: AxisName, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The whole batch on every device of `axis_name`: each array with a leading axis of devices."""
    if axis_name is None:
        return arrays

    def gather(a: jax.Array) -> jax.Array:
        # A sum of disjoint parts rather than all_gather: its result is known to be the same on every
        # device, which shard_map asks of centers that leave it replicated.
        parts = jnp.zeros((lax.psum(1, axis_name), *a.shape), jnp.int32 if a.dtype == jnp.bool_ else a.dtype)
        whole: jax.Array = lax.psum(parts.at[lax.axis_index(axis_name)].set(a.astype(parts.dtype)), axis_name)
        return whole.astype(a.dtype)

    return tuple(gather(a) for a in arrays)


def representatives(labels: jax.Array, used: jax.Array, num_classes: int) -> jax.Array:
    """For each sample the position of the first used one of its class, in a flat batch.

    Unused samples stand for themselves.
    """
    position = jnp.arange(labels.size, dtype=jnp.int32)
    target = jnp.where(used, labels, num_classes)
    first = jnp.full(num_classes, labels.size, jnp.int32).at[target].min(position, mode="drop")
    return jnp.where(used, first.at[target].get(mode="fill", fill_value=0), position)


def write_rows(
    centers: jax.Array, labels: jax.Array, rows: jax.Array, chosen: jax.Array, after: Any
) -> jax.Array:
    """`centers` with `rows` at the labels of the samples that are `chosen`, each class at most once."""
    target = jnp.where(chosen & _always(after), labels, centers.shape[0])
    return centers.at[target].set(rows.astype(centers.dtype), mode="drop")


def _always(after: Any) -> jax.Array:
    """True, but only known once every leaf of `after` has been computed.

    XLA drops an optimization barrier before it orders reads and writes; a value that it can't fold stays.
    """
    true = jnp.ones((), jnp.bool_)
    for leaf in jax.tree.leaves(after):
        total = jnp.sum(jnp.asarray(leaf).astype(jnp.float32))
        true = true & (jnp.isnan(total) | (total == total))
    return true
