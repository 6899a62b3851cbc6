"""Center loss as a Flax NNX module."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Format
from jax.nn.initializers import normal
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_centerloss import _checks, _loss, _options, _update
from jax_centerloss._optim import OWNER
from jax_centerloss._options import AxisName, Clip, ReduceFn
from jax_centerloss._placement import OutSharding


class Centers(nnx.Variable[jax.Array]):
    """Centers that are moved by rule or by rows. They are no `nnx.Param`."""


def _sharding_metadata(out_sharding: OutSharding | None) -> dict[str, Any]:
    """The metadata by which Flax places a variable, and what follows it, such as an optimizer's state."""
    if out_sharding is None:
        return {}
    name = "out_sharding" if hasattr(nnx, "use_eager_sharding") else "sharding"  # Renamed in Flax 0.12.
    sharding = out_sharding.sharding if isinstance(out_sharding, Format) else out_sharding
    if isinstance(sharding, NamedSharding):
        return {name: sharding.spec, "mesh": sharding.mesh}
    return {name: sharding} if isinstance(sharding, PartitionSpec) else {}


class CenterLoss(nnx.Module):
    """Holds one center per class and returns the center loss of a batch.

    The module is a pytree with one leaf: it can be passed to `jax_centerloss.update_centers`, `distance_map`
    and `nearest_center`, and so can its `nnx.state`.

    Args:
      num_classes: C.
      feat_dim: D, the size of a feature vector.
      clip: see `jax_centerloss.center_loss`.
      reduce_fn: see `jax_centerloss.center_loss`.
      axis_name: see `jax_centerloss.center_loss`.
      param_dtype: dtype of the centers. In bfloat16 they need a `rounding_key`, or small steps are lost.
      centers_init: draws the `(C, D)` centers; N(0, 1) by default.
      centers_as: `"param"`, an `nnx.Param` that the optimizer moves, or `"state"`, a `Centers` variable that
        `update_centers` or a `jax_centerloss.row_optimizer` moves. It is no parameter, and has a gradient
        only for `nnx.grad` with `argnums=nnx.DiffState(0, Centers)`.
      out_sharding: see `jax_centerloss.init_centers`. It is also set as the metadata that
        `nnx.get_partition_spec` reads.
      rngs: the `params` stream draws the centers.

    Raises:
      ValueError: if a size is below 1 or an option is unknown; in a call, if the centers have another size,
        and what `jax_centerloss.center_loss` raises.
      TypeError: if a size is not an integer, `param_dtype` is not floating point, or `centers_init` is not a
        function.

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
        clip: Clip = _options.CLIP,
        reduce_fn: ReduceFn = jnp.mean,
        axis_name: AxisName = None,
        param_dtype: DTypeLike = jnp.float32,
        centers_init: jax.nn.initializers.Initializer = normal(1.0),
        centers_as: str = "param",
        out_sharding: OutSharding | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_classes, self.feat_dim = _options.check_module(
            num_classes,
            feat_dim,
            clip=clip,
            reduce_fn=reduce_fn,
            centers_as=centers_as,
            param_dtype=param_dtype,
            centers_init=centers_init,
        )
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
        kind = nnx.Param if centers_as == "param" else Centers
        metadata: dict[str, Any] = OWNER | _sharding_metadata(out_sharding)
        # With eager sharding Flax would reshard the table, which loses its memory layout.
        own_layout = isinstance(out_sharding, Format) and hasattr(nnx, "use_eager_sharding")
        eager: Any = nnx.use_eager_sharding if own_layout else contextlib.nullcontext
        with eager(False):
            self.centers = kind(drawn["centers"], **metadata)

    def __setattr__(self, name: str, value: Any) -> None:
        # Other attributes, the first centers, and a Variable of another CenterLoss, which shares its centers,
        # are set as usual.
        held = vars(self).get("centers") if name == "centers" else None
        if not isinstance(held, nnx.Variable) or (
            type(value) is type(held) and OWNER.items() <= value.get_metadata().items()
        ):
            super().__setattr__(name, value)
            return
        # A bare array is written into the Variable. In its place it would be neither a parameter nor state,
        # and nothing would move it.
        (old,), new = jax.tree.leaves(held), _checks.as_table(value, "centers")
        _options.check_declared_shape(new, *old.shape)
        new = new.astype(old.dtype)
        if isinstance(old, jax.Array) and not isinstance(old, jax.core.Tracer):
            new = jax.device_put(new, old.sharding)
        nnx.update(self, {"centers": new})

    def __call__(
        self,
        x: ArrayLike,
        labels: ArrayLike,
        *,
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
    ) -> jax.Array:
        """The loss of features `(..., D)` with integer labels `(...)`: see `jax_centerloss.center_loss`."""
        centers = _checks.as_table(self.centers)
        _options.check_declared_shape(centers, self.num_classes, self.feat_dim)
        return _loss.center_loss(
            centers,
            x,
            labels,
            where=where,
            weights=weights,
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
        weights: ArrayLike | None = None,
        after: Any = None,
        rounding_key: jax.Array | None = None,
    ) -> None:
        """Moves the centers of the batch's classes, in the module: see `jax_centerloss.update_centers`.

        Call it once in each step, with the features of the step and with the loss as `after`. No gradient
        passes through it. With bfloat16 centers pass `rounding_key=rngs.rounding()`, which is another key in
        each step if `rngs` is part of the model.

        It is meant for `centers_as="state"`, since the optimizer moves parameters too. `"gradient"` is the
        gradient of the loss of this module, with its `clip`, of the sum if `reduce_fn` is `jnp.sum` and else
        of the mean.
        """
        centers = nnx.state(self, nnx.PathContains("centers"))
        _options.check_declared_shape(_checks.as_table(centers), self.num_classes, self.feat_dim)
        moved = _update.update_by_rule(
            centers,
            x,
            labels,
            alpha=alpha,
            rule=rule,
            where=where,
            weights=weights,
            axis_name=self.axis_name,
            after=after,
            rounding_key=rounding_key,
            clip=self.clip,
            reduce_fn=self.reduce_fn,
        )
        nnx.update(self, moved)
