"""Which leaves are centers, and what moves them."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jax_centerloss as jcl


def ones(*shape):
    return np.ones(shape, np.float32)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, labels):
        return jcl.linen.CenterLoss(4, 2, name="center_loss")(nn.Dense(2)(x), labels)


LINEN = jax.eval_shape(LinenNet().init, jax.random.key(0), ones(1, 3), np.zeros(1, np.int32))["params"]
PLAIN = {"dense": ones(2), "centers": ones(3, 2)}
TREES = {
    "plain": PLAIN,
    "nested": {"loss": {"inner": [{"centers": ones(3, 2)}]}, "dense": (ones(2), ones(1))},
    "only": {"centers": ones(3, 2)},
    "linen": jax.tree.map(lambda leaf: ones(*leaf.shape), LINEN),
}


def assert_rates(steps, rate, centers="['centers']"):
    """Centers move by one rate, and everything else by 0.1."""
    steps = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(steps)}
    assert any(centers in path for path in steps)
    for path, leaf in steps.items():
        want = rate if centers in path else 0.1
        np.testing.assert_allclose(-leaf, want * np.ones(leaf.shape), rtol=1e-5)


@pytest.mark.parametrize("name", TREES)
def test_centers_are_found_wherever_they_sit(name):
    params = TREES[name]
    for given, rate in (((), 0.5), ((optax.sgd(0.7),), 0.7)):
        tx = jcl.with_center_optimizer(optax.sgd(0.1), *given)
        assert_rates(tx.update(params, tx.init(params), params)[0], rate)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 2, rngs=rngs)
        self.first = jcl.nnx.CenterLoss(4, 2, rngs=rngs)
        self.second = jcl.nnx.CenterLoss(5, 2, rngs=rngs)


@pytest.mark.parametrize(
    ("momentum", "centers"),
    [(None, "['centers']"), (0.9, "['centers']"), (None, "['second']['centers']")],
    ids=["without a state of its own", "with a state of its own", "centers of one module only"],
)
def test_nnx_state_under_an_optimizer(momentum, centers):
    seen = set()

    def select(path, leaf):
        seen.add(path)
        return path[0] == "second"

    options = {"select": select} if "second" in centers else {}
    model = Net(nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.state(model))
    tx = jcl.with_center_optimizer(optax.sgd(0.1, momentum), optax.sgd(0.7, momentum), **options)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(np.ones_like, nnx.state(model, nnx.Param)))
    assert_rates(jax.tree.map(lambda a, b: np.asarray(a) - b, nnx.state(model), before), 0.7, centers)
    if options:
        assert seen == {("dense", "kernel"), ("dense", "bias"), ("first", "centers"), ("second", "centers")}


@pytest.mark.parametrize(
    ("options", "params", "words"),
    [
        ({}, {"dense": {"kernel": ones(2)}}, r'no parameter is below a key "centers".*dense/kernel'),
        ({"select": lambda path, leaf: False}, PLAIN, "picked by select"),
        ({}, {"a": {"centers": ones(2)}, "b": {"centers": ones(2)}}, "several parameters are below a key"),
        ({}, {}, "this model has no parameters"),
        ({}, ones(2, 2), "this model has a bare array"),
    ],
)
def test_a_model_without_centers_or_with_several_is_an_error(options, params, words):
    tx = jcl.with_center_optimizer(optax.sgd(0.1), **options)
    with pytest.raises(ValueError, match=words):
        tx.init(params)


def test_what_is_no_optimizer_is_refused():
    for half, function in itertools.product(
        ("init", "update"), (jcl.with_center_optimizer, jcl.row_optimizer)
    ):
        with pytest.raises(TypeError, match="tx must be an optax transformation"):
            function(SimpleNamespace(**{half: lambda *_: None}))
    with pytest.raises(TypeError, match=r"centers must be an optax transformation.*got 0\.5"):
        jcl.with_center_optimizer(optax.sgd(0.1), 0.5)


@pytest.mark.parametrize(
    "own",
    [
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.5, momentum=0.9),
    ],
    ids=["clip and adam", "injected momentum"],
)
@jax.numpy_dtype_promotion("standard")  # optax's bias correction promotes.
def test_nnx_state_in_a_loop_of_ones_own(rng, own):
    # The same chain by itself on the bare table takes the same steps.
    _, params = nnx.split(jcl.nnx.CenterLoss(4, 3, rngs=nnx.Rngs(0)), nnx.Param)
    tx = jcl.with_center_optimizer(optax.adam(0.1), own)
    alone = jax.tree.leaves(params)[0]

    @jax.jit
    def step(params, state, alone, alone_state, gradient):
        grads = jax.tree.unflatten(jax.tree.structure(params), [gradient])
        updates, state = tx.update(grads, state, params)
        alone_updates, alone_state = own.update(gradient, alone_state, alone)
        moved = optax.apply_updates(params, updates), optax.apply_updates(alone, alone_updates)
        return moved[0], state, moved[1], alone_state

    carry = params, tx.init(params), alone, own.init(alone)
    for _ in range(3):
        carry = step(*carry, rng.normal(size=(4, 3)).astype(np.float32))
    np.testing.assert_array_equal(jax.tree.leaves(carry[0])[0], carry[2])
    assert np.abs(carry[2] - np.asarray(alone)).max() > 0.1


def test_the_recipe_moves_centers_the_same_at_every_lambda(rng):
    x, labels = rng.normal(size=(32, 3)).astype(np.float32), rng.integers(0, 4, 32)
    start = rng.normal(size=(4, 3)).astype(np.float32)

    @jax.jit
    def run(centers, lam):
        own = optax.chain(optax.scale(1 / lam), optax.sgd(0.5))
        tx = jcl.with_center_optimizer(optax.sgd(0.1), centers=own)

        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: lam * jcl.center_loss(p, x, labels))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"centers": centers}
        return jax.lax.scan(step, (params, tx.init(params)), length=10)[0][0]["centers"]

    expected = np.float64(start)
    for _ in range(10):  # The PyTorch loop: its gradient multiplied by 1 / lam by hand, then SGD at 0.5.
        step = np.zeros_like(expected)
        np.add.at(step, labels, 2 * (expected[labels] - x) / len(x))
        expected = expected - 0.5 * step
    for lam in (1.0, 0.1, 5e-4, 1e-6):
        np.testing.assert_allclose(run(start, np.float32(lam)), expected, rtol=1e-5, atol=1e-6)


def test_lambda_that_returns_to_zero_leaves_centers_at_rest():
    # Momentum and weight decay would carry them on.
    own = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5, momentum=0.9))
    tx = jcl.with_center_optimizer(optax.sgd(0.1), own, weight=lambda n: jnp.where(n < 1, 0.5, 0.0))
    params, update = {"centers": jnp.ones((3, 2))}, jax.jit(tx.update)
    updates, state = update(params, tx.init(params), params)
    assert np.all(updates["centers"] != 0)
    updates, after = update(params, state, params)
    np.testing.assert_array_equal(updates["centers"], np.zeros((3, 2)))
    traces = (optax.tree_utils.tree_get(one, "trace")["centers"] for one in (state, after))
    np.testing.assert_array_equal(*traces)
