"""Center loss as a Flax NNX module."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_centerloss import _checks, _loss, _update
from jax_centerloss._checks import Clip, ReduceFn
from jax_centerloss._table import AxisName


class Centers(nnx.Variable[jax.Array]):
    """Centers that are moved by rule: not an `nnx.Param`, of which gradients are taken."""


def _sharding_metadata(out_sharding: NamedSharding | PartitionSpec | None) -> dict[str, Any]:
    """What Flax calls the placement of a variable, so that it keeps to it: in an optimizer's state, say."""
    if out_sharding is None:
        return {}
    name = "out_sharding" if hasattr(nnx, "use_eager_sharding") else "sharding"  # The latter in Flax 0.11.
    if isinstance(out_sharding, NamedSharding):
        return {name: out_sharding.spec, "mesh": out_sharding.mesh}
    return {name: out_sharding}


class CenterLoss(nnx.Module):
    """Holds one center per class and returns the center loss of a batch.

    The module is itself a pytree with one leaf: it goes straight into `jax_centerloss.update_centers`,
    `distance_map` and `nearest_center`, and so does its `nnx.state`.

    Args:
      num_classes: C.
      feat_dim: D, the size of a feature vector.
      clip: see `jax_centerloss.center_loss`.
      reduce_fn: see `jax_centerloss.center_loss`.
      axis_name: see `jax_centerloss.center_loss`.
      param_dtype: dtype of the centers.
      centers_init: draws the `(C, D)` centers; N(0, 1) by default.
      centers_as: `"param"`, an `nnx.Param` for the optimizer, or `"state"`, a variable that is no parameter,
        of which no gradient is made: `update_centers` moves it, or a `jax_centerloss.row_optimizer`.
      out_sharding: see `jax_centerloss.init_centers`; it is also the metadata that `nnx.get_partition_spec`
        reads.
      rngs: the `params` stream draws the centers.

    Raises:
      ValueError: if a size is below 1, and what `jax_centerloss.center_loss` raises.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jax_centerloss
      >>> center_loss = jax_centerloss.nnx.CenterLoss(10, 2, rngs=nnx.Rngs(0))
      >>> loss = center_loss(jnp.ones((4, 2)), jnp.array([0, 1, 2, 3]))
      >>> loss.shape
      ()

    References:
      Wen et al, A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV 2016
      (https://doi.org/10.1007/978-3-319-46478-7_31).
    """

    def __init__(
        self,
        num_classes: int,
        feat_dim: int,
        *,
        clip: Clip = _loss.CLIP,
        reduce_fn: ReduceFn = jnp.mean,
        axis_name: AxisName = None,
        param_dtype: DTypeLike = jnp.float32,
        centers_init: jax.nn.initializers.Initializer = normal(1.0),
        centers_as: str = "param",
        out_sharding: NamedSharding | PartitionSpec | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        _checks.choice("centers_as", centers_as, _checks.CENTERS_AS)
        self.clip = clip
        self.reduce_fn = reduce_fn
        self.axis_name = axis_name
        drawn = _loss.init_centers(
            rngs.params(),
            num_classes,
            feat_dim,
            initializer=centers_init,
            dtype=param_dtype,
            out_sharding=out_sharding,
        )
        self.num_classes, self.feat_dim = drawn["centers"].shape
        kind = nnx.Param if centers_as == "param" else Centers
        self.centers = kind(drawn["centers"], **_sharding_metadata(out_sharding))

    def __call__(self, x: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
        """The loss of features `(..., D)` with integer labels `(...)`, where `where` `(...)` is true."""
        # Centers that are state have no gradient, even where it is taken of every variable.
        centers = self.centers if isinstance(self.centers, nnx.Param) else jax.lax.stop_gradient(self.centers)
        return _loss.center_loss(
            centers,
            x,
            labels,
            where=where,
            reduce_fn=self.reduce_fn,
            clip=self.clip,
            axis_name=self.axis_name,
        )

    def update_centers(
        self,
        x: ArrayLike,
        labels: ArrayLike,
        *,
        alpha: float | jax.Array = 0.5,
        rule: str = "paper",
        where: ArrayLike | None = None,
        after: Any = None,
    ) -> None:
        """Moves the centers of the batch's classes, in the module: see `jax_centerloss.update_centers`.

        Call it once a step with the features of the step, and with the loss as `after`; no gradient passes.
        It is meant for `centers_as="state"`: parameters would be moved by their optimizer too.
        """
        moved = _update.update_centers(
            nnx.state(self, nnx.PathContains("centers")),
            jax.lax.stop_gradient(x),
            labels,
            alpha=alpha,
            rule=rule,
            where=where,
            axis_name=self.axis_name,
            after=jax.lax.stop_gradient(after),
        )
        nnx.update(self, moved)
