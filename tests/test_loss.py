"""The loss, the distances and their semantics, against closed forms in float64 NumPy."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jax_centerloss as jcl

N, C, D = 12, 5, 3
LOW, HIGH = 1e-12, 1e12


@pytest.fixture
def data(rng):
    centers = rng.normal(size=(C, D)).astype(np.float32)
    x = rng.normal(size=(N, D)).astype(np.float32)
    return {"centers": centers}, x, rng.integers(0, C, N)


def squared(params, x, labels):
    """Own-class squared distances, in float64."""
    difference = x.astype(np.float64) - params["centers"].astype(np.float64)[labels]
    return (difference**2).sum(-1)


def test_values_and_gradients_are_those_of_the_formula(data):
    params, x, labels = data

    @jax.jit
    def run(params, x):
        loss = partial(jcl.center_loss, params, x, labels)
        reduced = [loss(reduce_fn=f) for f in (None, jnp.sum, jnp.mean)]
        many_classes = jcl.center_loss(jnp.zeros((100_000, 2)), jnp.zeros((4, 2)), np.zeros(4, int))
        grads = jax.grad(jcl.center_loss, (0, 1))(params, x, labels)
        return reduced, loss(clip=None), many_classes, grads

    (each, total, mean), unclamped, many_classes, (gp, gx) = run(params, x)
    expected = squared(params, x, labels)
    np.testing.assert_allclose(each, expected + (C - 1) * LOW, rtol=1e-6)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-6)
    np.testing.assert_allclose([mean, unclamped], [expected.mean()] * 2, rtol=1e-6)
    # The constant of the reference.
    np.testing.assert_allclose(many_classes, 100_000 * LOW, rtol=1e-6)
    pull = 2 * (x - params["centers"][labels]).astype(np.float64) / N
    by_centers = np.zeros((C, D))
    np.add.at(by_centers, labels, -pull)
    np.testing.assert_allclose(gx, pull, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gp["centers"], by_centers, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_first_and_second_derivatives_numerically(data):
    params, x, labels = data
    check_grads(lambda p, x: jcl.center_loss(p, x, labels), (params, x), order=2, rtol=2e-2)


def test_any_leading_dimensions(data):
    params, x, labels = data

    @jax.jit
    def run(lead_of):
        shaped = x[: lead_of.size].reshape(*lead_of.shape, D), labels[: lead_of.size].reshape(lead_of.shape)
        return jcl.center_loss(params, *shaped), jcl.center_loss(params, *shaped, reduce_fn=None)

    for lead in [(), (1,), (12,), (4, 3), (2, 3, 2)]:
        mean, each = run(np.zeros(lead))
        want = squared(params, x, labels)[: math.prod(lead)]
        assert each.shape == lead
        np.testing.assert_allclose(np.ravel(each), want + (C - 1) * LOW, rtol=1e-6)
        np.testing.assert_allclose(mean, want.mean(), rtol=1e-6)


def test_ignoring_is_slicing(data, rng):
    params, x, labels = data
    keep = rng.random(N) < 0.5

    @jax.jit
    def run(x, labels, where=None):
        def loss(params, x, reduce_fn):
            return jcl.center_loss(params, x, labels, reduce_fn=reduce_fn, where=where)

        each = loss(params, x, None)
        return [jax.value_and_grad(loss, (0, 1))(params, x, f) for f in (jnp.mean, jnp.sum)], each

    sliced, _ = run(x[keep], labels[keep])
    for ignored, each in (run(x, labels, keep), run(x, np.where(keep, labels, -1 - labels))):
        for (got, (gp, gx)), (want, (gp_sliced, gx_sliced)) in zip(ignored, sliced, strict=True):
            chex.assert_trees_all_close((got, gp), (want, gp_sliced), rtol=1e-5)
            np.testing.assert_allclose(gx[keep], gx_sliced, rtol=1e-6)
            assert not np.any(gx[~keep])
        assert not np.any(each[~keep])
        assert np.all(each[keep] > 0)


def test_fully_masked_and_empty_means_are_zero(data):
    params, x, labels = data

    @jax.jit
    def run():
        loss, none = jcl.center_loss, np.full(N, -1)
        values = [
            loss(params, x, labels, where=np.zeros(N, bool)),
            loss(params, x, none),
            loss(params, x[:0], labels[:0]),
        ]
        return values, jax.grad(loss, 1)(params, x, none)

    assert not any(np.any(leaf) for leaf in jax.tree.leaves(run()))
    assert jcl.center_loss(params, x, np.full(N, -1)) == 0  # Outside of jit, too.


def test_not_a_number_in_a_used_row_surfaces_and_in_a_masked_row_does_not(data):
    params, x, labels = data
    keep = np.arange(N) != 3

    @jax.jit
    def run(x):
        loss = jcl.center_loss
        means = loss(params, x, labels), loss(params, x, labels, clip=None)
        each, pull = jax.vjp(lambda x: loss(params, x, labels, reduce_fn=None), x)
        masked = jax.value_and_grad(loss, (0, 1))(params, x, labels, where=keep)
        return means, each, pull(jnp.ones(N))[0], masked, jcl.update_centers(params, x, labels, where=keep)

    for bad in (np.nan, np.inf, -np.inf):
        x[3, 1] = bad
        means, each, pull, (value, grads), moved = run(x)
        assert np.all(np.isnan(means))
        assert np.array_equal(np.isnan(each), ~keep)
        assert np.isnan(pull[3, 1])
        np.testing.assert_allclose(value, squared(params, x, labels)[keep].mean(), rtol=1e-6)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((grads, moved)))


def test_at_the_clamp_gradients_pass_and_what_overflows_shows():
    # One coordinate, so that the distance is exact: 2**2, at, inside and outside a clamp that ends there.
    slopes = {(4.0, 9.0): 4.0, (1.0, 4.0): 4.0, (4.1, 9.0): 0.0, (1.0, 3.9): 0.0}

    @jax.jit
    def run():
        zero, slope = jnp.zeros((1, 1)), jax.grad(jcl.center_loss, 1)
        infinite = [
            jcl.center_loss(jnp.zeros((2, 2)), jnp.full((1, 2), 1e20), [0], clip=clip)
            for clip in ((LOW, HIGH), None)
        ]
        return [slope(zero, jnp.array([[2.0]]), [0], clip=clip) for clip in slopes], infinite

    by_clip, infinite = run()
    np.testing.assert_allclose(np.ravel(by_clip), list(slopes.values()))
    # In the reference infinity times the mask's zero is NaN, too.
    assert np.all(np.isnan(infinite))


def test_label_without_a_class_is_nan_under_jit_and_touches_no_center(data):
    params, x, labels = data
    labels[5] = C
    others = np.arange(N) != 5

    @jax.jit
    def run(params, x, labels):
        each, pull = jax.vjp(lambda p, x: jcl.center_loss(p, x, labels, reduce_fn=None), params, x)
        mean, masked = (jcl.center_loss(params, x, labels, where=where) for where in (None, labels < C))
        return each, pull(jnp.ones(N)), mean, masked

    each, (gp, gx), mean, masked = run(params, x, labels)
    assert np.array_equal(np.isnan(each), ~others)
    assert np.all(np.isnan(gx[5]))
    assert np.all(np.isfinite(gx[others]))
    assert np.all(np.isfinite(gp["centers"]))
    assert np.isnan(mean)
    want = squared(params, x, np.minimum(labels, C - 1))[others].mean()
    np.testing.assert_allclose(masked, want, rtol=1e-6)


def test_label_dtypes_narrower_than_the_number_of_classes(rng):
    table = rng.normal(size=(1000, 2)).astype(np.float32)
    dtypes = jnp.int8, jnp.uint8, jnp.int16, jnp.int32, jnp.uint32

    @jax.jit
    def losses(*labels):
        return [jcl.center_loss(table, table[:5] + 1, each) for each in labels]

    np.testing.assert_allclose(losses(*(jnp.arange(5, dtype=t) for t in dtypes)), [2.0] * 5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(rng, dtype):
    # Squares of norm 1000 overflow float16; float16 cannot hold the clamp's 1e-12.
    centers = jnp.asarray(rng.normal(size=(C, 256)), jnp.float32)
    x = jnp.asarray(1000 * rng.normal(size=(N, 256)) / 16, dtype)
    labels = rng.integers(0, C, N)
    value, grad = jax.jit(jax.value_and_grad(jcl.center_loss, 1))(centers, x, labels)
    rounded = np.asarray(x.astype(jnp.float32))
    expected = squared({"centers": np.asarray(centers)}, rounded, labels).mean()
    assert value.dtype == jnp.float32
    assert grad.dtype == dtype
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert np.all(np.isfinite(grad.astype(jnp.float32)))


def test_distance_map_is_the_direct_distance_far_from_the_origin(rng):
    base = 1000 * rng.normal(size=D)
    centers = (base + 0.05 * rng.normal(size=(C, D))).astype(np.float32)
    x = (base + 0.05 * rng.normal(size=(2, 4, D))).astype(np.float32)
    difference = x.astype(np.float64)[..., None, :] - centers.astype(np.float64)
    distances = jcl.distance_map(centers, x)
    assert distances.shape == (2, 4, C)
    np.testing.assert_allclose(distances, (difference**2).sum(-1), rtol=1e-4, atol=1e-7)


def test_a_stray_center_spoils_no_other_column(data):
    params, x, labels = data
    clean = np.asarray(jcl.distance_map(params, x))
    others, keep = np.arange(C) != 2, labels != 2

    @jax.jit
    def run(centers):
        loss = jcl.center_loss(centers, x, labels, where=keep)
        return jcl.distance_map(centers, x), jcl.nearest_center(centers, x), loss

    for stray in (1e18, np.nan, np.inf):
        distances, nearest, loss = run(np.where(others[:, None], params["centers"], np.float32(stray)))
        np.testing.assert_allclose(distances[:, others], clean[:, others], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(nearest, np.flatnonzero(others)[clean[:, others].argmin(-1)])
        np.testing.assert_allclose(loss, squared(params, x, labels)[keep].mean(), rtol=1e-6)


@pytest.mark.parametrize("unseen", [1, 10])
def test_centers_still_near_the_origin_cost_the_others_no_digits(rng, unseen):
    centers = (100 + 0.01 * rng.normal(size=(100, 8))).astype(np.float32)
    centers[-unseen:] = rng.normal(size=(unseen, 8))
    x = centers[:-unseen] + (0.001 * rng.normal(size=(100 - unseen, 8))).astype(np.float32)
    difference = x.astype(np.float64)[:, None] - centers.astype(np.float64)
    np.testing.assert_allclose(jcl.distance_map(centers, x), (difference**2).sum(-1), rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(jcl.nearest_center(centers, x), np.arange(100 - unseen))


def test_distances_are_never_negative(rng):
    centers = rng.normal(size=(50, 64)).astype(np.float32)
    assert np.all(jcl.distance_map(centers, centers) >= 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nearest_center_holds_a_block_of_distances_and_no_table(dtype):
    shapes = jax.ShapeDtypeStruct((1_000_000, 8), dtype), jax.ShapeDtypeStruct((64, 8), jnp.float32)
    used = jax.jit(jcl.nearest_center).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    # XLA on CPUs computes on bfloat16 by converting what a loop reads, here the table, beforehand.
    table = 0 if dtype == jnp.float32 else 1_000_000 * 8 * 4
    assert used < table + 4 * 64 * 1024 * 4


@pytest.mark.parametrize("num_classes", [1, 7, 1024, 2500])
def test_nearest_center_is_the_argmin(rng, num_classes):
    centers = rng.normal(size=(num_classes, 4)).astype(np.float32)
    x = rng.normal(size=(3, 5, 4)).astype(np.float32)
    difference = x.astype(np.float64)[..., None, :] - centers.astype(np.float64)
    np.testing.assert_array_equal(jcl.nearest_center(centers, x), (difference**2).sum(-1).argmin(-1))


@pytest.mark.usefixtures("for_its_platform")
@pytest.mark.parametrize(
    ("function", "shape", "d", "c", "most"),
    [
        (jcl.nearest_center, (1000, 1000), 16, 1024, 48),
        (jcl.center_metrics, (1000, 1000), 16, 1024, 48),
        (jcl.nearest_center, (131_071,), 128, 5000, 48),
        # Of few classes a copy of the features is larger than the distances.
        (jcl.nearest_center, (65_536, 2), 512, 10, 80),
        pytest.param(jcl.center_metrics, (65_536, 2), 512, 10, 80, marks=pytest.mark.slow),
    ],
)
def test_many_samples_take_memory_for_a_block_of_them(function, shape, d, c, most, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # For more devices, samples are brought to stripes.
    labels = (jax.ShapeDtypeStruct(shape, jnp.int32),) if function is jcl.center_metrics else ()
    x = jax.ShapeDtypeStruct((*shape, d), jnp.float32)
    program = jax.jit(function).lower(jax.ShapeDtypeStruct((c, d), jnp.float32), x, *labels).compile()
    # Metrics also hold the differences of features and centers, as the loss does.
    differences = math.prod(x.shape) * 4 if labels else 0
    assert program.memory_analysis().temp_size_in_bytes < differences + most * 2**20


@pytest.mark.few(1)
@pytest.mark.parametrize("shape", [(8194,), (3, 2731), (911, 9)])
def test_many_samples_in_blocks(rng, shape):
    centers = rng.normal(size=(1024, 3)).astype(np.float32)
    x = rng.normal(size=(*shape, 3)).astype(np.float32)
    labels = rng.integers(0, 1024, shape)
    distances = np.stack([np.linalg.norm(np.float64(row)[..., None, :] - centers, axis=-1) for row in x])
    np.testing.assert_array_equal(jcl.nearest_center(centers, x), distances.argmin(-1))
    own = np.take_along_axis(distances, labels[..., None], -1)
    np.put_along_axis(distances, labels[..., None], np.inf, -1)
    gap, by_x = jax.jit(jax.value_and_grad(lambda x: jcl.center_metrics(centers, x, labels)["gap"]))(x)
    np.testing.assert_allclose(gap, (distances.min(-1) - own[..., 0]).mean(), rtol=1e-4)
    toward_own, toward_other = ((x - centers[j]) for j in (labels, distances.argmin(-1)))
    slope = toward_other / distances.min(-1)[..., None] - toward_own / own
    # The distance to the nearest center, from a matrix product, is the less exact the shorter it is.
    np.testing.assert_allclose(by_x * labels.size, slope, rtol=1e-3, atol=5e-3)


def test_gradients_of_many_samples_keep_no_distances(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    shapes = [((10**6, 16), jnp.float32), ((1024, 16), jnp.float32), ((10**6,), jnp.int32)]
    slope = jax.grad(lambda x, centers, labels: jcl.center_metrics(centers, x, labels)["gap"])
    program = jax.jit(slope).lower(*(jax.ShapeDtypeStruct(*each) for each in shapes)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 256 * 2**20  # A map of distances has 3,906 MiB.


def test_nearest_center_of_a_feature_that_is_not_a_number_is_none():
    assert jcl.nearest_center(
        np.zeros((3, 2), np.float32), jnp.array([[jnp.nan, 0.0], [0.0, 0.0]])
    ).tolist() == [-1, 0]


def test_init_centers_is_standard_normal():
    params = jcl.init_centers(jax.random.key(0), 2000, 50)
    assert list(params) == ["centers"]
    assert params["centers"].dtype == jnp.float32
    np.testing.assert_allclose(params["centers"].mean(), 0, atol=4 / np.sqrt(1e5))
    np.testing.assert_allclose(params["centers"].var(), 1, atol=4 * np.sqrt(2 / 1e5))
    assert jcl.init_centers(jax.random.key(0), 3, 2, dtype=jnp.bfloat16)["centers"].dtype == jnp.bfloat16


def test_forward_memory_holds_no_table():
    n, c, d = 256, 100_000, 64
    shapes = (
        jax.ShapeDtypeStruct(s, t) for s, t in (((c, d), "float32"), ((n, d), "float32"), ((n,), "int32"))
    )
    compiled = jax.jit(jcl.center_loss).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * n * d * 4 + 1024
