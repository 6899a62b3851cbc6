"""Moves centers by a rule, independent of the model's gradient and of the weight of the loss."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.typing import ArrayLike

from jax_centerloss import _batch, _checks, _rules
from jax_centerloss._batch import Batch, Given
from jax_centerloss._rows import moves, placement, rounding
from jax_centerloss._rows.moves import Moved
from jax_centerloss._rows.placement import AxisName
from jax_centerloss._rows.rounding import Seed
from jax_centerloss._rules import Rule


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

    Unlike a gradient step on `cross_entropy + lam * center_loss`, the move does not depend on `lam`. With N
    used samples, `n_j` of them of class j,

    - `"paper"`: `c_j - alpha * sum(c_j - x) / (1 + n_j)`, the paper's Eq. 4;
    - `"gradient"`: `c_j - alpha * 2 * sum(c_j - x) / N`, gradient descent on `center_loss` with its default
      `reduce_fn` and `clip`;
    - `"mean"`: `c_j - alpha * sum(c_j - x) / n_j`, alpha of the way to the mean of the class in the batch: a
      moving average of class means.

    A sample of weight k counts as k samples in the sums, in `n_j` and in N.

    Call it with the features that the loss gets. A feature that is NaN or infinite makes the center of its
    class NaN. Gradients pass through the move if a loss uses the moved centers; auxiliary outputs of a loss
    function get none, and need no `jax.lax.stop_gradient`. Under `jit`, donate the centers so that they are
    written in place.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      x: features `(..., D)`, floating point.
      labels: integer classes `(...)`. A negative label leaves its sample out. A label `>= C` raises, unless
        `where` or a weight of 0 leaves its sample out; under `jit`, where labels are not known, it leaves its
        sample out.
      alpha: the rate of the centers, 0.5 in the paper. If it is a schedule, pass `schedule(step)`.
      rule: `"paper"`, `"gradient"` or `"mean"`.
      where: boolean `(...)`, the samples to use; all by default.
      weights: real numbers `(...)`, not negative: a sample of weight k counts as k samples, and a weight of 0
        leaves its sample out. A negative weight raises; under `jit` it makes the center of its class NaN, and
        with `"gradient"` the centers of all classes of the batch.
      axis_name: inside `shard_map`, `pmap` or `vmap`, the mapped axis (or axes) over which the batch is
        split: counts and sums are then over the whole batch.
      after: a pytree, typically the loss, that is computed before the centers are written. Pass everything
        that the same jitted program computes from the old centers. For a read that XLA schedules after the
        write, it copies the whole table.
      rounding_key: a PRNG key for the stochastic rounding of moved rows of bfloat16 or float16 centers, with
        which a center moves by its exact step on average. Use a new key in each step. Without a key, or with
        the same one in all steps, steps below half a unit in the last place are lost, and centers may stop
        short of their features. It changes nothing for float32 centers.

    Returns:
      Moved centers, in the tree structure and dtype of `params`. Rows of other classes are bitwise unchanged.

    Raises:
      ValueError: on an unknown `rule`, a shape that does not fit, a `rounding_key` that holds several keys,
        or outside of `jit` a label `>= C` or a negative weight.
      TypeError: on features or centers that are not floating point, labels that are not integers, a `where`
        that is not boolean, an `alpha` that is a schedule, a `rounding_key` that is no key, or an argument
        that is no array.

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
    centers, given = _checks.as_table(params), (x, labels, where, weights)
    moved, _ = move(centers, (), given, _rules.as_rule(rule, alpha), axis_name, after, rounding_key)
    return jax.tree.unflatten(jax.tree.structure(params), [moved])


def _shardings(held: Any, *others: Any) -> Any:
    """The shardings of `held`, the centers and the state of their optimizer, as they are."""
    return jax.tree.map(lambda leaf: placement.sharding_of(leaf, held, *others), held)


def jit_move(step: Callable[..., Moved] | None = None) -> Callable[..., Moved]:
    """Jits a move of the centers: by a rule, or by a row optimizer's `step`, a partial of `moves.move_rows`.

    Each row optimizer gets a program of its own, which is freed with it. One program for all would keep each
    `step` as a static argument for good.
    """

    @placement.jit_on_auto_axes(_shardings, static_argnames="axis_name")
    def program(
        held: Any, batch: Batch, rule: Rule | None, after: Any, seed: Seed, *, axis_name: AxisName
    ) -> Any:
        centers, state = held
        samples, scale = _rules.samples_and_scale(centers, batch, rule, after, axis_name)
        if step is None:
            assert rule is not None  # Only a row optimizer moves without one.
            add = partial(moves.add_sums, by_count=rule.name != "gradient")
            return placement.call_for_platform(add, centers, samples, scale, seed), state
        mesh = placement.mesh_of(centers, samples.classes)
        # On a mesh the devices would communicate once for each block.
        options = {"in_blocks": False} if mesh is not None and mesh.size > 1 else {}
        return placement.call_for_platform(partial(step, **options), centers, state, samples, scale, seed)

    return program


_move_by_rule = jit_move()


def move(
    centers: jax.Array,
    state: Any,
    given: Given,
    rule: Rule | None,
    axis_name: AxisName,
    after: Any,
    rounding_key: Any,
    *,
    program: Callable[..., Moved] = _move_by_rule,
    stop_gradient: bool = False,
) -> Moved:
    """Moves a checked table of centers by a rule, or without a rule by the gradients in place of features.

    `program` is what `jit_move` returns. The state is that of its optimizer; a rule has none, `()`.
    """
    batch = _batch.as_batch(*given, centers, _batch.FEATURES if rule else _batch.GRADIENTS)
    after = _checks.as_after(after)
    if stop_gradient:
        centers, batch, rule, after = lax.stop_gradient((centers, batch, rule, after))
    seed = rounding.seed_of(_checks.as_rounding_key(rounding_key), centers, state)
    return program((centers, state), batch, rule, after, seed, axis_name=axis_name)
