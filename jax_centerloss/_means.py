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

from jax_centerloss import _batch, _checks, _rules
from jax_centerloss._rows import groups, placement, table

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
        batch = _batch.as_batch(*pair, None, None, centers)
        if any(isinstance(a, jax.core.Tracer) for a in (centers, batch.x, batch.labels)):
            raise TypeError("init_from_features loops over a stream of batches: call it outside of jit.")
        # Wait: on a CPU an array that the loader made with `jnp.asarray` may share the loader's buffer.
        state = jax.block_until_ready(_add_batch(state, batch))
    num_unseen, first = _find_unseen(state.counts)
    if num_unseen:
        names = ", ".join(map(str, np.asarray(first)[:num_unseen])) + (", ..." if num_unseen > _NAMED else "")
        message = f"{num_unseen} of {len(centers)} classes were never seen and keep their centers: {names}."
        warnings.warn(message, stacklevel=2)
    return jax.tree.unflatten(jax.tree.structure(params), [state.means.astype(centers.dtype)])


class _State(NamedTuple):
    """Running means. (`_state_sharding` returns the shardings of these arrays in the same form.)"""

    means: Any  # (C, D)
    remainder: Any  # (C, D), the exact mean is `means + remainder`.
    counts: Any  # (C,)


def _state_sharding(*arrays: Any) -> _State:
    sharding: Any = placement.sharding_of(*jax.tree.leaves(arrays))
    return _State(sharding, sharding, NamedSharding(sharding.mesh, P(sharding.spec[0])))


@placement.jit_on_auto_axes(_state_sharding)
def _initial_state(centers: jax.Array) -> _State:
    """The old centers, as the means of no samples: a class that is never seen keeps its center."""
    # The copy can be donated. In half precision a running mean would have too few digits.
    means = jnp.array(centers, table.compute_dtype(centers))
    return _State(means, jnp.zeros_like(means), jnp.zeros(centers.shape[0], jnp.int32))


@placement.jit_on_auto_axes(placement.replicated_sharding)
def _find_unseen(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The number of classes without samples, and the first 8 of them."""
    unseen = counts == 0
    first = jnp.flatnonzero(unseen, size=_NAMED, fill_value=counts.shape[0])
    return jnp.sum(unseen, dtype=jnp.int32), placement.replicate(first, placement.mesh_of(counts))


@placement.jit_on_auto_axes(_state_sharding, donate_argnums=0)
def _add_batch(state: _State, batch: _batch.Batch) -> _State:
    """The running means with the samples of a batch added."""
    samples = _rules.plain_samples(state.means, batch, after=None, axis_name=None)
    return placement.call_for_platform(_add_samples, state, samples.classes, samples.values)


def _add_samples(state: _State, labels: jax.Array, x: jax.Array, *, platform: str) -> _State:
    means, remainder, counts = state
    batch = groups.group(labels, means.shape[0], platform)
    new_counts = batch.sum(jnp.ones_like(labels)[:, None])[:, 0]
    has_class = (batch.classes < means.shape[0]) & (new_counts > 0)
    batch = batch._replace(classes=table.classes_where(has_class, batch.classes))
    old_counts = table.read(counts, batch)
    share = 1 / jnp.maximum(old_counts + new_counts, 1).astype(x.dtype)
    # A new class starts at its mean in this batch, and not at its old center: that may be far away, and the
    # differences of samples from it would lose digits.
    first_means = share[:, None] * batch.sum(x)
    is_old = (old_counts > 0)[:, None]
    start = jnp.where(is_old, table.read(means, batch).astype(x.dtype), first_means)
    start = jnp.where(has_class[:, None], start, jnp.zeros((), x.dtype))
    # The transpose of the sum by class gives each sample the start of its class.
    (start_of_sample,) = jax.linear_transpose(batch.sum, x)(start)
    sums = batch.sum(x - start_of_sample)
    # Compensated summation: the exact old mean is `start + old_remainder`. The new one is `start + step`: the
    # old mean plus `share * sum(x - old mean)`.
    old_remainder = jnp.where(is_old, table.read(remainder, batch).astype(x.dtype), jnp.zeros((), x.dtype))
    step = old_remainder + share[:, None] * (sums - new_counts.astype(x.dtype)[:, None] * old_remainder)
    mean = (start + step).astype(means.dtype)
    # The rounding error of `start + step`, by Knuth's two-sum.
    added = mean.astype(x.dtype) - start
    new_remainder = (step - added) + (start - (mean.astype(x.dtype) - added))
    means = table.write(means, batch, mean)
    remainder = table.write(remainder, batch, new_remainder)
    return _State(means, remainder, table.add(counts, batch, new_counts))
