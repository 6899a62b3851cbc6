"""What `center_metrics` reports, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import jax_centerloss as jcl

N, D = 40, 6


def draw(classes, seed=0):
    rng = np.random.default_rng(seed)
    centers = 3 * rng.normal(size=(classes, D)).astype(np.float32)
    labels = rng.integers(0, min(classes, 30), N).astype(np.int32)
    x = (centers[labels] + rng.normal(size=(N, D))).astype(np.float32)
    previous = (centers + 0.1 * rng.normal(size=centers.shape)).astype(np.float32)
    return centers, x, labels, previous


def oracle(centers, x, labels, previous, among=None):
    distances = np.linalg.norm(x[:, None].astype(np.float64) - centers[None], axis=-1)
    own = distances[np.arange(len(x)), labels]
    distances[np.arange(len(x)), labels] = np.inf
    nearest = distances[:, slice(None) if among is None else among].min(1)
    seen = np.unique(labels)
    return {
        "own_distance": own.mean(),
        "gap": (nearest - own).mean(),
        "ratio": own.mean() / nearest.mean(),
        "classes_seen": len(seen),
        "moved": np.linalg.norm(centers[seen].astype(np.float64) - previous[seen], axis=-1).mean(),
    }


def assert_metrics(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("classes", [30, 1024])
def test_exact_up_to_1024_classes(classes, jit):
    centers, x, labels, previous = draw(classes)
    metrics = jax.jit(jcl.center_metrics) if jit else jcl.center_metrics
    got = metrics(centers, x, labels, previous=previous)
    assert_metrics(got, oracle(centers, x, labels, previous))
    assert got["classes_seen"].dtype == jnp.int32


def test_of_more_classes_1024_are_looked_at_evenly():
    centers, x, labels, previous = draw(10_000)
    looked_at = np.unique(np.linspace(0, 9999, 1024).round().astype(int))
    assert len(looked_at) == 1024
    got = jcl.center_metrics(centers, x, labels, previous=previous)
    assert_metrics(got, oracle(centers, x, labels, previous, among=looked_at))


def test_what_is_not_used_does_not_count():
    centers, x, labels, previous = draw(30)
    where = np.arange(N) % 3 != 0
    want = oracle(centers, x[where], labels[where], previous)
    x[~where] = np.nan
    assert_metrics(jcl.center_metrics(centers, x, labels, where=where, previous=previous), want)
    ignored = np.where(where, labels, -1)
    assert_metrics(jcl.center_metrics(centers, x, ignored, previous=previous), want)
    shaped = jcl.center_metrics({"centers": centers}, x.reshape(4, 10, D), ignored.reshape(4, 10))
    assert shaped.keys() == want.keys() - {"moved"}


def test_nothing_used_is_zero():
    centers, x, labels, previous = draw(30)
    got = jcl.center_metrics(centers, x, np.full_like(labels, -1), previous=previous)
    assert_metrics(got, dict.fromkeys(got, 0))


def test_a_single_class_has_no_gap():
    got = jcl.center_metrics(jnp.zeros((1, D)), jnp.ones((2, D)), jnp.zeros(2, jnp.int32))
    assert got["gap"] == np.inf
    np.testing.assert_allclose(got["own_distance"], np.sqrt(D), rtol=1e-6)


def test_broken_values_show():
    centers, x, labels, previous = draw(30)
    beyond = jax.jit(jcl.center_metrics)(centers, x, labels + 30, previous=previous)
    assert np.isnan(beyond["own_distance"])
    assert np.isnan(beyond["gap"])
    assert beyond["classes_seen"] == 0
    x[3, 2] = np.nan
    assert np.isnan(jcl.center_metrics(centers, x, labels)["own_distance"])


def test_centers_far_away_that_are_no_numbers_leave_the_others_alone():
    centers, x, labels, previous = draw(60)
    want = oracle(centers[:30], x, labels, previous)
    padded = np.where(np.arange(60)[:, None] < 30, centers, np.nan)
    assert_metrics(jcl.center_metrics(padded, x, labels, previous=previous), want)
    # And so do their gradients, here by a distance map of the real classes, too.
    functions = (
        lambda table, x: jcl.center_metrics(table, x, labels)["gap"],
        lambda table, x: jnp.sum(jcl.distance_map(table, x)[..., :30]),
    )
    for function in functions:
        got, want = (jax.grad(function, (0, 1))(table, x) for table in (padded, centers[:30]))
        for one, other in zip((got[0][:30], got[1]), want, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * np.max(np.abs(other)))


def test_previous_of_another_table_is_refused():
    centers, x, labels, previous = draw(30)
    with pytest.raises(ValueError, match=r"previous must be earlier centers \(30, 6\), got shape \(20, 6\)"):
        jcl.center_metrics(centers, x, labels, previous=previous[:20])
    with pytest.raises(ValueError, match=r"previous must hold exactly one array, the .* got 2 leaves"):
        jcl.center_metrics(centers, x, labels, previous=(previous, previous))
    gone = jnp.asarray(previous)
    gone.delete()
    with pytest.raises(ValueError, match="previous was donated to a step and is gone"):
        jcl.center_metrics(centers, x, labels, previous=gone)


def test_temporaries_do_not_grow_with_the_classes():
    shape = jax.ShapeDtypeStruct

    def temporaries(classes):
        arguments = shape((classes, 64), jnp.float32), shape((N, 64), jnp.float32), shape((N,), jnp.int32)
        program = jax.jit(lambda c, x, y, p: jcl.center_metrics(c, x, y, previous=p)).lower(
            *arguments, arguments[0]
        )
        return program.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2000) == temporaries(10_000_000)


def test_index_checks_find_nothing_in_a_clean_batch():
    """More classes than samples, and a class that stands there twice, has an empty slot beyond the table."""
    centers, x, labels = jnp.zeros((9, 2)), jnp.ones((3, 2)), jnp.array([4, 4, 1])
    metrics = jax.jit(functools.partial(jcl.center_metrics, previous=centers + 1.0))
    error, _ = checkify.checkify(metrics, errors=checkify.index_checks)(centers, x, labels)
    assert error.get() is None


@pytest.mark.parametrize("function", [jcl.distance_map, jcl.nearest_center, jcl.center_metrics])
def test_all_digits_are_asked_for_where_a_gpu_or_tpu_would_drop_some(function):
    centers, x, labels, _ = draw(20)
    arguments = (centers, x, labels) if function is jcl.center_metrics else (centers, x)
    with jax.default_matmul_precision("bfloat16"):
        program = jax.jit(function).lower(*arguments).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
