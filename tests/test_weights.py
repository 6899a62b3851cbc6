"""A weight of k is the sample k times: in the loss, its derivatives, every rule and every row optimizer."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from jax.test_util import check_grads
from oracle import Batch, Precision
from test_properties import CLIP, RULES, assert_within

import jax_centerloss as jcl

C, D, N = 5, 3, 12
ALPHA = 0.3
RULE = pytest.mark.parametrize("rule", RULES)


def draw(rng, number=N, classes=C, dim=D):
    """Centers, features and labels, some of them negative."""
    centers = rng.normal(size=(classes, dim)).astype(np.float32)
    x = (rng.normal(size=(number, dim)) + rng.choice([0, 0, 30])).astype(np.float32)
    return centers, x, rng.integers(-1, classes, number).astype(np.int32)


def draw_weights(rng, number=N):
    """Some of them 0, of sizes that may be far apart."""
    weights = (
        rng.random(number) * 10.0 ** rng.integers(-4, 5, number) if rng.random() < 0.5 else rng.random(number)
    )
    return np.where(rng.random(number) < 0.25, 0, weights).astype(np.float32)


@jax.jit
def everything(centers, x, labels, where, weights):
    def loss(centers, x, weights, **options):
        return jcl.center_loss(centers, x, labels, where=where, weights=weights, **options)

    return (
        [loss(centers, x, weights, reduce_fn=f) for f in (jnp.mean, jnp.sum, None)],
        jax.grad(loss, (0, 1, 2))(centers, x, weights),
        [
            jcl.update_centers(centers, x, labels, where=where, weights=weights, alpha=ALPHA, rule=rule)
            for rule in RULES
        ],
    )


@pytest.mark.few(1)
@pytest.mark.parametrize(("number", "classes", "dim"), [(12, 5, 3), (3, 40, 2), (30, 2, 8)])
def test_a_thousand_random_cases(rng, number, classes, dim):
    precision = Precision.of(np.float32)
    for _ in range(1000):
        centers, x, labels = draw(rng, number, classes, dim)
        batch = Batch(centers, x, labels, rng.random(number) < 0.8, draw_weights(rng, number))
        losses, grads, steps = jax.device_get(everything(*batch))
        for reduce, got in zip(("mean", "sum", None), losses, strict=True):
            assert_within(got, oracle.loss(batch, reduce, CLIP, precision), f"{reduce}")
        for got, want in zip(grads, oracle.gradients(batch, CLIP, precision, precision)[::-1], strict=False):
            assert_within(got, want, "gradient")
        # At weight 0 the derivative is that of the loss there, which the next test looks at.
        by_weights = np.where(batch.weights == 0, 0, grads[2])
        assert_within(by_weights, oracle.gradient_by_weights(batch, CLIP, precision), "gradient by weights")
        for rule, got in zip(RULES, steps, strict=True):
            assert_within(got, oracle.moved(batch, rule, ALPHA, CLIP, precision), rule)


def test_the_derivative_by_the_weights(rng):
    centers, x, labels = draw(rng)
    weights = (0.1 + rng.random(N)).astype(np.float32)
    where = np.arange(N) % 4 != 1
    for reduce_fn in (jnp.mean, jnp.sum):
        check_grads(
            lambda w, x, reduce_fn=reduce_fn: jcl.center_loss(
                centers, x, labels, where=where, weights=w, reduce_fn=reduce_fn
            ),
            (weights, x),
            order=2,
            rtol=2e-2,
            atol=2e-2,
        )
    # How a sample would count that does not yet, as meta-learned weights start from 0.
    by_weights = jax.grad(lambda w: jcl.center_loss(centers, x, labels, weights=w, reduce_fn=jnp.sum))
    each = jcl.center_loss(centers, x, labels, reduce_fn=None)
    np.testing.assert_allclose(by_weights(np.zeros(N, np.float32)), each, rtol=1e-6)
    mixed = jax.jacobian(
        lambda w: jax.grad(lambda x: jcl.center_loss(centers, x, labels, weights=w, reduce_fn=jnp.sum))(x)
    )(np.zeros(N, np.float32))
    used = labels >= 0
    want = 2 * (x - centers[np.maximum(labels, 0)]) * used[:, None]
    np.testing.assert_allclose(mixed[np.arange(N), :, np.arange(N)], want, rtol=1e-5, atol=1e-6)


def repeated(rng, most=4):
    """A batch, a number of times for each sample, and the batch in which each stands so often."""
    centers, x, labels = draw(rng)
    times = rng.integers(0, most, N)
    return centers, x, labels, times, np.repeat(x, times, 0), np.repeat(labels, times)


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", ["int32", "uint8", "float32", "bfloat16", "float16"])
def test_k_times_in_the_loss_and_by_rule(rng, dtype):
    centers, x, labels, times, x_often, labels_often = repeated(rng)
    weights = jnp.asarray(times, dtype)
    for options in ({}, {"reduce_fn": jnp.sum}, {"clip": None}, {"clip": (0.5, 2.0)}):
        got = jax.value_and_grad(jcl.center_loss, (0,))(centers, x, labels, weights=weights, **options)
        want = jax.value_and_grad(jcl.center_loss, (0,))(centers, x_often, labels_often, **options)
        for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert ours.dtype == jnp.float32
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for rule in RULES:
        got = jcl.update_centers(centers, x, labels, weights=weights, rule=rule)
        np.testing.assert_allclose(
            got, jcl.update_centers(centers, x_often, labels_often, rule=rule), rtol=1e-5, atol=1e-6
        )


OPTIMIZERS = {
    "momentum": lambda: optax.sgd(0.4, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.4, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.1, eps=0.1),
    "adamw": lambda: optax.adamw(0.1, eps=0.1, weight_decay=0.1),
    "adagrad": lambda: optax.adagrad(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1, eps=0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.4)),
}


@pytest.mark.few(4)
@RULE
@pytest.mark.parametrize("name", OPTIMIZERS)
@jax.numpy_dtype_promotion("standard")
def test_k_times_by_rows(rng, name, rule):
    rows = jcl.row_optimizer(OPTIMIZERS[name]())
    params = often = jnp.asarray(rng.normal(size=(C, D)), jnp.float32)
    state = state_often = rows.init(params)
    for _ in range(3):
        _, x, labels, times, x_often, labels_often = repeated(rng)
        params, state = rows.update(params, state, x, labels, weights=times, rule=rule)
        often, state_often = rows.update(often, state_often, x_often, labels_often, rule=rule)
        trees = jax.tree.leaves((params, state)), jax.tree.leaves((often, state_often))
        for ours, theirs in zip(*trees, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_k_times_in_the_metrics(rng):
    centers, x, labels, times, x_often, labels_often = repeated(rng)
    previous = centers + 1
    got = jcl.center_metrics(centers, x, labels, weights=times, previous=previous)
    want = jcl.center_metrics(centers, x_often, labels_often, previous=previous)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)


@RULE
def test_a_weight_of_zero_is_a_sample_that_is_not_there(rng, rule):
    centers, x, labels = draw(rng)
    where = labels != 2  # A class of which no sample counts.
    weights = np.where(where, 1, 0).astype(np.float32)
    x[~where] = np.nan
    labels[np.flatnonzero(where)[0]] = C + 3  # Without a class, but of no weight.
    weights[np.flatnonzero(where)[0]] = 0
    where = weights != 0
    for options in ({"weights": weights}, {"weights": weights, "where": where}):
        got = jax.value_and_grad(jcl.center_loss, (0, 1))(centers, x, labels, **options)
        want = jax.value_and_grad(jcl.center_loss, (0, 1))(centers, x, labels, where=where)
        for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        moved = jcl.update_centers(centers, x, labels, rule=rule, **options)
        np.testing.assert_allclose(
            moved, jcl.update_centers(centers, x, labels, rule=rule, where=where), rtol=1e-6
        )
        np.testing.assert_array_equal(moved[2], centers[2])
    rows = jcl.row_optimizer(optax.sgd(0.1, momentum=0.9))
    state = jax.tree.map(lambda leaf: leaf + 1, rows.init(centers))
    moved, new = rows.update(centers, state, x, labels, weights=weights, rule=rule)
    np.testing.assert_array_equal(moved[2], centers[2])
    np.testing.assert_array_equal(jax.tree.leaves(new)[0][2], np.ones(D))
    # The derivative by the weight of what is NaN or has no class is 0, and spoils no other.
    by_weights = jax.jit(jax.grad(lambda w: jcl.center_loss(centers, x, labels, weights=w)))(weights)
    assert np.isfinite(by_weights).all()
    assert jcl.center_loss(centers, x, labels, weights=np.zeros(N)) == 0
    np.testing.assert_array_equal(
        jcl.update_centers(centers, x, labels, weights=np.zeros(N), rule=rule), centers
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_a_bad_weight_of_a_used_sample_shows_and_of_an_ignored_one_does_not(rng, bad):
    centers, x, labels = draw(rng)
    labels = np.maximum(labels, 0)
    weights = np.ones(N, np.float32)
    weights[3] = bad
    for function in (jcl.center_loss, jcl.update_centers, jcl.center_metrics):
        if bad < 0:
            with pytest.raises(ValueError, match=rf"not be negative, got -1\.0 .* class {labels[3]}"):
                function(centers, x, labels, weights=weights)
        result = jax.jit(function)(centers, x, labels, weights=weights)
        assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(result))
        ignored = np.where(np.arange(N) == 3, -1, labels)
        clean = function(centers, x, ignored, weights=weights)
        for got, want in zip(
            jax.tree.leaves(clean), jax.tree.leaves(function(centers, x, ignored)), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-5)
    moved = jax.jit(jcl.update_centers)(centers, x, labels, weights=weights)
    assert np.isnan(moved[labels[3]]).all()
    assert np.isfinite(np.delete(moved, labels[3], 0)).all()


@pytest.mark.parametrize("centers_as", ["param", "state"])
def test_weights_in_the_modules(rng, centers_as):
    centers, x, labels = draw(rng)
    weights = draw_weights(rng)
    module = jcl.nnx.CenterLoss(C, D, centers_as=centers_as, rngs=nnx.Rngs(0))
    module.centers = centers
    linen = jcl.linen.CenterLoss(C, D, centers_as=centers_as, alpha=ALPHA)
    collection = {"param": "params", "state": "centers"}[centers_as]
    want = jcl.center_loss(centers, x, labels, weights=weights)
    moved = jcl.update_centers(centers, x, labels, weights=weights, alpha=ALPHA)
    np.testing.assert_allclose(module(x, labels, weights=weights), want, rtol=1e-6)
    variables = {collection: {"centers": centers}}
    np.testing.assert_allclose(linen.apply(variables, x, labels, weights=weights), want, rtol=1e-6)
    module.update_centers(x, labels, weights=weights, alpha=ALPHA)
    np.testing.assert_allclose(module.centers[...], moved, rtol=1e-6)
    if centers_as == "state":
        _, new = linen.apply(variables, x, labels, weights=weights, mutable=["centers"])
        np.testing.assert_allclose(new["centers"]["centers"], moved, rtol=1e-6)


@pytest.mark.few(2)
@RULE
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_weights_on_a_mesh_and_in_shard_map(rng, rule, kind):
    centers, x, labels = draw(rng, 16, 8)
    weights = draw_weights(rng, 16)
    rows = jcl.row_optimizer(optax.sgd(0.2, momentum=0.9))

    def run(centers, state, x, labels, weights, axis_name=None):
        options = {"weights": weights, "axis_name": axis_name}
        loss = jcl.center_loss(centers, x, labels, **options)
        moved = jcl.update_centers(centers, x, labels, rule=rule, after=loss, **options)
        by_rows, _ = rows.update(centers, state, x, labels, rule=rule, **options)
        return loss, moved, by_rows, jcl.center_metrics(centers, x, labels, **options)

    want = run(centers, rows.init(centers), x, labels, weights)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    split, whole = jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()
    table, *batch = jax.device_put((centers, x, labels, weights), jax.sharding.NamedSharding(mesh, split))
    results = [jax.jit(run)(table, rows.init(table), *batch)]
    if kind == "Auto":
        mapped = jax.shard_map(
            lambda *arguments: run(*arguments, axis_name="d"),
            mesh=mesh,
            in_specs=(whole, whole, split, split, split),
            out_specs=whole,
        )
        results.append(jax.jit(mapped)(centers, rows.init(centers), x, labels, weights))
    for result in results:
        for got, expected in zip(jax.tree.leaves(result), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-5)


def test_vmap_over_weights(rng):
    centers, x, labels = draw(rng)
    weights = np.stack([draw_weights(rng) for _ in range(4)])
    for function in (jcl.center_loss, jcl.update_centers):
        got = jax.vmap(lambda w, f=function: f(centers, x, labels, weights=w))(weights)
        want = np.stack([function(centers, x, labels, weights=w) for w in weights])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_mixup_of_two_labels_is_the_mean_of_both(rng):
    # Zhang et al, mixup (ICLR 2018): each sample has two labels, with weights t and 1 - t.
    centers, x, labels = draw(rng)
    labels, others, t = np.maximum(labels, 0), rng.integers(0, C, N), rng.random(N).astype(np.float32)
    twice = np.concatenate([x, x]), np.concatenate([labels, others])
    got = jcl.center_loss(centers, *twice, weights=np.concatenate([t, 1 - t]), clip=None)
    d = [((x - centers[y]) ** 2).sum(-1) for y in (labels, others)]
    np.testing.assert_allclose(got, np.mean(t * d[0] + (1 - t) * d[1]), rtol=1e-5)


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        (np.ones(N, bool), TypeError, "real numbers, got bool. A mask goes into `where`"),
        (np.ones(N, np.complex64), TypeError, "real numbers, got complex64"),
        (np.ones((N, 1), np.float32), ValueError, rf"shape of labels \({N},\), got \({N}, 1\)"),
        (np.float32(2), ValueError, r"shape of labels .*, got \(\)"),
        ("balanced", TypeError, "weights must be an array, got str"),
        ({0: 0.5}, TypeError, "weights must be an array, got a dict with the keys 0"),
    ],
)
def test_what_is_no_weight_is_refused(rng, weights, error, words):
    centers, x, labels = draw(rng)
    for function in (jcl.center_loss, jcl.update_centers, jcl.center_metrics, jcl.check_batch):
        with pytest.raises(error, match=words):
            function(centers, x, labels, weights=weights)


def test_without_weights_no_array_of_them_is_made(rng):
    centers, x, labels = draw(rng)
    plain = jax.make_jaxpr(jcl.center_loss)(centers, x, labels)
    weighed = jax.make_jaxpr(lambda w: jcl.center_loss(centers, x, labels, weights=w))(np.ones(N, np.float32))
    ones = [e for e in plain.eqns if e.primitive.name == "mul" and e.outvars[0].aval.shape == (N,)]
    assert len(ones) < len(
        [e for e in weighed.eqns if e.primitive.name == "mul" and e.outvars[0].aval.shape == (N,)]
    )


@pytest.mark.slow
def test_a_network_that_weighs_its_samples_trains(rng):
    # The gradient passes into what makes the weights.
    centers, x, labels = draw(rng)
    dense = flax.linen.Dense(1)
    params = dense.init(jax.random.key(0), x)

    def loss(params):
        weights = jax.nn.softplus(dense.apply(params, x)[:, 0])
        return jcl.center_loss(centers, x, labels, weights=weights)

    first = loss(params)
    for _ in range(50):
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(loss)(params))
    assert loss(params) < 0.9 * first


@pytest.mark.few(1)
@RULE
@pytest.mark.usefixtures("for_its_platform")
def test_a_weighed_step_is_in_place(rule):
    shape = jax.ShapeDtypeStruct

    def step(centers, x, labels, weights):
        loss, gradient = jax.value_and_grad(jcl.center_loss, 1)(centers, x, labels, weights=weights)
        moved = jcl.update_centers(centers, x, labels, weights=weights, rule=rule, after=loss)
        return moved, loss, gradient

    def memory(classes):
        table, x = shape((classes, 64), jnp.float32), shape((512, 64), jnp.float32)
        each = shape((512,), jnp.int32), shape((512,), jnp.float32)
        return jax.jit(step, donate_argnums=0).lower(table, x, *each).compile().memory_analysis()

    few, many = memory(10_000), memory(1_000_000)
    assert many.alias_size_in_bytes == 1_000_000 * 64 * 4
    assert few.temp_size_in_bytes == many.temp_size_in_bytes <= 6 * 512 * 64 * 4 + 2**16
