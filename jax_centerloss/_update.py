"""How centers move by rule: no gradient through the model, no step scaled by the loss's weight."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_centerloss import _checks, _loss, _placement, _table
from jax_centerloss._table import AxisName

RULES = ("paper", "gradient")
_BLOCK = 2**19  # Numbers in a block of sums.


def update_centers(
    params: Any,
    x: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: float | jax.Array = 0.5,
    rule: str = "paper",
    where: ArrayLike | None = None,
    axis_name: AxisName = None,
    after: Any = None,
) -> Any:
    """Moves the centers of the batch's classes towards their features.

    The step never depends on the weight of the loss. With `n_j` used samples of class j among N used ones,

      `"paper"`: `c_j - alpha * sum(c_j - x) / (1 + n_j)`, the paper's Eq. 4;
      `"gradient"`: `c_j - alpha * 2 * sum(c_j - x) / N`, plain gradient descent on `center_loss`, the mean
      with its default `clip`.

    Call it with the features of the step; `jax.lax.stop_gradient` is not needed. Under `jit`, donate the
    centers so that they are written in place.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      x: features `(..., D)`, floating point.
      labels: integer classes `(...)`. Negative ones are ignored; one that is `>= C` raises where its value
        is known and is left out under `jit`.
      alpha: the rate of the centers, 0.5 in the paper; `schedule(step)`, say, for one that changes.
      rule: `"paper"` or `"gradient"`.
      where: boolean `(...)`, the samples to use; all by default.
      axis_name: inside `shard_map`, `pmap` or `vmap`, the mapped axis (or axes) that the batch is spread
        over: counts and sums are then over the whole batch.
      after: a pytree, typically the loss, that is computed before the centers are written. Pass whatever
        the same jitted program computes from the centers: XLA may put a read that is not in it behind the
        write, on a copy of the whole table. With `axis_name`, it has to be the same on every device.

    Returns:
      Moved centers, in the tree structure and dtype of `params`. Rows of other classes keep their bits.

    Raises:
      ValueError: on an unknown `rule`, a shape that does not fit, or a known label `>= C`.
      TypeError: on features or centers that are not floating point, labels that are not integers, or a
        `where` that is not boolean.

    Example:
      >>> import jax.numpy as jnp, jax_centerloss
      >>> centers = jnp.zeros((2, 2))
      >>> x = jnp.array([[4.0, 0.0], [4.0, 8.0], [0.0, 0.0]])
      >>> jax_centerloss.update_centers(centers, x, jnp.array([1, 1, 0]), alpha=0.75).tolist()
      [[0.0, 0.0], [2.0, 2.0]]

    References:
      Wen et al, A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV 2016
      (https://doi.org/10.1007/978-3-319-46478-7_31).
    """
    centers = _checks.table(params)
    batch = _checks.batch(x, labels, where, centers)
    _checks.choice("rule", rule, RULES)
    _checks.scalar("alpha", alpha)
    moved = _moved(centers, *batch, jnp.asarray(alpha), after, rule=rule, axis_name=axis_name)
    return jax.tree.unflatten(jax.tree.structure(params), [moved])


@_placement.any_mesh(_placement.as_table, static_argnames=("rule", "axis_name"))
def _moved(
    centers: jax.Array,
    x: jax.Array,
    labels: jax.Array,
    used: jax.Array,
    alpha: jax.Array,
    after: Any,
    *,
    rule: str,
    axis_name: AxisName,
) -> jax.Array:
    pulls = pull(centers, x, labels, used, after, rule=rule, axis_name=axis_name)
    rates = alpha.astype(pulls.scale.dtype) * pulls.scale
    number, block = pulls.classes.shape[0], max(1, _BLOCK // centers.shape[1])
    if not isinstance(number, int) or number <= block:
        block = number
    moved: jax.Array = (
        _move(centers, pulls, rates, block=number)
        if block == number
        else lax.platform_dependent(
            centers, pulls, rates, cpu=partial(_move, block=block), default=partial(_move, block=number)
        )
    )
    return moved


@partial(jax.jit, static_argnames="block")  # Apart from what makes its inputs, it takes fewer temporaries.
def _move(centers: jax.Array, pulls: "Pulls", rates: jax.Array, *, block: int) -> jax.Array:
    """The centers after the sum of each class's differences, times its rate, is added to it.

    Block by block of classes, on CPUs, the sums stay in the cache, and less memory is taken anew in each
    step; on other platforms every block would cost as much as all of them.
    """
    number = pulls.classes.shape[0]
    blocks = 1 if number == block else -(-number // block)
    spare = blocks * block - number
    classes = jnp.pad(pulls.classes, (0, spare), constant_values=centers.shape[0])
    rates = jnp.pad(rates, (0, spare))

    def move(i: ArrayLike, centers: jax.Array) -> jax.Array:
        start = jnp.asarray(i, jnp.int32) * block
        sums = _table.sum_by_slot(pulls.difference, pulls.slot - start, block)
        mine, rate = (lax.dynamic_slice_in_dim(a, start, block) for a in (classes, rates))
        return _table.add_rows(centers, mine, rate[:, None] * sums)

    # The first block stands outside: inside shard_map it settles over which axes the result varies.
    centers = move(0, centers)
    return centers if blocks == 1 else lax.fori_loop(1, blocks, move, centers)


class Pulls(NamedTuple):
    """What a batch asks: class `classes[s]` to move by `scale[s]` times the sum of its differences."""

    difference: jax.Array  # (N, D), x - c.
    slot: jax.Array  # (N,), of the sample's class; out of range where the sample moves nothing.
    classes: jax.Array  # (S,), C for a slot without a class.
    scale: jax.Array  # (S,), NaN for a class whose distances are no numbers.


def pull(
    centers: jax.Array,
    x: jax.Array,
    labels: jax.Array,
    used: jax.Array,
    after: Any,
    *,
    rule: str,
    axis_name: AxisName,
) -> Pulls:
    """What the batch asks of the centers by `rule`, for a rate of one: whole on every device."""
    rows, known = _table.read_rows(centers, labels, x)
    dtype = rows.dtype
    x = x.astype(dtype)
    # The very terms of `center_loss`, which XLA then computes once for both.
    difference, distance = x - rows, _loss.squared_distance(x, rows, known, used)
    labels, used, difference, distance = _table.gather_batch(
        axis_name, _placement.mesh_of(centers, x, labels), labels, used & known, difference, distance
    )
    slot, classes = _table.slots(labels, used, centers.shape[0])
    # NaN and infinity show in the count of their class, and so in its center, also where the clamp cuts.
    # Counts are exact up to 2**24 samples of one class in a batch.
    samples = jnp.where(jnp.isfinite(distance), np.ones((), dtype), np.full((), np.nan, dtype))
    counts = _table.sum_by_slot(samples, slot, classes.shape[0])
    if rule == "paper":
        scale = 1 / (1 + counts)
    else:
        scale = jnp.where(jnp.isnan(counts), counts, 2 / jnp.maximum(_loss.count(used), 1).astype(dtype))
        low, high = _loss.CLIP
        slot = jnp.where((distance >= low) & (distance <= high), slot, _table.NO_SLOT)
    classes = jnp.where((counts != 0) & _table.always(after), classes, centers.shape[0])
    return Pulls(difference, slot, classes, scale)
