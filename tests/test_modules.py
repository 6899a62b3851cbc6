"""The Flax modules: the same numbers as the functions, in both of Flax's APIs."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_centerloss as jcl

C, D = 6, 3
CLIP = (1.0, 6.0)  # Some distances are outside.


@pytest.fixture
def batch(rng):
    x = rng.normal(size=(3, 5, D)).astype(np.float32)
    return x, rng.integers(-1, C, (3, 5)), rng.random((3, 5)) < 0.7


def modules(**options):
    module = jcl.nnx.CenterLoss(C, D, **options, rngs=nnx.Rngs(0))
    return module, jcl.linen.CenterLoss(C, D, **options)


@pytest.mark.parametrize(
    ("clip", "reduce_fn", "param_dtype"),
    [(None, jnp.mean, jnp.float32), (CLIP, jnp.sum, jnp.bfloat16), (CLIP, None, jnp.float32)],
)
def test_nnx_and_linen_are_bit_identical(batch, clip, reduce_fn, param_dtype):
    x, labels, where = batch
    module, linen = modules(clip=clip, reduce_fn=reduce_fn, param_dtype=param_dtype)
    (centers,) = jax.tree.leaves(module)
    assert centers.dtype == param_dtype
    options = {"where": where, "clip": clip, "reduce_fn": reduce_fn}

    @jax.jit
    def losses_and_gradients(module, params, centers, x):
        def of(function, holder):
            value, pull = jax.vjp(function, holder, x)
            return [value, *jax.tree.leaves(pull(jnp.ones_like(value)))]

        return (
            of(lambda m, x: m(x, labels, where=where), module),
            of(lambda p, x: linen.apply({"params": p}, x, labels, where=where), params),
            of(lambda c, x: jcl.center_loss(c, x, labels, **options), centers),
        )

    by_nnx, by_linen, by_function = losses_and_gradients(module, {"centers": centers}, centers, x)
    assert [leaf.shape for leaf in by_nnx[1:]] == [(C, D), x.shape]
    jax.tree.map(np.testing.assert_array_equal, by_nnx, by_function)
    jax.tree.map(np.testing.assert_array_equal, by_linen, by_function)


def test_states_and_params_go_straight_into_the_functions(batch):
    x, labels, _ = batch
    module, linen = modules()
    variables = jax.jit(linen.init)(jax.random.key(1), x, labels)
    assert variables["params"]["centers"].shape == (C, D)

    @jax.jit
    def results(params):
        moved = jcl.update_centers(params, x, labels)
        assert jax.tree.structure(moved) == jax.tree.structure(params)
        distances = jcl.distance_map(params, x)
        return [
            *jax.tree.leaves(moved),
            jcl.center_loss(params, x, labels),
            jcl.nearest_center(params, x),
            distances,
        ]

    for params in (module, nnx.state(module), variables["params"]):
        jax.tree.map(np.testing.assert_array_equal, results(params), results(*jax.tree.leaves(params)))


def test_initializers_and_dtypes():
    module, linen = modules(centers_init=flax.linen.initializers.constant(2.0), param_dtype=jnp.float16)
    params = linen.init(jax.random.key(0), jnp.ones((1, D)), jnp.zeros(1, jnp.int32))["params"]
    for centers in (*jax.tree.leaves(module), params["centers"]):
        assert centers.dtype == jnp.float16
        np.testing.assert_array_equal(centers, np.full((C, D), 2, np.float16))


def test_linen_initializes_outside_its_mapped_axis():
    module = jcl.linen.CenterLoss(C, D, axis_name="data")
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, D)), jnp.zeros(1, jnp.int32))
    assert variables["params"]["centers"].shape == (C, D)


def test_centers_as_state_are_no_parameter_and_have_a_gradient_only_where_it_is_asked_for(batch):
    x, labels, where = batch
    as_param, _ = modules()
    module, linen = modules(centers_as="state")
    assert jax.tree.leaves(nnx.state(module, nnx.Param)) == []
    np.testing.assert_array_equal(*(jax.tree.leaves(m)[0] for m in (as_param, module)))
    variables = jax.jit(linen.init)(jax.random.key(0), x, labels)
    assert set(variables) == {"centers"}

    @nnx.jit
    def by_nnx(module):
        def loss(module):
            return module(x, labels, where=where)

        assert jax.tree.leaves(nnx.grad(loss)(module)) == []
        return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, jcl.nnx.Centers))(module)

    @jax.jit
    def by_linen(variables):
        def loss(variables, **options):
            return linen.apply(variables, x, labels, where=where, **options)

        # The step is no part of the derivative.
        moving = jax.grad(lambda v: loss(v, mutable=["centers"]), has_aux=True)(variables)[0]
        value, gradient = jax.value_and_grad(loss)(variables)
        return (value, gradient), (value, moving)

    @jax.jit
    def by_function(centers):
        return jax.value_and_grad(jcl.center_loss)(centers, x, labels, where=where)

    for found, holder in ((by_nnx(module), module), *((found, variables) for found in by_linen(variables))):
        want = by_function(*jax.tree.leaves(holder))
        for one, other in zip(jax.tree.leaves(found), want, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


class Counting(jcl.nnx.CenterLoss):
    """A subclass with a variable of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = nnx.Variable(jnp.zeros((), jnp.int32))


@pytest.mark.parametrize(
    ("kind", "centers_as", "rule"),
    [(jcl.nnx.CenterLoss, "param", "paper"), (Counting, "state", "gradient")],
    ids=["param by paper", "state of a subclass by gradient"],
)
def test_the_nnx_module_moves_its_centers_inside_of_a_loss(batch, kind, centers_as, rule):
    # As BatchNorm does with its statistics.
    x, labels, where = batch
    module = kind(C, D, centers_as=centers_as, rngs=nnx.Rngs(0))
    start = module.centers[...]

    @nnx.jit
    def move(module, x):
        def loss_fn(module, x, alpha):
            loss = module(x, labels, where=where)
            module.update_centers(x, labels, alpha=alpha, rule=rule, where=where, after=loss)
            return loss + jnp.sum(module.centers[...])

        return nnx.grad(loss_fn, argnums=(1, 2))(module, x, 0.3)

    @jax.jit
    def by_function(start, x):
        moved = jcl.update_centers(start, x, labels, alpha=0.3, rule=rule, where=where)
        return moved, jax.grad(lambda x: jcl.center_loss(start, x, labels, where=where))(x)

    by_x, by_alpha = move(module, x)
    want, want_by_x = by_function(start, x)
    np.testing.assert_allclose(module.centers[...], want, rtol=1e-6)
    # No gradient passes through the move.
    np.testing.assert_allclose(by_x, want_by_x, rtol=1e-5, atol=1e-7)
    assert by_alpha == 0


@pytest.mark.parametrize("rule", ["paper", "gradient"])
def test_the_linen_module_moves_its_centers_when_they_are_mutable(batch, rule):
    x, labels, where = batch
    linen = jcl.linen.CenterLoss(C, D, centers_as="state", alpha=0.3, rule=rule)
    init = jax.jit(linen.init)
    variables = init(jax.random.key(0), x, labels)
    start = variables["centers"]["centers"]
    untouched = init(jax.random.key(0), x, -np.ones_like(labels))
    np.testing.assert_array_equal(start, untouched["centers"]["centers"])

    @jax.jit
    def step(variables, x):
        def loss_fn(x):
            loss, moved = linen.apply(variables, x, labels, where=where, mutable=["centers"])
            (centers,) = jax.tree.leaves(moved)
            return loss + jnp.sum(centers), (loss, centers)  # No gradient passes through the move.

        return jax.grad(loss_fn, has_aux=True)(x)

    @jax.jit
    def by_function(start, x):
        moved = jcl.update_centers(start, x, labels, alpha=0.3, rule=rule, where=where)
        return moved, jax.value_and_grad(lambda x: jcl.center_loss(start, x, labels, where=where))(x)

    gradient, (loss, moved) = step(variables, x)
    want, (want_loss, want_gradient) = by_function(start, x)
    np.testing.assert_allclose(moved, want, rtol=1e-6)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-5, atol=1e-7)


def test_unknown_choices_are_refused():
    for make in (
        lambda: modules(centers_as="buffer"),
        lambda: jcl.linen.CenterLoss(C, D, centers_as="buffer"),
        lambda: jcl.linen.CenterLoss(C, D, rule="newton"),
    ):
        with pytest.raises(ValueError, match="must be one of"):
            make()
