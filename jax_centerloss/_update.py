"""How centers move by rule: no gradient through the model, no step scaled by the loss's weight."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_centerloss import _checks, _loss, _table
from jax_centerloss._table import AxisName

RULES = ("paper", "gradient")


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
      `"gradient"`: `c_j - alpha * 2 * sum(c_j - x) / N`, plain gradient descent on `center_loss`.

    Call it with the features of the step; `jax.lax.stop_gradient` is not needed. Under `jit`, donate the
    centers so that they are written in place.

    Args:
      params: a pytree with one leaf, the `(C, D)` centers.
      x: features `(..., D)`, floating point.
      labels: integer classes `(...)`. Negative ones are ignored; one that is `>= C` raises where its value
        is known and is left out under `jit`.
      alpha: the rate of the centers, 0.5 in the paper.
      rule: `"paper"` or `"gradient"`.
      where: boolean `(...)`, the samples to use; all by default.
      axis_name: inside `shard_map`, `pmap` or `vmap`, the mapped axis (or axes) that the batch is spread
        over: counts and sums are then over the whole batch.
      after: a pytree, typically the loss, that is computed before the centers are written. Pass it when
        the same jitted program reads the centers in another way too, or XLA copies the whole table.

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
    x, labels, used = _checks.batch(x, labels, where, centers)
    _checks.choice("rule", rule, RULES)
    x, labels, used = _table.gather_batch(axis_name, x, labels, used)
    x, labels, used = x.reshape(-1, x.shape[-1]), labels.reshape(-1), used.reshape(-1)
    rows, known = _table.read_rows(centers, labels, x)
    used = used & known

    dtype = _table.compute_dtype(x, rows)
    rows = rows.astype(dtype)
    clip = None if rule == "paper" else _loss.CLIP
    pulls = jax.grad(_total_loss)(rows, x, used, clip, centers.shape[0])
    representative = _table.representatives(labels, used, centers.shape[0])
    direction = jnp.zeros_like(rows).at[representative].add(pulls)
    if rule == "paper":
        counts = jnp.zeros(labels.shape, jnp.int32).at[representative].add(used.astype(jnp.int32))
        direction = direction / (2 * (1 + counts)).astype(dtype)[:, None]
    else:
        direction = direction / jnp.maximum(_loss.count(used), 1).astype(dtype)
    moved = rows - jnp.asarray(alpha, dtype) * direction
    chosen = used & (representative == jnp.arange(labels.size, dtype=jnp.int32))
    centers = _table.write_rows(centers, labels, moved, chosen, after)
    return jax.tree.unflatten(jax.tree.structure(params), [centers])


def _total_loss(
    rows: jax.Array, x: jax.Array, used: jax.Array, clip: _checks.Clip, num_classes: int
) -> jax.Array:
    return jnp.sum(_loss.own_class_losses(rows, x, used, used, clip=clip, num_classes=num_classes))
