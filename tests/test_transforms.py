"""The same numbers under every JAX transformation, and over the whole batch when it is spread."""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_centerloss as jcl

C, D, N = 6, 4, 16


@pytest.fixture
def data(rng):
    centers = rng.normal(size=(C, D)).astype(np.float32)
    labels = np.sort(rng.integers(-1, C, N)).astype(np.int32)  # Sorted: devices see different classes.
    return centers, rng.normal(size=(N, D)).astype(np.float32), labels, rng.random(N) < 0.7


def loss(c, x, y, w, **options):
    return jcl.center_loss(c, x, y, where=w, **options)


def move(c, x, y, w, **options):
    return jcl.update_centers(c, x, y, where=w, **options)


def four(arrays):
    """A batch as four batches."""
    return [a.reshape(4, 4, *a.shape[1:]) for a in arrays]


def test_jit_is_eager(data):
    for function in (loss, move):
        chex.assert_trees_all_close(jax.jit(function)(*data), function(*data), rtol=1e-6)


def test_vmap_is_a_loop(data):
    # As arguments: of constants in a program, JAX 0.7's XLA folds the gather under vmap wrongly, by hand too.
    @jax.jit
    def run(c, *batch):
        batches, tables = four(batch), jnp.stack([c, 2 * c])
        one_by_one = zip(*batches, strict=True)
        looped = [(loss(c, *each), move(c, *each)) for each in one_by_one]
        vmapped = [jax.vmap(f, (None, 0, 0, 0))(c, *batches) for f in (loss, move)]
        gradient = jax.grad(loss)
        gradients = [gradient(table, *batch) for table in tables]
        return looped, vmapped, gradients, jax.vmap(gradient, (0, None, None, None))(tables, *batch)

    looped, vmapped, gradients, vmapped_gradients = run(*data)
    for want, got in zip(zip(*looped, strict=True), vmapped, strict=True):
        np.testing.assert_allclose(got, np.stack(want), rtol=1e-5)
    np.testing.assert_allclose(vmapped_gradients, np.stack(gradients), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_linearize_and_second_derivatives(data):
    c, x, y, w = data
    x = x.astype(np.float32)
    tangent = np.ones_like(x)
    value, linear = jax.linearize(lambda x: loss(c, x, y, w), x)
    np.testing.assert_allclose(value, loss(c, x, y, w), rtol=1e-6)
    np.testing.assert_allclose(linear(tangent), jnp.vdot(jax.grad(loss, 1)(c, x, y, w), tangent), rtol=1e-5)
    # |x - c|² has the second derivative 2 in its own coordinate and -2 in the center's.
    used = w & (y >= 0)
    hessian = jax.hessian(loss, (0, 1))(c, x, y, w)
    want = np.zeros((N, D, N, D))
    mixed, centers = np.zeros((C, D, N, D)), np.zeros((C, D, C, D))
    for i in np.flatnonzero(used):
        for d in range(D):
            want[i, d, i, d] = 2 / used.sum()
            mixed[y[i], d, i, d] = -2 / used.sum()
            centers[y[i], d, y[i], d] += 2 / used.sum()
    for got, expected in zip(
        (hessian[1][1], hessian[0][1], hessian[0][0]), (want, mixed, centers), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_vmap_over_an_ensemble_of_centers_by_rule_and_by_rows(data):
    rows = jcl.row_optimizer(optax.sgd(0.5, momentum=0.9))

    @jax.jit
    def run(c, x, y, w):
        def by_rows(c):
            return rows.update(c, rows.init(c), x, y, where=w)

        # With more classes than samples the search for them stands in a loop.
        wide = jnp.stack([jnp.zeros((500, D)), jnp.ones((500, D))])
        cases = [
            (lambda c: move(c, x, y, w), jnp.stack([c, 2 * c, -c])),
            (by_rows, jnp.stack([c, 2 * c, -c])),
            (lambda c: jcl.update_centers(c, x, y), wide),
            (lambda y: jcl.update_centers(wide[0], x, y), jnp.stack([y, jnp.roll(y, 1)])),
        ]
        looped = [jax.tree.map(lambda *a: jnp.stack(a), *map(f, stack)) for f, stack in cases]
        return [jax.vmap(f)(stack) for f, stack in cases], looped

    chex.assert_trees_all_close(*run(*data), rtol=1e-5, atol=1e-6)


def test_a_scaled_loss_has_scaled_gradients_and_micro_batches_add_up(data):
    c, *batch = data
    scales = 2.0**-10, 2.0**15  # Powers of two: exact.

    @jax.jit
    def run():
        scaled = [jax.grad(lambda *a, s=scale: s * loss(*a), (0, 1))(*data) for scale in scales]
        gradients = jax.grad(lambda *a: loss(*a, reduce_fn=jnp.sum), (0, 1))
        parts = [gradients(c, *each) for each in zip(*four(batch), strict=True)]
        return jax.grad(loss, (0, 1))(*data), scaled, gradients(*data), parts

    grads, scaled, whole, parts = run()
    for scale, each in zip(scales, scaled, strict=True):
        chex.assert_trees_all_equal(jax.tree.map(lambda g, s=scale: g / s, each), grads)
    by_centers, by_x = zip(*parts, strict=True)
    chex.assert_trees_all_close((sum(by_centers), np.concatenate(by_x)), whole, rtol=1e-5, atol=1e-6)


def test_steps_with_donated_arguments_are_traced_once_and_take_them(data):
    c, x, y, w = map(jnp.array, data)
    rows = jcl.row_optimizer(optax.sgd(0.5, momentum=0.9))
    traced = []

    def step(c, state, x, y, w):
        traced.append(1)
        value, grad = jax.value_and_grad(loss, 1)(c, x, y, w)
        c, state = rows.update(c, state, x, y, where=w, after=value)
        return jcl.update_centers(c, x, y, where=w, after=c), state, value, grad

    donated, kept = jax.jit(step, donate_argnums=(0, 1)), jax.jit(step)
    state = rows.init(c)
    want = jax.tree.map(jnp.copy, (c, state))
    for i in range(3):
        before = c
        want = kept(*want, x + i, y, w)[:2]
        c, state, *_ = donated(c, state, x + i, y, w)
        assert before.is_deleted()
    assert traced == [1]
    chex.assert_trees_all_close((c, state), want, rtol=1e-6)


def test_scan_and_remat_and_forward_mode(data):
    c, *batch = data

    @jax.jit
    def run():
        batches = four(map(jnp.asarray, batch))
        _, tangent = jax.jvp(lambda c: loss(c, *batch), (c,), (jnp.ones_like(c),))
        scanned, _ = jax.lax.scan(lambda c, each: (move(c, *each), None), jnp.asarray(c), batches)
        looped = c
        for each in zip(*batches, strict=True):
            looped = move(looped, *each)
        return jax.grad(loss)(*data), jax.grad(jax.checkpoint(loss))(*data), tangent, scanned, looped

    grad, rematerialized, tangent, scanned, looped = run()
    np.testing.assert_allclose(rematerialized, grad, rtol=1e-6)
    np.testing.assert_allclose(tangent, grad.sum(), rtol=1e-4)
    np.testing.assert_allclose(scanned, looped, rtol=1e-6)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_batch_over_devices_counts_as_a_whole_under_jit_and_inside_shard_map(data, kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    specs = P(), P("data"), P("data"), P("data")
    placed = jax.device_put(data, tuple(NamedSharding(mesh, spec) for spec in specs))

    def results(*data, **axis):
        value, grads = jax.value_and_grad(loss)(*data, **axis)
        moved = [move(*data, rule=rule, **axis) for rule in ("paper", "gradient")]
        return [value, loss(*data, reduce_fn=jnp.sum, **axis)], grads, moved

    def body(*data):
        return results(*data, axis_name="data")

    losses, grads, moved = jax.jit(results)(*data)
    for spread in (results, jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P())):
        found = jax.jit(spread)(*placed)
        np.testing.assert_allclose(found[0], losses, rtol=1e-6)
        np.testing.assert_allclose(found[1], grads, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[2], moved, rtol=1e-5)


def test_nearest_center_inside_shard_map(rng):
    centers = rng.normal(size=(2500, 4)).astype(np.float32)
    x = rng.normal(size=(16, 4)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    nearest = jax.shard_map(jcl.nearest_center, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    np.testing.assert_array_equal(jax.jit(nearest)(centers, x), jcl.nearest_center(centers, x))


def test_lists_of_labels_under_jit(data):
    c, x, _, _ = data
    for function in (jcl.center_loss, jcl.update_centers):
        under_jit = jax.jit(function)(c, x[:2], [0, 3])
        np.testing.assert_allclose(under_jit, function(c, x[:2], np.array([0, 3])), rtol=1e-6)


def test_named_vmap_axis(data):
    c, *batch = data

    def both(*batch, **axis):
        return loss(c, *batch, **axis), move(c, *batch, **axis)

    values, moved = jax.jit(jax.vmap(partial(both, axis_name="i"), axis_name="i"))(*four(batch))
    value, want = jax.jit(both)(*batch)
    np.testing.assert_allclose(values, np.full(4, value), rtol=1e-6)
    np.testing.assert_allclose(moved, [want] * 4, rtol=1e-5)


def test_outside_of_jit_a_second_call_compiles_nothing(rng, data):
    tables = [rng.normal(size=(classes, D)).astype(np.float32) for classes in (C, 3000)]
    functions = loss, move, lambda c, x, y, w: jcl.nearest_center(c, x)
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    for centers, function in itertools.product(tables, functions):
        function(centers, *data[1:])
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            function(2 * centers, *data[1:])
        finally:
            jax.monitoring.clear_event_listeners()
        assert not compiled, (function, len(centers))


def test_several_blocks_of_sums_inside_shard_map(rng):
    c, d, n = 5000, 512, 2400
    centers, x = rng.normal(size=(c, d)).astype(np.float32), rng.normal(size=(n, d)).astype(np.float32)
    labels = rng.integers(0, c, n).astype(np.int32)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (P(), P("data"), P("data"))

    def whole(c, x, y):
        return jcl.update_centers(c, x, y, axis_name="data")

    def apart(c, x, y):
        return jax.lax.pmean(jcl.update_centers(c, x, y), "data")

    moved, mean = (
        jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P()))(centers, x, labels)
        for f in (whole, apart)
    )
    np.testing.assert_allclose(moved, jcl.update_centers(centers, x, labels), rtol=1e-5, atol=1e-6)
    halves = [jcl.update_centers(centers, x[i], labels[i]) for i in (slice(0, n // 2), slice(n // 2, n))]
    np.testing.assert_allclose(mean, np.mean(halves, axis=0), rtol=1e-5, atol=1e-6)
