"""Where arrays lie on a mesh of devices: the one place that knows the kinds of axes."""

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

OutSharding = NamedSharding | P | Format  # Where a table is asked to lie.


def mesh_of(*arrays: ArrayLike) -> AbstractMesh | None:
    """The mesh that the arrays are placed on, where tracing shows it."""
    meshes = (getattr(jax.typeof(a).sharding, "mesh", None) for a in arrays)
    return next((mesh for mesh in meshes if mesh is not None and not mesh.empty), None)


def axes_of(entry: Any) -> tuple[Any, ...]:
    """The axes of the mesh in one entry of a `PartitionSpec`."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def sharding_of(array: jax.Array, *others: jax.Array) -> NamedSharding | None:
    """The placement of `array`; on the mesh of `others`, whole on every device, if it has none of its own."""
    if mesh_of(array) is not None:
        sharding: NamedSharding = jax.typeof(array).sharding
        return sharding
    mesh = mesh_of(*others)
    return None if mesh is None else NamedSharding(mesh, P(*(None,) * array.ndim))


def as_table(centers: jax.Array, *others: Any) -> NamedSharding | None:
    """Where centers lie that are returned, given with `others`."""
    return sharding_of(centers, *jax.tree.leaves(others))


def reshard(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """`array` moved there, on Explicit axes; Auto ones are XLA's."""
    if not _explicit(sharding.mesh):
        return array
    moved: jax.Array = jax.sharding.reshard(array, sharding)
    return moved


def samples_of(x: jax.Array, *others: jax.Array) -> NamedSharding | None:
    """Where something lies that has one entry for each sample of `x`."""
    placed = sharding_of(x, *others)
    return None if placed is None else NamedSharding(placed.mesh, P(*placed.spec[:-1]))


def along(x: jax.Array, array: jax.Array) -> jax.Array:
    """`array`, which has one entry for each sample, placed as the samples of `x` are."""
    placed = samples_of(x, array)
    return array if placed is None or mesh_of(array) is None else reshard(array, placed)


def beside(centers: jax.Array, leaf: jax.Array) -> jax.Array:
    """What belongs to concrete centers where the first step would put it: a scalar on all of their devices.

    A table of their shape is laid out in memory as they are.
    """
    placed = leaf
    if any(isinstance(a, jax.core.Tracer) or not isinstance(a, jax.Array) for a in (centers, leaf)):
        return placed
    if not leaf.ndim:
        if isinstance(centers.sharding, NamedSharding):
            placed = jax.device_put(leaf, NamedSharding(centers.sharding.mesh, P()))
    elif leaf.shape == centers.shape:
        lies: Any = operator.attrgetter("format.layout.major_to_minor")  # Not in the types of `jax.Array`.
        if lies(leaf) != (order := lies(centers)):
            placed = jax.device_put(leaf, Format(Layout(order), leaf.sharding))
    return placed


def everywhere(*arrays: Any) -> NamedSharding | None:
    """On every device of the mesh of `arrays`, whole."""
    mesh = mesh_of(*jax.tree.leaves(arrays))
    return None if mesh is None else NamedSharding(mesh, P())


def any_mesh(placed: Callable[..., Any], **jit: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiles a function of arrays as one program, in which axes that are Explicit are Auto.

    `placed(*arrays)` says where the results lie if there are such axes; on Auto axes XLA finds it out.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        # Inlined into the user's program, in which XLA then shares more between the loss and the step.
        @partial(jax.jit, inline=True, **jit)
        @wraps(function)
        def program(*arrays: Any, **static: Any) -> Any:
            inside = partial(function, **static)
            mesh = mesh_of(*jax.tree.leaves(arrays))
            if explicit := () if mesh is None else _explicit(mesh):
                inside = jax.sharding.auto_axes(inside, axes=explicit, out_sharding=placed(*arrays))
            return inside(*arrays)

        return program

    return wrap


def _explicit(mesh: AbstractMesh | Mesh) -> tuple[Any, ...]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind is AxisType.Explicit)


def drawn(draw: Callable[[jax.Array], Any], key: jax.Array, placed: NamedSharding | Format) -> Any:
    """`draw(key)`, of which every device draws its own part."""
    sharding = placed.sharding if isinstance(placed, Format) else placed
    explicit = _explicit(sharding.mesh) if isinstance(sharding, NamedSharding) else ()
    if explicit:
        # Else the table would be Explicit, and so whole on every device, until it is done.
        draw = jax.sharding.auto_axes(draw, axes=explicit, out_sharding=sharding)
    return jax.jit(draw, out_shardings=placed)(key)


def whole(mesh: AbstractMesh | None, array: jax.Array) -> jax.Array:
    """`array` whole on every device of `mesh`.

    For batches, before they are written to a table: of a scatter whose updates are spread over devices XLA
    makes one table for each part of them, and adds the tables up.
    """
    if mesh is None:
        if jax.device_count() == 1:
            return array
        # The program may still run on many devices, which are not known yet. What is read at indices that
        # are the same everywhere, and that XLA can't see through, is whole everywhere.
        zero = lax.optimization_barrier(jnp.zeros((), jnp.int32))
        order = jnp.arange(array.shape[0], dtype=jnp.int32) + zero
        return array.at[order].get(mode="promise_in_bounds", unique_indices=True)
    if AxisType.Manual in mesh.axis_types:
        return array
    sharding = NamedSharding(mesh, P(*(None,) * array.ndim))
    array = reshard(array, sharding)
    # Outside of a program there is no choice of XLA's to constrain.
    if AxisType.Auto in mesh.axis_types and isinstance(array, jax.core.Tracer):
        array = lax.with_sharding_constraint(array, sharding)
    return array


def stripes(centers: jax.Array) -> int:
    """Into how many equal parts, of consecutive classes, a table can be cut without cutting through a shard.

    Auto axes don't show how many shards there are, but it is a divisor of the number of devices.
    """
    mesh = mesh_of(centers)
    return math.gcd(centers.shape[0], jax.device_count() if mesh is None else mesh.size)
