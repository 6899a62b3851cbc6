"""How centers move by rule: no gradient through the model, no step scaled by the loss's weight."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jax_centerloss import _batch, _checks, _groups, _loss, _placement, _rounding, _table
from jax_centerloss._batch import Batch
from jax_centerloss._checks import Clip, ReduceFn
from jax_centerloss._pulls import Pulls, Samples, look, pull
from jax_centerloss._table import AxisName

RULES = ("paper", "gradient", "mean")
AFTER = "Pass the loss, or a tree of what is computed from the centers."


def update_centers(
    params: Any,
    x: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: float | jax.Array = 0.5,
    rule: str = "paper",
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis_name: AxisName = None,
    after: Any = None,
    rounding_key: jax.Array | None = None,
) -> Any:
    """Moves the centers of the batch's classes towards their features.

    The step never depends on the weight of the loss. With `n_j` used samples of class j among N used ones,

      `"paper"`: `c_j - alpha * sum(c_j - x) / (1 + n_j)`, the paper's Eq. 4;
      `"gradient"`: `c_j - alpha * 2 * sum(c_j - x) / N`, plain gradient descent on `center_loss`, the mean
      with its default `clip`;
      `"mean"`: `c_j - alpha * sum(c_j - x) / n_j`, alpha of the way to the class's mean in the batch, as a
      moving average of class means goes.

    With `weights`, each sample counts as so many in the sums, in `n_j` and in N.

    Call it with the features of the step; `jax.lax.stop_gradient` is not needed. Under `jit`, donate the
    centers so that they are written in place.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      x: features `(..., D)`, floating point.
      labels: integer classes `(...)`. Negative ones are ignored; one that is `>= C` raises where its value
        is known and is left out under `jit`.
      alpha: the rate of the centers, 0.5 in the paper; `schedule(step)`, say, for one that changes.
      rule: `"paper"`, `"gradient"` or `"mean"`.
      where: boolean `(...)`, the samples to use; all by default.
      weights: real numbers `(...)`, not negative, one for each sample: a weight of k counts as k samples, 0
        as none. A negative one raises where its value is known; under `jit` it makes its center NaN.
      axis_name: inside `shard_map`, `pmap` or `vmap`, the mapped axis (or axes) that the batch is spread
        over: counts and sums are then over the whole batch.
      after: a pytree, typically the loss, that is computed before the centers are written. Pass whatever
        the same jitted program computes from the centers: XLA may put a read that is not in it behind the
        write, on a copy of the whole table.
      rounding_key: a PRNG key, another one for each step, that rounds moved rows of bfloat16 or float16
        centers stochastically: on average a center then moves by its exact step. Without it, or with one key
        for all steps, a step below half a unit in the last place is lost, and centers may stop short of
        their features. float32 centers need none, and one changes nothing.

    Returns:
      Moved centers, in the tree structure and dtype of `params`. Rows of other classes keep their bits.

    Raises:
      ValueError: on an unknown `rule`, a shape that does not fit, several keys, or a known label `>= C` or
        negative weight.
      TypeError: on features or centers that are not floating point, labels that are not integers, a `where`
        that is not boolean, an `alpha` that is a schedule, a `rounding_key` that is no key, or what is no
        array at all.

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
    return by_rule(
        params,
        x,
        labels,
        alpha=alpha,
        rule=rule,
        where=where,
        weights=weights,
        axis_name=axis_name,
        after=after,
        rounding_key=rounding_key,
        clip=_loss.CLIP,
        reduce_fn=jnp.mean,
        differentiable=True,
    )


def by_rule(
    params: Any,
    x: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: float | jax.Array,
    rule: str,
    where: ArrayLike | None,
    weights: ArrayLike | None,
    axis_name: AxisName,
    after: Any,
    rounding_key: jax.Array | None,
    clip: Clip,
    reduce_fn: ReduceFn,
    differentiable: bool = False,
) -> Any:
    """`update_centers`, whose `"gradient"` is that of the loss with any `clip`, as a mean or as a sum."""
    centers = _checks.table(params)
    batch = _batch.batch(x, labels, where, weights, centers)
    _checks.choice("rule", rule, RULES)
    rate = _checks.scalar("alpha", alpha)
    after = _checks.arrays("after", after, AFTER)
    seed = _rounding.seed_of(_checks.key("rounding_key", rounding_key), centers)
    if not differentiable:
        centers, batch, after = lax.stop_gradient((centers, batch, after))
    moved = _moved(
        centers,
        batch,
        rate,
        after,
        seed,
        rule=rule,
        axis_name=axis_name,
        clip=_checks.clip_range(clip),
        summed=reduce_fn is jnp.sum,
    )
    return jax.tree.unflatten(jax.tree.structure(params), [moved])


@_placement.any_mesh(_placement.as_table, static_argnames=("rule", "axis_name", "clip", "summed"))
def _moved(
    centers: jax.Array,
    batch: Batch,
    alpha: jax.Array,
    after: Any,
    seed: jax.Array | None,
    *,
    axis_name: AxisName,
    **options: Any,
) -> jax.Array:
    samples = look(centers, batch, after, axis_name)
    moved: jax.Array = _groups.by_platform(partial(_move, **options), centers, samples, alpha, seed)
    return moved


def _move(
    centers: jax.Array,
    samples: Samples,
    alpha: jax.Array,
    seed: jax.Array | None,
    *,
    platform: str,
    **options: Any,
) -> jax.Array:
    pulls = pull(centers, samples, platform=platform, **options)
    pulls = pulls._replace(scale=alpha.astype(pulls.scale.dtype) * pulls.scale)
    if platform == "cpu" and (size := pulls.block_size()):
        moved: jax.Array = _move_blocks(centers, pulls, seed, size=size)
        return moved
    return _table.add_rows(centers, pulls.classes, pulls.scale[:, None] * pulls.sums(), seed)


@partial(jax.jit, static_argnames="size")  # Apart from what makes its inputs, it takes fewer temporaries.
def _move_blocks(centers: jax.Array, pulls: Pulls, seed: jax.Array | None, *, size: int) -> jax.Array:
    """The centers after the sum of each class's differences, times its rate, is added to it, by blocks."""
    blocks, block = pulls.blocks(size)

    def move(i: ArrayLike, centers: jax.Array) -> jax.Array:
        return _table.add_rows(centers, *block(i), seed)

    # The first block stands outside: inside shard_map it settles over which axes the result varies.
    moved: jax.Array = lax.fori_loop(1, blocks, move, move(0, centers))
    return moved
