"""Shardings: the one place that tells Explicit mesh axes from Auto ones."""

import math
import operator
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

OutSharding = NamedSharding | P | Format  # What `out_sharding` accepts.


def mesh_of(*arrays: ArrayLike) -> AbstractMesh | None:
    """The mesh of the first array that is known to be on one."""
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
    """The sharding of `array`. If it has none, it counts as replicated on the mesh of `others`."""
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
    """Reshards `array`, which has one entry per sample, as the samples of `x` are."""
    sharding = per_sample_sharding(x, array)
    return array if sharding is None or mesh_of(array) is None else reshard(array, sharding)


def place_like_table(leaf: jax.Array, centers: jax.Array) -> jax.Array:
    """Gives a leaf of an optimizer's initial state the placement that it has after the first step.

    A scalar is replicated on the devices of the centers, and a table gets the memory layout of the centers.
    With another placement the second step would be compiled again. Tracers stay as they are.
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
    out_sharding: Callable[..., Any], **jit_options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: `jax.jit`, with Explicit mesh axes turned into Auto axes inside of the function.

    `out_sharding(*arrays)` returns the shardings of the results. It is called only if the mesh has Explicit
    axes; on Auto axes XLA infers the shardings.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        # Inlined into the caller's program, where XLA computes once what the loss and the update share.
        @partial(jax.jit, inline=True, **jit_options)
        @wraps(function)
        def program(*arrays: Any, **static: Any) -> Any:
            call = partial(function, **static)
            mesh = mesh_of(*jax.tree.leaves(arrays))
            explicit = () if mesh is None else _explicit_axes(mesh)
            if explicit:
                call = jax.sharding.auto_axes(call, axes=explicit, out_sharding=out_sharding(*arrays))
            return call(*arrays)

        return program

    return wrap


def _explicit_axes(mesh: AbstractMesh | Mesh) -> tuple[Any, ...]:
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, axis_type in types if axis_type is AxisType.Explicit)


def draw_sharded(draw: Callable[[jax.Array], Any], key: jax.Array, out: NamedSharding | Format) -> Any:
    """`draw(key)`, each device drawing its own shard."""
    sharding = out.sharding if isinstance(out, Format) else out
    explicit = _explicit_axes(sharding.mesh) if isinstance(sharding, NamedSharding) else ()
    if explicit:
        # Under Explicit axes the initializer's intermediates would be replicated tables.
        draw = jax.sharding.auto_axes(draw, axes=explicit, out_sharding=sharding)
    return jax.jit(draw, out_shardings=out)(key)


def replicate(array: jax.Array, mesh: AbstractMesh | None) -> jax.Array:
    """Replicates `array` on the devices of `mesh`. Inside of `shard_map` it is returned as it is.

    Values have to be replicated before they are scattered into a table. If they are sharded, XLA makes each
    device scatter its shard into a full table of zeros, and all-reduces these tables.
    """
    if mesh is None:
        return array if jax.device_count() == 1 else _replicate_on_unknown_mesh(array)
    if AxisType.Manual in mesh.axis_types:
        return array
    sharding = NamedSharding(mesh, P(*(None,) * array.ndim))
    array = reshard(array, sharding)
    # Outside of `jit` operations run one by one, and the array is replicated where that is needed.
    if AxisType.Auto in mesh.axis_types and isinstance(array, jax.core.Tracer):
        array = lax.with_sharding_constraint(array, sharding)
    return array


def _replicate_on_unknown_mesh(array: jax.Array) -> jax.Array:
    """Replicates `array` where tracing shows no mesh, but there are several devices.

    Such a program may come from `jax.jit(..., in_shardings=...)`. XLA replicates the result of a gather whose
    indices are replicated. So this gathers at 0, 1, 2, ...; the barrier hides these numbers from XLA, which
    would remove the gather.
    """
    hidden_zero = lax.optimization_barrier(jnp.zeros((), jnp.int32))
    identity = jnp.arange(array.shape[0], dtype=jnp.int32) + hidden_zero
    return array.at[identity].get(mode="promise_in_bounds", unique_indices=True)


def num_stripes(centers: jax.Array) -> int:
    """Into how many equal runs of classes to cut the table, so that each run is in one shard.

    The number of shards divides the size of the mesh. If tracing shows no mesh, the number of devices stands
    for it; with another mesh than one of all devices, a run may then lie in two shards, which costs speed.
    """
    mesh = mesh_of(centers)
    return math.gcd(centers.shape[0], jax.device_count() if mesh is None else mesh.size)
