"""What tells a user that training works: pure functions of the centers and a batch of features."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_centerloss import _batch, _checks, _distances, _groups, _loss, _placement, _table
from jax_centerloss._batch import Batch
from jax_centerloss._table import AxisName

_OTHER_CLASSES = 1024  # Among which the nearest other center is looked for, at most.


def center_metrics(
    params: Any,
    x: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    previous: Any = None,
    axis_name: AxisName = None,
) -> dict[str, jax.Array]:
    """How compact the classes of a batch are, how far apart, and whether their centers move.

    All distances are Euclidean, not squared, and so comparable with each other (their derivative where they
    are 0 is taken to be 0): training works if
    `own_distance` falls below `gap`. Centers that stand still show in `moved`, which is then far smaller
    than `own_distance`; mostly their step is scaled by the weight of the loss, see `with_center_optimizer`.

    The cost is O(N·D), and for `gap` O(N·min(C, 1024)·D). Up to 1,024 classes it is exact. Of more classes
    1,024 are looked at, at even distances over the table: the nearest center may lie nearer.

    Called in the jitted step that moves the centers, pass it what the step starts from, and its result in
    `after`. `previous` has to be a copy kept outside of such a step, since centers are donated there.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      x: features `(..., D)`, floating point.
      labels: integer classes `(...)`. Negative ones are ignored; one that is `>= C` raises where its value is
        known and makes the distances NaN under `jit`.
      where: boolean `(...)`, the samples to use; all by default.
      weights: real numbers `(...)`, not negative, one for each sample: a weight of k counts as k samples, 0
        as none. A negative one raises where its value is known; under `jit` it makes the distances NaN.
      previous: earlier centers, in the form of `params`: a copy taken some steps ago, say one epoch. The
        centers themselves are refused, such as the state of the very NNX module, which follows it.
      axis_name: inside `shard_map`, `pmap` or `vmap`, the mapped axis (or axes) that the batch is spread
        over: means and numbers are then over the whole batch.

    Returns:
      A dict of scalars, in float32 (float64 if an operand has it) unless said otherwise, and 0 if no sample
      is used:

      `"own_distance"`: from a sample to the center of its class, mean over the samples;
      `"gap"`: how much farther the nearest other center is, mean over the samples: negative for a sample that
      is nearer to another class; infinite if there is no other center;
      `"classes_seen"`: int32, how many classes the samples have;
      `"moved"`: how far a center is from its place in `previous`, mean over the classes that were seen. Only
      with `previous`.

    Raises:
      ValueError: on a shape that does not fit, a known label `>= C` or negative weight, or a `previous` that
        is no earlier table.
      TypeError: on features or centers that are not floating point, labels that are not integers, a `where`
        that is not boolean, or what is no array at all.

    Example:
      >>> import jax.numpy as jnp, jax_centerloss
      >>> centers = jnp.array([[0.0, 0.0], [9.0, 0.0]])
      >>> x, labels = jnp.array([[0.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0])
      >>> metrics = jax_centerloss.center_metrics(centers, x, labels, previous=centers + 1.0)
      >>> {name: round(float(value), 2) for name, value in metrics.items()}
      {'classes_seen': 1.0, 'gap': 7.27, 'moved': 1.41, 'own_distance': 2.0}
    """
    centers = _checks.table(params)
    batch = _batch.batch(x, labels, where, weights, centers)
    if previous is not None:
        previous = _checks.previous(params, previous, centers)
    metrics: dict[str, jax.Array] = _metrics(centers, batch, previous, axis_name=axis_name)
    return metrics


@_placement.any_mesh(_placement.everywhere, static_argnames="axis_name")
def _metrics(
    centers: jax.Array, batch: Batch, previous: jax.Array | None, *, axis_name: AxisName
) -> dict[str, jax.Array]:
    x, labels, used, weights = batch
    if weights is not None:
        used = used & (weights != 0)
    # Before any root, whose derivative at NaN would not be masked any more.
    x = jnp.where(used[..., None], x, jnp.zeros((), x.dtype))
    rows, known = _table.read_rows(centers, labels, x)
    own = _distances.root(_loss.squared_distance(x.astype(rows.dtype), rows, known, used))
    own = jnp.where(known, own, np.full((), np.nan, rows.dtype))
    gap = _nearest_other(centers, x, labels) - own
    metrics = {
        "own_distance": _loss.mean(own, used, weights, axis_name),
        "gap": _loss.mean(gap, used, weights, axis_name),
    }

    mesh = _placement.mesh_of(centers, x, labels)
    labels, used = _table.gather_batch(axis_name, mesh, labels, used & known)
    slot, classes = _groups.slots(labels, used, centers.shape[0])
    seen = _groups.sum_by_slot(jnp.ones(slot.shape, jnp.int32), slot, classes.shape[0]) > 0
    metrics["classes_seen"] = _loss.count(seen)
    if previous is not None:
        dtype = _table.compute_dtype(centers, previous)
        now, then = (_table.rows_of(table, classes).astype(dtype) for table in (centers, previous))
        metrics["moved"] = _loss.mean(_distances.root(jnp.sum((now - then) ** 2, axis=-1)), seen)
    return metrics


def _nearest_other(centers: jax.Array, x: jax.Array, labels: jax.Array) -> jax.Array:
    """The distance of each sample to the nearest center of another class, among some of them."""
    classes, some = _table.sample(centers, _OTHER_CLASSES)
    distances = _distances.root(_distances.distances_to(some, x, precision="highest"))
    classes = classes.astype(labels.dtype).reshape((1,) * labels.ndim + (-1,))
    other = (labels[..., None] != classes) & jnp.logical_not(jnp.isnan(distances))
    return jnp.min(jnp.where(other, distances, np.full((), np.inf, distances.dtype)), axis=-1)
