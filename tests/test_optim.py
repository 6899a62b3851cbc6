"""Which leaves are centers, and what moves them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jax_centerloss as jcl


def steps(tx, params, grads):
    updates, _ = tx.update(grads, tx.init(params), params)
    return updates


def ones(*shape):
    return jnp.ones(shape)


TREES = {
    "plain": {"dense": ones(2), "centers": ones(3, 2)},
    "nested": {"loss": {"inner": [{"centers": ones(3, 2)}]}, "dense": (ones(2), ones(1))},
    "only": {"centers": ones(3, 2)},
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_centers_are_found_wherever_they_sit(tree):
    updates = steps(jcl.with_center_optimizer(optax.sgd(0.1), optax.sgd(0.7)), tree, tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        rate = 0.7 if "centers" in jax.tree_util.keystr(path) else 0.1
        np.testing.assert_allclose(leaf, -rate * np.ones(leaf.shape), rtol=1e-6)


def test_the_default_is_sgd_at_one_half():
    updates = steps(jcl.with_center_optimizer(optax.sgd(0.1)), TREES["plain"], TREES["plain"])
    np.testing.assert_allclose(updates["centers"], -0.5 * np.ones((3, 2)))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 2, rngs=rngs)
        self.first = jcl.nnx.CenterLoss(4, 2, rngs=rngs)
        self.second = jcl.nnx.CenterLoss(5, 2, rngs=rngs)


@pytest.mark.parametrize("momentum", [None, 0.9])  # With a state of its own, and without.
def test_nnx_state_under_an_optimizer(momentum):
    model = Net(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(model))
    tx = jcl.with_center_optimizer(optax.sgd(0.1, momentum), optax.sgd(0.7, momentum))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    moved = jax.tree.map(lambda a, b: a - b, before, nnx.state(model))
    for path, leaf in jax.tree_util.tree_leaves_with_path(moved):
        rate = 0.7 if "centers" in jax.tree_util.keystr(path) else 0.1
        np.testing.assert_allclose(leaf, rate * np.ones(leaf.shape), rtol=1e-5)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, labels):
        return jcl.linen.CenterLoss(4, 2, name="center_loss")(nn.Dense(2)(x), labels)


def test_linen_params():
    params = LinenNet().init(jax.random.key(0), ones(1, 3), jnp.zeros(1, jnp.int32))["params"]
    updates = steps(jcl.with_center_optimizer(optax.sgd(0.1), optax.sgd(0.7)), params, params)
    np.testing.assert_allclose(
        updates["center_loss"]["centers"], -0.7 * params["center_loss"]["centers"], rtol=1e-6
    )
    np.testing.assert_allclose(updates["Dense_0"]["kernel"], -0.1 * params["Dense_0"]["kernel"], rtol=1e-6)


def test_select_leaves_another_layers_centers_alone():
    params = {"rbf": {"centers": ones(7)}, "loss": {"centers": ones(3, 2)}}
    tx = jcl.with_center_optimizer(
        optax.sgd(0.1), optax.sgd(0.7), select=lambda path, leaf: path == ("loss", "centers")
    )
    updates = steps(tx, params, params)
    np.testing.assert_allclose(updates["rbf"]["centers"], -0.1 * np.ones(7), rtol=1e-6)
    np.testing.assert_allclose(updates["loss"]["centers"], -0.7 * np.ones((3, 2)), rtol=1e-6)


def test_select_sees_the_same_path_under_nnx():
    seen = set()

    def select(path, leaf):
        seen.add(path)
        return path[0] == "second"

    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, jcl.with_center_optimizer(optax.sgd(0.1), select=select), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    assert seen == {("dense", "kernel"), ("dense", "bias"), ("first", "centers"), ("second", "centers")}


def test_a_model_without_centers_is_an_error():
    with pytest.raises(ValueError, match=r'no parameter is below a key "centers".*dense/kernel'):
        jcl.with_center_optimizer(optax.sgd(0.1)).init({"dense": {"kernel": ones(2)}})
    with pytest.raises(ValueError, match="picked by select"):
        jcl.with_center_optimizer(optax.sgd(0.1), select=lambda path, leaf: False).init(TREES["plain"])
    with pytest.raises(ValueError, match="this model has no parameters"):
        jcl.with_center_optimizer(optax.sgd(0.1)).init({})


@pytest.mark.parametrize("half", ["init", "update"])
def test_half_a_transformation_is_none(half):
    given = SimpleNamespace(**{half: lambda *_: None})
    with pytest.raises(TypeError, match="tx must be an optax transformation"):
        jcl.with_center_optimizer(given)
    with pytest.raises(TypeError, match="tx must be an optax transformation"):
        jcl.row_optimizer(given)


@pytest.mark.parametrize(
    "own",
    [
        optax.sgd(0.5, momentum=0.9),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.5, momentum=0.9),
    ],
    ids=["momentum", "clip and adam", "injected"],
)
@jax.numpy_dtype_promotion("standard")  # optax's bias correction promotes.
def test_nnx_state_in_a_loop_of_ones_own(rng, own):
    # The same chain by itself on the bare table takes the same steps.
    _, params = nnx.split(jcl.nnx.CenterLoss(4, 3, rngs=nnx.Rngs(0)), nnx.Param)
    tx = jcl.with_center_optimizer(optax.adam(0.1), own)
    state = tx.init(params)
    alone = jax.tree.leaves(params)[0]
    alone_state = own.init(alone)
    for _ in range(3):
        gradient = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
        grads = jax.tree.unflatten(jax.tree.structure(params), [gradient])
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, alone_state = own.update(gradient, alone_state, alone)
        alone = optax.apply_updates(alone, updates)
    np.testing.assert_array_equal(jax.tree.leaves(params)[0], alone)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"centers must be an optax transformation.*got 0\.5"):
        jcl.with_center_optimizer(optax.sgd(0.1), 0.5)
    with pytest.raises(ValueError, match="this model has a bare array"):
        jcl.with_center_optimizer(optax.sgd(0.1)).init(jnp.zeros((2, 2)))


def test_the_recipe_moves_centers_the_same_at_every_lambda(rng):
    x, labels = rng.normal(size=(32, 3)).astype(np.float32), rng.integers(0, 4, 32)
    start = {"centers": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}

    def run(lam):
        tx = jcl.with_center_optimizer(
            optax.sgd(0.1), centers=optax.chain(optax.scale(1 / lam), optax.sgd(0.5))
        )
        params, state = start, tx.init(start)
        for _ in range(10):
            grads = jax.grad(lambda p: lam * jcl.center_loss(p, x, labels))(params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params["centers"]

    expected = np.asarray(start["centers"], np.float64)
    for _ in range(10):  # The PyTorch loop: its gradient multiplied by 1 / lam by hand, then SGD at 0.5.
        step = np.zeros_like(expected)
        np.add.at(step, labels, 2 * (expected[labels] - x) / len(x))
        expected = expected - 0.5 * step
    for lam in (1.0, 0.1, 5e-4, 1e-6):
        np.testing.assert_allclose(run(lam), expected, rtol=1e-5, atol=1e-6)
