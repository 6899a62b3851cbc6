"""The three rules: how a batch moves the center of each of its classes."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jax_centerloss import _checks, _loss, _reduce
from jax_centerloss._batch import Batch
from jax_centerloss._checks import Clip, ReduceFn
from jax_centerloss._rows import placement, table
from jax_centerloss._rows.moves import Samples, ScaleFn
from jax_centerloss._rows.placement import AxisName


@partial(jax.tree_util.register_dataclass, data_fields=["rate"], meta_fields=["name", "clip", "summed"])
@dataclass(frozen=True)
class Rule:
    """A rule of `update_centers`, and the loss whose gradient the rule "gradient" takes."""

    name: str
    rate: jax.Array  # alpha
    clip: Clip = _checks.CLIP
    summed: bool = False  # Whether the loss is the sum over the samples, not their mean.


def as_rule(name: str, alpha: Any, clip: Clip = _checks.CLIP, reduce_fn: ReduceFn = jnp.mean) -> Rule:
    """The rule with these arguments. All are checked but `reduce_fn`, which means a sum or else a mean."""
    _checks.check_choice("rule", name, _checks.RULES)
    rate = jnp.asarray(_checks.as_scalar("alpha", alpha))
    return Rule(name, rate, _checks.as_clip(clip), reduce_fn is jnp.sum)


def _scale(rule: Rule, denominator: jax.Array, counts: jax.Array) -> jax.Array:
    """The factor of each class's `sum(x - c_j)`; `counts` holds the numbers n_j of their samples.

    `denominator` is N, the number of all used samples, for the gradient of a mean, and else 1. With weights,
    n_j and N are sums of weights. A NaN in n_j makes the factor NaN, and for "gradient" that is all n_j does.
    """
    rate = rule.rate.astype(counts.dtype)
    if rule.name == "paper":  # Eq. 4: c_j - alpha * sum(c_j - x) / (1 + n_j).
        return rate / (1 + counts)
    if rule.name == "mean":  # c_j - alpha * sum(c_j - x) / n_j.
        return rate / jnp.where(counts == 0, jnp.ones_like(counts), counts)
    # c_j - alpha * 2 * sum(c_j - x) / N.
    return jnp.where(jnp.isnan(counts), counts, rate * (2 / denominator))


def plain_samples(centers: jax.Array, batch: Batch, after: Any, axis_name: AxisName) -> Samples:
    """The samples of a batch without weights, with its `x` as their values.

    These are gradients, or features whose means are wanted.
    """
    x, labels, used, _ = batch
    x = x.astype(table.compute_dtype(x, centers))
    classes = table.classes_where(used & (labels < centers.shape[0]), labels.astype(jnp.int32))
    classes, x = placement.whole_batch(axis_name, placement.mesh_of(centers, x, labels), classes, x)
    counted = jnp.ones_like(x, shape=classes.shape)
    return Samples(classes, x, counted, None, table.true_after(after, axis_name))


def samples_and_scale(
    centers: jax.Array, batch: Batch, rule: Rule | None, after: Any, axis_name: AxisName
) -> tuple[Samples, ScaleFn]:
    """The samples of a batch, whose values are their weighted differences from the centers, and the scale.

    Without a rule `batch.x` holds gradients. They are the values themselves, and the scale is 1. A distance
    or weight that is NaN or infinite makes the center NaN, even if the clamp of the loss would cap an
    infinite distance.
    """
    if rule is None:
        return plain_samples(centers, batch, after, axis_name), Partial(jnp.ones_like)
    x, labels, used, weights = batch
    rows, in_range = table.gather_label_rows(centers, labels, x)
    x = x.astype(rows.dtype)
    # Written as in the loss, so that XLA computes both once.
    difference = x - rows
    distance = _reduce.squared_distance(x, rows, in_range, used)
    denominator = jnp.ones((), rows.dtype)
    if rule.name == "gradient" and not rule.summed:
        # N comes from the same call as in the loss, although the sum of losses is not used: XLA then computes
        # it once for loss and update, unless there are weights.
        losses = _loss.sample_losses(x, rows, in_range, used, clip=rule.clip, num_classes=centers.shape[0])
        _, denominator = _reduce.total_and_number(losses, used, weights, axis_name, counted=used & in_range)
    used = used & in_range
    # In float32 counts are exact up to 2**24 samples of a class.
    counted = jnp.ones_like(distance)
    if weights is not None:
        counted = weights.astype(rows.dtype)
        used = used & (counted != 0)
        # 0 * NaN would reach the derivative with respect to a weight of 0.
        difference = jnp.where(used[..., None], difference, jnp.zeros((), rows.dtype)) * counted[..., None]
    classes = table.classes_where(used, labels.astype(jnp.int32))
    mesh = placement.mesh_of(centers, x, labels)
    arrays = classes, difference, distance, counted
    classes, difference, distance, counted = placement.whole_batch(axis_name, mesh, *arrays)
    finite = jnp.isfinite(distance) & jnp.isfinite(counted)
    counted = jnp.where(finite, counted, np.full((), np.nan, rows.dtype))
    kept = None
    if rule.name == "gradient" and rule.clip is not None:
        # Beyond the clamp, the gradient of the loss is zero.
        kept = (distance >= rule.clip[0]) & (distance <= rule.clip[1])
    samples = Samples(classes, difference, counted, kept, table.true_after(after, axis_name))
    return samples, Partial(_scale, rule, denominator)
