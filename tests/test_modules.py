"""The Flax modules: the same numbers as the functions, in both of Flax's APIs."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jax_centerloss as jcl

C, D = 6, 4


@pytest.fixture
def batch(rng):
    return (
        rng.normal(size=(3, 5, D)).astype(np.float32),
        rng.integers(-1, C, (3, 5)),
        rng.random((3, 5)) < 0.7,
    )


def modules(**options):
    module = jcl.nnx.CenterLoss(C, D, **options, rngs=nnx.Rngs(0))
    return module, jcl.linen.CenterLoss(C, D, **options)


@pytest.mark.few(3)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("clip", "reduce_fn"), [(None, jnp.mean), ((1e-12, 1e12), jnp.sum), ((1e-12, 1e12), None)]
)
def test_nnx_and_linen_are_bit_identical(batch, clip, reduce_fn, param_dtype, masked):
    x, labels, where = batch
    where = where if masked else None
    module, linen = modules(clip=clip, reduce_fn=reduce_fn, param_dtype=param_dtype)
    centers = jax.tree.leaves(module)[0]
    assert centers.dtype == param_dtype
    options = {"where": where, "clip": clip, "reduce_fn": reduce_fn}

    @jax.jit
    def by_nnx(module, x):
        return jax.vjp(lambda m, x: m(x, labels, where=where), module, x)

    @jax.jit
    def by_linen(params, x):
        return jax.vjp(lambda p, x: linen.apply({"params": p}, x, labels, where=where), params, x)

    @jax.jit
    def by_function(centers, x):
        return jax.vjp(lambda c, x: jcl.center_loss(c, x, labels, **options), centers, x)

    value, pull = by_nnx(module, x)
    for other, other_pull in (by_linen({"centers": centers}, x), by_function(centers, x)):
        np.testing.assert_array_equal(value, other)
        ones = jnp.ones_like(value)
        for ours, theirs in zip(jax.tree.leaves(pull(ones)), jax.tree.leaves(other_pull(ones)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_states_and_params_go_straight_into_the_functions(batch):
    x, labels, _ = batch
    module, linen = modules()
    variables = linen.init(jax.random.key(1), x, labels)
    assert variables["params"]["centers"].shape == (C, D)
    for params in (module, nnx.state(module), variables["params"]):
        (centers,) = jax.tree.leaves(params)
        np.testing.assert_array_equal(jcl.center_loss(params, x, labels), jcl.center_loss(centers, x, labels))
        np.testing.assert_array_equal(jcl.nearest_center(params, x), jcl.nearest_center(centers, x))
        assert jcl.distance_map(params, x).shape == (3, 5, C)
        moved = jcl.update_centers(params, x, labels)
        assert jax.tree.structure(moved) == jax.tree.structure(params)
        np.testing.assert_array_equal(jax.tree.leaves(moved)[0], jcl.update_centers(centers, x, labels))


def test_initializers_and_dtypes():
    module, linen = modules(centers_init=flax.linen.initializers.constant(2.0), param_dtype=jnp.float16)
    params = linen.init(jax.random.key(0), jnp.ones((1, D)), jnp.zeros(1, jnp.int32))["params"]
    for centers in (*jax.tree.leaves(module), params["centers"]):
        assert centers.dtype == jnp.float16
        np.testing.assert_array_equal(centers, np.full((C, D), 2, np.float16))


def test_linen_initializes_outside_its_mapped_axis():
    module = jcl.linen.CenterLoss(C, D, axis_name="data")
    variables = module.init(jax.random.key(0), jnp.ones((1, D)), jnp.zeros(1, jnp.int32))
    assert variables["params"]["centers"].shape == (C, D)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.features = nnx.Linear(8, D, rngs=rngs)
        self.center_loss = jcl.nnx.CenterLoss(C, D, rngs=rngs)


def test_training_an_nnx_model_pulls_features_to_their_centers(rng):
    x, labels = rng.normal(size=(64, 8)).astype(np.float32), rng.integers(0, C, 64)
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, jcl.with_center_optimizer(optax.sgd(0.05)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            return model.center_loss(model.features(x), labels)

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(50)]
    assert losses[-1] < 0.5 * losses[0]


def test_centers_as_state_are_no_parameter_and_give_the_same_loss(batch):
    x, labels, where = batch
    as_param, _ = modules()
    as_state, linen = modules(centers_as="state")
    assert jax.tree.leaves(nnx.state(as_state, nnx.Param)) == []
    np.testing.assert_array_equal(*(jax.tree.leaves(m)[0] for m in (as_param, as_state)))
    variables = linen.init(jax.random.key(0), x, labels)
    assert set(variables) == {"centers"}
    np.testing.assert_array_equal(as_param(x, labels, where=where), as_state(x, labels, where=where))
    (centers,) = jax.tree.leaves(variables)
    np.testing.assert_array_equal(
        linen.apply(variables, x, labels, where=where), jcl.center_loss(centers, x, labels, where=where)
    )


@pytest.mark.parametrize("rule", ["paper", "gradient"])
@pytest.mark.parametrize("centers_as", ["param", "state"])
def test_the_nnx_module_moves_its_centers_as_the_function_does(batch, rule, centers_as):
    x, labels, where = batch
    module, _ = modules(centers_as=centers_as)
    want = jcl.update_centers(nnx.state(module), x, labels, alpha=0.3, rule=rule, where=where)

    @nnx.jit
    def move(module, x):
        loss = module(x, labels, where=where)
        module.update_centers(x, labels, alpha=0.3, rule=rule, where=where, after=loss)

    move(module, x)
    np.testing.assert_allclose(jax.tree.leaves(module)[0], jax.tree.leaves(want)[0], rtol=1e-6)


def test_the_nnx_module_moves_its_centers_inside_of_a_loss(batch):
    # As BatchNorm does with its statistics.
    x, labels, _ = batch
    module, _ = modules(centers_as="state")
    want = jcl.update_centers(nnx.state(module), x, labels)

    @nnx.jit
    def move(module, x):
        def loss_fn(module, x):
            loss = module(x, labels)
            module.update_centers(x, labels, after=loss)
            return loss

        return nnx.grad(loss_fn, argnums=1)(module, x)

    start = jax.tree.leaves(module)[0]
    gradient = move(module, x)
    np.testing.assert_allclose(
        gradient, jax.grad(lambda x: jcl.center_loss(start, x, labels))(x), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(jax.tree.leaves(module)[0], jax.tree.leaves(want)[0], rtol=1e-6)


@pytest.mark.parametrize("rule", ["paper", "gradient"])
def test_the_linen_module_moves_its_centers_when_they_are_mutable(batch, rule):
    x, labels, where = batch
    linen = jcl.linen.CenterLoss(C, D, centers_as="state", alpha=0.3, rule=rule)
    variables = linen.init(jax.random.key(0), x, labels)
    start = variables["centers"]["centers"]
    np.testing.assert_array_equal(
        start, linen.init(jax.random.key(0), x, -np.ones_like(labels))["centers"]["centers"]
    )

    @jax.jit
    def step(variables, x):
        def loss_fn(x):
            return linen.apply(variables, x, labels, where=where, mutable=["centers"])

        return jax.value_and_grad(loss_fn, has_aux=True)(x)

    (loss, moved), gradient = step(variables, x)
    want = jcl.update_centers(start, x, labels, alpha=0.3, rule=rule, where=where)
    np.testing.assert_allclose(moved["centers"]["centers"], want, rtol=1e-6)
    np.testing.assert_allclose(loss, jcl.center_loss(start, x, labels, where=where), rtol=1e-6)
    np.testing.assert_allclose(
        gradient, jax.grad(lambda x: jcl.center_loss(start, x, labels, where=where))(x), rtol=1e-5, atol=1e-7
    )


def test_unknown_choices_are_refused(batch):
    x, labels, _ = batch
    for make in (
        lambda: modules(centers_as="buffer"),
        lambda: jcl.linen.CenterLoss(C, D, centers_as="buffer").init(jax.random.key(0), x, labels),
        lambda: jcl.linen.CenterLoss(C, D, rule="newton").init(jax.random.key(0), x, labels),
    ):
        with pytest.raises(ValueError, match="must be one of"):
            make()


def test_centers_that_are_state_have_a_gradient_only_where_it_is_asked_for(batch):
    x, labels, _ = batch
    module, linen = modules(centers_as="state")
    variables = linen.init(jax.random.key(0), x, labels)
    assert jax.tree.leaves(nnx.grad(lambda m: m(x, labels))(module)) == []
    by_nnx = nnx.grad(lambda m: m(x, labels), argnums=nnx.DiffState(0, jcl.nnx.Centers))(module)
    by_linen = jax.grad(lambda v: linen.apply(v, x, labels))(variables)
    # The step is no part of the derivative.
    by_moving = jax.grad(lambda v: linen.apply(v, x, labels, mutable=["centers"]), has_aux=True)(variables)[0]
    for gradient, centers in ((by_nnx, module), (by_linen, variables), (by_moving, variables)):
        (centers,) = jax.tree.leaves(centers)
        want = jax.grad(jcl.center_loss)(centers, x, labels)
        np.testing.assert_allclose(jax.tree.leaves(gradient)[0], want, rtol=1e-6)


def test_a_subclass_with_a_variable_of_its_own_moves_its_centers(batch):
    class Counting(jcl.nnx.CenterLoss):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.steps = nnx.Variable(jnp.zeros((), jnp.int32))

    x, labels, _ = batch
    module = Counting(C, D, centers_as="state", rngs=nnx.Rngs(0))
    start = module.centers[...]
    module.update_centers(x, labels)
    np.testing.assert_allclose(module.centers[...], jcl.update_centers(start, x, labels), rtol=1e-6)


def test_no_gradient_passes_through_a_move_of_an_nnx_module(batch):
    x, labels, where = batch

    def moved(alpha):
        module = jcl.nnx.CenterLoss(C, D, centers_as="state", rngs=nnx.Rngs(0))
        module.update_centers(x, labels, where=where, alpha=alpha)
        return jnp.sum(module.centers[...])

    assert jax.grad(moved)(0.5) == 0
