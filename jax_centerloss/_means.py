"""Centers from features that are already there."""

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jax_centerloss import _batch, _checks, _groups, _placement, _table

_NAMED = 8  # Classes that the warning lists.


def init_from_features(params: Any, batches: Iterable[tuple[ArrayLike, ArrayLike]]) -> Any:
    """Centers as the class means of features, in one pass over a stream of batches.

    For a network that is already trained, in part or as a whole: its centers start where its features are.
    Means are kept up to date by differences from them, and what is rounded off is kept in a table beside
    them, so a stream of any length costs no digits. Only the rows of a batch's classes are touched.
    It is called outside `jit`; batches of one shape compile once. The next batch is asked for when the last
    one has been added, so that a loader may fill one buffer again and again.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      batches: pairs `(x, labels)` of features `(..., D)`, floating point, and integer classes `(...)`;
        negative ones are ignored.

    Returns:
      Centers in the tree structure and dtype of `params`: the mean of each class that was seen, and the old
      center of each that was not. A `UserWarning` names the latter.

    Raises:
      ValueError: on a shape that does not fit, or a label `>= C`.
      TypeError: on a batch that is no pair, features that are not floating point, or labels that are not
        integers.

    Example:
      >>> import jax.numpy as jnp, jax_centerloss
      >>> x, labels = jnp.array([[1.0, 0.0], [3.0, 0.0], [5.0, 5.0]]), jnp.array([0, 0, 1])
      >>> jax_centerloss.init_from_features(jnp.zeros((2, 2)), [(x, labels)]).tolist()
      [[2.0, 0.0], [5.0, 5.0]]
    """
    centers = _checks.table(params)
    state = _start(centers)
    for pair in batches:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            found = f"{type(pair).__name__}{f' of {len(pair)}' if isinstance(pair, tuple | list) else ''}"
            raise TypeError(
                f"batches must hold pairs (x, labels), got {found}. A single batch is `[(x, labels)]`; "
                "samples are masked by negative labels."
            )
        batch = _batch.batch(pair[0], pair[1], None, None, centers)
        if any(isinstance(a, jax.core.Tracer) for a in (centers, batch.x, batch.labels)):
            raise TypeError("init_from_features loops over a stream of batches: call it outside of jit.")
        # On a CPU an array may share the loader's memory, also one that the loader made by `jnp.asarray`.
        state = jax.block_until_ready(_add(state, batch))
    means, counts = state.means, state.counts
    number, first = _unseen(counts)
    if number:
        names = ", ".join(map(str, np.asarray(first)[:number])) + (", ..." if number > _NAMED else "")
        warnings.warn(
            f"{number} of {counts.size} classes were never seen and keep their centers: {names}.",
            stacklevel=2,
        )
    return jax.tree.unflatten(jax.tree.structure(params), [means.astype(centers.dtype)])


class _State(NamedTuple):
    """Arrays, or where they lie."""

    means: Any  # (C, D)
    rest: Any  # (C, D), what was rounded off from the means.
    counts: Any  # (C,)


def _placed(*arrays: Any) -> _State | None:
    centers, *others = jax.tree.leaves(arrays)
    table = _placement.as_table(centers, *others)
    return None if table is None else _State(table, table, NamedSharding(table.mesh, P(table.spec[0])))


@_placement.any_mesh(_placed)
def _start(centers: jax.Array) -> _State:
    # A copy, which can be donated from batch to batch; half precision would not hold a running mean.
    means = jnp.array(centers, _table.compute_dtype(centers))
    return _State(means, jnp.zeros_like(means), jnp.zeros(centers.shape[0], jnp.int32))


@_placement.any_mesh(_placement.everywhere)
def _unseen(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    unseen = counts == 0
    first = jnp.flatnonzero(unseen, size=_NAMED, fill_value=counts.shape[0])
    return jnp.sum(unseen, dtype=jnp.int32), _placement.whole(_placement.mesh_of(counts), first)


@_placement.any_mesh(_placed, donate_argnums=0)
def _add(state: _State, batch: _batch.Batch) -> _State:
    means, rest, counts = state
    x, labels, used, _ = batch
    mesh = _placement.mesh_of(means, x, labels)
    labels, used, x = _table.gather_batch(None, mesh, labels, used, x)
    x = x.astype(_table.compute_dtype(x, means))
    slot, classes = _groups.slots(labels, used, means.shape[0])
    number = classes.shape[0]
    new = _groups.sum_by_slot(jnp.ones(slot.shape, jnp.int32), slot, number)
    classes = jnp.where(new > 0, classes, means.shape[0])
    before = _table.rows_of(counts, classes)
    # A class that is new starts from one of its samples: from the old center, which may lie anywhere, digits
    # would be lost.
    position = jnp.arange(slot.shape[0], dtype=jnp.int32)
    sample = jnp.zeros(number, jnp.int32).at[slot].max(position, mode="drop")
    start = jnp.where((before > 0)[:, None], _table.rows_of(means, classes).astype(x.dtype), x[sample])
    difference = x - start.at[slot].get(mode="clip")
    sums = _groups.sum_by_slot(difference, slot, number)
    # The mean is start + lost. A step below half a unit of start is not lost either.
    lost = _table.rows_of(rest, classes).astype(x.dtype)
    share = 1 / jnp.maximum(before + new, 1).astype(x.dtype)
    step = lost + share[:, None] * (sums - new.astype(x.dtype)[:, None] * lost)
    moved = (start + step).astype(means.dtype)
    added = moved.astype(x.dtype) - start
    lost = (step - added) + (start - (moved.astype(x.dtype) - added))
    return _State(
        _table.write_rows(means, classes, moved),
        _table.write_rows(rest, classes, lost),
        _table.add_rows(counts, classes, new),
    )
