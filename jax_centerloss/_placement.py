"""Shardings and platforms: the one place that tells Explicit mesh axes from Auto ones.

A mesh is known if the type of an array, `jax.typeof(array)`, names it.
"""

import math
import operator
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

OutSharding = NamedSharding | P | Format  # What `out_sharding` accepts.
T = TypeVar("T")


def call_for_platform(function: Callable[..., T], *arrays: Any) -> T:
    """`function(*arrays, platform=...)` with the platform that the program is compiled for."""
    result: T = lax.platform_dependent(
        *arrays,
        cpu=partial(function, platform="cpu"),
        tpu=partial(function, platform="tpu"),
        default=partial(function, platform="gpu"),
    )
    return result


def mesh_of(*arrays: ArrayLike) -> AbstractMesh | None:
    """The mesh in the type of the first array with one, or None if no mesh is known."""
    for array in arrays:
        mesh: AbstractMesh | None = getattr(jax.typeof(array).sharding, "mesh", None)
        if mesh is not None and not mesh.empty:
            return mesh
    return None


def mesh_axes(entry: Any) -> tuple[Any, ...]:
    """The mesh axes in one entry of a `PartitionSpec`: None, a name, or a tuple of names."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def sharding_of(array: jax.Array, *others: jax.Array) -> NamedSharding | None:
    """The sharding in the type of `array`. If that names no mesh: replicated, on the mesh of `others`."""
    if mesh_of(array) is not None:
        sharding: NamedSharding = jax.typeof(array).sharding
        return sharding
    mesh = mesh_of(*others)
    return None if mesh is None else NamedSharding(mesh, P(*(None,) * array.ndim))


def centers_sharding(centers: jax.Array, *others: Any) -> NamedSharding | None:
    """The sharding of returned centers: that of `centers`, else replicated on the mesh of `others`."""
    return sharding_of(centers, *jax.tree.leaves(others))


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
    if not _explicit_axes(sharding.mesh):
        return array
    resharded: jax.Array = jax.sharding.reshard(array, sharding)
    return resharded


def reshard_like_samples(array: jax.Array, x: jax.Array) -> jax.Array:
    """Reshards an array with one entry per sample like the leading axes of `x`, if it is on a mesh."""
    sharding = per_sample_sharding(x, array)
    return array if sharding is None or mesh_of(array) is None else reshard(array, sharding)


def place_like_table(leaf: jax.Array, centers: jax.Array) -> jax.Array:
    """Gives a leaf of an optimizer's initial state the placement that it has after the first step.

    A scalar is replicated on the devices of the centers. A table keeps its sharding, and gets the memory
    layout of the centers. Else the second step would be compiled again. Tracers stay as they are.
    """
    placed = leaf
    if any(isinstance(a, jax.core.Tracer) or not isinstance(a, jax.Array) for a in (leaf, centers)):
        return placed
    if not leaf.ndim:
        if isinstance(centers.sharding, NamedSharding):
            placed = jax.device_put(leaf, NamedSharding(centers.sharding.mesh, P()))
    elif leaf.shape == centers.shape:
        order_of: Any = operator.attrgetter("format.layout.major_to_minor")  # `jax.Array` does not type it.
        if order_of(leaf) != (order := order_of(centers)):
            placed = jax.device_put(leaf, Format(Layout(order), leaf.sharding))
    return placed


def jit_on_auto_axes(
    out_shardings_fn: Callable[..., Any], **jit_options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: `jax.jit`, with Explicit mesh axes turned into Auto axes inside of the function.

    `out_shardings_fn(*arrays)` returns the shardings of the results. It is called only if the mesh has
    Explicit axes; on Auto axes XLA infers the shardings.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        # `inline=True` puts loss and update into one program, where XLA computes once what they share.
        @partial(jax.jit, inline=True, **jit_options)
        @wraps(function)
        def program(*arrays: Any, **static: Any) -> Any:
            call = partial(function, **static)
            mesh = mesh_of(*jax.tree.leaves(arrays))
            explicit = () if mesh is None else _explicit_axes(mesh)
            if explicit:
                call = jax.sharding.auto_axes(call, axes=explicit, out_sharding=out_shardings_fn(*arrays))
            return call(*arrays)

        return program

    return wrap


def _explicit_axes(mesh: AbstractMesh | Mesh) -> tuple[Any, ...]:
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, axis_type in types if axis_type is AxisType.Explicit)


def draw_sharded(draw: Callable[[jax.Array], Any], key: jax.Array, out: NamedSharding | Format) -> Any:
    """Runs the initializer `draw(key)` with results placed as `out`: each device computes its own shard."""
    sharding = out.sharding if isinstance(out, Format) else out
    explicit = _explicit_axes(sharding.mesh) if isinstance(sharding, NamedSharding) else ()
    if explicit:
        # Under Explicit axes each device would hold the intermediate results as full tables.
        draw = jax.sharding.auto_axes(draw, axes=explicit, out_sharding=sharding)
    return jax.jit(draw, out_shardings=out)(key)


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
    # Eager operations reshard their own operands, so that only a tracer needs the constraint.
    if AxisType.Auto in mesh.axis_types and isinstance(array, jax.core.Tracer):
        array = lax.with_sharding_constraint(array, sharding)
    return array


def _replicate_on_unknown_mesh(array: jax.Array) -> jax.Array:
    """Replicates `array` if no mesh is known although there are several devices.

    That happens in `jax.jit(..., in_shardings=...)`, for example. XLA replicates the result of a gather at
    replicated indices, so `array` is gathered at the indices 0, 1, 2, ... The barrier hides these numbers
    from XLA, since it would remove such a gather.
    """
    hidden_zero = lax.optimization_barrier(jnp.zeros((), jnp.int32))
    identity = jnp.arange(array.shape[0], dtype=jnp.int32) + hidden_zero
    return array.at[identity].get(mode="promise_in_bounds", unique_indices=True)


def num_stripes(centers: jax.Array) -> int:
    """The number of "stripes": equal, contiguous blocks of classes, each of which lies in one shard.

    It is a multiple of the number of shards, since that divides C and the size of the mesh. If the mesh is
    unknown, the number of devices is used: on a smaller mesh a stripe may span two shards, which costs speed.
    """
    mesh = mesh_of(centers)
    return math.gcd(centers.shape[0], jax.device_count() if mesh is None else mesh.size)
