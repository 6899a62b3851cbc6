"""The page on speed: what its three lines of plain JAX get wrong is shown of them, and is right here."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pages
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from placements import collectives

import jax_centerloss as jcl

pytestmark = pytest.mark.usefixtures("as_jax_promotes")

(BLOCK,) = pages.python_of("speed")
plain = pages.defined(BLOCK)["plain_step"]
N, D, C = 24, 4, 10
LAST = C - 1


def ours(c, x, y, where=None):
    loss = jcl.center_loss(c, x, y, where=where)
    return loss, jcl.update_centers(c, x, y, where=where, after=loss)


@partial(jax.jit, static_argnums=0)
def graded(step, c, x, y):
    """The loss, its gradient by the features, and the moved centers."""
    (loss, moved), gradient = jax.value_and_grad(lambda x: step(c, x, y), has_aux=True)(x)
    return loss, gradient, moved


@pytest.fixture
def batch(rng):
    """Of all classes but the last."""
    x, c = rng.normal(size=(N, D)).astype(np.float32), rng.normal(size=(C, D)).astype(np.float32)
    return c, x, rng.integers(0, LAST, N).astype(np.int32)


def changed(array, where, value):
    array = array.copy()
    array[where] = value
    return array


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_full_batch_of_good_labels_is_right_in_both(batch):
    assert_equal(graded(ours, *batch), graded(plain, *batch))


def test_lambda_in_the_step_of_the_centers(batch):
    c, x, y = batch
    lam, rate = 0.01, 0.5

    def moved(loss, tx):
        params = {"w": jnp.ones(2), "centers": c}
        grads = jax.grad(lambda p: jnp.sum(p["w"]) + lam * loss(p["centers"]))(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)["centers"]

    @jax.jit
    def steps():
        def loss(c):
            return plain(c, x, y)[0]

        divided = jcl.with_center_optimizer(optax.sgd(0.1), optax.sgd(rate), weight=lam)
        return (
            c - rate * jax.grad(loss)(c),
            moved(loss, optax.sgd(rate)),
            moved(lambda c: jcl.center_loss(c, x, y), divided),
            jcl.update_centers(c, x, y, alpha=rate, rule="gradient"),
        )

    meant, left_in, divided_out, by_rule = steps()
    np.testing.assert_allclose(left_in - c, lam * (meant - c), rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(divided_out, meant, rtol=1e-5, atol=1e-6)
    # By rule it is not there at all.
    np.testing.assert_allclose(by_rule, meant, rtol=1e-5, atol=1e-6)


def test_padding_trains_the_last_class(batch):
    c, x, y = batch
    padded = changed(y, slice(N // 2, None), -1)
    loss, gradient, moved = graded(plain, c, x, padded)
    want_loss, want_gradient, want = graded(plain, c, x[: N // 2], y[: N // 2])
    assert not np.allclose(loss, want_loss)
    assert np.all(np.any(gradient[N // 2 :] != 0, axis=1))
    assert np.abs(moved[LAST] - c[LAST]).max() > 0.1  # A class that no sample has.
    assert_equal([moved[:LAST]], [want[:LAST]])

    loss, gradient, moved = graded(ours, c, x, padded)
    assert_equal([loss, gradient[: N // 2], moved], [want_loss, want_gradient, want])
    assert not np.any(gradient[N // 2 :])
    np.testing.assert_array_equal(moved[LAST], c[LAST])


def test_nan_in_a_row_that_is_not_used(batch):
    c, x, y = batch
    keep = np.arange(N) > 0
    x = changed(x, 0, np.nan)
    want_loss, want_gradient, want = graded(plain, c, x[1:], y[1:])
    # It is in the loss and in a center.
    loss, _, moved = graded(plain, c, x, y)
    assert np.isnan(loss)
    assert np.all(np.isnan(moved[y[0]]))

    def masked(c, x, y):
        """The three lines with a mask, as it is commonly written."""
        loss = jnp.sum(jnp.where(keep, jnp.sum((x - c[y]) ** 2, -1), 0.0)) / jnp.sum(keep)
        d = (x - c[y]) * keep[:, None]
        n = jnp.zeros(len(c)).at[y].add(keep)[y]
        return loss, c.at[y].add(0.5 * d / (1 + n)[:, None])

    loss, gradient, moved = graded(masked, c, x, y)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    assert np.all(np.isnan(gradient[0]))  # Which a layer below sums up over the samples.
    assert np.all(np.isnan(moved[y[0]]))

    loss, gradient, moved = graded(partial(ours, where=keep), c, x, y)
    assert_equal([loss, gradient[1:], moved], [want_loss, want_gradient, want])
    assert not np.any(gradient[0])


def test_a_label_that_is_out_of_range(batch):
    c, x, y = batch
    wrong = changed(y, 0, C + 3)
    loss, gradient, moved = graded(plain, c, x, wrong)
    # Read, it is the last class, and written, it is none.
    assert_equal([loss, gradient], graded(plain, c, x, changed(y, 0, LAST))[:2])
    np.testing.assert_allclose(gradient[0], 2 * (x[0] - c[LAST]) / N, rtol=1e-5)
    np.testing.assert_array_equal(moved[LAST], c[LAST])

    with pytest.raises(ValueError, match=f"label {C + 3} is out of range for {C} classes"):
        ours(c, x, wrong)
    loss, gradient, moved = graded(ours, c, x, wrong)
    assert np.isnan(loss)
    assert np.all(np.isnan(gradient[0]))
    assert np.all(np.isfinite(gradient[1:]))
    assert_equal([moved], [graded(plain, c, x[1:], y[1:])[2]])


def mesh(kind):
    return jax.make_mesh((8,), ("d",), axis_types=(getattr(AxisType, kind),))


def test_a_mesh_of_explicit_axes(batch):
    c, x, y = batch
    split = NamedSharding(mesh("Explicit"), P("d"))
    c = np.concatenate([c, c[:6]])  # 16 classes, for eight devices.
    wanted = jax.jit(plain)(c, x, y)
    for sharding in (None, NamedSharding(split.mesh, P()), split):
        given = jax.device_put(c, sharding), *jax.device_put((x, y), split)
        with pytest.raises(Exception, match=r"out_sharding|not found in mesh"):
            jax.jit(plain)(*given)
        assert_equal(jax.jit(ours)(*given), wanted)


def test_a_mesh_of_auto_axes_moves_what_is_as_large_as_the_table():
    split = NamedSharding(mesh("Auto"), P("d"))

    def travels(step, classes):
        shape = partial(jax.ShapeDtypeStruct, sharding=split)
        given = shape((classes, D), jnp.float32), shape((N, D), jnp.float32), shape((N,), jnp.int32)
        program = jax.jit(step, donate_argnums=0).lower(*given).compile()
        return sum(size * count for (_, size), count in collectives(program.as_text()).items())

    few, many = 8_000, 80_000
    assert travels(plain, many) >= 9 * travels(plain, few) >= 9 * few * 4
    assert travels(ours, many) == travels(ours, few) < few * 4


def temporaries(step, classes, n=256, d=32):
    # On a mesh of one device: with more at hand and no mesh in sight, the labels are first made whole.
    one = NamedSharding(
        jax.make_mesh((1,), ("one",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]), P()
    )
    shape = partial(jax.ShapeDtypeStruct, sharding=one)
    given = shape((classes, d), jnp.float32), shape((n, d), jnp.float32), shape((n,), jnp.int32)
    memory = jax.jit(step, donate_argnums=0).lower(*given).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= classes * d * 4
    return memory.temp_size_in_bytes


@pytest.mark.usefixtures("for_its_platform", "as_users_run_it")
def test_a_large_table_is_counted_over():
    classes = 1_000_000
    assert temporaries(plain, classes) >= classes * 4  # A count for each class.
    assert temporaries(ours, classes) <= 6 * 256 * 32 * 4 + 64 * 1024


def masked(c, x, y):
    used = y >= 0
    squares = jnp.sum((x - c[jnp.maximum(y, 0)]) ** 2, -1)
    return jnp.sum(jnp.where(used, squares, 0.0)) / jnp.sum(used)


def micro_batches(c, x, y):
    return sum(jnp.mean(jnp.sum((x[i::2] - c[y[i::2]]) ** 2, -1)) for i in range(2))


@pytest.mark.usefixtures("for_its_platform", "as_users_run_it")
@pytest.mark.parametrize("read", [masked, micro_batches], ids=lambda read: read.__name__)
def test_a_large_table_that_is_read_in_another_way_is_copied(read):
    classes = 100_000

    def lines(c, x, y):
        return read(c, x, y), plain(c, x, y)[1]

    def here(c, x, y):
        loss = read(c, x, y)
        return loss, jcl.update_centers(c, x, y, after=loss)

    assert temporaries(lines, classes) >= classes * 32 * 4
    assert temporaries(here, classes) <= 6 * 256 * 32 * 4 + 64 * 1024 + 2**18
