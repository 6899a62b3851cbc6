"""What a batch asks of the centers: which classes move, and by which sums."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_centerloss import _groups, _loss, _placement, _table
from jax_centerloss._batch import Batch
from jax_centerloss._checks import Clip
from jax_centerloss._table import AxisName

BLOCK = 2**17  # Numbers in a block of sums, on CPUs.


class Samples(NamedTuple):
    """A flat batch, whole on every device, and what it has to do with the centers."""

    labels: jax.Array  # (N,)
    used: jax.Array  # (N,), only those whose label is a class.
    difference: jax.Array  # (N, D), x - c, times the weight of the sample.
    distance: jax.Array  # (N,), squared, without the weight.
    weights: jax.Array | None  # (N,)
    ready: jax.Array  # True, once all is computed that the write has to wait for.


def look(centers: jax.Array, batch: Batch, after: Any, axis_name: AxisName) -> Samples:
    """What the step takes of the batch."""
    x, labels, used, weights = batch
    rows, known = _table.read_rows(centers, labels, x)
    x = x.astype(rows.dtype)
    # The very terms of `center_loss`, which XLA then computes once for both.
    difference, distance = x - rows, _loss.squared_distance(x, rows, known, used)
    used = used & known
    if weights is not None:
        used, weights = used & (weights != 0), weights.astype(rows.dtype)
        difference = difference * weights[..., None]
    mesh = _placement.mesh_of(centers, x, labels)
    given = (difference, distance) if weights is None else (difference, distance, weights)
    labels, used, difference, distance, *rest = _table.gather_batch(axis_name, mesh, labels, used, *given)
    ready = _table.always(after, axis_name)
    return Samples(labels, used, difference, distance, rest[0] if rest else None, ready)


class Pulls(NamedTuple):
    """What a batch asks: class `classes[s]` to move by `scale[s]` times the sum of its differences."""

    classes: jax.Array  # (S,), beyond the table for a slot without a class.
    scale: jax.Array  # (S,), NaN for a class whose distances or weights are NaN or infinite.
    values: jax.Array  # (N, D), the differences; without slots (S, D), their sums.
    slot: jax.Array | None  # (N,), of the sample's class; out of range where the sample moves nothing.

    def sums(self, first: ArrayLike = 0, number: int | None = None) -> jax.Array:
        """The sum of the differences of each class, or of that many slots from the first on."""
        if self.slot is None:
            return self.values
        return _groups.sum_by_slot(self.values, self.slot - first, number or self.classes.shape[0])

    def block_size(self) -> int | None:
        """How many slots a CPU takes at once, if there are more."""
        number, size = self.classes.shape[0], max(1, BLOCK // self.values.shape[1])
        return size if isinstance(number, int) and number > size else None

    def blocks(self, size: int) -> tuple[int, Callable[[ArrayLike], tuple[jax.Array, jax.Array]]]:
        """How many blocks of slots there are, and of each the classes and how far they move.

        Block by block the sums stay in a CPU's cache, and less memory is taken anew in each step.
        """
        number = -(-self.classes.shape[0] // size)
        spare = number * size - self.classes.shape[0]
        classes = jnp.pad(self.classes, (0, spare), constant_values=_groups.NO_SLOT)
        scale = jnp.pad(self.scale, (0, spare))

        def block(i: ArrayLike) -> tuple[jax.Array, jax.Array]:
            start = jnp.asarray(i, jnp.int32) * size
            mine, far = (lax.dynamic_slice_in_dim(a, start, size) for a in (classes, scale))
            return mine, far[:, None] * self.sums(start, size)

        return number, block


def pull(
    centers: jax.Array,
    samples: Samples,
    *,
    platform: str,
    rule: str,
    clip: Clip = _loss.CLIP,
    summed: bool = False,
) -> Pulls:
    """What the batch asks of the centers by `rule`, for a rate of one."""
    labels, used, values, distance, weights, ready = samples
    dtype, num_classes = values.dtype, centers.shape[0]
    groups = _groups.group(labels, used, num_classes, platform)
    # NaN and infinity show in the count of their class, and so in its center, also where the clamp cuts.
    # Counts are exact up to 2**24 samples of one class in a batch.
    sound = jnp.isfinite(distance) if weights is None else jnp.isfinite(distance) & jnp.isfinite(weights)
    counted = jnp.where(sound, np.ones((), dtype) if weights is None else weights, np.full((), np.nan, dtype))
    moves = None
    if rule == "gradient" and clip is not None:
        moves = (distance >= clip[0]) & (distance <= clip[1])
    slot: jax.Array | None = None
    if platform == "gpu":
        # The difference is kept: taken anew after the write, it would be of a copy of the table.
        values = lax.optimization_barrier(values)
        values = values if moves is None else jnp.where(moves[:, None], values, jnp.zeros((), dtype))
        # Both sums at once.
        sums = groups.sum(jnp.concatenate([values, counted[:, None]], axis=1))
        values, counts = sums[:, :-1], sums[:, -1]
    else:
        counts = groups.sum(counted)
        slot = groups.slot if moves is None else jnp.where(moves, groups.slot, _groups.NO_SLOT)
    if rule == "paper":
        scale = 1 / (1 + counts)
    elif rule == "mean":
        scale = 1 / jnp.where(counts == 0, np.ones((), dtype), counts)
    else:
        number = jnp.ones((), dtype) if summed else _loss.number_of(used, weights, None, dtype)
        scale = jnp.where(jnp.isnan(counts), counts, 2 / number)
    classes = jnp.where((counts != 0) & ready, groups.classes, num_classes)
    return Pulls(classes, scale, values, slot)
