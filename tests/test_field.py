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
    """What the model is called with."""
    return rng.normal(size=(N, 8)).astype(np.float32), rng.integers(0, C, N).astype(np.int32)


@pytest.fixture
def samples(rng):
    """Features in two dimensions and their labels."""
    return rng.normal(size=(N, 2)).astype(np.float32), rng.integers(0, C, N)


def loss_of(model, lam, x, labels):
    features = model.rbf(x)
    each = optax.softmax_cross_entropy_with_integer_labels(model.head(features), labels)
    return each.mean() + lam * model.center_loss(features, labels)


@nnx.jit
def train_step(model, optimizer, x, labels):
    optimizer.update(model, nnx.grad(loss_of)(model, 1e-3, x, labels))


# Whose centers.


class Two(nnx.Module):
    """Two center losses in a list, beside another layer."""

    def __init__(self):
        heads = [jcl.nnx.CenterLoss(C, 2, rngs=nnx.Rngs(i)) for i in range(2)]
        self.heads = nnx.List(heads) if hasattr(nnx, "List") else heads
        self.rbf = RadialBasis(nnx.Rngs(0))


class Own(nnx.Module):
    """Centers in a variable of one's own."""

    def __init__(self):
        self.centers = nnx.Param(jnp.zeros((C, 2)))


def module_with_state():
    return jcl.nnx.CenterLoss(C, 2, centers_as="state", rngs=nnx.Rngs(0))


def replaced():
    module = jcl.nnx.CenterLoss(C, 2, rngs=nnx.Rngs(0))
    module.centers = nnx.Param(jnp.zeros((C, 2)))
    return module


@pytest.mark.parametrize(
    ("make", "kind", "options"),
    [
        (Two, nnx.Param, {}),
        (Own, nnx.Param, {"select": lambda path, leaf: path == ("centers",)}),
        (replaced, nnx.Param, {}),
        (module_with_state, jcl.nnx.Centers, {}),
    ],
    ids=["two in a list", "one's own", "replaced", "state"],
)
def test_centers_of_an_nnx_model_are_found(make, kind, options):
    model = make()
    before = jax.tree_util.tree_leaves_with_path(nnx.state(model, kind))
    tx = jcl.with_center_optimizer(optax.sgd(0.0), optax.sgd(1.0), **options)
    ones = jax.tree.map(jnp.ones_like, nnx.state(model, kind))
    nnx.Optimizer(model, tx, wrt=kind).update(model, ones)
    for (path, old), new in zip(before, jax.tree.leaves(nnx.state(model, kind)), strict=True):
        step = 0 if "rbf" in jax.tree_util.keystr(path) else 1
        np.testing.assert_allclose(new, old - step, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(Model, nnx.Rngs(0), centers_as="state"), "rbf/centers may be .*update_centers or a row"),
        (Own, "centers may be another layer's .*name them by `select`"),
    ],
    ids=["centers that are state", "centers of one's own"],
)
def test_parameters_that_may_be_another_layers_are_not_taken(make, words):
    with pytest.raises(ValueError, match=rf"known to belong to an nnx\.CenterLoss; {words}"):
        nnx.Optimizer(make(), jcl.with_center_optimizer(optax.adam(1e-2)), wrt=nnx.Param)


# λ.


@pytest.mark.parametrize("own", [optax.sgd(0.5, momentum=0.9), optax.adam(0.1)], ids=["momentum", "adam"])
@jax.numpy_dtype_promotion("standard")
def test_lambda_warmed_up_from_zero(samples, own):
    # KaiyangZhou/pytorch-center-loss issues 7 and 25: the weight, divided out by hand, and NaN.
    def lam(step):
        return jnp.maximum(0.0, 0.01 * (step.astype(jnp.float32) - 1))  # 0 in the first two steps.

    tx = jcl.with_center_optimizer(optax.sgd(0.1), own, weight=lam)

    @jax.jit
    def step(number, params, state, want, own_state):
        grads = jax.grad(lambda p: lam(number) * jcl.center_loss(p, *samples))(params)
        updates, state = tx.update(grads, state, params)
        own_updates, own_state = own.update(jax.grad(jcl.center_loss)(want, *samples), own_state, want)
        return optax.apply_updates(params, updates), state, optax.apply_updates(want, own_updates), own_state

    params = want = {"centers": jnp.ones((C, 2))}
    state, own_state = tx.init(params), own.init(want)
    for number in range(5):
        params, state, *alone = step(jnp.int32(number), params, state, want, own_state)
        if number >= 2:  # Before that, centers and their optimizer rest.
            want, own_state = alone
        np.testing.assert_allclose(params["centers"], want["centers"], rtol=1e-4)


@pytest.mark.parametrize("jit", [False, True])
def test_a_lambda_of_any_type_divides_tables_of_every_dtype(jit):
    # 1 / 1e-5 is infinite in float16.
    lams = 5e-4, 1e-5, np.float32(0.1), jnp.float32(2), lambda step: jnp.float32(0.5)
    grads = {
        dtype: {"centers": jnp.full((C, 2), 1e-4, dtype)} for dtype in ("float16", "bfloat16", "float32")
    }

    def run(grads):
        transformations = [
            jcl.with_center_optimizer(optax.sgd(0.1), optax.sgd(1.0), weight=lam) for lam in lams
        ]
        return [{name: tx.update(g, tx.init(g))[0] for name, g in grads.items()} for tx in transformations]

    for lam, by_dtype in zip((5e-4, 1e-5, 0.1, 2, 0.5), (jax.jit(run) if jit else run)(grads), strict=True):
        for dtype, updates in by_dtype.items():
            assert updates["centers"].dtype == dtype
            want = -np.asarray(grads[dtype]["centers"], np.float64) / lam
            got = np.asarray(updates["centers"], np.float64)
            np.testing.assert_allclose(got, want, rtol=2 * float(jnp.finfo(dtype).eps))


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


def test_a_schedule_of_lambda_that_turns_negative_is_refused_where_its_value_is_known():
    params = {"centers": jnp.ones((C, 2))}
    tx = jcl.with_center_optimizer(optax.sgd(0.1), weight=lambda step: 0.1 - 0.2 * step.astype(jnp.float32))
    _, state = tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=r"weight must not be negative or NaN, got -0\.1"):
        tx.update(params, state)


@pytest.mark.parametrize("wrapped", [optax.MultiSteps, optax.apply_if_finite, optax.chain])
def test_lambda_at_the_step_of_its_divisor(wrapped):
    # huggingface/accelerate issue 999 and google-deepmind/optax issue 596: schedules count updates, loops
    # count micro-steps. The rate of the centers does not depend on λ with the line of the page.
    every, warm, rate = (4 if wrapped is optax.MultiSteps else 1), 5, 0.5
    lam = optax.linear_schedule(0.0, 0.01, transition_steps=warm)
    x, labels = np.array([[1, 2], [3, 4]], np.float32), np.arange(2)
    module = jcl.nnx.CenterLoss(2, 2, rngs=nnx.Rngs(0))
    centers = np.asarray(module.centers[...], np.float64)
    tx = jcl.with_center_optimizer(optax.sgd(0.0), optax.sgd(rate), weight=lam)
    arguments = {optax.MultiSteps: (every,), optax.apply_if_finite: (3,), optax.chain: ()}[wrapped]
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


# What optax wraps around.


def groups(params):
    def group(path, _):
        return "freeze" if "rbf" in jax.tree_util.keystr(path) else "train"

    return jax.tree_util.tree_map_with_path(group, params)


def only(name):
    return lambda params: jax.tree.map(lambda group: group == name, groups(params))


WRAPPERS = {
    # google-deepmind/optax issues 296 and 1148, google/flax issue 3050: freezing, with NNX and Linen.
    "masked": lambda tx: optax.chain(
        optax.masked(tx, only("train")), optax.masked(optax.set_to_zero(), only("freeze"))
    ),
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


@nnx.jit
def gradients_and_step(model, x, labels):
    """The gradients of the loss, and the centers after a step by the gradient rule."""
    moved = jcl.update_centers(model.center_loss.centers[...], model.rbf(x), labels, rule="gradient")
    return nnx.grad(loss_of)(model, 1e-3, x, labels), moved


@jax.numpy_dtype_promotion("standard")
def check_that_centers_alone_move(batch, wrapped):
    tx = wrapped(jcl.with_center_optimizer(optax.sgd(0.0), optax.sgd(0.5), weight=1e-3))
    model = Model(nnx.Rngs(0))
    grads, want = gradients_and_step(model, *batch)
    trees = nnx.to_pure_dict(nnx.state(model, nnx.Param)), nnx.to_pure_dict(grads)
    basis = trees[0]["rbf"]["centers"]
    for tree in trees:  # In a plain tree one layer alone may have centers.
        tree["rbf"] = {"means": tree["rbf"]["centers"]}

    @jax.jit
    def step(params, grads):
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    moved = step(*trees)
    train_step(model, nnx.Optimizer(model, tx, wrt=nnx.Param), *batch)
    for centers in (model.center_loss.centers[...], moved["center_loss"]["centers"]):
        np.testing.assert_allclose(centers, want, rtol=1e-4, atol=1e-5)
    for others in (model.rbf.centers[...], moved["rbf"]["means"]):
        np.testing.assert_array_equal(others, basis)


def test_another_layer_has_centers_too(batch):
    # KaiyangZhou/pytorch-center-loss issue 2: λ divided out, here beside a radial basis layer.
    check_that_centers_alone_move(batch, lambda tx: tx)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", WRAPPERS)
def test_what_optax_wraps_around(batch, name):
    check_that_centers_alone_move(batch, WRAPPERS[name])


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

    tx = optax.masked(
        jcl.with_center_optimizer(optax.sgd(0.0), weight=0.1),
        lambda p: jax.tree_util.tree_map_with_path(lambda path, _: "bias" not in str(path), p),
    )

    @jax.jit
    def run():
        params = Net().init(jax.random.key(0), *batch)["params"]
        state = TrainState.create(apply_fn=Net().apply, params=params, tx=tx)
        grads = jax.grad(lambda p: 0.1 * state.apply_fn({"params": p}, *batch))(params)
        x = nn.Dense(4).apply({"params": params["Dense_0"]}, batch[0])
        want = jcl.update_centers(params["center_loss"], x, batch[1], rule="gradient")
        return state.apply_gradients(grads=grads).params["center_loss"]["centers"], want["centers"]

    np.testing.assert_allclose(*run(), rtol=1e-5, atol=1e-6)


# Centers that nothing moves.


@pytest.mark.parametrize(
    ("centers_as", "tx"),
    [
        ("param", jcl.with_center_optimizer(optax.sgd(0.1), optax.sgd(0.5))),
        ("state", jcl.with_center_optimizer(optax.sgd(0.1), optax.sgd(0.5))),
        ("state", optax.sgd(0.5)),
    ],
    ids=["parameters", "state with others", "state alone"],
)
def test_an_assigned_array_goes_into_the_variable_and_has_a_gradient_for_who_asks(samples, centers_as, tx):
    # As `criterion.centers.data = ...` does in PyTorch. davidsandberg/facenet issue 575 and
    # michuanhaohao/reid-strong-baseline issue 181: centers that are state never moved.
    module = jcl.nnx.CenterLoss(C, 2, centers_as=centers_as, rngs=nnx.Rngs(0))
    kind = type(module.centers)
    module.centers = np.ones((C, 2), np.float32)
    assert type(module.centers) is kind
    np.testing.assert_array_equal(module.centers[...], np.ones((C, 2)))
    everything = nnx.Any(nnx.Param, kind)
    optimizer = nnx.Optimizer(module, tx, wrt=everything)

    @nnx.jit
    def step(module, optimizer):
        gradient = nnx.grad(lambda m: m(*samples), argnums=nnx.DiffState(0, everything))
        optimizer.update(module, gradient(module))

    step(module, optimizer)
    want = jcl.update_centers(np.ones((C, 2), np.float32), *samples, rule="gradient")
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
    # pytorch/pytorch issue 39428: load_state_dict casts to the module's dtype, and steps go on in float32.
    module = jcl.nnx.CenterLoss(8, 2, rngs=nnx.Rngs(0))
    module.centers = jcl.from_torch({"a": {"centers": np.ones((8, 2), jnp.bfloat16)}}, key="a.centers")
    assert module.centers[...].dtype == jnp.float32
    np.testing.assert_array_equal(module.centers[...], np.ones((8, 2)))


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


def test_previous_that_follows_the_module_is_refused(samples):
    module = module_with_state()
    copy, variables = jax.tree.map(jnp.copy, nnx.state(module)), nnx.state(module)
    module.update_centers(*samples)
    words = r"previous holds the centers themselves.*jax\.tree\.map\(jnp\.copy, params\)"
    for previous in (module, variables, nnx.state(module), module.centers, module.centers[...]):
        for function in (jcl.center_metrics, jcl.plot):
            with pytest.raises(ValueError, match=words):
                function(module, *samples, previous=previous)
    with pytest.raises(ValueError, match=words):
        nnx.jit(lambda m: jcl.center_metrics(m, *samples, previous=nnx.state(m)))(module)
    with pytest.raises(ValueError, match=words):
        jax.jit(lambda c: jcl.center_metrics(c, *samples, previous=c))(jnp.zeros((C, 2)))
    assert jcl.center_metrics(module, *samples, previous=copy)["moved"] > 0.01


# Declared sizes.


def test_centers_of_another_size_than_that_of_the_module_are_refused(samples):
    calls = []
    for centers_as in ("param", "state"):
        module = jcl.nnx.CenterLoss(9, 2, centers_as=centers_as, rngs=nnx.Rngs(0))
        nnx.update(module, jcl.from_torch({"centers": np.zeros((6, 2), np.float32)}))
        calls += [module, module.update_centers, jax.jit(partial(module))]
    linen = jcl.linen.CenterLoss(9, 2, centers_as="state")
    apply = partial(linen.apply, {"centers": {"centers": jnp.zeros((6, 2))}})
    for call in (*calls, apply, partial(apply, mutable=["centers"])):
        with pytest.raises(ValueError, match=r"is CenterLoss\(9, 2\), but its centers have shape \(6, 2\)"):
            call(*samples)


def test_an_initializer_of_another_size_is_refused():
    def pretrained(key, shape, dtype):
        return np.zeros((6, 2))

    key, linen = jax.random.key(0), jcl.linen.CenterLoss(9, 2, centers_init=pretrained)
    for make in (
        lambda: jcl.init_centers(key, 9, 2, initializer=pretrained),
        lambda: jcl.nnx.CenterLoss(9, 2, centers_init=pretrained, rngs=nnx.Rngs(0)),
        lambda: linen.init(key, np.ones((1, 2), np.float32), np.zeros(1, int)),
    ):
        with pytest.raises(ValueError, match=r"must return centers of shape \(9, 2\), got \(6, 2\)"):
            make()
    assert jcl.init_centers(key, 6, 2, initializer=pretrained)["centers"].dtype == jnp.float32


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
@pytest.mark.parametrize("convert", [lambda x: x, jnp.asarray], ids=["numpy", "asarray"])
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
    # Where it is, a float32 has no digits below 1/16, and the last steps are 1/400.
    batches = [(np.full((1, 1), value, np.float32), [0]) for value in (1e6, 1e6 + 1) for _ in range(200)]
    assert jcl.init_from_features(jnp.zeros((1, 1)), batches)[0, 0] == 1e6 + 0.5


# Between features.


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_linen_state_with_a_loss_for_each_sample_in_shard_map(rng, kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    x, labels = rng.normal(size=(16, 2)).astype(np.float32), np.arange(16) % C
    variables = {"centers": {"centers": jnp.zeros((C, 2))}}

    def step(variables, x, labels):
        options = {"centers_as": "state", "axis_name": "data"}
        modules = [jcl.linen.CenterLoss(C, 2, reduce_fn=f, **options) for f in (None, jnp.mean)]
        return [module.apply(variables, x, labels, mutable=["centers"]) for module in modules]

    out = [(P("data"), P()), (P(), P())]
    spread = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=out)
    placed = jax.device_put((x, labels), jax.sharding.NamedSharding(mesh, P("data")))
    per_sample = (x.astype(np.float64) ** 2).sum(1)
    want = jcl.update_centers(np.zeros((C, 2), np.float32), x, labels)
    for (got, moved), loss in zip(
        jax.jit(spread)(variables, *placed), (per_sample, per_sample.mean()), strict=True
    ):
        np.testing.assert_allclose(got, loss, rtol=1e-6)
        np.testing.assert_allclose(moved["centers"]["centers"], want, rtol=1e-5, atol=1e-6)


def test_metrics_have_a_gradient_also_of_a_sample_on_its_center():
    # jax-ml/jax issues 3058 and 5798: the root at 0, and a NaN behind a mask.
    centers = np.array([[0.0, 0.0], [3.0, 4.0]], np.float32)
    x = np.array([[0, 0], [3, 0], [np.nan, 1]], np.float32)
    labels = np.array([0, 0, -1])

    @jax.jit
    def gradients(x):
        return [
            jax.grad(lambda x, name=name: jcl.center_metrics(centers, x, labels)[name])(x)
            for name in ("own_distance", "gap")
        ]

    own = np.array([[0, 0], [0.5, 0], [0, 0]])  # The mean over two samples.
    other = np.array([[-0.3, -0.4], [0, -0.5], [0, 0]])
    np.testing.assert_allclose(gradients(x), [own, other - own], atol=1e-6)


def test_what_is_not_finite_in_a_map_of_distances():
    for bad in (np.nan, np.inf, -np.inf):
        centers = np.array([[0.0, 0.0], [bad, 1.0], [3.0, 4.0]], np.float32)
        x = np.array([[0.0, 0.0], [1.0, bad], [-2.0, 1.0]], np.float32)
        distances = np.asarray(jcl.distance_map(centers, x))
        assert np.isnan(distances[:, 1]).all()
        assert np.isnan(distances[1]).all()
        np.testing.assert_allclose(distances[[0, 2]][:, [0, 2]], [[0, 25], [5, 34]], atol=1e-5)
        np.testing.assert_array_equal(jcl.nearest_center(centers, x), [0, -1, 0])
        np.testing.assert_array_equal(jcl.nearest_center(np.full_like(centers, bad), x), [-1, -1, -1])


@pytest.mark.parametrize("classes", [6, 3000])
def test_the_lowest_class_wins_at_a_tie(rng, classes):
    for _ in range(20):
        centers = rng.integers(-3, 4, (classes, 3)).astype(np.float32)
        x = rng.integers(-3, 4, (50, 3)).astype(np.float32)
        want = ((x[:, None] - centers[None]) ** 2).sum(-1).argmin(-1)
        np.testing.assert_array_equal(jcl.nearest_center(centers, x), want)
    # Equal centers tie whatever their digits.
    centers = np.repeat(rng.normal(size=(1, 3)), classes, 0).astype(np.float32)
    np.testing.assert_array_equal(jcl.nearest_center(centers, rng.normal(size=(50, 3)).astype(np.float32)), 0)


def test_unsigned_labels_are_masked_by_where(rng):
    x, labels = rng.normal(size=(2, 2)).astype(np.float32), np.array([255, 3], np.uint8)
    centers = jnp.zeros((256, 2))
    moved = jcl.update_centers(centers, x, labels, where=np.array([False, True]))
    np.testing.assert_array_equal(moved[255], np.zeros(2))
    assert np.any(moved[3] != 0)


def test_a_modules_own_loss_is_what_its_gradient_rule_descends(rng):
    x, labels = (2 * rng.normal(size=(N, 2))).astype(np.float32), rng.integers(0, C, N)

    @jax.jit
    def run(start):
        results = []
        for options in ({"clip": None}, {"clip": (0.0, 0.5)}, {"reduce_fn": jnp.sum}):
            want = start - 0.1 * jax.grad(jcl.center_loss)(start, x, labels, **options)
            module = jcl.nnx.CenterLoss(C, 2, rngs=nnx.Rngs(0), **options)
            module.centers = start
            module.update_centers(x, labels, alpha=0.1, rule="gradient")
            linen = jcl.linen.CenterLoss(C, 2, centers_as="state", alpha=0.1, rule="gradient", **options)
            _, moved = linen.apply({"centers": {"centers": start}}, x, labels, mutable=["centers"])
            results.append((module.centers[...], moved["centers"]["centers"], want))
        return results

    for by_nnx, by_linen, want in run(rng.normal(size=(C, 2)).astype(np.float32)):
        np.testing.assert_allclose(by_nnx, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(by_linen, want, rtol=1e-5, atol=1e-6)


def test_a_sample_exactly_at_an_end_of_the_clamp_pulls():
    # PyTorch's clamp passes the gradient on the closed interval.
    zero = np.zeros((1, 2), np.float32)
    module = jcl.nnx.CenterLoss(1, 2, clip=(1.0, 4.0), centers_as="state", rngs=nnx.Rngs(0))
    for end in (1.0, 4.0):
        x = np.array([[np.sqrt(end), 0.0]], np.float32)
        module.centers = zero
        module.update_centers(x, [0], alpha=0.25, rule="gradient")
        np.testing.assert_array_equal(module.centers[...], 0.5 * x)
    x = np.array([[1e6, 0.0]], np.float32)  # Of the default clamp: its distance is 1e12.
    np.testing.assert_array_equal(jcl.update_centers(zero, x, [0], alpha=0.25, rule="gradient"), 0.5 * x)


def test_momentums_state_is_not_adagrads():
    centers = jnp.zeros((C, 2))
    momentum, adagrad = jcl.row_optimizer(optax.sgd(0.1, 0.9)), jcl.row_optimizer(optax.adagrad(0.1))
    with pytest.raises(ValueError, match="state does not belong to this optimizer"):
        adagrad.update(centers, momentum.init(centers), jnp.ones((1, 2)), [0])


def test_the_mean_rule_is_a_moving_average_of_class_means(samples):
    # Prototypes; ShownX/mxnet-center-loss issue 1 asks for centers that follow the data.
    x, labels = samples
    centers = np.linspace(-1, 1, 8, dtype=np.float32).reshape(4, 2)
    means = np.stack([x[labels == j].mean(0) for j in range(C)])

    @jax.jit
    def moved(alpha):
        return jcl.update_centers(centers, x, labels, alpha=alpha, rule="mean")

    for alpha in (0.25, 1.0):
        want = (1 - alpha) * centers[:C] + alpha * means
        np.testing.assert_allclose(moved(alpha)[:C], want, rtol=1e-5)
        np.testing.assert_array_equal(moved(alpha)[C], centers[C])


# Words.


X, Y, TABLE = np.zeros((4, 3), np.float32), np.zeros(4, int), np.zeros((5, 3), np.float32)
OF_ANOTHER_TYPE = {
    # google-deepmind/optax issue 1286: a schedule where a number is meant.
    "schedule": (
        lambda: jcl.update_centers(TABLE, X, Y, alpha=optax.cosine_decay_schedule(0.5, 10)),
        r"alpha must be a number, got the function.*alpha=schedule\(step\)",
    ),
    "linen schedule": (
        lambda: jcl.linen.CenterLoss(5, 3, alpha=optax.cosine_decay_schedule(0.5, 10)),
        r"alpha=schedule\(step\)",
    ),
    "labels None": (lambda: jcl.center_loss(TABLE, X, None), "labels must be an array, got None"),
    "ragged labels": (
        lambda: jcl.center_loss(TABLE, X, [[0], [1, 2]]),
        "labels must be an array, got a list",
    ),
    "a model's output": (
        lambda: jcl.center_loss(TABLE, {"features": X, "logits": X}, Y),
        "x must be an array, got a dict with the keys 'features', 'logits'. Pass the features",
    ),
    "a tuple": (lambda: jcl.center_loss(TABLE, (X, X[:2]), Y), "x must be an array, got a tuple of 2"),
    "x None": (lambda: jcl.nearest_center(TABLE, None), "x must be an array, got None"),
    "swapped": (lambda: jcl.nearest_center(X, {"centers": TABLE}), r"the order is \(params, x\)"),
    "swapped labels": (lambda: jcl.center_loss(TABLE, Y, X), "Labels come after it"),
    "after": (lambda: jcl.update_centers(TABLE, X, Y, after={"loss": "loss"}), "a leaf of after .* got str"),
    "where of words": (lambda: jcl.center_loss(TABLE, X, Y, where="all"), "where must be an array, got str"),
    "select": (
        lambda: jcl.with_center_optimizer(optax.sgd(0.1), select="centers"),
        "select must be a function",
    ),
    "sizes of floats": (
        lambda: jcl.nnx.CenterLoss(5.0, 3, rngs=nnx.Rngs(0)),
        r"num_classes must be an integer, got 5\.0",
    ),
}
OF_ANOTHER_VALUE = {
    "params None": (lambda: jcl.center_loss(None, X, Y), "params must hold exactly one array"),
    "reduce_fn in nnx": (
        lambda: jcl.nnx.CenterLoss(5, 3, reduce_fn="sum", rngs=nnx.Rngs(0)),
        "reduce_fn must be",
    ),
    "clip in linen": (lambda: jcl.linen.CenterLoss(5, 3, clip=1.0), "clip must be"),
    "reduce_fn in linen": (lambda: jcl.linen.CenterLoss(5, 3, reduce_fn="sum"), "reduce_fn must be"),
    "clip in nnx": (lambda: jcl.nnx.CenterLoss(5, 3, clip=1.0, rngs=nnx.Rngs(0)), "clip must be"),
    "centers_as": (lambda: jcl.linen.CenterLoss(5, 3, centers_as="buffer"), "centers_as must be one of"),
}


@pytest.mark.parametrize(("call", "words"), OF_ANOTHER_TYPE.values(), ids=OF_ANOTHER_TYPE)
def test_an_argument_of_another_type_is_named(call, words):
    with pytest.raises(TypeError, match=words):
        call()


@pytest.mark.parametrize(("call", "words"), OF_ANOTHER_VALUE.values(), ids=OF_ANOTHER_VALUE)
def test_an_argument_of_another_value_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_missing_label_is_ignored_and_weights_of_64_bits_count():
    # NaN as an integer, as pandas and NumPy have it, is -2**63, of which 32 bits are 0.
    with np.errstate(invalid="ignore"):
        labels = np.array([np.nan, 1.0]).astype(np.int64)
    centers, x = np.array([[0, 0], [5, 5]], np.float32), np.array([[1, 1], [5, 5]], np.float32)
    assert labels[0] < -(2**62)

    @jax.jit
    def run():
        functions = jcl.center_loss, jcl.update_centers
        missing, ignored = ([f(centers, x, given) for f in functions] for given in (labels, [-1, 1]))
        losses = [jcl.center_loss(centers, x, [1, 1], weights=w) for w in (None, np.full(2, 2**32))]
        return missing, ignored, losses

    missing, ignored, losses = run()
    jax.tree.map(np.testing.assert_array_equal, missing, ignored)
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_an_infinite_weight_shows_by_every_rule():
    x, weights = np.zeros((1, 2), np.float32), np.array([np.inf])

    @jax.jit
    def moved():
        return [jcl.update_centers(x, x, [0], weights=weights, rule=rule) for rule in RULES]

    assert np.isnan(moved()).all()


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


def test_checkify_of_a_step_by_rows_with_weights(samples):
    rows = jcl.row_optimizer(optax.sgd(0.1, momentum=0.9))
    x, labels = map(jnp.asarray, samples)

    def step(centers, state, weights):
        jcl.check_batch(centers, x, labels, weights=weights)
        return rows.update(centers, state, x, labels, weights=weights)

    centers, weights = jnp.zeros((C, 2)), jnp.ones(N).at[5].set(-3.0)
    error, _ = checkify.checkify(jax.jit(step))(centers, rows.init(centers), weights)
    assert f"the weight of a used sample, of class {labels[5]}, is -3" in error.get()


# PaddleOCR issues 3962, 4366, 6947, 9160, 10131: lines of text, labels by argmax, blanks left out.


def test_frames_of_a_line_with_labels_by_argmax(rng):
    logits = rng.normal(size=(4, 9, C + 1)).astype(np.float32)  # (batch, time, classes and the blank)
    x = rng.normal(size=(4, 9, 2)).astype(np.float32)
    centers = rng.normal(size=(C, 2)).astype(np.float32)

    @jax.jit
    def run():
        labels = jnp.argmax(logits, -1) - 1  # The blank is class 0, and becomes -1.
        by_line = jcl.center_loss(centers, x, labels, clip=None)
        by_time = jcl.center_loss(centers, x.swapaxes(0, 1), labels.T, clip=None)
        # Its centers come from a trained model, and no optimizer moves them.
        frozen = jax.grad(lambda c: jcl.center_loss(jax.lax.stop_gradient(c), x, labels))(centers)
        return [by_line, by_time], frozen

    losses, frozen = run()
    labels = logits.argmax(-1) - 1
    used = labels >= 0
    want = np.mean(((x[used] - centers[labels[used]]) ** 2).sum(-1))
    np.testing.assert_allclose(losses, [want, want], rtol=1e-5)
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


def advice(error, words, function, *arguments, **options):
    """The pieces of code in the words of the error that a call raises."""
    with pytest.raises(error, match=words) as raised:
        function(*arguments, **options)
    return re.findall("`([^`]*)`", str(raised.value))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mask_or_a_unit_is_never_dropped(name):
    # numpy.ma keeps what np.asarray drops: JAX refuses such arrays, and so does every function here.
    units = lambda a: a.view(Metres), lambda a: a.view(Measured), Quantity, Quantity.nested
    for index in range(2 if name in ("distance_map", "nearest_center") else 3):
        for kind in (np.ma.masked_array, Lazy, *units):
            given = [CENTERS, POINTS, OWN]
            given[index] = kind(given[index])
            with pytest.raises(TypeError, match=r"^\S+( leaf of params)? (\S+ )?must .*(masked|unit would)"):
                FUNCTIONS[name](*given)


def test_masks_of_masks_weights_and_checkpoints_are_not_dropped():
    mask = [False, True, False]
    want = jcl.center_loss(CENTERS, POINTS, OWN, where=np.logical_not(mask))
    for name, value in {"where": np.ones(3, bool), "weights": np.ones(3)}.items():
        masked = np.ma.masked_array(value, mask=mask)
        call = partial(jcl.center_loss, CENTERS, POINTS, OWN)
        code = advice(TypeError, f"{name} must not be a masked array", call, **{name: masked})[0]
        np.testing.assert_array_equal(call(**{name: eval(code, {name: masked})}), want)
    x = np.ma.masked_array(POINTS, mask=[[False, False], [False, True], [False, False]])
    words = "x must not be a masked array"
    first, second = advice(TypeError, words, jcl.init_from_features, CENTERS, [(x, OWN)])
    scope = {"np": np, "x": x, "labels": OWN}
    exec(first, scope)
    filled, labels = eval(second, scope), scope["labels"]
    with pytest.warns(UserWarning, match="2 of 4 classes were never seen"):
        means = jcl.init_from_features(CENTERS + 7, [(filled, labels)])
    np.testing.assert_array_equal(means, [POINTS[0], [7, 7], POINTS[2], [7, 7]])
    np.testing.assert_array_equal(jcl.center_loss(CENTERS, filled, labels), want)
    assert jcl.nearest_center(CENTERS, filled).tolist() == [0, -1, 0]
    words = "labels must not be a masked array"
    code = advice(TypeError, words, jcl.center_loss, CENTERS, POINTS, Lazy(OWN))[0]
    assert eval(code, {"np": np, "labels": Lazy(OWN)}).tolist() == OWN.tolist()
    with pytest.raises(TypeError, match="masked"):
        jcl.from_torch({"centers": np.ma.masked_array(CENTERS, mask=CENTERS == 0)})
    with pytest.raises(TypeError, match="masked"):
        jcl.center_loss(CENTERS, POINTS, [np.ma.masked, 1, 2])


@pytest.mark.parametrize("dtype", [">f4", ">f8", np.longdouble])
def test_numbers_of_a_foreign_byte_order_count(dtype):
    # FITS, MATLAB and HDF5 files hold big-endian numbers.
    centers = np.arange(8, dtype=np.float32).reshape(4, 2)
    foreign, weights = POINTS.astype(dtype), np.array([1, 0, 2], ">i4")

    @jax.jit
    def run():
        losses = [
            jcl.center_loss(*given, clip=None)
            for given in (
                (centers.astype(dtype), POINTS, OWN),
                (centers, foreign, OWN.astype(">i2")),
                (jcl.from_torch({"centers": centers.astype(dtype)}), POINTS, OWN.astype(">i8")),
                (centers, list(foreign), list(OWN.astype(">i8"))),
            )
        ]
        return losses, [jcl.center_loss(centers, POINTS, OWN, weights=w) for w in (weights, [1, 0, 2])]

    losses, weighed = run()
    want = np.mean((POINTS.astype(float) - centers[OWN]) ** 2 @ np.ones(2))
    np.testing.assert_allclose(losses, [want] * 4, rtol=1e-6)
    np.testing.assert_array_equal(*weighed)


def test_lists_and_few_bits_count_as_the_numbers_they_hold():
    many = np.zeros((300, 2), np.float32)
    halves = list(np.asarray([1, 0, 2], jnp.bfloat16))
    labels = jnp.asarray(OWN, "int4"), OWN.tolist(), tuple(OWN), list(jnp.asarray(OWN))

    @jax.jit
    def run():
        rows = [list(row) for row in np.asarray(POINTS, jnp.bfloat16)]
        losses = [
            jcl.center_loss(Layer(jnp.asarray(many)), POINTS, OWN),
            *(jcl.center_loss(many, POINTS, each) for each in (OWN, *labels)),
        ]
        weighed = [
            jcl.center_loss(many, POINTS, list(np.asarray(OWN, "int4")), weights=halves),
            jcl.center_loss(many, POINTS, OWN, weights=[1, 0, 2]),
        ]
        moved = [
            jcl.update_centers(many, rows, OWN, alpha=halves[0]),
            jcl.update_centers(many, POINTS, OWN, alpha=1.0),
        ]
        return losses, weighed, moved

    losses, weighed, moved = run()
    np.testing.assert_array_equal(losses, [losses[0]] * 6)
    np.testing.assert_array_equal(*weighed)
    np.testing.assert_array_equal(*moved)
    # jax-ml/jax issue 18385: given to jit, labels of 64 bits wrap before this library sees them.
    for huge in (2**31 + 1, 2**32, 2**32 + 1, 2**40):
        for given in ([0, 1, huge], np.array([0, 1, huge])):
            with pytest.raises(ValueError, match=f"label {huge} is out of range"):
                jcl.center_loss(many, POINTS, given)
    np.testing.assert_array_equal(jcl.center_loss(CENTERS, POINTS, [0, -(2**63), 2]), 5.0)


# Every piece of advice, followed to the letter.


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
    words = "1 of them missing" if name.startswith("missing") else "labels"
    for _ in range(2 if name == "a column of floats" else 1):
        found = advice((TypeError, ValueError), words, jcl.center_loss, CENTERS, POINTS, labels)
        (code,) = (code for code in found if code not in ("where", "weights"))
        labels = eval(code, {"labels": labels, "np": np, "jnp": jnp})
    want = np.mean(np.sum(POINTS[np.array(classes) >= 0] ** 2, 1))
    np.testing.assert_allclose(jcl.center_loss(CENTERS, POINTS, labels, clip=None), want, rtol=1e-6)


def test_labels_that_are_no_whole_numbers_get_no_advice_to_cast_them():
    for bad in ([0.5, 1.0, 2.0], [0.0, np.inf, 2.0]):
        words = "some are no whole numbers"
        pieces = advice(TypeError, words, jcl.center_loss, CENTERS, POINTS, np.array(bad))
        assert not any("astype" in piece for piece in pieces)


def loss_of_lists(x, where):
    """The loss of lists of whole numbers, made arrays by the advice of one error after the other."""
    given = {"x": x, "labels": OWN, "where": where}
    for name in ("x", "where"):
        words = rf"{name} must be (floating|boolean)"
        code = advice(TypeError, words, jcl.center_loss, CENTERS, **given)[0].removeprefix("where=")
        given[name] = eval(code, {"np": np, "jnp": jnp} | given)
    return jcl.center_loss(CENTERS, **given)


def test_advice_on_lists_of_whole_numbers():
    np.testing.assert_array_equal(loss_of_lists(POINTS.astype(int).tolist(), [1, 0, 1]), 5.0)
    under_jit = jax.jit(lambda one: loss_of_lists([[one, 1], [5, 5], [2, 2 * one]], [one, 0, 1]))
    np.testing.assert_allclose(under_jit(1), 5.0, rtol=1e-6)


def test_advice_on_labels_inside_of_jit():
    missing = jnp.array([0, NAN, 2])
    cast = advice(TypeError, "must be integers", jax.jit(jcl.center_loss), CENTERS, POINTS, missing)[0]

    @jax.jit
    def loss(labels):
        return jcl.center_loss(CENTERS, POINTS, eval(cast, {"labels": labels, "jnp": jnp}), clip=None)

    np.testing.assert_allclose(loss(missing), (2 + 8) / 2, rtol=1e-6)
    assert np.isnan(loss(jnp.array([0, jnp.inf, 2])))  # Shown, not counted as a class.


def test_advice_on_names_and_complex_features():
    words = "labels must be an array, got an array of str.*for the whole data set"
    code = advice(TypeError, words, jcl.center_loss, CENTERS, POINTS, np.array(["ash", "oak", "elm"]))[0]
    scope = {"np": np, "all_names": ["oak", "ash", "oak", "elm"]}
    exec(code, scope)
    assert scope["names"][scope["labels"]].tolist() == scope["all_names"]
    x = np.array([[3 + 4j], [0]])
    code = advice(TypeError, "real and imaginary", jcl.center_loss, CENTERS, x, [0, 1])[0]
    np.testing.assert_array_equal(eval(code, {"jnp": jnp, "x": x}), [[3, 4], [0, 0]])


def test_advice_on_row_optimizers_and_keys():
    rows, optimizer = jcl.row_optimizer(optax.sgd(0.1)), partial(nnx.Optimizer, wrt=nnx.Param)
    centers = jcl.nnx.CenterLoss(4, 2, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="no optax transformation"):
        optimizer(centers, rows).update(centers, nnx.state(centers))
    model = Model(nnx.Rngs(0))
    code = advice(ValueError, "no optax transformation", optimizer, model, rows)[-1]
    names = {"model_tx": optax.adam(1e-3), "tx": optax.sgd(0.1), "jcl": jcl}
    optimizer(model, eval(f"jcl.{code}", names))
    with pytest.raises(TypeError, match=r"rngs must be nnx\.Rngs, such as `nnx\.Rngs\(0\)`"):
        jcl.nnx.CenterLoss(4, 2, rngs=jax.random.key(0))


def test_advice_on_shards_leads_to_centers_that_nothing_finds():
    mesh = jax.make_mesh((8,), ("d",))
    init = partial(jcl.init_centers, out_sharding=jax.NamedSharding(mesh, P("d", None)))
    code = advice(ValueError, "Round it up to 16", init, jax.random.key(0), 9, 2)[-1]
    centers = init(jax.random.key(0), 16, 2)["centers"]
    unused = np.asarray(centers)[9:]
    assert (jcl.nearest_center(centers, unused) >= 9).all()
    with jax.set_mesh(mesh):
        filled = eval(code, {"jnp": jnp, "centers": centers})
    assert filled.sharding.is_equivalent_to(centers.sharding, 2)
    assert (jcl.nearest_center(filled, unused) < 9).all()
    labels = np.arange(7)
    got, want = (jcl.center_metrics(c, unused, labels) for c in (filled, np.asarray(centers)[:9]))
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5)


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
        loss = partial(jcl.center_loss, CENTERS, x, labels, clip=None)
        code = advice(ValueError, "of classes", loss, weights=weights)[-1]
        return loss(weights=eval(code, {"weights": weights, "labels": labels, "jnp": jnp, "jax": jax}))

    np.testing.assert_allclose((jax.jit(follow) if how == "jit" else follow)(labels), want, rtol=1e-6)
    words, old = r"shape of labels \(3,\), got \(5,\)", np.ones(5)  # Of an old batch, say.
    assert advice(ValueError, words, jcl.center_loss, CENTERS, POINTS, OWN, weights=old) == []


def test_advice_on_previous_centers_and_modules():
    metrics = partial(jcl.center_metrics, x=POINTS, labels=OWN)
    code = advice(ValueError, "nothing has moved", metrics, CENTERS, previous=CENTERS)[-1]
    scope = {"jax": jax, "jnp": jnp, "params": {"centers": jnp.asarray(CENTERS)}}
    exec(code, scope)
    moved = jcl.update_centers(scope["params"], POINTS, OWN, rule="mean", alpha=1.0)
    distance = metrics(moved, previous=scope["previous"])["moved"]
    np.testing.assert_allclose(distance, np.linalg.norm(POINTS, axis=1).mean(), rtol=1e-6)
    make, centers = partial(jcl.nnx.CenterLoss, 4, 2, rngs=nnx.Rngs(0)), jnp.full((4, 2), 3.0)
    code = advice(TypeError, "existing centers", make, centers_init=centers)[-1]
    module = make(centers_init=eval(code, {"centers": centers}))
    np.testing.assert_array_equal(module.centers[...], centers)


def test_advice_on_which_parameters_are_centers():
    # NetVLAD, deep clustering and radial basis functions have a parameter of that name as well.
    params = {name: {"centers": jnp.ones((4, 2))} for name in ("center_loss", "vlad")}
    choose = partial(jcl.with_center_optimizer, optax.sgd(0.1), optax.sgd(1.0))
    found = advice(
        ValueError, "several parameters .*center_loss/centers, vlad/centers", choose().init, params
    )
    (select,) = [code for code in found if "=" in code]
    tx = choose(**eval(f"dict({select})"))
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["center_loss"]["centers"], -np.ones((4, 2)), rtol=1e-6)
    np.testing.assert_allclose(updates["vlad"]["centers"], -0.1 * np.ones((4, 2)), rtol=1e-6)


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

    @nnx.jit
    def step(model, optimizer, x, labels):
        optimizer.update(model, nnx.grad(lambda m: m.center_loss(m.features(x), labels))(model))

    # optax promotes the bias correction of bare scalars.
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        model, optimizer = create()
        x, labels = jax.device_put((jnp.ones((16, 4)), jnp.arange(16)), jax.NamedSharding(mesh, P()))
        for _ in range(2):
            moments = [leaf for leaf in jax.tree.leaves(nnx.state(optimizer)) if leaf.ndim == 2]
            assert len(moments) == 4
            assert all(leaf.addressable_shards[0].data.size * 8 == leaf.size for leaf in moments)
            step(model, optimizer, x, labels)


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
    x = rng.normal(size=(3, 2)).astype(np.float32)

    def step(module, x, labels):
        loss = module(x, labels)
        module.update_centers(x, labels, after=loss)
        return loss

    def results(module, x, labels):
        functions = jcl.center_loss, jcl.update_centers, jcl.center_metrics
        return [jax.tree.leaves(function(module, x, labels)) for function in functions]

    np.testing.assert_allclose(jit(step)(module, x, OWN), step(usual, x, OWN), rtol=1e-6)
    np.testing.assert_allclose(module.centers[...], usual.centers[...], rtol=1e-6)
    got, want = (jit(results)(m, x, OWN) for m in (module, usual))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), got, want)
