"""The same numbers under every JAX transformation, and over the whole batch when it is spread."""

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


def test_jit_is_eager(data):
    for function in (loss, lambda c, x, y, w: jcl.update_centers(c, x, y, where=w)):
        chex.assert_trees_all_close(jax.jit(function)(*data), function(*data), rtol=1e-6)


def test_vmap_is_a_loop(data):
    c, x, y, w = data
    split = [a.reshape(4, 4, *a.shape[1:]) for a in (x, y, w)]
    for function in (loss, lambda c, x, y, w: jcl.update_centers(c, x, y, where=w)):
        looped = jnp.stack([function(c, *(a[i] for a in split)) for i in range(4)])
        np.testing.assert_allclose(jax.vmap(function, (None, 0, 0, 0))(c, *split), looped, rtol=1e-5)
    ensemble = jnp.stack([c, 2 * c])
    looped = jnp.stack([jax.grad(loss)(table, x, y, w) for table in ensemble])
    vmapped = jax.vmap(jax.grad(loss), (0, None, None, None))(ensemble, x, y, w)
    np.testing.assert_allclose(vmapped, looped, rtol=1e-5, atol=1e-6)


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
    c, x, y, w = data
    ensemble = jnp.stack([c, 2 * c, -c])
    rows = jcl.row_optimizer(optax.sgd(0.5, momentum=0.9))

    def by_rows(c):
        return rows.update(c, rows.init(c), x, y, where=w)

    for function in (lambda c: jcl.update_centers(c, x, y, where=w), by_rows):
        looped = jax.tree.map(lambda *a: jnp.stack(a), *map(function, ensemble))
        chex.assert_trees_all_close(jax.vmap(function)(ensemble), looped, rtol=1e-5, atol=1e-6)
    # More classes than samples: the search for them stands in a loop.
    wide = jnp.stack([jnp.zeros((500, D)), jnp.ones((500, D))])
    looped = jnp.stack([jcl.update_centers(table, x, y) for table in wide])
    vmapped = jax.vmap(lambda c, y: jcl.update_centers(c, x, y), (0, None))(wide, y)
    np.testing.assert_allclose(vmapped, looped, rtol=1e-5, atol=1e-6)
    labels = jnp.stack([y, np.roll(y, 1)])
    looped = jnp.stack([jcl.update_centers(wide[0], x, each) for each in labels])
    vmapped = jax.vmap(lambda y: jcl.update_centers(wide[0], x, y))(labels)
    np.testing.assert_allclose(vmapped, looped, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**15])
def test_a_scaled_loss_has_scaled_gradients(data, scale):
    grads = jax.grad(loss, (0, 1))(*data)
    scaled = jax.grad(lambda *a: scale * loss(*a), (0, 1))(*data)
    chex.assert_trees_all_equal(jax.tree.map(lambda g: g / scale, scaled), grads)  # A power of two: exact.


def test_micro_batches_add_up(data):
    c, x, y, w = data
    whole = jax.grad(loss, (0, 1))(c, x, y, w, reduce_fn=jnp.sum)
    parts = [
        jax.grad(loss, (0, 1))(c, x[i : i + 4], y[i : i + 4], w[i : i + 4], reduce_fn=jnp.sum)
        for i in range(0, N, 4)
    ]
    added = sum(part[0] for part in parts), jnp.concatenate([part[1] for part in parts])
    chex.assert_trees_all_close(added, whole, rtol=1e-5, atol=1e-6)


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
    c, x, y, w = data
    grad = jax.grad(loss)(c, x, y, w)
    np.testing.assert_allclose(jax.grad(jax.checkpoint(loss))(c, x, y, w), grad, rtol=1e-6)
    _, tangent = jax.jvp(lambda c: loss(c, x, y, w), (c,), (jnp.ones_like(c),))
    np.testing.assert_allclose(tangent, grad.sum(), rtol=1e-4)
    batches = tuple(jnp.asarray(a).reshape(4, 4, *a.shape[1:]) for a in (x, y, w))
    scanned, _ = jax.lax.scan(
        lambda c, b: (jcl.update_centers(c, b[0], b[1], where=b[2]), None), jnp.asarray(c), batches
    )
    looped = c
    for i in range(4):
        looped = jcl.update_centers(looped, batches[0][i], batches[1][i], where=batches[2][i])
    np.testing.assert_allclose(scanned, looped, rtol=1e-6)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_inside_shard_map_means_and_counts_are_global(data, kind):
    c, x, y, w = data
    mesh = jax.make_mesh((8,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    c, x, y, w = (
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip(data, (P(), P("data"), P("data"), P("data")), strict=True)
    )

    def body(c, x, y, w):
        value, grads = jax.value_and_grad(loss)(c, x, y, w, axis_name="data")
        total = loss(c, x, y, w, axis_name="data", reduce_fn=jnp.sum)
        moved = [
            jcl.update_centers(c, x, y, where=w, rule=r, axis_name="data") for r in ("paper", "gradient")
        ]
        return value, grads, total, moved

    specs = (P(), P("data"), P("data"), P("data"))
    value, grads, total, moved = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P()))(
        c, x, y, w
    )
    expected = jax.value_and_grad(loss)(*data)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(grads, expected[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total, loss(*data, reduce_fn=jnp.sum), rtol=1e-6)
    for rule, ours in zip(("paper", "gradient"), moved, strict=True):
        np.testing.assert_allclose(ours, jcl.update_centers(*data[:3], where=data[3], rule=rule), rtol=1e-5)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_batch_sharded_under_jit(data, kind):
    c, x, y, w = data
    mesh = jax.make_mesh((8,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    placed = jax.device_put((c, x, y, w), (whole, split, split, split))
    chex.assert_trees_all_close(
        jax.jit(jax.value_and_grad(loss))(*placed), jax.value_and_grad(loss)(*data), rtol=1e-5, atol=1e-6
    )


def test_nearest_center_inside_shard_map(rng):
    centers = rng.normal(size=(2500, 4)).astype(np.float32)
    x = rng.normal(size=(16, 4)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    nearest = jax.shard_map(jcl.nearest_center, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    np.testing.assert_array_equal(jax.jit(nearest)(centers, x), jcl.nearest_center(centers, x))


@pytest.mark.parametrize("function", [jcl.center_loss, jcl.update_centers])
def test_lists_of_labels_under_jit(data, function):
    c, x, _, _ = data
    np.testing.assert_allclose(
        jax.jit(function)(c, x[:2], [0, 3]), function(c, x[:2], np.array([0, 3])), rtol=1e-6
    )


def test_named_vmap_axis(data):
    c, x, y, w = data
    split = [a.reshape(4, 4, *a.shape[1:]) for a in (x, y, w)]
    values = jax.vmap(lambda x, y, w: loss(c, x, y, w, axis_name="i"), axis_name="i")(*split)
    np.testing.assert_allclose(values, np.full(4, loss(c, x, y, w)), rtol=1e-6)
    moved = jax.vmap(lambda x, y, w: jcl.update_centers(c, x, y, where=w, axis_name="i"), axis_name="i")(
        *split
    )
    np.testing.assert_allclose(moved[0], jcl.update_centers(c, x, y, where=w), rtol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        loss,
        lambda c, x, y, w: jcl.update_centers(c, x, y, where=w),
        lambda c, x, y, w: jcl.nearest_center(c, x),
    ],
)
@pytest.mark.parametrize("classes", [C, 3000])
def test_outside_of_jit_a_second_call_compiles_nothing(rng, data, function, classes):
    _, x, y, w = data
    centers = rng.normal(size=(classes, D)).astype(np.float32)
    function(centers, x, y, w)
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        function(2 * centers, x, y, w)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not compiled


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
