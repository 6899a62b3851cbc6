"""What `center_metrics` reports, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import jax_centerloss as jcl

N, D = 40, 3
metrics = jax.jit(jcl.center_metrics)


def draw(classes):
    rng = np.random.default_rng(0)
    centers = 3 * rng.normal(size=(classes, D)).astype(np.float32)
    labels = rng.integers(0, min(classes, 30), N).astype(np.int32)
    x = (centers[labels] + rng.normal(size=(N, D))).astype(np.float32)
    previous = (centers + 0.1 * rng.normal(size=centers.shape)).astype(np.float32)
    return centers, x, labels, previous


def oracle(centers, x, labels, previous):
    distances = np.linalg.norm(x[:, None].astype(np.float64) - centers[None], axis=-1)
    own = distances[np.arange(len(x)), labels]
    distances[np.arange(len(x)), labels] = np.inf
    last = len(centers) - 1
    looked_at = np.unique(np.linspace(0, last, min(last + 1, 1024)).round().astype(int))
    assert len(looked_at) == min(last + 1, 1024)
    nearest = distances[:, looked_at].min(1)
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


@pytest.mark.parametrize(
    ("function", "classes"),
    [(jcl.center_metrics, 30), (metrics, 1024), (metrics, 10_000)],
    ids=["eager", "all of 1024 are looked at", "1024 of more are looked at evenly"],
)
def test_metrics_are_those_of_numpy(function, classes):
    centers, x, labels, previous = draw(classes)
    got = function(centers, x, labels, previous=previous)
    assert_metrics(got, oracle(centers, x, labels, previous))
    assert got["classes_seen"].dtype == jnp.int32


def test_what_is_not_used_does_not_count():
    centers, x, labels, previous = draw(30)
    where = np.arange(N) % 3 != 0
    want = oracle(centers, x[where], labels[where], previous)
    x[~where] = np.nan
    assert_metrics(metrics(centers, x, labels, where=where, previous=previous), want)
    ignored = np.where(where, labels, -1)
    everywhere = np.ones(N, bool)
    assert_metrics(metrics(centers, x, ignored, where=everywhere, previous=previous), want)
    nothing = metrics(centers, x, labels, where=~everywhere, previous=previous)
    assert_metrics(nothing, dict.fromkeys(want, 0))
    del want["moved"]  # Without earlier centers.
    shaped = metrics({"centers": centers}, x.reshape(4, 10, D), ignored.reshape(4, 10))
    assert_metrics(shaped, want)


def test_a_single_class_has_no_gap():
    got = metrics(jnp.zeros((1, D)), jnp.ones((2, D)), jnp.zeros(2, jnp.int32))
    assert got["gap"] == np.inf
    np.testing.assert_allclose(got["own_distance"], np.sqrt(D), rtol=1e-6)


def test_broken_values_show():
    centers, x, labels, _ = draw(30)
    beyond = metrics(centers, x, labels + 30)
    assert np.isnan(beyond["own_distance"])
    assert np.isnan(beyond["gap"])
    assert beyond["classes_seen"] == 0
    x[3, 2] = np.nan
    assert np.isnan(metrics(centers, x, labels)["own_distance"])


def test_centers_far_away_that_are_no_numbers_leave_the_others_alone():
    centers, x, labels, previous = draw(60)
    padded = np.where(np.arange(60)[:, None] < 30, centers, np.nan)
    got = metrics(padded, x, labels, previous=previous)
    assert_metrics(got, oracle(centers[:30], x, labels, previous))

    # And so do their gradients, here by a distance map of the real classes, too.
    @jax.jit
    def gradients(table, x):
        gap, pull = jax.vjp(lambda table, x: jcl.center_metrics(table, x, labels)["gap"], table, x)
        distances, pull_all = jax.vjp(lambda table, x: jcl.distance_map(table, x)[..., :30], table, x)
        by = *pull(jnp.ones_like(gap)), *pull_all(jnp.ones_like(distances))
        return [by[0][:30], by[1], by[2][:30], by[3]]

    for one, other in zip(gradients(padded, x), gradients(centers[:30], x), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * np.max(np.abs(other)))


def test_previous_of_another_table_is_refused():
    centers, x, labels, previous = draw(30)
    gone = jnp.asarray(previous)
    gone.delete()
    for given, words in (
        (previous[:20], r"previous must be earlier centers \(30, 3\), got shape \(20, 3\)"),
        ((previous, previous), "previous must hold exactly one array, the .* got 2 leaves"),
        (gone, "previous was donated to a step and is gone"),
    ):
        with pytest.raises(ValueError, match=words):
            jcl.center_metrics(centers, x, labels, previous=given)


def test_temporaries_do_not_grow_with_the_classes():
    x, labels = jax.ShapeDtypeStruct((N, 64), jnp.float32), jax.ShapeDtypeStruct((N,), jnp.int32)

    def temporaries(classes):
        centers = jax.ShapeDtypeStruct((classes, 64), jnp.float32)
        program = metrics.lower(centers, x, labels, previous=centers).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(2000) == temporaries(10_000_000)


def test_index_checks_find_nothing_in_a_clean_batch():
    """More classes than samples, and a class that stands there twice, has an empty slot beyond the table."""
    centers, x, labels = np.zeros((9, 2), np.float32), np.ones((3, 2), np.float32), np.array([4, 4, 1])
    checked = functools.partial(jcl.center_metrics, previous=np.ones((9, 2), np.float32))
    error, _ = jax.jit(checkify.checkify(checked, errors=checkify.index_checks))(centers, x, labels)
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
