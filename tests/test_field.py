"""What real programs do: situations from public reports, written anew, each with its source."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P

import jax_centerloss as jcl
from jax_centerloss._checks import RULES

C, D, N = 3, 16, 48


class RadialBasis(nnx.Module):
    """Another layer whose parameter is called centers."""

    def __init__(self, rngs):
        self.centers = nnx.Param(jax.random.normal(rngs.params(), (D, 8)))

    def __call__(self, x):
        return jnp.exp(-jnp.sum((x[:, None] - self.centers[...][None]) ** 2, -1))


class Model(nnx.Module):
    def __init__(self, rngs, **options):
        self.rbf = RadialBasis(rngs)
        self.head = nnx.Linear(D, C, rngs=rngs)
        self.center_loss = jcl.nnx.CenterLoss(C, D, rngs=rngs, **options)


@pytest.fixture
def batch(rng):
    return rng.normal(size=(N, 8)).astype(np.float32), rng.integers(0, C, N).astype(np.int32)


def loss_of(model, lam, x, labels):
    features = model.rbf(x)
    each = optax.softmax_cross_entropy_with_integer_labels(model.head(features), labels)
    return each.mean() + lam * model.center_loss(features, labels)


@nnx.jit(static_argnames="lam")
def train_step(model, optimizer, x, labels, lam):
    grads = nnx.grad(loss_of)(model, lam, x, labels)
    optimizer.update(model, grads)


def table(model):
    return np.asarray(jax.tree.leaves(nnx.state(model.center_loss))[0])


# Whose centers.


def test_another_layer_has_centers_too(batch):
    # KaiyangZhou/pytorch-center-loss issue 2: λ divided out, here beside a radial basis layer.
    model = Model(nnx.Rngs(0))
    tx = jcl.with_center_optimizer(optax.sgd(0.0), optax.sgd(0.5), weight=1e-3)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    basis, start = np.asarray(model.rbf.centers[...]), table(model)
    want = jcl.update_centers(start, model.rbf(batch[0]), batch[1], rule="gradient")
    train_step(model, optimizer, *batch, lam=1e-3)
    np.testing.assert_array_equal(model.rbf.centers[...], basis)
    np.testing.assert_allclose(table(model), want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")
def test_a_model_with_another_layers_centers_learns(batch):
    model = Model(nnx.Rngs(0))
    labels = np.asarray(model.rbf(batch[0]).argmax(-1) % C)
    tx = jcl.with_center_optimizer(optax.adam(1e-2), optax.sgd(0.5), weight=1e-3)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    first = loss_of(model, 0.0, batch[0], labels)
    for _ in range(200):
        train_step(model, optimizer, batch[0], labels, lam=1e-3)
    assert np.max(model.rbf(batch[0])) > 0.1  # They had collapsed to 3e-5.
    assert loss_of(model, 0.0, batch[0], labels) < first - 0.2


def test_centers_that_are_state_beside_another_layer():
    model = Model(nnx.Rngs(0), centers_as="state")
    with pytest.raises(
        ValueError,
        match=r"known to belong to an nnx\.CenterLoss; rbf/centers may be .*update_centers or a row",
    ):
        nnx.Optimizer(model, jcl.with_center_optimizer(optax.adam(1e-2)), wrt=nnx.Param)


def test_several_center_losses_of_one_nnx_model_are_all_found(rng):
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.heads = (
                nnx.List([jcl.nnx.CenterLoss(C, 2, rngs=rngs) for _ in range(2)])
                if hasattr(nnx, "List")
                else [jcl.nnx.CenterLoss(C, 2, rngs=rngs) for _ in range(2)]
            )
            self.rbf = RadialBasis(rngs)

    model = Two(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, jcl.with_center_optimizer(optax.sgd(0.0), optax.sgd(1.0)), wrt=nnx.Param)
    before = [np.asarray(head.centers[...]) for head in model.heads]
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    for head, start in zip(model.heads, before, strict=True):
        np.testing.assert_allclose(head.centers[...], start - 1, rtol=1e-6)


@pytest.mark.parametrize("name", ["rbf", "vlad", "clusters"])
def test_two_layers_with_centers_in_a_plain_tree_are_an_error(name):
    # NetVLAD and deep clustering have a parameter of that name as well.
    params = {name: {"centers": jnp.ones((4, 2))}, "loss": {"centers": jnp.ones((3, 2))}, "w": jnp.ones(2)}
    with pytest.raises(
        ValueError, match=rf"{name}/centers.*select=lambda path, leaf: path == \(.center_loss"
    ):
        jcl.with_center_optimizer(optax.sgd(0.1)).init(params)
    tx = jcl.with_center_optimizer(optax.sgd(0.1), select=lambda path, leaf: path == ("loss", "centers"))
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates[name]["centers"], -0.1 * np.ones((4, 2)), rtol=1e-6)
    np.testing.assert_allclose(updates["loss"]["centers"], -0.5 * np.ones((3, 2)), rtol=1e-6)


def test_centers_of_ones_own_in_nnx_are_named_by_select():
    class Own(nnx.Module):
        def __init__(self):
            self.centers = nnx.Param(jnp.zeros((C, 2)))

    model = Own()
    with pytest.raises(ValueError, match="name them by `select`"):
        nnx.Optimizer(model, jcl.with_center_optimizer(optax.sgd(0.1)), wrt=nnx.Param)
    tx = jcl.with_center_optimizer(optax.sgd(0.1), select=lambda path, leaf: path == ("centers",))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model)))
    np.testing.assert_allclose(model.centers[...], -0.5 * np.ones((C, 2)))


# λ.


@pytest.mark.parametrize("own", [optax.sgd(0.5), optax.sgd(0.5, momentum=0.9), optax.adam(0.1)])
@jax.numpy_dtype_promotion("standard")
def test_lambda_warmed_up_from_zero(rng, own):
    # KaiyangZhou/pytorch-center-loss issues 7 and 25: the weight, divided out by hand, and NaN.
    x, labels = rng.normal(size=(N, 2)).astype(np.float32), rng.integers(0, C, N)

    def lam(step):
        return jnp.maximum(0.0, 0.01 * (step.astype(jnp.float32) - 1))  # 0 in the first two steps.

    tx = jcl.with_center_optimizer(optax.sgd(0.1), own, weight=lam)
    params = want = {"centers": jnp.ones((C, 2))}
    state, own_state = tx.init(params), own.init(want)
    for step in range(5):
        grads = jax.grad(lambda p, s=step: lam(jnp.int32(s)) * jcl.center_loss(p, x, labels))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if step >= 2:  # Before that, centers and their optimizer rest.
            updates, own_state = own.update(jax.grad(jcl.center_loss)(want, x, labels), own_state, want)
            want = optax.apply_updates(want, updates)
        np.testing.assert_allclose(params["centers"], want["centers"], rtol=1e-4)


def test_lambda_that_returns_to_zero_leaves_centers_at_rest():
    # Momentum and weight decay would carry them on.
    own = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5, momentum=0.9))
    tx = jcl.with_center_optimizer(optax.sgd(0.1), own, weight=lambda n: jnp.where(n < 1, 0.5, 0.0))
    params = {"centers": jnp.ones((C, 2))}
    updates, state = tx.update(params, tx.init(params), params)
    assert np.all(updates["centers"] != 0)
    updates, after = tx.update(params, state, params)
    np.testing.assert_array_equal(updates["centers"], np.zeros((C, 2)))
    trace = [leaf for leaf in jax.tree.leaves(after) if leaf.ndim]
    for old, new in zip([leaf for leaf in jax.tree.leaves(state) if leaf.ndim], trace, strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("lam", [5e-4, 1e-5, np.float32(0.1), jnp.float32(2)])
def test_lambda_divides_tables_of_every_dtype(lam, dtype):
    # 1 / 1e-5 is infinite in float16.
    params = {"centers": jnp.ones((C, 2), dtype)}
    grads = {"centers": jnp.full((C, 2), 0.25 * float(lam), jnp.float32).astype(dtype)}
    tx = jcl.with_center_optimizer(optax.sgd(0.1), optax.sgd(1.0), weight=lam)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["centers"].dtype == dtype
    want = -np.asarray(grads["centers"], np.float64) / float(lam)
    np.testing.assert_allclose(np.asarray(updates["centers"], np.float64), want, rtol=2e-2)


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        ("0.1", TypeError, "weight must be a number, got str.*optax schedule"),
        (np.ones(3), ValueError, r"weight must be a number or a scalar array, got shape \(3,\)"),
        ({"lam": 0.1}, TypeError, "weight must be a number, got a dict"),
        (1 + 2j, TypeError, "weight must be a real number, got complex64"),
        (-0.1, ValueError, r"weight must not be negative or NaN, got -0\.1"),
        (np.nan, ValueError, "weight must not be negative or NaN"),
    ],
)
def test_a_lambda_that_is_no_number_is_refused(weight, error, words):
    with pytest.raises(error, match=words):
        jcl.with_center_optimizer(optax.sgd(0.1), weight=weight)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("kind", [float, np.float32, jnp.float32, "schedule"])
def test_a_lambda_of_any_type_is_divided_out(kind, jit):
    lam = jnp.float32(0.5)
    weight = (lambda step: lam) if kind == "schedule" else kind(0.5)
    params, gradient = {"centers": jnp.zeros((3, 2))}, {"centers": jnp.ones((3, 2))}
    tx = jcl.with_center_optimizer(optax.sgd(0.1), optax.sgd(1.0), weight=weight)
    update = jax.jit(tx.update) if jit else tx.update
    updates, _ = update(gradient, tx.init(params), params)
    np.testing.assert_array_equal(updates["centers"], np.full((3, 2), -2.0))


def test_a_schedule_of_lambda_that_turns_negative_is_refused_where_its_value_is_known():
    params = {"centers": jnp.ones((3, 2))}
    tx = jcl.with_center_optimizer(optax.sgd(0.1), weight=lambda step: 0.1 - 0.2 * step.astype(jnp.float32))
    _, state = tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=r"weight must not be negative or NaN, got -0\.1"):
        tx.update(params, state)


# What optax wraps around.


def frozen(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "rbf" in jax.tree_util.keystr(path), params)


def trained(params):
    return jax.tree.map(lambda freeze: not freeze, frozen(params))


def groups(params):
    return jax.tree.map(lambda freeze: "freeze" if freeze else "train", frozen(params))


WRAPPERS = {
    # google-deepmind/optax issues 296 and 1148, google/flax issue 3050: freezing, with NNX and Linen.
    "masked": lambda tx: optax.chain(optax.masked(tx, trained), optax.masked(optax.set_to_zero(), frozen)),
    "partition": lambda tx: optax.partition({"train": tx, "freeze": optax.set_to_zero()}, groups),
    "chain": lambda tx: optax.chain(optax.clip(1e6), tx),
    "named chain": lambda tx: optax.named_chain(("all", tx)),
    "apply if finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally": lambda tx: optax.conditionally_mask(tx, lambda step: step >= 0),
    "gradient accumulation": lambda tx: optax.MultiSteps(tx, 1),
    "inject": lambda tx: optax.inject_hyperparams(
        lambda learning_rate: jcl.with_center_optimizer(optax.sgd(learning_rate), optax.sgd(0.5), weight=1e-3)
    )(learning_rate=0.0),
}


@pytest.mark.few(5)
@pytest.mark.parametrize("as_nnx", [True, False], ids=["nnx", "dict"])
@pytest.mark.parametrize("name", WRAPPERS)
@jax.numpy_dtype_promotion("standard")
def test_what_optax_wraps_around(batch, name, as_nnx):
    inner = jcl.with_center_optimizer(optax.sgd(0.0), optax.sgd(0.5), weight=1e-3)
    tx = WRAPPERS[name](inner)
    model = Model(nnx.Rngs(0))
    want = jcl.update_centers(table(model), model.rbf(batch[0]), batch[1], rule="gradient")
    if as_nnx:
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        train_step(model, optimizer, *batch, lam=1e-3)
        got = table(model)
    else:
        grads = nnx.to_pure_dict(nnx.grad(loss_of)(model, 1e-3, *batch))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        for tree in (grads, params):
            tree["rbf"] = {"means": tree["rbf"]["centers"]}
        updates, _ = tx.update(grads, tx.init(params), params)
        got = optax.apply_updates(params, updates)["center_loss"]["centers"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_optimizers_state_is_mapped_by_its_params():
    # optax.tree.map_params places a state beside its params; it calls init with a placeholder.
    params = {"w": jnp.ones(2), "loss": {"centers": jnp.ones((C, 2))}}
    tx = jcl.with_center_optimizer(optax.adam(0.1), optax.sgd(0.1, momentum=0.9), weight=0.1)
    state = tx.init(params)
    doubled = optax.tree_utils.tree_map_params(tx, lambda leaf: leaf + 1, state)
    assert sum(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(doubled)) == 2 + 2 + C * 2


def test_a_linen_train_state(batch):
    from flax.training.train_state import TrainState

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, labels):
            return jcl.linen.CenterLoss(C, 4, name="center_loss")(nn.Dense(4)(x), labels)

    params = Net().init(jax.random.key(0), *batch)["params"]
    tx = optax.masked(
        jcl.with_center_optimizer(optax.sgd(0.0), weight=0.1),
        lambda p: jax.tree_util.tree_map_with_path(lambda path, _: "bias" not in str(path), p),
    )
    state = TrainState.create(apply_fn=Net().apply, params=params, tx=tx)
    grads = jax.grad(lambda p: 0.1 * state.apply_fn({"params": p}, *batch))(params)
    moved = state.apply_gradients(grads=grads).params["center_loss"]["centers"]
    x = nn.Dense(4).apply({"params": params["Dense_0"]}, batch[0])
    want = jcl.update_centers(params["center_loss"], x, batch[1], rule="gradient")["centers"]
    np.testing.assert_allclose(moved, want, rtol=1e-5, atol=1e-6)


# Centers that nothing moves.


def test_the_gradient_of_centers_that_are_state_is_there_for_who_asks(rng):
    # davidsandberg/facenet issue 575 and michuanhaohao/reid-strong-baseline issue 181: they never moved.
    x, labels = rng.normal(size=(N, 2)).astype(np.float32), rng.integers(0, C, N)
    module = jcl.nnx.CenterLoss(C, 2, centers_as="state", rngs=nnx.Rngs(0))
    want = jcl.update_centers(nnx.state(module), x, labels, rule="gradient")
    optimizer = nnx.Optimizer(module, optax.sgd(0.5), wrt=jcl.nnx.Centers)
    wrt = nnx.DiffState(0, nnx.Any(nnx.Param, jcl.nnx.Centers))
    optimizer.update(module, nnx.grad(lambda m: m(x, labels), argnums=wrt)(module))
    np.testing.assert_allclose(module.centers[...], jax.tree.leaves(want)[0], rtol=1e-5)


def test_state_in_an_optimizer_of_all_is_trained_and_not_only_shrunk(rng):
    x, labels = rng.normal(size=(N, 2)).astype(np.float32), rng.integers(0, C, N)
    module = jcl.nnx.CenterLoss(C, 2, centers_as="state", rngs=nnx.Rngs(0))
    everything = nnx.Any(nnx.Param, jcl.nnx.Centers)
    optimizer = nnx.Optimizer(module, optax.adamw(0.05), wrt=everything)

    @nnx.jit
    def step(module, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: m(x, labels), argnums=nnx.DiffState(0, everything))(module)
        optimizer.update(module, grads)
        return loss

    with jax.numpy_dtype_promotion("standard"):
        losses = [step(module, optimizer) for _ in range(60)]
    means = np.stack([x[labels == j].mean(0) for j in range(C)])
    assert losses[-1] < losses[0]
    assert np.abs(module.centers[...] - means).max() < 0.3


def test_with_center_optimizer_takes_state_where_its_type_is_asked_for():
    module = jcl.nnx.CenterLoss(C, 2, centers_as="state", rngs=nnx.Rngs(0))
    start = np.asarray(module.centers[...])
    tx = jcl.with_center_optimizer(optax.sgd(0.0), optax.sgd(1.0))
    optimizer = nnx.Optimizer(module, tx, wrt=jcl.nnx.Centers)
    optimizer.update(module, jax.tree.map(jnp.ones_like, nnx.state(module)))
    np.testing.assert_allclose(module.centers[...], start - 1, rtol=1e-6)


@pytest.mark.parametrize("centers_as", ["param", "state"])
def test_an_assigned_array_goes_into_the_variable(rng, centers_as):
    # As `criterion.centers.data = ...` does in PyTorch.
    x, labels = rng.normal(size=(N, 2)).astype(np.float32), rng.integers(0, C, N)
    module = jcl.nnx.CenterLoss(C, 2, centers_as=centers_as, rngs=nnx.Rngs(0))
    kind = type(module.centers)
    module.centers = np.ones((C, 2), np.float32)
    assert type(module.centers) is kind
    np.testing.assert_array_equal(module.centers[...], np.ones((C, 2)))
    tx = jcl.with_center_optimizer(optax.sgd(0.1), optax.sgd(0.5))
    optimizer = nnx.Optimizer(module, tx, wrt=kind)
    grads = nnx.grad(lambda m: m(x, labels), argnums=nnx.DiffState(0, kind))(module)
    optimizer.update(module, grads)
    want = jcl.update_centers(np.ones((C, 2), np.float32), x, labels, rule="gradient")
    np.testing.assert_allclose(module.centers[...], want, rtol=1e-5)


def test_an_assigned_table_keeps_kind_dtype_and_placement():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, P("d", None))
    options = {"param_dtype": jnp.bfloat16, "out_sharding": split, "centers_as": "state"}
    module = jcl.nnx.CenterLoss(8, 2, **options, rngs=nnx.Rngs(0))
    for value in (np.ones((8, 2), np.float32), nnx.Param(jnp.ones((8, 2)))):
        module.centers = value
        (centers,) = jax.tree.leaves(nnx.state(module, jcl.nnx.Centers))
        assert centers.dtype == jnp.bfloat16
        assert centers.sharding.is_equivalent_to(split, 2)
        np.testing.assert_array_equal(np.asarray(centers, np.float32), 1)
    with pytest.raises(ValueError, match=r"CenterLoss\(8, 2\), but its centers have shape \(6, 2\)"):
        module.centers = np.ones((6, 2), np.float32)
    with pytest.raises(TypeError, match="centers must be floating point"):
        module.centers = np.ones((8, 2), int)
    other = jcl.nnx.CenterLoss(8, 2, **options, rngs=nnx.Rngs(1))
    other.centers = module.centers  # Shared.
    assert other.centers is module.centers


def test_a_replaced_parameter_is_still_of_the_center_loss():
    module = jcl.nnx.CenterLoss(C, 2, rngs=nnx.Rngs(0))
    module.centers = nnx.Param(jnp.zeros((C, 2)))
    optimizer = nnx.Optimizer(
        module, jcl.with_center_optimizer(optax.sgd(0.0), optax.sgd(1.0)), wrt=nnx.Param
    )
    optimizer.update(module, jax.tree.map(jnp.ones_like, nnx.state(module)))
    np.testing.assert_array_equal(module.centers[...], -np.ones((C, 2)))


def test_a_model_that_can_be_called_is_a_tree_like_any_other():
    # Equinox's modules are such trees.
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Callable:
        centers: jax.Array
        w: jax.Array

        def __call__(self, x):
            return x @ self.w

    model = Callable(jnp.ones((C, 2)), jnp.ones((2, 2)))
    tx = jcl.with_center_optimizer(optax.sgd(0.1), optax.sgd(0.7))
    updates, _ = tx.update(model, tx.init(model), model)
    np.testing.assert_allclose(updates.centers, -0.7 * np.ones((C, 2)), rtol=1e-6)
    np.testing.assert_allclose(updates.w, -0.1 * np.ones((2, 2)), rtol=1e-6)


def test_previous_that_follows_the_module_is_refused(rng):
    x, labels = rng.normal(size=(N, 2)).astype(np.float32), rng.integers(0, C, N)
    module = jcl.nnx.CenterLoss(C, 2, centers_as="state", rngs=nnx.Rngs(0))
    copy, state = jax.tree.map(jnp.copy, nnx.state(module)), nnx.state(module)
    module.update_centers(x, labels)
    words = r"previous holds the centers themselves.*jax\.tree\.map\(jnp\.copy, params\)"
    for previous in (module, state, nnx.state(module), module.centers, module.centers[...]):
        for function in (jcl.center_metrics, jcl.plot):
            with pytest.raises(ValueError, match=words):
                function(module, x, labels, previous=previous)
    with pytest.raises(ValueError, match=words):
        nnx.jit(lambda m: jcl.center_metrics(m, x, labels, previous=nnx.state(m)))(module)
    assert jcl.center_metrics(module, x, labels, previous=copy)["moved"] > 0.01
    with pytest.raises(ValueError, match=words):
        jax.jit(lambda c: jcl.center_metrics(c, x, labels, previous=c))(jnp.zeros((C, 2)))


# Declared sizes.


def test_a_linen_state_of_another_size_is_refused(rng):
    x, labels = rng.normal(size=(4, 2)).astype(np.float32), np.arange(4)
    variables = {"centers": {"centers": jnp.zeros((6, 2))}}
    for options in ({}, {"mutable": ["centers"]}):
        with pytest.raises(
            ValueError, match=r"this is CenterLoss\(9, 2\), but its centers have shape \(6, 2\)"
        ):
            jcl.linen.CenterLoss(9, 2, centers_as="state").apply(variables, x, labels, **options)


@pytest.mark.parametrize("centers_as", ["param", "state"])
def test_an_nnx_module_that_is_given_another_table_says_so(rng, centers_as):
    x, labels = rng.normal(size=(4, 2)).astype(np.float32), np.arange(4) % 3
    module = jcl.nnx.CenterLoss(9, 2, centers_as=centers_as, rngs=nnx.Rngs(0))
    nnx.update(module, jcl.from_torch({"centers": np.zeros((6, 2), np.float32)}))
    words = r"this is CenterLoss\(9, 2\), but its centers have shape \(6, 2\)"
    for call in (module, module.update_centers, jax.jit(lambda x, y: module(x, y))):
        with pytest.raises(ValueError, match=words):
            call(x, labels)


def test_an_initializer_of_another_size_is_refused():
    def pretrained(key, shape, dtype):
        return np.zeros((6, 2))

    for make in (
        lambda: jcl.init_centers(jax.random.key(0), 9, 2, initializer=pretrained),
        lambda: jcl.nnx.CenterLoss(9, 2, centers_init=pretrained, rngs=nnx.Rngs(0)),
        lambda: jcl.linen.CenterLoss(9, 2, centers_init=pretrained).init(
            jax.random.key(0), np.ones((1, 2), np.float32), np.zeros(1, int)
        ),
    ):
        with pytest.raises(
            ValueError, match=r"initializer must return centers of shape \(9, 2\), got \(6, 2\)"
        ):
            make()
    assert jcl.init_centers(jax.random.key(0), 6, 2, initializer=pretrained)["centers"].dtype == jnp.float32


# Memory that the caller owns (jax-ml/jax issue 37830).


def aligned(*shape):
    """An array that JAX takes without a copy on a CPU."""
    size = int(np.prod(shape)) * 4
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)


@pytest.fixture
def asynchronous():
    jax.config.update("jax_cpu_enable_async_dispatch", True)
    yield
    jax.config.update("jax_cpu_enable_async_dispatch", False)


@pytest.mark.usefixtures("asynchronous")
@pytest.mark.parametrize("convert", [lambda x: x, jnp.asarray, jnp.array], ids=["numpy", "asarray", "array"])
def test_a_loader_that_fills_one_buffer(rng, convert):
    buffer, labels = aligned(4096, 64), rng.integers(0, 4, 4096)
    contents = [rng.normal(size=buffer.shape).astype(np.float32) for _ in range(6)]

    def loader():
        for content in contents:
            buffer[:] = content
            yield convert(buffer), labels

    got = jcl.init_from_features(jnp.zeros((4, 64)), loader())
    x = np.concatenate(contents).astype(np.float64)
    want = np.stack([x[np.tile(labels, 6) == j].mean(0) for j in range(4)])
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.few(2)
@pytest.mark.usefixtures("asynchronous")
@pytest.mark.parametrize(
    "function", [jcl.center_loss, jcl.update_centers, jcl.distance_map, jcl.nearest_center]
)
def test_a_buffer_that_is_filled_anew_while_a_step_runs(rng, function):
    x, centers, labels = aligned(8192, 64), aligned(8, 64), np.zeros(8192, np.int32)
    x[:], centers[:] = rng.normal(size=x.shape), rng.normal(size=centers.shape)
    batch = (labels,) if function in (jcl.center_loss, jcl.update_centers) else ()
    want = np.asarray(function(centers.copy(), x.copy(), *batch))
    got = function(centers, x, *batch)
    x[:], centers[:], labels[:] = 7, 3, 1
    np.testing.assert_array_equal(got, want)


def test_a_running_mean_does_not_stand_still():
    batches = [(np.full((1, 1), value, np.float32), [0]) for value in (10000, 10001) for _ in range(3000)]
    assert jcl.init_from_features(jnp.zeros((1, 1)), batches)[0, 0] == 10000.5


# Between features.


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("reduce_fn", [None, jnp.mean])
def test_linen_state_with_a_loss_for_each_sample_in_shard_map(rng, reduce_fn, kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    x, labels = rng.normal(size=(16, 2)).astype(np.float32), np.arange(16) % C
    module = jcl.linen.CenterLoss(C, 2, centers_as="state", reduce_fn=reduce_fn, axis_name="data")
    variables = {"centers": {"centers": jnp.zeros((C, 2))}}

    def step(variables, x, labels):
        return module.apply(variables, x, labels, mutable=["centers"])

    out = P("data") if reduce_fn is None else P()
    spread = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=(out, P()))
    placed = jax.device_put((x, labels), jax.sharding.NamedSharding(mesh, P("data")))
    loss, moved = jax.jit(spread)(variables, *placed)
    per_sample = (x.astype(np.float64) ** 2).sum(1)
    np.testing.assert_allclose(loss, per_sample if reduce_fn is None else per_sample.mean(), rtol=1e-6)
    want = jcl.update_centers(np.zeros((C, 2), np.float32), x, labels)
    np.testing.assert_allclose(moved["centers"]["centers"], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["own_distance", "gap"])
def test_metrics_have_a_gradient_also_of_a_sample_on_its_center(name):
    # jax-ml/jax issues 3058 and 5798: the root at 0, and a NaN behind a mask.
    centers = np.array([[0.0, 0.0], [3.0, 4.0]], np.float32)
    x = np.array([[0, 0], [3, 0], [np.nan, 1]], np.float32)
    labels = np.array([0, 0, -1])
    gradient = jax.grad(lambda x: jcl.center_metrics(centers, x, labels)[name])(x)
    own = np.array([[0, 0], [0.5, 0], [0, 0]])  # The mean over two samples.
    other = np.array([[-0.3, -0.4], [0, -0.5], [0, 0]])
    np.testing.assert_allclose(gradient, own if name == "own_distance" else other - own, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_in_a_map_of_distances(bad):
    centers = np.array([[0.0, 0.0], [bad, 1.0], [3.0, 4.0]], np.float32)
    x = np.array([[0.0, 0.0], [1.0, bad], [-2.0, 1.0]], np.float32)
    distances = np.asarray(jcl.distance_map(centers, x))
    assert np.isnan(distances[:, 1]).all()
    assert np.isnan(distances[1]).all()
    np.testing.assert_allclose(distances[[0, 2]][:, [0, 2]], [[0, 25], [5, 34]], atol=1e-5)
    np.testing.assert_array_equal(jcl.nearest_center(centers, x), [0, -1, 0])
    np.testing.assert_array_equal(jcl.nearest_center(np.full_like(centers, bad), x), [-1, -1, -1])


@pytest.mark.parametrize("classes", [6, 3000])
def test_the_lowest_class_wins_at_a_tie_of_whole_numbers(rng, classes):
    for _ in range(20):
        centers = rng.integers(-3, 4, (classes, 3)).astype(np.float32)
        x = rng.integers(-3, 4, (50, 3)).astype(np.float32)
        want = ((x[:, None] - centers[None]) ** 2).sum(-1).argmin(-1)
        np.testing.assert_array_equal(jcl.nearest_center(centers, x), want)


def test_equal_centers_tie_whatever_their_digits(rng):
    centers = np.repeat(rng.normal(size=(1, 7)), 2500, 0).astype(np.float32)
    np.testing.assert_array_equal(jcl.nearest_center(centers, rng.normal(size=(30, 7)).astype(np.float32)), 0)


def test_unsigned_labels_are_masked_by_where(rng):
    x, labels = rng.normal(size=(2, 2)).astype(np.float32), np.array([255, 3], np.uint8)
    centers = jnp.zeros((256, 2))
    moved = jcl.update_centers(centers, x, labels, where=np.array([False, True]))
    np.testing.assert_array_equal(moved[255], np.zeros(2))
    assert np.any(moved[3] != 0)


@pytest.mark.few(3)
@pytest.mark.parametrize("centers_as", ["param", "state"])
@pytest.mark.parametrize(
    "options",
    [{"clip": None}, {"clip": (0.0, 0.5)}, {"reduce_fn": jnp.sum}],
    ids=["no clamp", "clamp", "sum"],
)
def test_a_modules_own_loss_is_what_its_gradient_rule_descends(rng, options, centers_as):
    x, labels = (2 * rng.normal(size=(N, 2))).astype(np.float32), rng.integers(0, C, N)
    module = jcl.nnx.CenterLoss(C, 2, centers_as=centers_as, rngs=nnx.Rngs(0), **options)
    start = module.centers[...]
    gradient = jax.grad(lambda c: jcl.center_loss(c, x, labels, **options))(start)
    module.update_centers(x, labels, alpha=0.1, rule="gradient")
    np.testing.assert_allclose(module.centers[...], start - 0.1 * gradient, rtol=1e-5, atol=1e-6)
    linen = jcl.linen.CenterLoss(C, 2, centers_as="state", alpha=0.1, rule="gradient", **options)
    _, moved = linen.apply({"centers": {"centers": start}}, x, labels, mutable=["centers"])
    np.testing.assert_allclose(moved["centers"]["centers"], start - 0.1 * gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("end", [1.0, 4.0])
def test_a_sample_exactly_at_an_end_of_the_clamp_pulls(end):
    # PyTorch's clamp passes the gradient on the closed interval.
    x = np.array([[np.sqrt(end), 0.0]], np.float32)
    module = jcl.nnx.CenterLoss(1, 2, clip=(1.0, 4.0), centers_as="state", rngs=nnx.Rngs(0))
    module.centers = np.zeros((1, 2), np.float32)
    module.update_centers(x, [0], alpha=0.25, rule="gradient")
    np.testing.assert_array_equal(module.centers[...], 0.5 * x)
    rest = np.array([[1e6, 0.0]], np.float32)  # Of the default clamp: its distance is 1e12.
    moved = jcl.update_centers(np.zeros((1, 2), np.float32), rest, [0], alpha=0.25, rule="gradient")
    np.testing.assert_array_equal(moved, 0.5 * rest)


def test_momentums_state_is_not_adagrads():
    centers = jnp.zeros((C, 2))
    momentum, adagrad = jcl.row_optimizer(optax.sgd(0.1, 0.9)), jcl.row_optimizer(optax.adagrad(0.1))
    with pytest.raises(ValueError, match="state does not belong to this optimizer"):
        adagrad.update(centers, momentum.init(centers), jnp.ones((1, 2)), [0])


def test_the_mean_rule_is_a_moving_average_of_class_means(rng):
    # Prototypes; ShownX/mxnet-center-loss issue 1 asks for centers that follow the data.
    centers, x = rng.normal(size=(C, 2)).astype(np.float32), rng.normal(size=(N, 2)).astype(np.float32)
    labels = rng.integers(0, C - 1, N)
    moved = jcl.update_centers(centers, x, labels, alpha=0.25, rule="mean")
    want = centers.copy()
    for j in range(C - 1):
        want[j] = 0.75 * centers[j] + 0.25 * x[labels == j].mean(0)
    np.testing.assert_allclose(moved, want, rtol=1e-5)
    np.testing.assert_array_equal(moved[C - 1], centers[C - 1])
    at_once = jcl.update_centers(centers, x, labels, alpha=1.0, rule="mean")
    np.testing.assert_allclose(at_once[0], x[labels == 0].mean(0), rtol=1e-5)


# Words.


def schedule(step):
    return 0.5 / (1 + step)


X, Y, TABLE = np.zeros((4, 3), np.float32), np.zeros(4, int), np.zeros((5, 3), np.float32)
WORDS = {
    # google-deepmind/optax issue 1286: a schedule where a number is meant.
    "schedule": (
        lambda: jcl.update_centers(TABLE, X, Y, alpha=schedule),
        TypeError,
        r"alpha=schedule\(step\)",
    ),
    "optax schedule": (
        lambda: jcl.update_centers(TABLE, X, Y, alpha=optax.cosine_decay_schedule(0.5, 10)),
        TypeError,
        "alpha must be a number, got the function",
    ),
    "linen schedule": (
        lambda: jcl.linen.CenterLoss(5, 3, alpha=schedule),
        TypeError,
        r"alpha=schedule\(step\)",
    ),
    "labels of strings": (
        lambda: jcl.center_loss(TABLE, X, np.array(["cat"] * 4)),
        TypeError,
        r"labels must be an array, got an array of str.*np\.unique",
    ),
    "labels None": (lambda: jcl.center_loss(TABLE, X, None), TypeError, "labels must be an array, got None"),
    "ragged labels": (
        lambda: jcl.center_loss(TABLE, X, [[0], [1, 2]]),
        TypeError,
        "labels must be an array, got a list",
    ),
    "float labels": (
        lambda: jcl.center_loss(TABLE, X, Y.astype(float)),
        TypeError,
        r"nan_to_num\(labels, nan=-1\)\.astype\(int\)",
    ),
    "one-hot labels": (
        lambda: jcl.center_loss(TABLE, X, np.eye(5, dtype=np.float32)[Y]),
        TypeError,
        "argmax",
    ),
    "a model's output": (
        lambda: jcl.center_loss(TABLE, {"features": X, "logits": X}, Y),
        TypeError,
        "x must be an array, got a dict with the keys 'features', 'logits'. Pass the features",
    ),
    "a tuple": (
        lambda: jcl.center_loss(TABLE, (X, X[:2]), Y),
        TypeError,
        "x must be an array, got a tuple of 2",
    ),
    "x None": (lambda: jcl.nearest_center(TABLE, None), TypeError, "x must be an array, got None"),
    "swapped": (
        lambda: jcl.nearest_center(X, {"centers": TABLE}),
        TypeError,
        r"the order is \(params, x\)",
    ),
    "swapped labels": (lambda: jcl.center_loss(TABLE, Y, X), TypeError, r"Labels come after it"),
    "params None": (lambda: jcl.center_loss(None, X, Y), ValueError, "params must hold exactly one array"),
    "after": (
        lambda: jcl.update_centers(TABLE, X, Y, after={"loss": "loss"}),
        TypeError,
        "a leaf of after must be an array, got str",
    ),
    "where of words": (
        lambda: jcl.center_loss(TABLE, X, Y, where="all"),
        TypeError,
        "where must be an array, got str",
    ),
    "float where": (
        lambda: jcl.update_centers(TABLE, X, Y, where=np.ones(4, np.float32)),
        TypeError,
        "weights go into `weights`",
    ),
    "select": (
        lambda: jcl.with_center_optimizer(optax.sgd(0.1), select="centers"),
        TypeError,
        "select must be a function",
    ),
    "reduce_fn in nnx": (
        lambda: jcl.nnx.CenterLoss(5, 3, reduce_fn="sum", rngs=nnx.Rngs(0)),
        ValueError,
        "reduce_fn must be",
    ),
    "reduce_fn in linen": (
        lambda: jcl.linen.CenterLoss(5, 3, reduce_fn="sum"),
        ValueError,
        "reduce_fn must be",
    ),
    "clip in nnx": (lambda: jcl.nnx.CenterLoss(5, 3, clip=1.0, rngs=nnx.Rngs(0)), ValueError, "clip must be"),
    "clip in linen": (lambda: jcl.linen.CenterLoss(5, 3, clip=1.0), ValueError, "clip must be"),
    "sizes in linen": (lambda: jcl.linen.CenterLoss(5, 0), ValueError, "feat_dim must be at least 1"),
    "sizes of floats": (
        lambda: jcl.nnx.CenterLoss(5.0, 3, rngs=nnx.Rngs(0)),
        TypeError,
        r"num_classes must be an integer, got 5\.0",
    ),
    "centers_as": (
        lambda: jcl.linen.CenterLoss(5, 3, centers_as="buffer"),
        ValueError,
        "centers_as must be one of",
    ),
    "a table for init": (
        lambda: jcl.nnx.CenterLoss(5, 3, centers_init=TABLE, rngs=nnx.Rngs(0)),
        TypeError,
        "lambda key, shape, dtype: centers",
    ),
    # pytorch/audio issue 3911 and many more: what a safe loader refuses; and a path where none is.
    "no file": (lambda: jcl.from_torch("nowhere.pth.tar"), FileNotFoundError, "nowhere"),
}


@pytest.mark.parametrize(("call", "error", "words"), WORDS.values(), ids=WORDS)
def test_an_argument_that_is_none_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_missing_label_is_ignored():
    # NaN as an integer, as pandas and NumPy have it, is -2**63, of which 32 bits are 0.
    with np.errstate(invalid="ignore"):
        labels = np.array([np.nan, 1.0]).astype(np.int64)
    centers, x = np.array([[0, 0], [5, 5]], np.float32), np.array([[1, 1], [5, 5]], np.float32)
    assert labels[0] < -(2**62)
    for function in (jcl.center_loss, jcl.update_centers):
        np.testing.assert_array_equal(function(centers, x, labels), function(centers, x, [-1, 1]))
    large = jcl.center_loss(centers, x, [1, 1], weights=np.full(2, 2**32))
    np.testing.assert_allclose(large, jcl.center_loss(centers, x, [1, 1]), rtol=1e-6)


def test_an_infinite_weight_shows_by_every_rule():
    for rule in RULES:
        x = np.zeros((1, 2), np.float32)
        assert np.isnan(jcl.update_centers(x, x, [0], weights=np.array([np.inf]), rule=rule)).all()


def test_labels_of_64_bits_are_named_where_they_are_known():
    # jax-ml/jax issue 18385: under jit they wrap before this library sees them.
    with pytest.raises(ValueError, match="label 4294967296 is out of range"):
        jcl.center_loss(TABLE, X, np.array([0, 1, 2**32, 3]))


# checkify of a whole step.


def test_nnx_checkify_of_a_whole_training_step(batch):
    model = Model(nnx.Rngs(0))
    tx = jcl.with_center_optimizer(optax.sgd(0.1), weight=1e-3)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def step(model, optimizer, x, labels):
        def loss_fn(model):
            features = model.rbf(x)
            jcl.check_batch(model.center_loss, features, labels)
            return model.center_loss(features, labels)

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    x = batch[0].copy()
    x[3, 2] = np.nan
    error, _ = nnx.checkify(nnx.jit(step))(model, optimizer, x, jnp.asarray(batch[1]))
    assert f"of class {batch[1][3]}, is nan" in error.get()


def test_checkify_of_a_step_by_rows_with_weights(batch):
    rows = jcl.row_optimizer(optax.sgd(0.1, momentum=0.9))
    centers = jnp.zeros((C, 8))

    def step(centers, state, x, labels, weights):
        jcl.check_batch(centers, x, labels, weights=weights)
        return rows.update(centers, state, x, labels, weights=weights)

    weights = jnp.ones(N).at[5].set(-3.0)
    error, _ = checkify.checkify(jax.jit(step))(
        centers, rows.init(centers), *map(jnp.asarray, batch), weights
    )
    assert f"the weight of a used sample, of class {batch[1][5]}, is -3" in error.get()


# PaddleOCR issues 3962, 4366, 6947, 9160, 10131: lines of text, labels by argmax, blanks left out.


def test_frames_of_a_line_with_labels_by_argmax(rng):
    logits = rng.normal(size=(4, 9, C + 1)).astype(np.float32)  # (batch, time, classes and the blank)
    x = rng.normal(size=(4, 9, 2)).astype(np.float32)
    labels = np.asarray(jnp.argmax(logits, -1)) - 1  # The blank is class 0, and becomes -1.
    centers = rng.normal(size=(C, 2)).astype(np.float32)
    used = labels >= 0
    want = np.mean(((x[used] - centers[labels[used]]) ** 2).sum(-1))
    np.testing.assert_allclose(jcl.center_loss(centers, x, labels, clip=None), want, rtol=1e-5)
    by_time = jcl.center_loss(centers, x.swapaxes(0, 1), labels.T, clip=None)
    np.testing.assert_allclose(by_time, want, rtol=1e-5)
    # Its centers come from a trained model, and no optimizer moves them.
    frozen = jax.grad(lambda c: jcl.center_loss(jax.lax.stop_gradient(c), x, labels))(centers)
    np.testing.assert_array_equal(frozen, np.zeros((C, 2)))


def test_large_rates_of_the_gradient_rule_run_off_and_the_papers_does_not():
    # davidsandberg/facenet issues 820 and 980: the loss grows to infinity with many samples of one class.
    x, labels = np.zeros((8, 1), np.float32), np.zeros(8, int)
    far = near = jnp.ones((1, 1))
    for _ in range(20):
        far = jcl.update_centers(far, x, labels, rule="gradient", alpha=0.5 * 8 / 2)  # facenet's, alfa = 0.5
        near = jcl.update_centers(near, x, labels, rule="paper", alpha=0.5)
    assert abs(far[0, 0]) > 1e5
    assert abs(near[0, 0]) < 1e-4


# Arrays of other libraries count as what they are, or are refused by name.


class Metres(np.ndarray):
    """As an array of astropy or pint: numbers with a unit, of which np.asarray keeps the numbers."""

    unit = "m"


class Measured(np.ndarray):
    """As an array of unyt, each of which has a unit of its own."""

    def __array_finalize__(self, other):
        self.unit, self.units = None, "m"


class Layer(nnx.Module):
    """A layer of some units is no quantity."""

    def __init__(self, centers):
        self.units, self.unit, self.dtype, self.shape = 2, "relu", jnp.float32, (2,)
        self.centers = nnx.Param(centers)


class Quantity:
    """As an array of saiunit: the unit is an entry of the object. `nested` is one in an xarray.DataArray."""

    def __init__(self, values, unit="m"):
        self.values, self.unit = values, unit

    def __array__(self, dtype=None, copy=None):
        return self.values

    @classmethod
    def nested(cls, values):
        holder = cls(values, unit=None)
        holder.data = cls(values)
        return holder


jax.tree_util.register_dataclass(Quantity, data_fields=["values"], meta_fields=["unit"])


class Lazy:
    """As a variable of netCDF4, which becomes a masked array."""

    def __init__(self, values):
        self.values = np.ma.masked_array(values, mask=np.zeros_like(values, bool))

    def __array__(self, dtype=None, copy=None):
        return self.values


CENTERS = np.zeros((4, 2), np.float32)
POINTS, OWN = np.array([[1, 1], [5, 5], [2, 2]], np.float32), np.array([0, 1, 2])
FUNCTIONS = {
    "center_loss": jcl.center_loss,
    "update_centers": jcl.update_centers,
    "center_metrics": jcl.center_metrics,
    "distance_map": lambda params, x, labels: jcl.distance_map(params, x),
    "nearest_center": lambda params, x, labels: jcl.nearest_center(params, x),
    "init_from_features": lambda params, x, labels: jcl.init_from_features(params, [(x, labels)]),
    "check_batch": jcl.check_batch,
    "plot": jcl.plot,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mask_or_a_unit_is_never_dropped(name):
    # numpy.ma keeps what np.asarray drops: JAX refuses such arrays, and so does every function here.
    units = lambda a: a.view(Metres), lambda a: a.view(Measured), Quantity, Quantity.nested
    for index in range(3):
        for kind in (np.ma.masked_array, Lazy, *units):
            given = [CENTERS, POINTS, OWN]
            if index == 2 and name in ("distance_map", "nearest_center"):
                continue
            given[index] = kind(given[index])
            with pytest.raises(TypeError, match=r"^\S+( leaf of params)? (\S+ )?must .*(masked|unit would)"):
                FUNCTIONS[name](*given)


def test_masks_of_masks_weights_and_checkpoints_are_not_dropped():
    mask = [False, True, False]
    want = jcl.center_loss(CENTERS, POINTS, OWN, where=np.logical_not(mask))
    for name, value in {"where": np.ones(3, bool), "weights": np.ones(3)}.items():
        masked = np.ma.masked_array(value, mask=mask)
        with pytest.raises(TypeError, match=f"{name} must not be a masked array") as raised:
            jcl.center_loss(CENTERS, POINTS, OWN, **{name: masked})
        followed = eval(code_of(raised.value)[0], {name: masked})
        np.testing.assert_array_equal(jcl.center_loss(CENTERS, POINTS, OWN, **{name: followed}), want)
    x = np.ma.masked_array(POINTS, mask=[[False, False], [False, True], [False, False]])
    with pytest.raises(TypeError, match="x must not be a masked array") as raised:
        jcl.init_from_features(CENTERS, [(x, OWN)])
    scope = {"np": np, "x": x, "labels": OWN}
    first, second = code_of(raised.value)
    exec(first, scope)
    filled, labels = eval(second, scope), scope["labels"]
    with pytest.warns(UserWarning, match="2 of 4 classes were never seen"):
        means = jcl.init_from_features(CENTERS + 7, [(filled, labels)])
    np.testing.assert_array_equal(means, [POINTS[0], [7, 7], POINTS[2], [7, 7]])
    np.testing.assert_array_equal(jcl.center_loss(CENTERS, filled, labels), want)
    assert jcl.nearest_center(CENTERS, filled).tolist() == [0, -1, 0]
    with pytest.raises(TypeError, match="labels must not be a masked array") as raised:
        jcl.center_loss(CENTERS, POINTS, Lazy(OWN))
    followed = eval(code_of(raised.value)[0], {"np": np, "labels": Lazy(OWN)})
    np.testing.assert_array_equal(
        jcl.center_loss(CENTERS, POINTS, followed), jcl.center_loss(CENTERS, POINTS, OWN)
    )
    with pytest.raises(TypeError, match="masked"):
        jcl.from_torch({"centers": np.ma.masked_array(CENTERS, mask=CENTERS == 0)})
    with pytest.raises(TypeError, match="masked"):
        jcl.center_loss(CENTERS, POINTS, [np.ma.masked, 1, 2])


@pytest.mark.parametrize("dtype", [">f4", ">f8", np.longdouble])
def test_numbers_of_a_foreign_byte_order_count(dtype):
    # FITS, MATLAB and HDF5 files hold big-endian numbers.
    centers = np.arange(8, dtype=np.float32).reshape(4, 2)
    want = np.mean((POINTS.astype(float) - centers[OWN]) ** 2 @ np.ones(2))
    for given in (
        (centers.astype(dtype), POINTS, OWN),
        (centers, POINTS.astype(dtype), OWN.astype(">i2")),
        (jcl.from_torch({"centers": centers.astype(dtype)}), POINTS, OWN.astype(">i8")),
    ):
        np.testing.assert_allclose(jcl.center_loss(*given, clip=None), want, rtol=1e-6)
    weights = np.array([1, 0, 2], ">i4")
    got, like = (jcl.center_loss(centers, POINTS, OWN, weights=w) for w in (weights, weights.tolist()))
    np.testing.assert_array_equal(got, like)
    lists = list(POINTS.astype(dtype)), list(OWN.astype(">i8"))
    np.testing.assert_allclose(jcl.center_loss(centers, *lists, clip=None), want, rtol=1e-6)


def test_lists_and_few_bits_count_as_the_numbers_they_hold():
    many = np.zeros((300, 2), np.float32)
    want = jcl.center_loss(many, POINTS, OWN)
    np.testing.assert_array_equal(jcl.center_loss(Layer(jnp.asarray(many)), POINTS, OWN), want)
    halves = list(np.asarray([1, 0, 2], jnp.bfloat16))
    np.testing.assert_array_equal(
        jcl.center_loss(many, POINTS, list(np.asarray(OWN, "int4")), weights=halves),
        jcl.center_loss(many, POINTS, OWN, weights=[1, 0, 2]),
    )
    moved = jcl.update_centers(
        many, [list(row) for row in np.asarray(POINTS, jnp.bfloat16)], OWN, alpha=halves[0]
    )
    np.testing.assert_array_equal(moved, jcl.update_centers(many, POINTS, OWN, alpha=1.0))
    for labels in (jnp.asarray(OWN, "int4"), OWN.tolist(), tuple(OWN), list(jnp.asarray(OWN))):
        np.testing.assert_array_equal(jcl.center_loss(many, POINTS, labels), want)
    for huge in (2**31 + 1, 2**32 + 1, 2**40):
        with pytest.raises(ValueError, match=f"label {huge} is out of range"):
            jcl.center_loss(many, POINTS, [0, 1, huge])
    np.testing.assert_array_equal(jcl.center_loss(CENTERS, POINTS, [0, -(2**63), 2]), 5.0)


# Every piece of advice, followed to the letter.


def code_of(error):
    return re.findall("`([^`]*)`", str(error))


NAN = float("nan")
SOFT = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0.2, 0.8, 0]], np.float32)  # One row has no label.
# How labels are given, and which classes they mean.
LABELS = {
    "missing": (np.array([0, NAN, 2], np.float32), [0, -1, 2]),
    "missing in a list": ([0.0, NAN, 2.0], [0, -1, 2]),
    "missing on a device": (jnp.array([0, NAN, 2]), [0, -1, 2]),
    "whole": (np.array([0.0, 1.0, 2.0]), [0, 1, 2]),
    "soft": (SOFT, [0, -1, 2]),
    "soft on a device": (jnp.asarray(SOFT), [0, -1, 2]),
    "soft in a list": (SOFT.tolist(), [0, -1, 2]),
    "one-hot": (np.ceil(SOFT[:2]).astype(int)[[0, 1, 0]], [0, -1, 0]),
    "a column": (OWN[:, None], OWN),
    "a column of floats": (OWN[:, None].astype(np.float32), OWN),
    "masked": (np.ma.masked_array(OWN.astype(np.uint8), mask=[False, True, False]), [0, -1, 2]),
    "masked and missing": (np.ma.masked_array([0, 1, NAN], mask=[False, True, False]), [0, -1, -1]),
}


@pytest.mark.parametrize("name", LABELS)
def test_advice_on_labels_leads_to_the_right_classes(name):
    labels, classes = LABELS[name]
    for _ in range(2 if name == "a column of floats" else 1):
        with pytest.raises((TypeError, ValueError)) as raised:
            jcl.center_loss(CENTERS, POINTS, labels)
        if name.startswith("missing"):
            assert "1 of them missing" in str(raised.value)
        (code,) = (code for code in code_of(raised.value) if code not in ("where", "weights"))
        labels = eval(code, {"labels": labels, "np": np, "jnp": jnp})
    want = np.mean(np.sum(POINTS[np.array(classes) >= 0] ** 2, 1))
    np.testing.assert_allclose(jcl.center_loss(CENTERS, POINTS, labels, clip=None), want, rtol=1e-6)


def test_labels_that_are_no_whole_numbers_get_no_advice_to_cast_them():
    for bad in ([0.5, 1.0, 2.0], [0.0, np.inf, 2.0]):
        with pytest.raises(TypeError, match="some are no whole numbers") as raised:
            jcl.center_loss(CENTERS, POINTS, np.array(bad))
        assert "astype" not in str(raised.value)


def test_advice_inside_of_jit():
    with pytest.raises(TypeError, match="must be integers") as raised:
        jax.jit(jcl.center_loss)(CENTERS, POINTS, jnp.array([0, NAN, 2]))
    cast = code_of(raised.value)[0]

    @jax.jit
    def loss(labels):
        return jcl.center_loss(CENTERS, POINTS, eval(cast, {"labels": labels, "jnp": jnp}), clip=None)

    @jax.jit
    def of_lists(flag):
        where, x = [flag, 0 * flag, flag], [[flag, flag], [5 * flag, 5 * flag], [2 * flag, 2 * flag]]
        for name in ("x", "where"):
            given = {"x": x, "labels": OWN, "where": where}
            with pytest.raises(TypeError, match=rf"{name} must be (floating|boolean)") as raised:
                jcl.center_loss(CENTERS, **given)
            code = code_of(raised.value)[0].removeprefix("where=")
            followed = eval(code, {"np": np, "jnp": jnp} | given)
            x, where = (followed, where) if name == "x" else (x, followed)
        return jcl.center_loss(CENTERS, x, OWN, where=where)

    np.testing.assert_allclose(of_lists(1), 5.0, rtol=1e-6)
    np.testing.assert_allclose(loss(jnp.array([0, NAN, 2])), (2 + 8) / 2, rtol=1e-6)
    assert np.isnan(loss(jnp.array([0, jnp.inf, 2])))  # Shown, not counted as a class.


def test_advice_on_names_complex_features_row_optimizers_and_keys():
    with pytest.raises(TypeError, match="for the whole data set") as raised:
        jcl.center_loss(CENTERS, POINTS, np.array(["ash", "oak", "elm"]))
    scope = {"np": np, "all_names": ["oak", "ash", "oak", "elm"]}
    exec(code_of(raised.value)[0], scope)
    assert scope["names"][scope["labels"]].tolist() == scope["all_names"]
    x = np.array([[3 + 4j], [0]])
    with pytest.raises(TypeError, match="real and imaginary") as raised:
        jcl.center_loss(CENTERS, x, [0, 1])
    followed = eval(code_of(raised.value)[0], {"jnp": jnp, "x": x})
    np.testing.assert_allclose(jcl.center_loss(CENTERS, followed, [0, 1], clip=None), 25 / 2)
    lists = {"x": POINTS.astype(int).tolist(), "where": [1, 0, 1]}
    want = jcl.center_loss(CENTERS, POINTS, OWN, where=np.array([True, False, True]))
    for name in lists:
        with pytest.raises(TypeError, match=rf"{name} must be (floating|boolean)") as raised:
            jcl.center_loss(CENTERS, **{"x": POINTS, "labels": OWN} | {name: lists[name]})
        code = code_of(raised.value)[0].removeprefix("where=")
        lists[name] = eval(code, {"np": np, "jnp": jnp, name: lists[name]})
    np.testing.assert_array_equal(jcl.center_loss(CENTERS, labels=OWN, **lists), want)
    rows = jcl.row_optimizer(optax.sgd(0.1))
    centers = jcl.nnx.CenterLoss(4, 2, rngs=nnx.Rngs(0))
    alone = nnx.Optimizer(centers, rows, wrt=nnx.Param)
    with pytest.raises(TypeError, match="no optax transformation"):
        alone.update(centers, nnx.grad(lambda centers: centers(POINTS, OWN))(centers))
    with pytest.raises(ValueError, match="no optax transformation") as raised:
        nnx.Optimizer(Model(nnx.Rngs(0)), rows, wrt=nnx.Param)
    names = {"model_tx": optax.adam(1e-3), "tx": optax.sgd(0.1)}
    tx = eval("jcl." + code_of(raised.value)[-1], names | {"jcl": jcl})
    nnx.Optimizer(Model(nnx.Rngs(0)), tx, wrt=nnx.Param)
    with pytest.raises(TypeError, match=r"rngs must be nnx\.Rngs, such as `nnx\.Rngs\(0\)`"):
        jcl.nnx.CenterLoss(4, 2, rngs=jax.random.key(0))


def test_advice_on_shards_leads_to_centers_that_nothing_finds():
    mesh = jax.make_mesh((8,), ("d",))
    shards = jax.NamedSharding(mesh, P("d", None))
    with pytest.raises(ValueError, match="Round it up to 16") as raised:
        jcl.init_centers(jax.random.key(0), 9, 2, out_sharding=shards)
    centers = jcl.init_centers(jax.random.key(0), 16, 2, out_sharding=shards)["centers"]
    unused = np.asarray(centers)[9:]
    assert (jcl.nearest_center(centers, unused) >= 9).all()
    with jax.set_mesh(mesh):
        filled = eval(code_of(raised.value)[-1], {"jnp": jnp, "centers": centers})
    assert filled.sharding.is_equivalent_to(centers.sharding, 2)
    assert (jcl.nearest_center(filled, unused) < 9).all()
    labels = np.arange(7)
    for name, value in jcl.center_metrics(np.asarray(centers)[:9], unused, labels).items():
        np.testing.assert_allclose(jcl.center_metrics(filled, unused, labels)[name], value, rtol=1e-5)


@pytest.mark.parametrize("how", ["arrays", "lists", "jit", "mesh"])
def test_advice_on_weights_of_classes_is_given_for_those_alone(how):
    weights, labels, x = np.array([1.0, 2.0, 3.0, 4.0]), OWN, POINTS
    want = np.average(np.sum(POINTS**2, 1), weights=weights[OWN])
    if how == "lists":
        weights, labels = weights.tolist(), labels.tolist()
    if how == "mesh":
        mesh = jax.make_mesh((3,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
        x, labels = (jax.device_put(a, jax.NamedSharding(mesh, P("d"))) for a in (x, labels))

    def follow(labels):
        with pytest.raises(ValueError, match="of classes") as raised:
            jcl.center_loss(CENTERS, x, labels, weights=weights)
        followed = eval(
            code_of(raised.value)[-1], {"weights": weights, "labels": labels, "jnp": jnp, "jax": jax}
        )
        return jcl.center_loss(CENTERS, x, labels, weights=followed, clip=None)

    found = (jax.jit(follow) if how == "jit" else follow)(labels)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    with pytest.raises(ValueError, match=r"shape of labels \(3,\), got \(5,\)") as raised:
        jcl.center_loss(CENTERS, POINTS, OWN, weights=np.ones(5))  # An old batch's, say.
    assert code_of(raised.value) == []


def test_advice_on_previous_centers_and_modules():
    with pytest.raises(ValueError, match="nothing has moved") as raised:
        jcl.center_metrics(CENTERS, POINTS, OWN, previous=CENTERS)
    scope = {"jax": jax, "jnp": jnp, "params": {"centers": jnp.asarray(CENTERS)}}
    exec(code_of(raised.value)[-1], scope)
    moved = jcl.update_centers(scope["params"], POINTS, OWN, rule="mean", alpha=1.0)
    metrics = jcl.center_metrics(moved, POINTS, OWN, previous=scope["previous"])
    np.testing.assert_allclose(metrics["moved"], np.linalg.norm(POINTS, axis=1).mean(), rtol=1e-6)
    given = {"centers": jnp.full((4, 2), 3.0)}
    with pytest.raises(TypeError, match="existing centers") as raised:
        jcl.nnx.CenterLoss(4, 2, centers_init=given["centers"], rngs=nnx.Rngs(0))
    module = jcl.nnx.CenterLoss(4, 2, centers_init=eval(code_of(raised.value)[-1], given), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(module.centers[...], given["centers"])


def test_advice_on_which_parameters_are_centers():
    params = {name: {"centers": jnp.ones((4, 2))} for name in ("center_loss", "kmeans")}
    with pytest.raises(ValueError, match="several parameters") as raised:
        jcl.with_center_optimizer(optax.sgd(0.0), optax.sgd(1.0)).init(params)
    (select,) = [code for code in code_of(raised.value) if "=" in code]
    tx = jcl.with_center_optimizer(optax.sgd(0.0), optax.sgd(1.0), **eval(f"dict({select})"))
    updates, _ = tx.update(params, tx.init(params), params)
    assert (updates["center_loss"]["centers"] == -1).all()
    assert (updates["kmeans"]["centers"] == 0).all()


def test_advice_on_the_dtype_of_a_state():
    halves, rows = (jcl.row_optimizer(optax.adam(0.1), state_dtype=dtype) for dtype in (jnp.bfloat16, None))
    state = halves.init(CENTERS)
    with pytest.raises(ValueError, match="`state_dtype` of this state, or cast the state"):
        rows.update(CENTERS, state, POINTS, OWN)
    cast = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), state, rows.init(CENTERS))
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it.
        found, want = (rows.update(CENTERS, given, POINTS, OWN)[0] for given in (cast, rows.init(CENTERS)))
    np.testing.assert_array_equal(found, want)


# Variables as Flax has them: their metadata, their references, the names of their axes.


class Sharded(nnx.Module):
    def __init__(self, rngs):
        wide = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
        self.features = nnx.Linear(4, 8, kernel_init=wide, use_bias=False, rngs=rngs)
        self.center_loss = jcl.nnx.CenterLoss(16, 8, out_sharding=P("model", None), rngs=rngs)


@pytest.mark.few(1)
@pytest.mark.skipif(not hasattr(nnx, "use_eager_sharding"), reason="needs Flax 0.12: before, optax fails too")
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_an_optimizers_state_is_sharded_by_the_metadata_of_the_variables(kind):
    # google/flax issues 4180 and 5172: made inside of nnx.jit, constrained by nnx.get_partition_spec.
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType[kind],))

    @nnx.jit
    def create():
        model = Sharded(nnx.Rngs(0))
        tx = jcl.with_center_optimizer(optax.adam(1e-3), optax.adam(1e-2), weight=0.1)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        state = nnx.state((model, optimizer))
        specs = nnx.get_partition_spec(state)
        nnx.update((model, optimizer), jax.lax.with_sharding_constraint(state, specs))
        return model, optimizer

    # optax promotes the bias correction of bare scalars.
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        model, optimizer = create()
        x, labels = jax.device_put((jnp.ones((16, 4)), jnp.arange(16)), jax.NamedSharding(mesh, P()))
        for _ in range(2):
            moments = [leaf for leaf in jax.tree.leaves(nnx.state(optimizer)) if leaf.ndim == 2]
            assert len(moments) == 4
            assert all(leaf.addressable_shards[0].data.size * 8 == leaf.size for leaf in moments)
            grads = nnx.grad(lambda m: m.center_loss(m.features(x), labels))(model)
            optimizer.update(model, grads)


@pytest.mark.skipif(
    not hasattr(nnx, "use_eager_sharding"), reason="before Flax 0.12 nnx.Param takes no names"
)
def test_logical_names_of_axes():
    # AI-Hypercomputer/maxtext issue 4205: names of axes that rules map to a mesh.
    with jax.set_mesh(jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))):
        with nnx.logical_axis_rules([("classes", "model"), ("embed", None)]):
            boxed = nnx.with_partitioning(jax.nn.initializers.normal(1.0), ("classes", "embed"))
            for option in (
                {"out_sharding": P("classes", "embed")},
                {"out_sharding": ("classes", "embed")},
                {"centers_init": boxed},
            ):
                module = jcl.nnx.CenterLoss(16, 4, **option, rngs=nnx.Rngs(0))
                assert module.centers[...].addressable_shards[0].data.shape == (2, 4)
                specs = nnx.get_partition_spec(nnx.state(module))
                assert jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, P))[0] == P("model", None)
        with pytest.raises(ValueError, match="pass no out_sharding beside it"):
            jcl.nnx.CenterLoss(16, 4, out_sharding=P("model", None), centers_init=boxed, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"names \['classes'\], but the mesh has axes \['model'\]"):
            jcl.nnx.CenterLoss(16, 4, out_sharding=("classes", None), rngs=nnx.Rngs(0))


@pytest.mark.few(1)
@pytest.mark.skipif(not hasattr(nnx, "vars_as"), reason="needs Flax whose Variables may be references")
@pytest.mark.filterwarnings("ignore:This function is deprecated:DeprecationWarning")
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit, nnx.jit], ids=["eager", "jax.jit", "nnx.jit"])
def test_variables_that_are_references(jit, rng):
    # google/flax issues 4960 and 5065: under jax.jit the table moves in place, as BatchNorm's statistics do.
    usual = jcl.nnx.CenterLoss(4, 2, centers_as="state", rngs=nnx.Rngs(0))
    module = nnx.vars_as(jcl.nnx.CenterLoss(4, 2, centers_as="state", rngs=nnx.Rngs(0)), ref=True)

    def step(module, x, labels):
        loss = module(x, labels)
        module.update_centers(x, labels, after=loss)
        return loss

    x = rng.normal(size=(3, 2)).astype(np.float32)
    np.testing.assert_allclose(jit(step)(module, x, OWN), step(usual, x, OWN), rtol=1e-6)
    np.testing.assert_allclose(module.centers[...], usual.centers[...], rtol=1e-6)
    for function in (jcl.center_loss, jcl.update_centers, jcl.center_metrics):
        got, want = (jit(function)(m, x, OWN) for m in (module, usual))
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-6), jax.tree.leaves(got), jax.tree.leaves(want)
        )


# A checkpoint is loaded as load_state_dict does; λ and its divisor count the same steps.


@pytest.mark.parametrize("kind", ["param", "state"])
def test_a_half_checkpoint_leaves_the_module_in_float32(kind):
    # pytorch/pytorch issue 39428: load_state_dict casts to the module's dtype, and steps go on in float32.
    module = jcl.nnx.CenterLoss(4, 2, centers_as=kind, rngs=nnx.Rngs(0))
    module.centers = jcl.from_torch({"a": {"centers": np.ones((4, 2), jnp.bfloat16)}}, key="a.centers")
    assert module.centers[...].dtype == jnp.float32
    np.testing.assert_array_equal(module.centers[...], np.ones((4, 2)))


@pytest.mark.parametrize("wrapped", [optax.MultiSteps, optax.apply_if_finite, optax.chain])
def test_lambda_at_the_step_of_its_divisor(wrapped):
    # huggingface/accelerate issue 999 and google-deepmind/optax issue 596: schedules count updates, loops
    # count micro-steps. The rate of the centers does not depend on λ with the line of the page.
    every, warm, rate = (4 if wrapped is optax.MultiSteps else 1), 10, 0.5
    lam = optax.linear_schedule(0.0, 0.01, transition_steps=warm)
    x, labels = np.array([[1, 2], [3, 4]], np.float32), np.arange(2)
    module = jcl.nnx.CenterLoss(2, 2, rngs=nnx.Rngs(0))
    centers = np.asarray(module.centers[...], np.float64)
    tx = jcl.with_center_optimizer(optax.sgd(0.0), optax.sgd(rate), weight=lam)
    arguments = () if wrapped is optax.chain else (every if wrapped is optax.MultiSteps else 3,)
    optimizer = nnx.Optimizer(module, wrapped(tx, *arguments), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, scale):
        weight = lam(optax.tree_utils.tree_get(optimizer.opt_state, "center_step")[...])
        grads = nnx.grad(lambda m: scale * weight * m(x, labels))(module)
        optimizer.update(module, grads)

    # optax's schedules promote their count.
    with jax.numpy_dtype_promotion("standard"):
        for update in range(2 * warm):
            if wrapped is optax.apply_if_finite and update % 5 == 4:  # A step that is left out.
                step(module, optimizer, np.float32(np.nan))
            for _ in range(every):
                step(module, optimizer, np.float32(1))
            if update > 0:  # While λ is 0 centers rest.
                centers += rate * (x - centers)  # The gradient of the mean over two samples of two classes.
            np.testing.assert_allclose(module.centers[...], centers, rtol=1e-4)
