"""Shardings and platforms: the one place that tells Explicit mesh axes from Auto ones.

`jax.typeof(array)` names the mesh of an array under Explicit axes, and under Auto axes where JAX tracks it.
If it names none, the mesh is called unknown.
"""

from collections.abc import Callable, Hashable
from functools import partial, wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

AxisName = Hashable  # None: the batch is not split over a mapped axis.
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def call_for_platform(function: Callable[..., T], *arrays: Any) -> T:
    """`function(*arrays, platform=...)` with the platform that the program is compiled for."""
    if jax.__version_info__ < (0, 10) and mesh_of(*jax.tree.leaves(arrays)) is not None:
        # JAX before 0.10 can't differentiate `lax.platform_dependent` on Explicit axes. On a mesh the default
        # backend is taken as the platform.
        return function(*arrays, platform=jax.default_backend())
    return lax.platform_dependent(
        *arrays,
        cpu=partial(function, platform="cpu"),
        tpu=partial(function, platform="tpu"),
        default=partial(function, platform="gpu"),
    )


def mesh_of(*arrays: ArrayLike) -> AbstractMesh | None:
    """The mesh in the type of the first array with one, or None if the mesh is unknown."""
    for array in arrays:
        mesh: AbstractMesh | None = getattr(jax.typeof(array).sharding, "mesh", None)
        if mesh is not None and not mesh.empty:
            return mesh
    return None


def mesh_axes(entry: Any) -> tuple[Any, ...]:
    """The mesh axes, as a tuple, in an entry of a `PartitionSpec`, which is None, a name or a tuple."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def sharding_of(array: jax.Array, *others: Any) -> NamedSharding | None:
    """The sharding in the type of `array`. If that names no mesh: replicated, on the mesh of `others`."""
    if mesh_of(array) is not None:
        return jax.typeof(array).sharding
    mesh = mesh_of(*jax.tree.leaves(others))
    return None if mesh is None else NamedSharding(mesh, P(*(None,) * array.ndim))


def per_sample_sharding(x: jax.Array, *others: jax.Array) -> NamedSharding | None:
    """The sharding of an array with one entry per sample of `x`: that of `x` without its last axis."""
    sharding = sharding_of(x, *others)
    return None if sharding is None else NamedSharding(sharding.mesh, P(*sharding.spec[:-1]))


def replicated_sharding(*arrays: Any) -> NamedSharding | None:
    """The sharding that replicates an array on the mesh of `arrays`."""
    mesh = mesh_of(*jax.tree.leaves(arrays))
    return None if mesh is None else NamedSharding(mesh, P())


def reshard(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Reshards `array` on Explicit axes. On Auto axes XLA chooses, and `array` is returned as it is."""
    if not sharding.mesh.explicit_axes:
        return array
    return jax.sharding.reshard(array, sharding)


def reshard_like_samples(array: jax.Array, x: jax.Array) -> jax.Array:
    """Gives `array`, with one entry per sample, the sharding of the leading axes of `x`.

    An array on no known mesh is returned as it is.
    """
    sharding = per_sample_sharding(x, array)
    return array if sharding is None or mesh_of(array) is None else reshard(array, sharding)


def jit_on_auto_axes(out_shardings_fn: Callable[..., Any], **jit_options: Any) -> Callable[[F], F]:
    """A decorator: `jax.jit`, with Explicit mesh axes turned into Auto axes inside of the function.

    `out_shardings_fn(*arrays)` returns the shardings of the results. It is called only if the mesh has
    Explicit axes; on Auto axes XLA infers the shardings.
    """

    def wrap(function: F) -> F:
        # `inline=True`: without a call in between, XLA computes once what the loss and the update share.
        @partial(jax.jit, inline=True, **jit_options)
        @wraps(function)
        def program(*arrays: Any, **static: Any) -> Any:
            call: Any = partial(function, **static)
            mesh = mesh_of(*jax.tree.leaves(arrays))
            explicit = () if mesh is None else mesh.explicit_axes
            if explicit:
                call = jax.sharding.auto_axes(call, axes=explicit, out_sharding=out_shardings_fn(*arrays))
            return call(*arrays)

        return program  # type: ignore[return-value]  # `jax.jit` forgets the signature.

    return wrap


def replicate(array: jax.Array, mesh: AbstractMesh | None) -> jax.Array:
    """Replicates `array` on the devices of `mesh`, or on all devices if the mesh is unknown (None).

    Inside of `shard_map` it is returned as it is. Values have to be replicated before they are scattered into
    a table. If the values are sharded, XLA makes each device scatter its shard into a full table of zeros,
    and all-reduces these tables.
    """
    if mesh is None:
        return array if jax.device_count() == 1 else _replicate_on_unknown_mesh(array)
    if AxisType.Manual in mesh.axis_types:
        return array
    sharding = NamedSharding(mesh, P(*(None,) * array.ndim))
    array = reshard(array, sharding)
    # Outside of `jit` each operation reshards its operands itself. Only a tracer needs the constraint.
    if AxisType.Auto in mesh.axis_types and isinstance(array, jax.core.Tracer):
        array = lax.with_sharding_constraint(array, sharding)
    return array


def _replicate_on_unknown_mesh(array: jax.Array) -> jax.Array:
    """Replicates `array` on all devices by a gather, without naming a mesh.

    The mesh is unknown in `jax.jit(..., in_shardings=...)`, for example. XLA replicates the result of a
    gather at replicated indices, so `array` is gathered at the indices 0, 1, 2, ... The barrier hides these
    numbers from XLA, since it would remove such a gather.
    """
    hidden_zero = lax.optimization_barrier(jnp.zeros((), jnp.int32))
    identity = jnp.arange(array.shape[0], dtype=jnp.int32) + hidden_zero
    return array.at[identity].get(mode="promise_in_bounds", unique_indices=True)


def whole_batch(
    axis_name: AxisName, mesh: AbstractMesh | None, labels: jax.Array, *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """Flattens the sample axes, those of `labels`, gathers them over `axis_name`, and replicates on the mesh.

    Returns the labels first. If the mesh is unknown, only labels and other arrays with one number per sample
    are replicated: XLA replicates values itself if the indices at which it scatters them are replicated.
    """
    ndim = labels.ndim
    arrays = (labels, *arrays)
    if axis_name is not None:
        arrays, ndim = tuple(_all_gather(array, axis_name) for array in arrays), ndim + 1
    flat = [array.reshape(-1, *array.shape[ndim:]) for array in arrays]
    return tuple(a if mesh is None and a.ndim > 1 else replicate(a, mesh) for a in flat)


def _all_gather(array: jax.Array, axis_name: AxisName) -> jax.Array:
    """`lax.all_gather`, written as a `psum` of disjoint parts.

    If the moved table is returned with `out_specs` that do not name the axis, `shard_map` has to know that it
    is the same on each device. `shard_map` knows this of what `psum` returns. Of what `lax.all_gather`
    returns it knows this only with `to=`, which JAX 0.7 does not have.
    """
    parts = jnp.zeros((lax.psum(1, axis_name), *array.shape), array.dtype)
    return lax.psum(parts.at[lax.axis_index(axis_name)].set(array), axis_name)
