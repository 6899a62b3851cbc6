"""Metrics that show whether training works: a pure function of the centers and a batch of features."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_centerloss import _batch, _blocks, _checks, _distances, _reduce
from jax_centerloss._batch import Batch
from jax_centerloss._rows import groups, placement, table
from jax_centerloss._rows.placement import AxisName

_SEARCHED_CLASSES = 1024  # The nearest other center is searched among at most this many classes.


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

    All distances are Euclidean, not squared, so that they can be compared with each other. Judge a training
    by `ratio`, beside the ratio of the same training without center loss: the smaller it is, the more compact
    are the classes. (That `own_distance` is below `gap` proves nothing: it is without center loss, too.) If
    centers barely move, `moved` is far below `own_distance`; the usual cause is a step that is scaled by the
    weight of the loss, see `with_center_optimizer`.

    The cost is O(N·D), and for `gap` and `ratio` O(N·min(C, 1024)·D). With more than 1,024 classes only 1,024
    evenly spaced ones are searched: `gap` is then an upper bound, and `ratio` a lower one. The derivative of
    a distance of 0 is 0.

    In a jitted step that moves the centers, compute the metrics from the centers before the move, and pass
    them to the move in `after`. Keep `previous` outside of the step, since the step donates its centers.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      x: features `(..., D)`, floating point.
      labels: integer classes `(...)`. A negative label leaves its sample out. A label `>= C` raises, unless
        `where` or a weight of 0 leaves its sample out; under `jit`, where labels are not known, it makes
        `own_distance`, `gap` and `ratio` NaN.
      where: boolean `(...)`, the samples to use; all by default.
      weights: real numbers `(...)`, not negative: a sample of weight k counts as k samples, and a weight of 0
        leaves its sample out. A negative weight raises; under `jit` it makes `own_distance`, `gap` and
        `ratio` NaN.
      previous: earlier centers, in the form of `params`: a copy from some steps ago, such as an epoch. The
        array in `params` itself is refused, and so is the state of the same NNX module, which changes with
        the module.
      axis_name: inside `shard_map`, `pmap` or `vmap`, the mapped axis (or axes) over which the batch is
        split: means and counts are then over the whole batch.

    Returns:
      A dict of scalars: 0 if no sample is used, and in float32 (float64 if an operand is) unless stated.

      - `"own_distance"`: the distance of a sample to the center of its class, mean over the samples.
      - `"gap"`: how much farther the nearest center of another class is, mean over the samples. It is
        negative for a sample that is nearer to that center, and infinite if there is no other class.
      - `"ratio"`: the mean distance to the center of the own class over the mean distance to the nearest
        other center. It does not depend on the scale of the features: the lower the better, and 0 if there is
        no other class.
      - `"classes_seen"`: int32, the number of classes of the used samples.
      - `"moved"`: the distance of a center to the same row of `previous`, mean over the classes of the used
        samples. Only with `previous`.

    Raises:
      ValueError: on a shape that does not fit, a `previous` that is no earlier table, or outside of `jit` a
        label `>= C` or a negative weight.
      TypeError: on features or centers that are not floating point, labels that are not integers, a `where`
        that is not boolean, or an argument that is no array.

    Example:
      >>> import jax.numpy as jnp, jax_centerloss
      >>> centers = jnp.array([[0.0, 0.0], [9.0, 0.0]])
      >>> x, labels = jnp.array([[0.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0])
      >>> metrics = jax_centerloss.center_metrics(centers, x, labels, previous=centers + 1.0)
      >>> {name: round(float(value), 2) for name, value in metrics.items()}
      {'classes_seen': 1.0, 'gap': 7.27, 'moved': 1.41, 'own_distance': 2.0, 'ratio': 0.22}
    """
    centers = _checks.as_table(params)
    batch = _batch.as_batch(x, labels, where, weights, centers)
    if previous is not None:
        previous = _checks.as_previous_table(params, previous, centers)
    return _compute_metrics(centers, batch, previous, axis_name=axis_name)


@placement.jit_on_auto_axes(placement.replicated_sharding, static_argnames="axis_name")
def _compute_metrics(
    centers: jax.Array, batch: Batch, previous: jax.Array | None, *, axis_name: AxisName
) -> dict[str, jax.Array]:
    x, labels, used, weights = batch
    if weights is not None:
        used = used & (weights != 0)
    rows, in_range = table.gather_label_rows(centers, labels, x)
    own = _reduce.squared_distance(x.astype(rows.dtype), rows, in_range, used)
    # Distances of unused samples are 0 before the root, whose derivative at NaN can't be masked later.
    own = _safe_sqrt(jnp.where(used, own, jnp.zeros((), own.dtype)))
    own = jnp.where(in_range, own, np.full((), np.nan, rows.dtype))
    nearest = _nearest_other(centers, x, labels, used)

    def mean(values: jax.Array) -> jax.Array:
        return _reduce.reduce(values, used, weights, jnp.mean, axis_name)

    own_distance = mean(own)
    is_zero = own_distance == 0  # If no sample is used, both means are 0. The ratio is then 0.
    ratio = own_distance / jnp.where(is_zero, np.ones((), own.dtype), mean(nearest))
    metrics = {"own_distance": own_distance, "gap": mean(nearest - own), "ratio": ratio}

    classes = table.classes_where(used & in_range, labels.astype(jnp.int32))
    mesh = placement.mesh_of(centers, x, labels)
    (classes,) = placement.whole_batch(axis_name, mesh, classes)
    return metrics | placement.call_for_platform(_compare_tables, classes, centers, previous)


def _compare_tables(
    labels: jax.Array, centers: jax.Array, previous: jax.Array | None, *, platform: str
) -> dict[str, jax.Array]:
    """The number of classes in a flat batch, and how far their centers are from `previous`."""
    batch = groups.group(labels, centers.shape[0], platform)
    counts = batch.sum(jnp.ones_like(labels)[:, None])[:, 0]
    seen = (batch.classes < centers.shape[0]) & (counts > 0)
    metrics = {"classes_seen": jnp.sum(seen, dtype=jnp.int32)}
    if previous is not None:
        dtype = table.compute_dtype(centers, previous)
        difference = table.read(centers, batch).astype(dtype) - table.read(previous, batch).astype(dtype)
        moved = _safe_sqrt(jnp.sum(difference * difference, axis=-1))
        metrics["moved"] = _reduce.reduce(moved, seen, None, jnp.mean, None)
    return metrics


def _safe_sqrt(squared: jax.Array) -> jax.Array:
    """The square root, with a derivative of 0 instead of infinity at 0."""
    zero, one = np.zeros((), squared.dtype), np.ones((), squared.dtype)
    return jnp.where(squared == 0, zero, jnp.sqrt(jnp.where(squared == 0, one, squared)))


def _nearest_other(centers: jax.Array, x: jax.Array, labels: jax.Array, used: jax.Array) -> jax.Array:
    """The distance of each used sample to the nearest of up to 1,024 centers of other classes."""
    classes, rows = table.evenly_spaced_rows(centers, _SEARCHED_CLASSES)
    classes = classes.astype(labels.dtype)

    def nearest(x: jax.Array, labels: jax.Array, used: jax.Array) -> jax.Array:
        x = jnp.where(used[..., None], x, jnp.zeros((), x.dtype))
        distances = _safe_sqrt(_distances.squared_distances_to(rows, x, precision="highest"))
        other = labels[..., None] != classes.reshape((1,) * labels.ndim + (-1,))
        other = other & jnp.logical_not(jnp.isnan(distances))
        distances = jnp.where(other, distances, np.full((), np.inf, distances.dtype))
        return jnp.min(distances, axis=-1, keepdims=True)

    mesh = placement.mesh_of(centers, x, labels)
    distance: jax.Array = _blocks.map_in_blocks(nearest, classes.shape[0], mesh, x, labels, used)
    return distance[..., 0]
