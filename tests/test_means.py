"""Centers as class means, against NumPy in float64 over all the features at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_centerloss as jcl


def stream(x, labels, size):
    return [(x[i : i + size], labels[i : i + size]) for i in range(0, len(x), size)]


@pytest.mark.parametrize("classes", [7, 3000])  # More samples than classes in a batch, and fewer.
def test_class_means_over_a_ragged_stream(rng, classes):
    x = rng.normal(size=(1000, 5)).astype(np.float32)
    labels = rng.integers(-1, 7, 1000) * (classes // 7)
    labels[labels < 0] = -1
    x[labels == 0, 0] = 0.0  # As the features of a network may be that never fire.
    params = {"centers": rng.normal(size=(classes, 5)).astype(np.float32)}
    if classes == 7:
        means = jcl.init_from_features(params, stream(x, labels, 64))
    else:
        with pytest.warns(
            UserWarning, match=r"2993 of 3000 classes were never seen .*: 1, 2, 3, .*, \.\.\.\."
        ):
            means = jcl.init_from_features(params, iter(stream(x, labels, 64)))
    assert jax.tree.structure(means) == jax.tree.structure(params)
    want = params["centers"].astype(np.float64)
    for j in np.unique(labels[labels >= 0]):
        want[j] = x[labels == j].astype(np.float64).mean(0)
    np.testing.assert_allclose(means["centers"], want, rtol=1e-5, atol=1e-6)
    unseen = np.setdiff1d(np.arange(classes), labels)
    np.testing.assert_array_equal(np.asarray(means["centers"])[unseen], params["centers"][unseen])


def test_a_long_stream_far_from_the_origin_and_from_the_old_centers_costs_no_digits(rng):
    offset, spread = 1e4, 1e-2
    x = (offset + spread * rng.standard_normal((50_000, 2))).astype(np.float32)
    labels = rng.integers(0, 3, 50_000)
    means = jcl.init_from_features(np.full((3, 2), -1e8, np.float32), stream(x, labels, 500))
    want = np.stack([x[labels == j].astype(np.float64).mean(0) for j in range(3)])
    # The nearest float32, or its neighbour: they are 1e-3 apart up there.
    np.testing.assert_allclose(means, want, rtol=0, atol=np.spacing(np.float32(offset)))


def test_half_precision_centers_are_rounded_once(rng):
    x, labels = rng.normal(size=(4000, 3)).astype(np.float32), np.zeros(4000, int)
    means = jcl.init_from_features(np.zeros((1, 3), jnp.bfloat16), stream(x, labels, 100))
    assert means.dtype == jnp.bfloat16
    want = x.astype(np.float64).mean(0, keepdims=True).astype(jnp.bfloat16)
    np.testing.assert_allclose(np.float32(means), np.float32(want), rtol=2**-8)


def test_sequences_and_the_users_own_table(rng):
    x, labels = rng.normal(size=(4, 6, 3)).astype(np.float32), rng.integers(0, 2, (4, 6))
    labels[0, 0], labels[0, 1] = 0, 1
    old = jnp.zeros((2, 3))
    means = jcl.init_from_features(old, [(x, labels)])
    want = [x[labels == j].mean(0) for j in range(2)]
    np.testing.assert_allclose(means, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(old, np.zeros((2, 3)))  # Not donated.


def test_an_empty_stream_is_reported():
    with pytest.warns(UserWarning, match="2 of 2 classes were never seen and keep their centers: 0, 1"):
        means = jcl.init_from_features(np.eye(2, dtype=np.float32), [])
    np.testing.assert_array_equal(means, np.eye(2))


@pytest.mark.parametrize(
    ("batch", "error", "match"),
    [
        (np.zeros((4, 2), np.float32), TypeError, r"pairs \(x, labels\), got ndarray\. .*\[\(x, labels\)\]"),
        ((np.zeros((4, 2), np.float32),), TypeError, "pairs .*, got tuple of 1"),
        ((np.zeros((4, 2), np.float32), np.array([0, 1, 2, 0])), ValueError, "label 2 is out of range for 2"),
        ((np.zeros((4, 3), np.float32), np.zeros(4, int)), ValueError, "D = 2"),
    ],
)
def test_bad_batches(batch, error, match):
    with pytest.raises(error, match=match):
        jcl.init_from_features(np.zeros((2, 2), np.float32), [batch])


def test_under_jit_it_says_where_to_call_it():
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda c: jcl.init_from_features(c, [(np.ones((1, 2)), [0])]))(jnp.zeros((2, 2)))
