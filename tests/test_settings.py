"""Under every strict setting of JAX, everything public runs clean and returns what it returns without."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference import enable_x64

import jax_centerloss as jcl

C, D, N = 2000, 3, 12  # More than a block of nearest_center, and more classes than samples.
ROWS = jcl.row_optimizer(optax.sgd(0.25, momentum=0.5))


def value_and_gradients(c, x, y, w):
    return jax.value_and_grad(jcl.center_loss, (0, 1))(c, x, y, where=w)


def training_step(c, x, y, w):
    """A step of a model in which optax moves the centers, without what strict promotion forbids optax."""
    tx = jcl.with_center_optimizer(optax.sgd(0.5), optax.sgd(0.25))
    params = {"scale": jnp.ones((), x.dtype), "loss": {"centers": c}}

    def loss_fn(p):
        return jcl.center_loss(p["loss"], p["scale"] * x, y, where=w)

    updates, _ = tx.update(jax.grad(loss_fn)(params), tx.init(params), params)
    return optax.apply_updates(params, updates)


def modules(c, x, y, w):
    def init(key, shape, dtype):
        del key, shape
        return jnp.asarray(c, dtype)

    module = jcl.nnx.CenterLoss(C, D, centers_init=init, centers_as="state", rngs=nnx.Rngs(0))
    loss = module(x, y, where=w)
    module.update_centers(x, y, where=w, after=loss)
    linen = jcl.linen.CenterLoss(C, D, centers_init=init, centers_as="state")
    moved = linen.apply({"centers": {"centers": c}}, x, y, where=w, mutable=["centers"])
    return loss, jax.tree.leaves(nnx.state(module)), moved


FUNCTIONS = {
    "loss": value_and_gradients,
    "paper": lambda c, x, y, w: jcl.update_centers(c, x, y, where=w),
    "gradient": lambda c, x, y, w: jcl.update_centers({"centers": c}, x, y, where=w, rule="gradient"),
    "rows": lambda c, x, y, w: ROWS.update(c, ROWS.init(c), x, y, where=w, rule="paper"),
    "rounded": lambda c, x, y, w: jcl.update_centers(
        c.astype(jnp.float16), x, y, where=w, rounding_key=jax.random.key(0)
    ),
    "distances": lambda c, x, y, w: jcl.distance_map(c, x),
    "nearest": lambda c, x, y, w: jcl.nearest_center(c, x),
    "metrics": lambda c, x, y, w: jcl.center_metrics(c, x, y, where=w, previous=0.5 * c),
    "optax": training_step,
    "modules": modules,
}
SETTINGS = {
    "debug_nans and debug_infs": lambda: stack(jax.debug_nans(True), jax.debug_infs(True)),
    "x64": enable_x64,
    "disable_jit": jax.disable_jit,
    "leaks": jax.checking_leaks,
    "x64 and no promotion": lambda: stack(
        enable_x64(), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")
    ),
}


# With these each operation is compiled, traced or looked at alone.
SLOW = {"debug_nans and debug_infs", "disable_jit", "leaks"}
EACH_SETTING = pytest.mark.parametrize(
    "setting",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SETTINGS],
)


@contextlib.contextmanager
def stack(*contexts):
    with contextlib.ExitStack() as entered:
        for context in contexts:
            entered.enter_context(context)
        yield


@pytest.fixture(scope="module")
def arguments():
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, C, N).astype(np.int32)
    labels[:3] = 5
    centers, x = rng.normal(size=(C, D)).astype(np.float32), rng.normal(size=(N, D)).astype(np.float32)
    return centers, x, labels, rng.random(N) < 0.8


def everything(*arguments):
    return {name: function(*arguments) for name, function in FUNCTIONS.items()}


@pytest.fixture(scope="module")
def usual(arguments):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.device_get(jax.jit(everything)(*arguments))


@EACH_SETTING
def test_clean_and_the_same(setting, arguments, usual):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), SETTINGS[setting]():
        given = tuple(jnp.asarray(a) for a in arguments)
        found = [jax.jit(everything)(*given)]
        if setting.startswith("debug"):  # Outside of jit too, where each operation is looked at.
            found.append(everything(*given))
            jax.vmap(jcl.center_loss, (None, 0, 0))(given[0], given[1][None], given[2][None])
    for result in found:
        chex.assert_trees_all_equal_dtypes(result, usual)
        chex.assert_trees_all_close(jax.device_get(result), usual, rtol=1e-5, atol=1e-6)


@EACH_SETTING
def test_a_row_optimizer_is_made(setting):
    with SETTINGS[setting]():
        rows = jcl.row_optimizer(optax.sgd(0.25, momentum=0.5))
        centers = jnp.zeros((3, 2), jnp.float32)
        moved, _ = rows.update(centers, rows.init(centers), jnp.ones((1, 2), jnp.float32), jnp.array([1]))
    np.testing.assert_allclose(moved, [[0, 0], [0.5, 0.5], [0, 0]])


@pytest.mark.parametrize("setting", ["leaks", "debug_nans and debug_infs"])
def test_class_means(setting, arguments):
    centers, x, labels, _ = arguments
    with SETTINGS[setting](), pytest.warns(UserWarning, match="never seen"):
        means = jcl.init_from_features(centers, [(x, labels)])
    np.testing.assert_allclose(means[5], x[labels == 5].mean(0), rtol=1e-5)
