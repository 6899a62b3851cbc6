"""A weight of k is the sample k times: in the loss, its derivatives, every rule and every row optimizer."""

import re
from functools import partial

import chex
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
    where = np.arange(N) % 4 != 1

    @jax.jit
    def mean_and_sum(weights, x):
        options = {"where": where, "weights": weights}
        return [jcl.center_loss(centers, x, labels, reduce_fn=f, **options) for f in (jnp.mean, jnp.sum)]

    weights = (0.1 + rng.random(N)).astype(np.float32)
    check_grads(mean_and_sum, (weights, x), order=2, rtol=2e-2, atol=2e-2)

    # How a sample would count that does not yet, as meta-learned weights start from 0.
    def total(x, weights):
        return jcl.center_loss(centers, x, labels, weights=weights, reduce_fn=jnp.sum)

    by_weights, mixed = jax.jit(
        lambda *given: (jax.grad(total, 1)(*given), jax.jacobian(jax.grad(total), 1)(*given))
    )(x, np.zeros(N, np.float32))
    difference = (x - centers[np.maximum(labels, 0)]) * (labels >= 0)[:, None]
    constant = (C - 1) * CLIP[0] * (labels >= 0)
    np.testing.assert_allclose(by_weights, np.sum(np.float64(difference) ** 2, 1) + constant, rtol=1e-6)
    np.testing.assert_allclose(mixed[np.arange(N), :, np.arange(N)], 2 * difference, rtol=1e-5, atol=1e-6)


def repeated(rng, most=4):
    """A batch, a number of times for each sample, and the batch in which each stands so often, filled up."""
    centers, x, labels = draw(rng)
    times = rng.integers(0, most, N)
    room = [(0, N * (most - 1) - times.sum())]
    x_often = np.pad(np.repeat(x, times, 0), [*room, (0, 0)])
    return centers, x, labels, times, x_often, np.pad(np.repeat(labels, times), room, constant_values=-1)


def test_k_times_in_the_loss_by_rule_and_in_the_metrics(rng):
    centers, x, labels, times, x_often, labels_often = repeated(rng)

    @jax.jit
    def run(x, labels, weights=None):
        options = ({}, {"reduce_fn": jnp.sum}, {"clip": None}, {"clip": (0.5, 2.0)})
        loss = jax.value_and_grad(partial(jcl.center_loss, weights=weights))
        return (
            [loss(centers, x, labels, **given) for given in options],
            [jcl.update_centers(centers, x, labels, weights=weights, rule=rule) for rule in RULES],
            jcl.center_metrics(centers, x, labels, weights=weights, previous=centers + 1),
        )

    got, want = run(x, labels, np.float32(times)), run(x_often, labels_often)
    for ours, theirs, atol in zip(got, want, (1e-5, 1e-6, 0), strict=True):
        chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=atol)

    assert {leaf.dtype for leaf in jax.tree.leaves(got[:2])} == {jnp.dtype("float32")}

    @jax.jit
    def of_each_dtype():
        return [
            (
                jax.value_and_grad(jcl.center_loss)(centers, x, labels, weights=w),
                [jcl.update_centers(centers, x, labels, weights=w, rule=rule) for rule in RULES],
            )
            for w in (jnp.asarray(times, dtype) for dtype in ("int32", "uint8", "bfloat16", "float16"))
        ]

    for of_loss, moved in of_each_dtype():
        assert {leaf.dtype for leaf in jax.tree.leaves((of_loss, moved))} == {jnp.dtype("float32")}
        chex.assert_trees_all_close((of_loss, moved), (want[0][0], want[1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "tx"),
    [
        ("paper", optax.sgd(0.4, momentum=0.9)),
        ("gradient", optax.adam(0.1, eps=0.1)),
        ("mean", optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.4))),
        pytest.param("gradient", optax.adamw(0.1, eps=0.1), marks=pytest.mark.slow),
        pytest.param("paper", optax.sgd(0.4, momentum=0.9, nesterov=True), marks=pytest.mark.slow),
        pytest.param("mean", optax.rmsprop(0.1, eps=0.1), marks=pytest.mark.slow),
    ],
    ids=["momentum", "adam", "clipped", "adamw", "nesterov", "rmsprop"],
)
@jax.numpy_dtype_promotion("standard")
def test_k_times_by_rows(rng, rule, tx):
    rows = jcl.row_optimizer(tx)
    params = jnp.asarray(rng.normal(size=(C, D)), jnp.float32)
    held = often = params, rows.init(params)
    for _ in range(3):
        _, x, labels, times, x_often, labels_often = repeated(rng)
        held = rows.update(*held, x, labels, weights=times, rule=rule)
        often = rows.update(*often, x_often, labels_often, rule=rule)
        chex.assert_trees_all_close(held, often, rtol=1e-4, atol=1e-5)


def test_a_weight_of_zero_is_a_sample_that_is_not_there(rng):
    centers, x, labels = draw(rng)
    where = labels != 2  # A class of which no sample counts.
    x[~where] = np.nan
    first = np.flatnonzero(where)[0]
    labels[first], where[first] = C + 3, False  # Without a class, but of no weight.
    weights = where.astype(np.float32)
    rows = jcl.row_optimizer(optax.sgd(0.1, momentum=0.9))
    state = jax.tree.map(lambda leaf: leaf + 1, rows.init(centers))

    @jax.jit
    def run(where=None, weights=None):
        options = {"where": where, "weights": weights}
        return (
            jax.value_and_grad(jcl.center_loss, (0, 1))(centers, x, labels, **options),
            [jcl.update_centers(centers, x, labels, rule=rule, **options) for rule in RULES],
            [rows.update(centers, state, x, labels, rule=rule, **options) for rule in RULES],
        )

    want = run(where=where)
    for got in (run(weights=weights), run(where=where, weights=weights)):
        chex.assert_trees_all_close(got, want, rtol=1e-6)
        _, by_rules, by_rows = got
        for moved in (*by_rules, *(moved for moved, _ in by_rows)):
            np.testing.assert_array_equal(moved[2], centers[2])
        for _, new in by_rows:
            np.testing.assert_array_equal(jax.tree.leaves(new)[0][2], np.ones(D))
    (loss, _), by_rules, _ = run(weights=np.zeros(N, np.float32))
    assert loss == 0
    for moved in by_rules:
        np.testing.assert_array_equal(moved, centers)
    # Nor is it looked at where its label is known. The derivative by its weight is 0, and spoils no other.
    by_weights = jax.grad(lambda w: jcl.center_loss(centers, x, labels, weights=w))
    assert np.isfinite(jax.jit(by_weights)(weights)).all()
    np.testing.assert_allclose(jcl.center_loss(centers, x, labels, weights=weights), want[0][0], rtol=1e-6)


def test_a_bad_weight_of_a_used_sample_shows_and_of_an_ignored_one_does_not(rng):
    centers, x, labels = draw(rng)
    labels = np.maximum(labels, 0)
    ignored = np.where(np.arange(N) == 3, -1, labels)
    functions = jcl.center_loss, jcl.update_centers, jcl.center_metrics

    @jax.jit
    def run(labels, weights=None):
        return [function(centers, x, labels, weights=weights) for function in functions]

    without = run(ignored)
    for bad in (np.nan, np.inf, -1.0):
        weights = np.ones(N, np.float32)
        weights[3] = bad
        results = run(labels, weights)
        for result in results:
            assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(result))
        moved = results[1]
        assert np.isnan(moved[labels[3]]).all()
        assert np.isfinite(np.delete(moved, labels[3], 0)).all()
        chex.assert_trees_all_close(run(ignored, weights), without, rtol=1e-5)
    # Outside of jit a negative weight is known.
    for function in functions:
        with pytest.raises(ValueError, match=rf"not be negative, got -1\.0 .* class {labels[3]}"):
            function(centers, x, labels, weights=weights)
    np.testing.assert_allclose(jcl.center_loss(centers, x, ignored, weights=weights), without[0], rtol=1e-5)


def test_weights_in_the_modules(rng):
    centers, x, labels = draw(rng)
    weights = draw_weights(rng)
    options = {"weights": weights}

    @jax.jit
    def run():
        losses = [jcl.center_loss(centers, x, labels, **options)]
        steps = [jcl.update_centers(centers, x, labels, alpha=ALPHA, **options)]
        for centers_as, collection in (("param", "params"), ("state", "centers")):
            module = jcl.nnx.CenterLoss(C, D, centers_as=centers_as, rngs=nnx.Rngs(0))
            module.centers = centers
            losses.append(module(x, labels, **options))
            module.update_centers(x, labels, alpha=ALPHA, **options)
            steps.append(module.centers[...])
            linen = jcl.linen.CenterLoss(C, D, centers_as=centers_as, alpha=ALPHA)
            variables = {collection: {"centers": centers}}
            losses.append(linen.apply(variables, x, labels, **options))
        _, new = linen.apply(variables, x, labels, mutable=["centers"], **options)
        return losses, [*steps, new["centers"]["centers"]]

    for want, *others in run():
        for got in others:
            np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_weights_on_a_mesh_and_in_shard_map(rng, kind):
    centers, x, labels = draw(rng, 16, 8)
    weights = draw_weights(rng, 16)
    rows = jcl.row_optimizer(optax.sgd(0.2, momentum=0.9))

    def run(centers, state, x, labels, weights, axis_name=None):
        options = {"weights": weights, "axis_name": axis_name}
        loss = jcl.center_loss(centers, x, labels, **options)
        return (
            loss,
            [jcl.update_centers(centers, x, labels, rule=rule, after=loss, **options) for rule in RULES],
            [rows.update(centers, state, x, labels, rule=rule, **options)[0] for rule in RULES],
            jcl.center_metrics(centers, x, labels, **options),
        )

    given = centers, rows.init(centers), x, labels, weights
    want = jax.jit(run)(*given)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    split, whole = jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()
    table, *batch = jax.device_put((centers, x, labels, weights), jax.sharding.NamedSharding(mesh, split))
    results = [jax.jit(run)(table, rows.init(table), *batch)]
    if kind == "Auto":
        specs = whole, whole, split, split, split
        mapped = jax.shard_map(partial(run, axis_name="d"), mesh=mesh, in_specs=specs, out_specs=whole)
        results.append(jax.jit(mapped)(*given))
    for result in results:
        chex.assert_trees_all_close(result, want, rtol=2e-5, atol=1e-5)


def test_vmap_over_weights(rng):
    centers, x, labels = draw(rng)
    weights = np.stack([draw_weights(rng) for _ in range(4)])

    def both(weights):
        return [f(centers, x, labels, weights=weights) for f in (jcl.center_loss, jcl.update_centers)]

    one_by_one = [jax.jit(both)(each) for each in weights]
    want = jax.tree.map(lambda *leaves: np.stack(leaves), *one_by_one)
    chex.assert_trees_all_close(jax.jit(jax.vmap(both))(weights), want, rtol=1e-5, atol=1e-6)


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


def test_weights_of_classes_are_refused_with_code_that_looks_them_up(rng):
    centers, x, labels = draw(rng)
    of_classes, labels = np.ones(C, np.float32), np.maximum(labels, 0)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    spread = jax.device_put(labels, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d")))
    plain = "[jnp.asarray(labels)]`"
    sharded = ".at[labels].get(out_sharding=jax.typeof(labels).sharding)`"
    for given, look_up in ((labels, plain), (jnp.asarray(labels), plain), (spread, sharded)):
        with pytest.raises(ValueError, match=re.escape(f"pass `jnp.asarray(weights){look_up}")):
            jcl.center_loss(centers, x, given, weights=of_classes)


def test_without_weights_no_array_of_them_is_made(rng):
    centers, x, labels = draw(rng)

    def products(**given):
        traced = jax.make_jaxpr(lambda **options: jcl.center_loss(centers, x, labels, **options))(**given)
        return sum(e.primitive.name == "mul" and e.outvars[0].aval.shape == (N,) for e in traced.eqns)

    assert products() < products(weights=np.ones(N, np.float32))


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
