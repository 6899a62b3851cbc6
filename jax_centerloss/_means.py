"""Initial centers as the class means of features."""

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

_NAMED = 8  # The warning lists at most this many classes.


def init_from_features(params: Any, batches: Iterable[tuple[ArrayLike, ArrayLike]]) -> Any:
    """Centers as the class means of features, in one pass over a stream of batches.

    It is for a network that has been trained before: its centers then start where its features are. The means
    are running means with compensated summation, so that rounding errors do not add up over a long stream,
    and a batch touches the rows of its own classes only. Call it outside of `jit`; it compiles once for each
    shape of a batch. It waits for a batch before it takes the next one, so that a data loader may reuse its
    buffer.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      batches: pairs `(x, labels)` of features `(..., D)`, floating point, and integer classes `(...)`. A
        negative label leaves its sample out.

    Returns:
      Centers in the tree structure and dtype of `params`: the mean of each class of the stream, and the old
      center of every other class. A `UserWarning` counts the other classes, and names the first 8.

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
    centers = _checks.as_table(params)
    state = _initial_state(centers)
    for pair in batches:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            found = f"{type(pair).__name__}{f' of {len(pair)}' if isinstance(pair, tuple | list) else ''}"
            raise TypeError(
                f"batches must hold pairs (x, labels), got {found}. A single batch is `[(x, labels)]`; "
                "negative labels leave samples out."
            )
        batch = _batch.as_batch(pair[0], pair[1], None, None, centers)
        if any(isinstance(a, jax.core.Tracer) for a in (centers, batch.x, batch.labels)):
            raise TypeError("init_from_features loops over a stream of batches: call it outside of jit.")
        # Wait: on a CPU an array that the loader made with `jnp.asarray` may share the loader's buffer.
        state = jax.block_until_ready(_add_batch(state, batch))
    means, counts = state.means, state.counts
    num_unseen, first = _find_unseen(counts)
    if num_unseen:
        names = ", ".join(map(str, np.asarray(first)[:num_unseen])) + (", ..." if num_unseen > _NAMED else "")
        warnings.warn(
            f"{num_unseen} of {counts.size} classes were never seen and keep their centers: {names}.",
            stacklevel=2,
        )
    return jax.tree.unflatten(jax.tree.structure(params), [means.astype(centers.dtype)])


class _State(NamedTuple):
    """Running means: arrays, or their shardings."""

    means: Any  # (C, D)
    remainder: Any  # (C, D), what rounding has taken from the means.
    counts: Any  # (C,)


def _state_sharding(*arrays: Any) -> _State | None:
    centers, *others = jax.tree.leaves(arrays)
    table = _placement.centers_sharding(centers, *others)
    return None if table is None else _State(table, table, NamedSharding(table.mesh, P(table.spec[0])))


@_placement.jit_on_auto_axes(_state_sharding)
def _initial_state(centers: jax.Array) -> _State:
    # The copy can be donated. In half precision a running mean would have too few digits.
    means = jnp.array(centers, _table.compute_dtype(centers))
    return _State(means, jnp.zeros_like(means), jnp.zeros(centers.shape[0], jnp.int32))


@_placement.jit_on_auto_axes(_placement.replicated_sharding)
def _find_unseen(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The number of classes without samples, and the first 8 of them."""
    unseen = counts == 0
    first = jnp.flatnonzero(unseen, size=_NAMED, fill_value=counts.shape[0])
    return jnp.sum(unseen, dtype=jnp.int32), _placement.replicate(first, _placement.mesh_of(counts))


@_placement.jit_on_auto_axes(_state_sharding, donate_argnums=0)
def _add_batch(state: _State, batch: _batch.Batch) -> _State:
    """The running means with the samples of a batch added."""
    means, remainder, counts = state
    x, labels, used, _ = batch
    mesh = _placement.mesh_of(means, x, labels)
    labels, used, x = _batch.flatten_and_replicate(None, mesh, labels, used, x)
    x = x.astype(_table.compute_dtype(x, means))
    slots = _groups.assign_slots(labels, used, means.shape[0])
    new_counts = slots.num_samples()
    classes = jnp.where(new_counts > 0, slots.classes, _groups.NO_CLASS)
    old_counts = _table.gather_class_rows(counts, classes)
    # The mean of a new class starts at one of its samples. Its old center may be far away, and differences
    # from it would lose digits.
    position = jnp.arange(labels.size, dtype=jnp.int32)
    sample_of_slot = jnp.zeros(classes.shape, jnp.int32).at[slots.slot_of_sample].max(position, mode="drop")
    old_means = _table.gather_class_rows(means, classes).astype(x.dtype)
    start = jnp.where((old_counts > 0)[:, None], old_means, x[sample_of_slot])
    sums = slots.sum(x - start.at[slots.slot_of_sample].get(mode="clip"))
    # Compensated summation: `lost` is the rounding error of the mean that is stored in `start`.
    lost = _table.gather_class_rows(remainder, classes).astype(x.dtype)
    share = 1 / jnp.maximum(old_counts + new_counts, 1).astype(x.dtype)
    step = lost + share[:, None] * (sums - new_counts.astype(x.dtype)[:, None] * lost)
    mean = (start + step).astype(means.dtype)
    added = mean.astype(x.dtype) - start
    new_lost = (step - added) + (start - (mean.astype(x.dtype) - added))
    return _State(
        _table.set_rows(means, classes, mean),
        _table.set_rows(remainder, classes, new_lost),
        _table.add_to_rows(counts, classes, new_counts),
    )
