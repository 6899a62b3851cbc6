"""The programs of all three platforms, on whatever is at hand, under transforms and on meshes."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_centerloss as jcl
from jax_centerloss._rows import placement

D, N = 3, 32
ADAM = jcl.row_optimizer(optax.adam(0.1))


@pytest.fixture
def platform(request, monkeypatch):
    def chosen(function, *arrays):
        return function(*arrays, platform=request.param)

    monkeypatch.setattr(placement, "call_for_platform", chosen)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


@pytest.fixture(autouse=True)
def as_optax_needs_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


def everything(axis_name, centers, state, x, labels):
    """The loss with both gradients, each way to move centers, and the metrics."""
    loss = partial(jcl.center_loss, axis_name=axis_name)
    return (
        jax.value_and_grad(loss, (0, 1))(centers, x, labels),
        [
            jcl.update_centers(centers, x, labels, rule=rule, axis_name=axis_name)
            for rule in ("paper", "gradient")
        ],
        ADAM.update(centers, state, x, labels, axis_name=axis_name),
        ADAM.apply_gradients(centers, state, labels, x, axis_name=axis_name),
        jcl.center_metrics(centers, x, labels, previous=centers + 1.0, axis_name=axis_name),
    )


def data(classes):
    rng = np.random.default_rng(0)
    centers = jnp.asarray(rng.normal(size=(classes, D)), jnp.float32)
    labels = rng.integers(-1, min(classes, 9), N).astype(np.int32)
    return centers, ADAM.init(centers), jnp.asarray(rng.normal(size=(N, D)), jnp.float32), jnp.asarray(labels)


def by_hand(centers, x, labels):
    """The loss, its gradients and the steps in a float64 loop over the classes."""
    centers, x = np.float64(centers), np.float64(x)
    used = labels >= 0
    pulls = np.where(used[:, None], centers[labels] - x, 0)
    by_class, counts = np.zeros_like(centers), np.zeros(len(centers))
    np.add.at(by_class, labels[used], pulls[used])
    np.add.at(counts, labels[used], 1)
    num = used.sum()
    return (
        np.sum(pulls**2) / num,
        2 * by_class / num,
        -2 * pulls / num,
        centers - 0.5 * by_class / (1 + counts)[:, None],
        centers - by_class / num,
    )


ALL = pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"], indirect=True)
# What a CPU's programs do on meshes, test_placement.py and test_transforms.py look at.
ACCELERATORS = pytest.mark.parametrize("platform", ["gpu", "tpu"], indirect=True)
# Few classes, which a GPU sums under masks, and more than samples.
CLASSES = pytest.mark.parametrize("classes", [4, 200])
KINDS = pytest.mark.parametrize(
    ("kind", "classes"), [(AxisType.Auto, 4), (AxisType.Explicit, 4), (AxisType.Explicit, 200)]
)


@pytest.mark.few(4)
@ALL
@CLASSES
def test_the_numbers_are_those_of_a_loop_over_the_classes(platform, classes):
    given = data(classes)
    (loss, grads), (paper, gradient), *_ = jax.jit(partial(everything, None))(*given)
    wanted = by_hand(given[0], given[2], np.asarray(given[3]))
    for got, want in zip((loss, *grads, paper, gradient), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.few(1)
@ACCELERATORS
@KINDS
def test_inside_shard_map(platform, kind, classes):
    given = data(classes)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    split = P(), P(), P("data"), P("data")
    out = (P(), (P(), P("data"))), P(), P(), P(), P()
    mapped = jax.shard_map(partial(everything, "data"), mesh=mesh, in_specs=split, out_specs=out)
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(given, split, strict=True)]
    want = jax.jit(partial(everything, None))(*given)
    chex.assert_trees_all_close(jax.jit(mapped)(*placed), want, rtol=1e-5, atol=1e-6)


@pytest.mark.few(1)
@ACCELERATORS
@KINDS
def test_on_a_mesh(platform, kind, classes):
    given = data(classes)
    mesh = jax.make_mesh((2, 2), ("data", "classes"), axis_types=(kind, kind))
    table, batch = NamedSharding(mesh, P("classes")), NamedSharding(mesh, P("data"))
    whole = NamedSharding(mesh, P())
    state = jax.tree.map(lambda leaf: jax.device_put(leaf, table if leaf.ndim else whole), given[1])
    placed = jax.device_put(given[0], table), state, *jax.device_put(given[2:], batch)
    want = jax.jit(partial(everything, None))(*given)
    chex.assert_trees_all_close(jax.jit(partial(everything, None))(*placed), want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@ACCELERATORS
@CLASSES
def test_vmap_and_scan(platform, classes):
    centers, state, x, labels = data(classes)
    batches = x.reshape(4, -1, D), labels.reshape(4, -1)

    def one(batch):
        return everything(None, centers, state, *batch)

    looped = [jax.jit(one)([a[i] for a in batches]) for i in range(4)]
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *looped)
    chex.assert_trees_all_close(jax.vmap(one)(batches), want, rtol=1e-5, atol=1e-6)
    _, scanned = jax.lax.scan(lambda carry, batch: (carry, one(batch)), (), batches)
    chex.assert_trees_all_close(scanned, want, rtol=1e-5, atol=1e-6)
