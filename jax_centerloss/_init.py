"""The initial centers, wherever they are to be placed."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format
from jax.nn.initializers import normal
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jax_centerloss import _arrays, _checks
from jax_centerloss._rows import placement

OutSharding = NamedSharding | PartitionSpec | Format  # What `out_sharding` accepts.


def init_centers(
    key: jax.Array,
    num_classes: int,
    feat_dim: int,
    *,
    initializer: jax.nn.initializers.Initializer = normal(1.0),
    dtype: DTypeLike = jnp.float32,
    out_sharding: OutSharding | None = None,
) -> dict[str, jax.Array]:
    """Makes the initial centers, one random vector for each class.

    Args:
      key: a PRNG key.
      num_classes: C, at least 1.
      feat_dim: D, the size of a feature vector, at least 1.
      initializer: returns the `(C, D)` centers; N(0, 1) by default, as in KaiyangZhou/pytorch-center-loss.
      dtype: floating-point dtype of the centers.
      out_sharding: the sharding of the centers: a `NamedSharding`, or under `jax.set_mesh(mesh)` a
        `PartitionSpec`. By default JAX chooses: one device, or replicated on the devices of the mesh.
        `PartitionSpec("classes", None)` shards them by class over the mesh axis "classes". Each device makes
        its own shard, and the values are the same as without a mesh. A `jax.experimental.layout.Format` also
        sets the memory layout, such as contiguous rows on a TPU. Inside of `jit` it does not: pass it in the
        `out_shardings` of the outermost `jit`.

    Returns:
      `{"centers": array}`, the array of shape `(C, D)`.

    Raises:
      ValueError: if a size is below 1 or not divisible by its number of shards, `out_sharding` does not fit
        the mesh or there is none, or `initializer` returns another shape.
      TypeError: if a size is not an integer, `dtype` is not floating point, or `out_sharding` or what
        `initializer` returns is of another type.

    Example:
      >>> import jax, jax_centerloss
      >>> params = jax_centerloss.init_centers(jax.random.key(0), num_classes=10, feat_dim=2)
      >>> params["centers"].shape
      (10, 2)
    """
    _checks.check_floating(dtype, "dtype", _checks.FLOAT_ADVICE)
    shape = _checks.as_shape(num_classes, feat_dim)

    def as_centers(leaf: Any) -> jax.Array:
        centers = _arrays.as_array("what initializer returns", leaf, "Return the (C, D) centers.")
        if centers.shape != shape:
            raise ValueError(f"initializer must return centers of shape {shape}, got {centers.shape}.")
        return centers.astype(dtype)

    def draw(key: jax.Array) -> Any:
        # `nn.with_partitioning` of Linen returns the array in a box, which is a pytree.
        return jax.tree.map(as_centers, initializer(key, shape, dtype))

    if out_sharding is None:
        return {"centers": draw(key)}
    out = _on_mesh(out_sharding)
    sharding = out.sharding if isinstance(out, Format) else out
    if isinstance(sharding, NamedSharding):  # JAX checks any other sharding of a `Format`.
        _check_shards(sharding, shape)
        explicit = sharding.mesh.explicit_axes
        if explicit:
            # Under Explicit axes each device would hold the intermediate results as full tables.
            draw = jax.sharding.auto_axes(draw, axes=explicit, out_sharding=sharding)
    return {"centers": jax.jit(draw, out_shardings=out)(key)}


def _on_mesh(out_sharding: OutSharding) -> NamedSharding | Format:
    """`out_sharding`, with the mesh of `jax.set_mesh` if it is a `PartitionSpec`."""
    if not isinstance(out_sharding, OutSharding):
        raise TypeError(
            "out_sharding must be a jax.sharding.PartitionSpec or NamedSharding, or a "
            f"jax.experimental.layout.Format, got {out_sharding!r}. "
            'PartitionSpec("classes", None) splits centers by class over the axis "classes" of a mesh.'
        )
    if not isinstance(out_sharding, PartitionSpec):
        return out_sharding
    spec, mesh = out_sharding, jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError(
            f"out_sharding={spec} needs a mesh: make the centers under `jax.set_mesh(mesh)`, or "
            "pass `jax.sharding.NamedSharding(mesh, spec)`."
        )
    unknown = [axis for entry in spec for axis in placement.mesh_axes(entry) if axis not in mesh.axis_names]
    if unknown:
        raise ValueError(f"out_sharding={spec} names {unknown}, but the mesh has axes {[*mesh.axis_names]}.")
    return NamedSharding(mesh, spec)


def _check_shards(sharding: NamedSharding, shape: tuple[int, int]) -> None:
    spec = sharding.spec
    if len(spec) > 2:
        raise ValueError(f"out_sharding={spec} has {len(spec)} entries, centers (C, D) have two dimensions.")
    for name, size, entry in zip(("num_classes", "feat_dim"), shape, spec, strict=False):
        shards = math.prod(sharding.mesh.shape[axis] for axis in placement.mesh_axes(entry))
        if size % shards:
            rounded = -(-size // shards) * shards
            advice = f"Round it up to {rounded}."
            if name == "num_classes":
                advice += (
                    " The additional classes have no samples. Set their centers to NaN, so that "
                    "`nearest_center` and `center_metrics` do not find them either: "
                    f"`jnp.where(jnp.arange({rounded})[:, None] < {size}, centers, jnp.nan)`."
                )
            raise ValueError(
                f"{name}={size} is not divisible by the {shards} shards of out_sharding={spec}. {advice}"
            )
