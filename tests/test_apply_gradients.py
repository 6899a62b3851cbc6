"""A row optimizer fed with gradients of any kind, against dense optax with absent rows frozen."""

import gc
import re
import weakref
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_in_place import compiled

import jax_centerloss as jcl

D = 3
OPTIMIZERS = {
    "sgd": optax.sgd(0.3),
    "adam": optax.adam(0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
}
ROWS = {name: jcl.row_optimizer(tx) for name, tx in OPTIMIZERS.items()}


@pytest.fixture(autouse=True)
def as_optax_needs_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


@cache
def ours_and_dense(name):
    """A step by rows; and optax's own, after which rows not in the batch, and their state, are put back."""
    tx = OPTIMIZERS[name]

    @jax.jit
    def step(ours, dense, rows, gradients, where, dense_gradient, here):
        table, state = dense
        updates, new_state = tx.update({"centers": dense_gradient}, state, {"centers": table})
        moved = optax.apply_updates(table, updates["centers"])

        def freeze(new, old):
            return jnp.where(here[:, None], new, old) if jnp.shape(new) == table.shape else new

        frozen = freeze(moved, table), jax.tree.map(freeze, new_state, state)
        return ROWS[name].apply_gradients(*ours, rows, gradients, where=where), frozen

    return step


@st.composite
def batches(draw, classes, num):
    """Rows that stand there several times, negative ones, masked ones with NaN, gradients that cancel."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = rng.integers(-1, draw(st.sampled_from([1, classes])), num).astype(np.int32)
    gradients = rng.normal(size=(num, D)).astype(np.float32) * draw(st.sampled_from([0.0, 1.0, 100.0]))
    where = rng.random(num) < draw(st.sampled_from([0.5, 1.0]))
    gradients[~where] = np.nan
    return rows, np.float32(gradients), where


@pytest.mark.few(2)
@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=15)
@given(data=st.data())
def test_equals_the_dense_optimizer_with_absent_rows_frozen(name, data):
    classes, num = data.draw(st.sampled_from([(4, 12), (40, 12), (40, 1), (40, 0)]))
    table = np.random.default_rng(0).normal(size=(classes, D)).astype(np.float32)
    ours = dense = table, OPTIMIZERS[name].init({"centers": table})
    for _ in range(2):
        rows, gradients, where = data.draw(batches(classes, num))
        used = (rows >= 0) & where
        gradient = np.zeros(table.shape)
        np.add.at(gradient, rows[used], gradients[used].astype(np.float64))
        here = np.isin(np.arange(classes), rows[used])
        ours, dense = ours_and_dense(name)(ours, dense, rows, gradients, where, np.float32(gradient), here)
    chex.assert_trees_all_close(ours, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [4, 5000])
def test_update_is_this_step_with_the_gradient_of_the_loss(rng, classes):
    table = rng.normal(size=(classes, D)).astype(np.float32)
    x, labels = rng.normal(size=(2, 5, D)).astype(np.float32), rng.integers(-1, 4, (2, 5))
    gradients = 2 * (table[labels] - x) / np.float32(np.sum(labels >= 0))
    rows = ROWS["adam"]

    @jax.jit
    def both(table):
        state = rows.init(table)
        return rows.update(table, state, x, labels), rows.apply_gradients(table, state, labels, gradients)

    want, got = both(table)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("classes", [4, 5000])
def test_gradients_in_half_precision_are_summed_in_float32(classes):
    # One by one, 1000 gradients of 1 would stop at 256 in bfloat16.
    rows, gradients = np.zeros(1000, np.int32), np.ones((1000, D), jnp.bfloat16)
    table = np.zeros((classes, D), jnp.bfloat16)
    moved, _ = ROWS["sgd"].apply_gradients({"w": table}, ROWS["sgd"].init(table), rows, gradients)
    assert moved["w"].dtype == jnp.bfloat16
    moved = np.float32(moved["w"])
    np.testing.assert_allclose(moved[0], -300.0, rtol=2**-8)
    assert not np.any(moved[1:])


def test_a_rounding_key_keeps_small_steps():
    optimizer = jcl.row_optimizer(optax.sgd(2.0**-12))

    @jax.jit
    def run(key):
        def step(held, key):
            moved = optimizer.apply_gradients(*held, np.zeros(1, int), jnp.ones((1, 64)), rounding_key=key)
            return moved, None

        table = jnp.ones((2, 64), jnp.bfloat16)
        (table, _), _ = jax.lax.scan(step, (table, optimizer.init(table)), jax.random.split(key, 1000))
        return table

    table = np.float32(run(jax.random.key(0)))
    np.testing.assert_allclose(np.mean(table[0]), 1 - 1000 * 2.0**-12, atol=0.02)
    np.testing.assert_array_equal(table[1], 1)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(rng, kind):
    classes, num = 48, 16
    table = rng.normal(size=(classes, D)).astype(np.float32)
    rows, gradients = rng.integers(-1, 8, num).astype(np.int32), rng.normal(size=(num, D)).astype(np.float32)
    optimizer = ROWS["adam"]
    want = optimizer.apply_gradients(table, optimizer.init(table), rows, gradients)
    mesh = jax.make_mesh((2, 4), ("data", "classes"), axis_types=(kind,) * 2)
    placed = jax.device_put(table, NamedSharding(mesh, P("classes")))
    batch = jax.device_put((rows, gradients), NamedSharding(mesh, P("data")))
    got = jax.jit(optimizer.apply_gradients)(placed, optimizer.init(placed), *batch)
    assert got[0].sharding.is_equivalent_to(placed.sharding, 2)
    inside = jax.shard_map(
        lambda *given: optimizer.apply_gradients(*given, axis_name="data"),
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P("data")),
        out_specs=P(),
    )
    whole = jax.device_put((table, optimizer.init(table)), NamedSharding(mesh, P()))
    for result in (got, jax.jit(inside)(*whole, *batch)):
        chex.assert_trees_all_close(result, want, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("for_its_platform")
@pytest.mark.parametrize("classes", [1000, 1_000_000])
def test_in_place_at_any_number_of_classes(classes):
    optimizer = ROWS["adam"]

    def step(table, state, gradients, rows):
        return optimizer.apply_gradients(table, state, rows, gradients)

    program = compiled(step, optimizer.init, classes)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= 3 * classes * 32 * 4
    assert memory.temp_size_in_bytes <= 6 * 256 * 32 * 4 + 64 * 1024
    assert not re.findall(rf"= \w+\[{classes}\b[^=]*\bcopy\(", program.as_text())


def row_wise_adagrad(rate, shape, eps=1e-8):
    """AdaGrad with one number for each row, the mean square of its gradients: 1 / D of the memory."""

    def init(params):
        return jax.tree.map(lambda table: jnp.zeros((len(table), *shape)), params)

    def update(gradients, state, params=None):
        means = jax.tree.map(lambda g, s: jnp.mean(g**2, axis=1).reshape(s.shape), gradients, state)
        state = jax.tree.map(jnp.add, state, means)
        steps = jax.tree.map(lambda g, s: -rate * g / (jnp.sqrt(s.reshape(-1, 1)) + eps), gradients, state)
        return steps, state

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("classes", [3, 5000])
def test_a_state_with_one_number_for_each_row(rng, shape, classes):
    optimizer = jcl.row_optimizer(row_wise_adagrad(0.1, shape))
    table = rng.normal(size=(classes, D)).astype(np.float32)
    moved, state = table, optimizer.init(table)
    step = jax.jit(optimizer.apply_gradients)
    want, squares = table.astype(np.float64), np.zeros(classes)
    for rows in ([0, 2, 2, -1], [2, 1, 1, 1]):
        gradients = rng.normal(size=(4, D)).astype(np.float32)
        moved, state = step(moved, state, np.array(rows), gradients)
        for row in set(rows) - {-1}:
            gradient = gradients[np.array(rows) == row].astype(np.float64).sum(0)
            squares[row] += np.mean(gradient**2)
            want[row] -= 0.1 * gradient / (np.sqrt(squares[row]) + 1e-8)
    np.testing.assert_allclose(moved, want, rtol=1e-5, atol=1e-6)
    (leaf,) = jax.tree.leaves(state)
    assert leaf.shape == (classes, *shape)
    np.testing.assert_allclose(np.ravel(leaf), squares, rtol=1e-5)


def test_what_does_not_fit_is_named():
    optimizer, table = ROWS["sgd"], np.zeros((3, D), np.float32)
    state, gradients = optimizer.init(table), np.ones((2, D), np.float32)
    bad = [
        ([0, 3], gradients, ValueError, r"row 3 is out of range for 3 classes: rows go from 0 to 2"),
        ([0.0, 1.0], gradients, TypeError, "rows must be integers, got float32"),
        ([0, 1], gradients[:, :2], ValueError, r"gradients must have shape \(\.\.\., D\) with D = 3"),
        ([0], gradients, ValueError, "rows must have the leading dimensions of gradients"),
        ([0], table + 1, ValueError, r"the rows that were read, not that of the whole table\.$"),
    ]
    for rows, wrong, error, words in bad:
        with pytest.raises(error, match=words):
            optimizer.apply_gradients(table, state, rows, wrong)
    moved, _ = jax.jit(optimizer.apply_gradients)(table, state, np.array([0, 3]), gradients)
    np.testing.assert_allclose(moved, [[-0.3] * D, [0] * D, [0] * D], rtol=1e-6)


def test_a_row_optimizer_that_is_no_longer_used_is_freed():
    tx = optax.sgd(0.1)
    rows, transformation = jcl.row_optimizer(tx), weakref.ref(tx.update)
    params = np.ones((20, 2), np.float32)
    rows.apply_gradients(params, rows.init(params), np.arange(3), params[:3])
    del rows, tx
    gc.collect()
    assert transformation() is None
