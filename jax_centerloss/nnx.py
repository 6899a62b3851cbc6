"""Center loss as a Flax NNX module."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import spmd
from jax.experimental.layout import Format
from jax.nn.initializers import normal
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_centerloss import _arrays, _checks, _init, _loss, _rules, _update
from jax_centerloss._checks import Clip, ReduceFn
from jax_centerloss._init import OutSharding
from jax_centerloss._optim import OWNER, is_owned
from jax_centerloss._rows.placement import AxisName

# Flax 0.12 names the metadata `out_sharding`, not `sharding`, and places a new Variable by it.
_EAGER_SHARDING = hasattr(nnx, "use_eager_sharding")


class Centers(nnx.Variable[jax.Array]):
    """The type of centers that are state. An optimizer of parameters, `nnx.Param`, leaves them alone."""


def _sharding_metadata(out_sharding: Any) -> dict[str, Any]:
    """The metadata by which Flax places a variable, and the optimizer's state that is made from it."""
    name = "out_sharding" if _EAGER_SHARDING else "sharding"
    if isinstance(out_sharding, Format):
        # With eager sharding Flax would reshard the centers, and lose their memory layout.
        layout = {"eager_sharding": False} if _EAGER_SHARDING else {}
        return layout | _sharding_metadata(out_sharding.sharding)
    if isinstance(out_sharding, NamedSharding):
        return {name: out_sharding.spec, "mesh": out_sharding.mesh}
    return {name: out_sharding} if isinstance(out_sharding, PartitionSpec) else {}


class CenterLoss(nnx.Module):
    """Holds one center per class and returns the center loss of a batch.

    The module is a pytree with one leaf: it can be passed to `jax_centerloss.update_centers`, `distance_map`
    and `nearest_center`, and so can its `nnx.state`.

    Args:
      num_classes: C, the number of classes.
      feat_dim: D, the size of a feature vector.
      clip: see `jax_centerloss.center_loss`.
      reduce_fn: see `jax_centerloss.center_loss`.
      axis_name: see `jax_centerloss.center_loss`.
      param_dtype: dtype of the centers. With bfloat16 pass a `rounding_key` to `update_centers`.
      centers_init: returns the `(C, D)` initial centers; N(0, 1) by default. `nnx.with_partitioning` of an
        initializer is accepted too, but draws the whole table before it is sharded.
      centers_as: `"param"`, an `nnx.Param` that the optimizer moves, or `"state"`, a `Centers` variable that
        `update_centers` or a `jax_centerloss.row_optimizer` moves. It is no parameter, and has a gradient
        only for `nnx.grad` with `argnums=nnx.DiffState(0, Centers)`.
      out_sharding: see `jax_centerloss.init_centers`. It is also set as the metadata that
        `nnx.get_partition_spec` reads. As in `nnx.Param`, it may be a tuple, and name logical axes that
        `nnx.logical_axis_rules` maps to those of the mesh.
      rngs: the `params` stream draws the centers.

    Raises:
      ValueError: if a size is below 1, an option is unknown, or both `centers_init` and `out_sharding` give a
        sharding; in a call, if the centers have another size, and what `jax_centerloss.center_loss` raises.
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
      >>> x, labels = jnp.ones((4, 2)), jnp.array([0, 1, 2, 3])
      >>> center_loss = jax_centerloss.nnx.CenterLoss(10, 2, centers_as="state", rngs=nnx.Rngs(0))
      >>> center_loss.update_centers(x, labels, after=center_loss(x, labels))

    References:
      Wen et al, A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV 2016
      (https://doi.org/10.1007/978-3-319-46478-7_31).
    """

    def __init__(
        self,
        num_classes: int,
        feat_dim: int,
        *,
        clip: Clip = _checks.CLIP,
        reduce_fn: ReduceFn = jnp.mean,
        axis_name: AxisName = None,
        param_dtype: DTypeLike = jnp.float32,
        centers_init: jax.nn.initializers.Initializer = normal(1.0),
        centers_as: str = "param",
        out_sharding: OutSharding | tuple[Any, ...] | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        _checks.check_module(clip, reduce_fn, centers_as, param_dtype, centers_init)
        if not isinstance(rngs, nnx.Rngs):
            found = _arrays.describe(rngs)
            raise TypeError(f"rngs must be nnx.Rngs, such as `nnx.Rngs(0)` or `nnx.Rngs(key)`, got {found}.")
        self.num_classes, self.feat_dim = _checks.as_shape(num_classes, feat_dim)
        self.clip = clip
        self.reduce_fn = reduce_fn
        self.axis_name = axis_name
        if isinstance(out_sharding, tuple):
            out_sharding = PartitionSpec(*out_sharding)
        metadata: dict[str, Any] = OWNER | _sharding_metadata(out_sharding)
        # By the rules that are set for Flax, mesh axes take the place of logical names.
        on_mesh = spmd.get_pspec(out_sharding) if isinstance(out_sharding, PartitionSpec) else out_sharding

        def initializer(*args: Any) -> Any:
            centers = centers_init(*args)
            if not isinstance(centers, nnx.VariableMetadata):
                return centers
            if out_sharding is not None:
                raise ValueError(
                    "centers_init has the metadata of a sharding: pass no out_sharding beside it."
                )
            metadata.update(centers.metadata)
            return centers.raw_value

        draw: Any = partial(_init.init_centers, dtype=param_dtype, out_sharding=on_mesh)
        drawn = draw(rngs.params(), num_classes, feat_dim, initializer=initializer)
        kind = nnx.Param if centers_as == "param" else Centers
        self.centers = kind(drawn["centers"], **metadata)

    def __setattr__(self, name: str, value: Any) -> None:
        """Writes an array that is assigned to `centers` into their Variable.

        Flax would replace the Variable by the array, which is neither a parameter nor state, so that nothing
        would move it. Assigning the Variable of another CenterLoss replaces this one, so that both share
        their centers.
        """
        variable = vars(self).get("centers") if name == "centers" else None
        is_shared = type(value) is type(variable) and is_owned(value)
        if is_shared or not isinstance(variable, nnx.Variable):
            super().__setattr__(name, value)
            return
        # The table gets the dtype of the present centers, and outside of `jit` their sharding.
        old = self.centers[...]
        new = _checks.as_module_table(value, *old.shape).astype(old.dtype)
        if isinstance(old, jax.Array) and not isinstance(old, jax.core.Tracer):
            new = jax.device_put(new, old.sharding)
        nnx.update(self, {"centers": new})

    def _table(self) -> jax.Array:
        # By index, since the Variable may hold a `jax.Ref`.
        return _checks.as_module_table(self.centers[...], self.num_classes, self.feat_dim)

    def __call__(
        self,
        x: ArrayLike,
        labels: ArrayLike,
        *,
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
    ) -> jax.Array:
        """The loss of features `(..., D)` with integer labels `(...)`: see `jax_centerloss.center_loss`."""
        loss = partial(_loss.center_loss, reduce_fn=self.reduce_fn, clip=self.clip, axis_name=self.axis_name)
        return loss(self._table(), x, labels, where=where, weights=weights)

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
        """Moves the centers of the module by a rule: see `jax_centerloss.update_centers`.

        Args are those of `jax_centerloss.update_centers`, without `axis_name`, which is the module's. Call it
        once in each step, with the features of the step and with the loss as `after`. No gradient passes
        through it. With bfloat16 centers pass `rounding_key=rngs.rounding()`: it is a new key in each step if
        the model holds `rngs`, which counts them.

        It is meant for `centers_as="state"`. Parameters would move twice in a step, unless the optimizer
        leaves them alone. `"gradient"` is the gradient of the loss of this module, with its `clip` (of the
        sum for `reduce_fn=jnp.sum`, otherwise of the mean).
        """
        given = x, labels, where, weights
        own_rule = _rules.as_rule(rule, alpha, self.clip, self.reduce_fn)
        options = self.axis_name, after, rounding_key
        moved, _ = _update.move(self._table(), (), given, own_rule, *options, stop_gradient=True)
        nnx.update(self, {"centers": moved})
