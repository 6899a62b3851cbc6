"""Tables that are born in shards, and the Flax modules that own them."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_centerloss as jcl

pytestmark = pytest.mark.usefixtures("as_jax_promotes")  # Flax and optax need it.

C, D, N = 64, 8, 32
SPEC = P(("data", "classes"), None)


@pytest.fixture(params=["Auto", "Explicit"])
def mesh(request):
    return jax.make_mesh((2, 4), ("data", "classes"), axis_types=(getattr(AxisType, request.param),) * 2)


def assert_sharded(centers, mesh):
    assert centers.sharding.is_equivalent_to(NamedSharding(mesh, SPEC), 2)
    assert {shard.data.shape for shard in centers.addressable_shards} == {(C // 8, D)}


@pytest.mark.few(3)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("by", ["sharding", "spec"])
def test_born_in_shards_with_the_numbers_of_the_whole(mesh, by, jit):
    def init(key, out_sharding=None):
        return [
            jcl.init_centers(key, C, D, dtype=dtype, out_sharding=out_sharding)["centers"]
            for dtype in (jnp.float32, jnp.bfloat16)
        ]

    whole = jax.jit(init)(jax.random.key(0))
    sharded = partial(init, out_sharding=SPEC if by == "spec" else NamedSharding(mesh, SPEC))
    with jax.set_mesh(mesh) if by == "spec" else contextlib.nullcontext():
        tables = (jax.jit(sharded) if jit else sharded)(jax.random.key(0))
    for centers, want in zip(tables, whole, strict=True):
        assert_sharded(centers, mesh)
        assert centers.dtype == want.dtype
        np.testing.assert_array_equal(centers, want)


def test_no_device_holds_more_than_its_share_of_the_work(mesh):
    def memory(**options):
        program = jax.jit(partial(jcl.init_centers, num_classes=80_000, feat_dim=64, **options))
        return program.lower(jax.random.key(0)).compile().memory_analysis()

    whole, part = memory(), memory(out_sharding=NamedSharding(mesh, SPEC))
    assert part.output_size_in_bytes * 8 == whole.output_size_in_bytes
    assert part.temp_size_in_bytes <= whole.temp_size_in_bytes / 8 + 4096


def batch(mesh=None):
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(N, D)).astype(np.float32), rng.integers(0, C, N).astype(np.int32)
    return arrays if mesh is None else jax.device_put(arrays, NamedSharding(mesh, P("data")))


def nnx_training(mesh, centers_as):
    """The centers and the losses of three steps, of a network whose features come from a dense layer."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(D, D, rngs=rngs)
            sharding = None if mesh is None else NamedSharding(mesh, SPEC)
            self.center_loss = jcl.nnx.CenterLoss(
                C, D, centers_as=centers_as, out_sharding=sharding, rngs=rngs
            )

    model = Model(nnx.Rngs(0))
    tx = optax.sgd(0.1, momentum=0.9)
    if centers_as == "param":
        tx = jcl.with_center_optimizer(tx, centers=optax.sgd(0.5, momentum=0.9))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, labels):
        def objective(model):
            features = model.dense(x)
            return model.center_loss(features, labels), features

        (loss, features), grads = nnx.value_and_grad(objective, has_aux=True)(model)
        optimizer.update(model, grads)
        if centers_as == "state":
            model.center_loss.update_centers(features, labels, after=loss)
        return loss

    losses = [step(model, optimizer, *batch(mesh)) for _ in range(3)]
    return model.center_loss.centers[...], np.float32(losses)


def linen_training(mesh, centers_as):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, labels):
            sharding = None if mesh is None else NamedSharding(mesh, SPEC)
            loss = jcl.linen.CenterLoss(C, D, centers_as=centers_as, out_sharding=sharding)
            return loss(nn.Dense(D)(x), labels)

    model, (x, labels) = Model(), batch(mesh)
    variables = jax.jit(model.init)(jax.random.key(0), x, labels)
    tx = optax.sgd(0.1, momentum=0.9)
    if centers_as == "param":
        tx = jcl.with_center_optimizer(tx, centers=optax.sgd(0.5, momentum=0.9))
    params, centers = variables["params"], variables.get("centers", {})
    state = tx.init(params)

    @jax.jit
    def step(params, centers, state):
        def objective(params):
            return model.apply({"params": params, "centers": centers}, x, labels, mutable=["centers"])

        (loss, moved), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), moved.get("centers", {}), state, loss

    losses = []
    for _ in range(3):
        params, centers, state, loss = step(params, centers, state)
        losses.append(loss)
    held = params if centers_as == "param" else centers
    return held["CenterLoss_0"]["centers"], np.float32(losses)


@pytest.mark.few(2)
@pytest.mark.parametrize("centers_as", ["param", "state"])
@pytest.mark.parametrize("train", [nnx_training, linen_training])
def test_modules_train_in_shards_as_on_one_device(train, mesh, centers_as):
    want_centers, want_losses = train(None, centers_as)
    with jax.set_mesh(mesh):
        centers, losses = train(mesh, centers_as)
    assert_sharded(centers, mesh)
    assert losses[2] < losses[0]
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    np.testing.assert_allclose(centers, want_centers, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by", ["sharding", "spec"])
def test_nnx_names_the_axes_of_the_centers(mesh, by):
    with jax.set_mesh(mesh):
        out_sharding = SPEC if by == "spec" else NamedSharding(mesh, SPEC)
        module = jcl.nnx.CenterLoss(C, D, out_sharding=out_sharding, rngs=nnx.Rngs(0))
        specs = jax.tree.leaves(nnx.get_partition_spec(nnx.state(module)), is_leaf=lambda s: isinstance(s, P))
    assert specs == [SPEC]
    assert_sharded(module.centers[...], mesh)
