"""Centers that lie in memory in an order of their own, as on a TPU where D is no multiple of 128."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from pages import python_of

import jax_centerloss as jcl

C, D = 8, 4
COLUMNS = Layout((1, 0))  # Any order but a CPU's own.
ROWS = jcl.row_optimizer(optax.sgd(0.1, momentum=0.9))


def order(array):
    return array.format.layout.major_to_minor


@pytest.fixture
def columns():
    return Format(COLUMNS, SingleDeviceSharding(jax.devices()[0]))


def test_centers_are_born_in_it(columns):
    want = jcl.init_centers(jax.random.key(0), C, D)["centers"]
    got = jcl.init_centers(jax.random.key(0), C, D, out_sharding=columns)["centers"]
    module = jcl.nnx.CenterLoss(C, D, out_sharding=columns, rngs=nnx.Rngs(0))
    linen = jcl.linen.CenterLoss(C, D, out_sharding=columns)
    variables = linen.init(jax.random.key(0), jnp.ones((1, D)), jnp.zeros(1, jnp.int32))
    for centers in (got, module.centers[...], variables["params"]["centers"]):
        assert order(centers) == (1, 0)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_split_over_a_mesh_too(kind):
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(kind,))
    placed = Format(COLUMNS, NamedSharding(mesh, P("classes", None)))
    centers = jcl.init_centers(jax.random.key(0), C, D, out_sharding=placed)["centers"]
    assert order(centers) == (1, 0)
    assert centers.sharding.is_equivalent_to(placed.sharding, 2)
    with pytest.raises(ValueError, match="num_classes=9 is not divisible by the 8 shards"):
        jcl.init_centers(jax.random.key(0), C + 1, D, out_sharding=placed)
    module = jcl.nnx.CenterLoss(C, D, out_sharding=placed, rngs=nnx.Rngs(0))
    assert order(module.centers[...]) == (1, 0)
    (spec,) = jax.tree.leaves(nnx.get_partition_spec(nnx.state(module)), is_leaf=lambda x: isinstance(x, P))
    assert spec == P("classes", None)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_optimizers_tables_lie_as_the_centers_do(columns, dtype):
    params = jcl.init_centers(jax.random.key(0), C, D, dtype=dtype, out_sharding=columns)
    tables = [leaf for leaf in jax.tree.leaves(ROWS.init(params)) if leaf.ndim]
    assert [order(leaf) for leaf in tables] == [(1, 0)]


def test_a_step_keeps_to_it_where_it_is_asked_to(columns):
    x, labels = np.ones((3, D), np.float32), np.array([1, 5, 1])
    params = jcl.init_centers(jax.random.key(0), C, D, out_sharding=columns)
    plain = jax.device_get(params)
    want = jax.jit(ROWS.update)(plain, ROWS.init(plain), x, labels)
    held = params, ROWS.init(params)
    formats = jax.tree.map(lambda leaf: leaf.format, held)
    step = jax.jit(lambda held: ROWS.update(*held, x, labels), donate_argnums=0, out_shardings=formats)
    got = step(held)
    assert jax.tree.map(lambda leaf: leaf.format, got) == formats
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.usefixtures("as_users_run_it")
def test_the_page_runs():
    blocks = python_of("accelerators")
    space = {}
    for block in blocks:
        exec(compile(block, "accelerators", "exec"), space)
        assert np.isfinite(space["loss"])
    assert len(blocks) == 2
    tables = [leaf for leaf in jax.tree.leaves(space["held"]) if leaf.ndim]
    assert [order(leaf) for leaf in tables] == 3 * [(0, 1)]
    assert order(space["model"].center_loss.centers[...]) == (0, 1)
