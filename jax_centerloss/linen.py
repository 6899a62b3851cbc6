"""Center loss as a Flax Linen module."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import normal
from jax.typing import ArrayLike, DTypeLike

from jax_centerloss import _loss
from jax_centerloss._checks import Clip, ReduceFn
from jax_centerloss._table import AxisName


class CenterLoss(nn.Module):
    """Holds one center per class, as the parameter `"centers"`, and returns the center loss of a batch.

    `variables["params"]` goes straight into `jax_centerloss.update_centers`, `distance_map` and
    `nearest_center`.

    Attributes:
      num_classes: C.
      feat_dim: D, the size of a feature vector.
      clip: see `jax_centerloss.center_loss`.
      reduce_fn: see `jax_centerloss.center_loss`.
      axis_name: see `jax_centerloss.center_loss`.
      param_dtype: dtype of the centers.
      centers_init: draws the `(C, D)` centers; N(0, 1) by default.

    Raises:
      ValueError: if a size is below 1, and what `jax_centerloss.center_loss` raises.

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
    clip: Clip = _loss.CLIP
    reduce_fn: ReduceFn = jnp.mean
    axis_name: AxisName = None
    param_dtype: DTypeLike = jnp.float32
    centers_init: jax.nn.initializers.Initializer = normal(1.0)

    @nn.compact
    def __call__(self, x: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
        """The loss of features `(..., D)` with integer labels `(...)`, where `where` `(...)` is true."""

        def draw(key: jax.Array) -> jax.Array:
            drawn = _loss.init_centers(
                key, self.num_classes, self.feat_dim, initializer=self.centers_init, dtype=self.param_dtype
            )
            return drawn["centers"]

        centers = self.param("centers", draw)
        return _loss.center_loss(
            centers,
            x,
            labels,
            where=where,
            reduce_fn=self.reduce_fn,
            clip=self.clip,
            axis_name=None if self.is_initializing() else self.axis_name,
        )
