"""Center loss as a Flax Linen module."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import normal
from jax.typing import ArrayLike, DTypeLike

from jax_centerloss import _checks, _init, _loss, _rules, _update
from jax_centerloss._checks import Clip, ReduceFn
from jax_centerloss._init import OutSharding
from jax_centerloss._rows.placement import AxisName


class CenterLoss(nn.Module):
    """Holds one center per class, as the variable `"centers"`, and returns the center loss of a batch.

    `variables["params"]`, or with `centers_as="state"` `variables["centers"]`, can be passed to
    `jax_centerloss.update_centers`, `distance_map` and `nearest_center`.

    Attributes:
      num_classes: C, the number of classes.
      feat_dim: D, the size of a feature vector.
      clip: see `jax_centerloss.center_loss`.
      reduce_fn: see `jax_centerloss.center_loss`.
      axis_name: see `jax_centerloss.center_loss`.
      param_dtype: dtype of the centers.
      centers_init: returns the `(C, D)` initial centers; N(0, 1) by default.
      centers_as: `"param"`, a parameter that the optimizer moves, or `"state"`, a variable in the collection
        `"centers"`, like `"batch_stats"` of batch normalization: each call with `mutable=["centers"]` moves
        the centers. For bfloat16 or float16 centers pass `rngs={"rounding": key}`, with a new key in each
        step, to round the moved rows stochastically: see `rounding_key` of `jax_centerloss.update_centers`.
        Without a stream of this name rows are rounded to nearest.
      out_sharding: see `jax_centerloss.init_centers`.
      alpha: the rate of centers that are state; see `jax_centerloss.update_centers`.
      rule: `"paper"`, `"gradient"` or `"mean"`, for centers that are state; see
        `jax_centerloss.update_centers`. `"gradient"` is the gradient of the loss of this module, with its
        `clip` (of the sum for `reduce_fn=jnp.sum`, otherwise of the mean).

    Raises:
      ValueError: if a size is below 1, an option unknown, or `alpha` no scalar; in a call, if centers that
        are state have another size (for parameters Flax raises its own error), and what
        `jax_centerloss.center_loss` raises.
      TypeError: if a size is not an integer, `param_dtype` is not floating point, `centers_init` is not a
        function, or `alpha` is not a real number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jax_centerloss
      >>> center_loss = jax_centerloss.linen.CenterLoss(10, 2)
      >>> x, labels = jnp.ones((4, 2)), jnp.array([0, 1, 2, 3])
      >>> variables = center_loss.init(jax.random.key(0), x, labels)
      >>> center_loss.apply(variables, x, labels).shape
      ()

    References:
      Wen et al, A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV 2016
      (https://doi.org/10.1007/978-3-319-46478-7_31).
    """

    num_classes: int
    feat_dim: int
    clip: Clip = _checks.CLIP
    reduce_fn: ReduceFn = jnp.mean
    axis_name: AxisName = None
    param_dtype: DTypeLike = jnp.float32
    centers_init: jax.nn.initializers.Initializer = normal(1.0)
    centers_as: str = "param"
    out_sharding: OutSharding | None = None
    alpha: float = 0.5
    rule: str = "paper"

    def __post_init__(self) -> None:
        _checks.check_module(self.clip, self.reduce_fn, self.centers_as, self.param_dtype, self.centers_init)
        _checks.as_shape(self.num_classes, self.feat_dim)
        _checks.check_choice("rule", self.rule, _checks.RULES)
        _checks.as_scalar("alpha", self.alpha)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        labels: ArrayLike,
        *,
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
    ) -> jax.Array:
        """The loss: see `jax_centerloss.center_loss`. Centers that are mutable state are moved."""

        def draw(key: jax.Array) -> jax.Array:
            init = partial(_init.init_centers, initializer=self.centers_init, dtype=self.param_dtype)
            drawn = init(key, self.num_classes, self.feat_dim, out_sharding=self.out_sharding)
            return drawn["centers"]

        if self.centers_as == "param":
            centers = self.param("centers", draw)
        else:
            state = self.variable("centers", "centers", lambda: draw(self.make_rng("params")))
            centers = state.value
        centers = _checks.as_module_table(centers, self.num_classes, self.feat_dim)
        axis_name = None if self.is_initializing() else self.axis_name
        own_loss = partial(_loss.center_loss, reduce_fn=self.reduce_fn, clip=self.clip, axis_name=axis_name)
        loss = own_loss(centers, x, labels, where=where, weights=weights)
        may_move = self.is_mutable_collection("centers") and not self.is_initializing()
        if self.centers_as == "state" and may_move:
            rule = _rules.as_rule(self.rule, self.alpha, self.clip, self.reduce_fn)
            key = self.make_rng("rounding") if self.has_rng("rounding") else None
            given = x, labels, where, weights
            state.value, _ = _update.move(centers, (), given, rule, axis_name, loss, key, stop_gradient=True)
        return loss
