"""The three rules: in which direction, and how far, a batch moves the center of each of its classes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_centerloss import _groups, _loss, _options, _placement, _table
from jax_centerloss._batch import Batch
from jax_centerloss._table import AxisName

_BLOCK_SIZE = 2**17  # Numbers in a block of sums on a CPU, which then stays in its cache.


class Samples(NamedTuple):
    """A flat batch, replicated on every device, with its differences from the centers."""

    labels: jax.Array  # (N,)
    used: jax.Array  # (N,), False also for a label out of range.
    difference: jax.Array  # (N, D), x - c, times the weight of the sample.
    distance: jax.Array  # (N,), |x - c|², not weighted.
    weights: jax.Array | None  # (N,)
    ready: jax.Array  # True, once everything that has to be read before the write was read.


def compare_with_centers(centers: jax.Array, batch: Batch, after: Any, axis_name: AxisName) -> Samples:
    x, labels, used, weights = batch
    rows, in_range = _table.gather_own_rows(centers, labels, x)
    x = x.astype(rows.dtype)
    # The same operations as in `center_loss`, so that XLA computes them once for both.
    difference, distance = x - rows, _loss.squared_distance(x, rows, in_range, used)
    used = used & in_range
    values: tuple[jax.Array, ...] = difference, distance
    if weights is not None:
        used, weights = used & (weights != 0), weights.astype(rows.dtype)
        values = difference * weights[..., None], distance, weights
    mesh = _placement.mesh_of(centers, x, labels)
    labels, used, difference, distance, *rest = _table.flatten_and_replicate(
        axis_name, mesh, labels, used, *values
    )
    ready = _table.true_after(after, axis_name)
    return Samples(labels, used, difference, distance, rest[0] if rest else None, ready)


class Directions(NamedTuple):
    """The direction of class `classes[s]` is `scale[s]` times the sum of the differences of its samples."""

    classes: jax.Array  # (S,), each class once; a class beyond the table in a slot that moves no center.
    scale: jax.Array  # (S,), NaN if a distance or a weight of the class is NaN or infinite.
    values: jax.Array  # (N, D) differences, or (S, D) sums of them if there are no slots.
    slots: jax.Array | None  # (N,), of each sample; out of range for one that is not to be summed.

    def sums(self, first: ArrayLike = 0, number: int | None = None) -> jax.Array:
        """The sum of the differences in each slot, or in `number` slots from `first` on."""
        if self.slots is None:
            return self.values
        return jax.ops.segment_sum(self.values, self.slots - first, number or self.classes.shape[0])

    def block_size(self) -> int | None:
        """The number of slots in a block on a CPU, or None if one block would hold them all."""
        number, size = self.classes.shape[0], max(1, _BLOCK_SIZE // self.values.shape[1])
        return size if isinstance(number, int) and number > size else None

    def blocks(self, size: int) -> tuple[int, Callable[[ArrayLike], tuple[jax.Array, jax.Array]]]:
        """The number of blocks of `size` slots, and a function of a block's index: classes and directions."""
        number = -(-self.classes.shape[0] // size)
        padding = number * size - self.classes.shape[0]
        classes = jnp.pad(self.classes, (0, padding), constant_values=_groups.NO_CLASS)
        scale = jnp.pad(self.scale, (0, padding))

        def block(i: ArrayLike) -> tuple[jax.Array, jax.Array]:
            start = jnp.asarray(i, jnp.int32) * size
            own_classes, own_scale = (lax.dynamic_slice_in_dim(a, start, size) for a in (classes, scale))
            return own_classes, own_scale[:, None] * self.sums(start, size)

        return number, block


def directions_of(
    samples: Samples,
    num_classes: int,
    *,
    platform: str,
    rule: str,
    clip: _options.Clip = _options.CLIP,
    summed: bool = False,
) -> Directions:
    """The directions under `rule`. With `summed`, `"gradient"` is that of a sum and not of a mean."""
    labels, used, values, distance, weights, ready = samples
    dtype = values.dtype
    groups = _groups.group_by_class(labels, used, num_classes, platform)
    # NaN and infinity make the count of their class NaN, and so its center, also where the clamp would hide
    # an infinite distance. Counts are exact up to 2**24 samples of a class.
    finite = jnp.isfinite(distance) if weights is None else jnp.isfinite(distance) & jnp.isfinite(weights)
    counted = jnp.where(
        finite, np.ones((), dtype) if weights is None else weights, np.full((), np.nan, dtype)
    )
    within_clip = None
    if rule == "gradient" and clip is not None:  # Beyond the clamp, the gradient of the loss is zero.
        within_clip = (distance >= clip[0]) & (distance <= clip[1])
    slots: jax.Array | None = None
    if platform == "gpu":
        # The barrier keeps the differences in memory. XLA would compute them again after the write to the
        # table, and copy the table for it.
        values = lax.optimization_barrier(values)
        if within_clip is not None:
            values = jnp.where(within_clip[:, None], values, jnp.zeros((), dtype))
        sums = groups.sum(jnp.concatenate([values, counted[:, None]], axis=1))  # Both in one pass.
        values, counts = sums[:, :-1], sums[:, -1]
    else:
        counts = groups.sum(counted)
        slots = groups.slots
        if within_clip is not None:
            slots = jnp.where(within_clip, slots, _groups.NO_CLASS)
    number = jnp.ones((), dtype) if summed else _loss.sum_of_weights(used, weights, None, dtype)
    scale = _scale(rule, counts, number)
    # Without `ready` in it, XLA could write rows before it has read the centers for `after`.
    moves = (counts != 0) & ready
    return Directions(jnp.where(moves, groups.classes, num_classes), scale, values, slots)


def _scale(rule: str, counts: jax.Array, number: jax.Array) -> jax.Array:
    """What the sum of `x - c_j` over the samples of class j is multiplied by, beside the rate alpha.

    `counts` holds n_j, the number of the samples of class j, and `number` is N, that of all samples.
    """
    if rule == "paper":  # Eq. 4: c_j - alpha * sum(c_j - x) / (1 + n_j).
        return 1 / (1 + counts)
    if rule == "mean":  # c_j - alpha * sum(c_j - x) / n_j.
        return 1 / jnp.where(counts == 0, jnp.ones_like(counts), counts)
    return jnp.where(jnp.isnan(counts), counts, 2 / number)  # c_j - alpha * 2 * sum(c_j - x) / N.
