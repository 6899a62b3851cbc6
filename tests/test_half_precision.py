"""Half precision as it is trained in: what is kept, and what is lost and how much."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference as ref

import jax_centerloss as jcl

pytestmark = pytest.mark.usefixtures("as_jax_promotes")

CLASSES, DIM, FEAT, NUM = 4, 8, 16, 128
HALF = ["bfloat16", "float16"]


@pytest.fixture
def blobs(rng):
    labels = rng.integers(0, CLASSES, NUM).astype(np.int32)
    means = 2 * rng.normal(size=(CLASSES, DIM))
    return (means[labels] + 0.5 * rng.normal(size=(NUM, DIM))).astype(np.float32), labels


def train(dtype, images, labels, *, scale=1.0, steps=60):
    """A model that computes in `dtype`, master weights and centers in float32, the loss scaled by `scale`."""
    keys = jax.random.split(jax.random.key(0), 3)
    weights = {
        "hidden": 0.3 * jax.random.normal(keys[0], (DIM, FEAT)),
        "head": 0.3 * jax.random.normal(keys[1], (FEAT, CLASSES)),
    }
    centers = jcl.init_centers(keys[2], CLASSES, FEAT)
    tx = optax.sgd(0.1, momentum=0.9)
    state = tx.init(weights)

    @jax.jit
    def step(weights, state, centers):
        def loss_fn(weights):
            low = jax.tree.map(lambda w: w.astype(dtype), weights)
            x = jnp.tanh(images.astype(dtype) @ low["hidden"])
            logits = (x @ low["head"]).astype(jnp.float32)
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            center = jcl.center_loss(centers, x, labels)
            return scale * (cross_entropy + 0.1 * center), (x, cross_entropy, center)

        grads, (x, *losses) = jax.grad(loss_fn, has_aux=True)(weights)
        updates, state = tx.update(jax.tree.map(lambda g: g / scale, grads), state, weights)
        centers = jcl.update_centers(centers, x, labels)
        return optax.apply_updates(weights, updates), state, centers, (x, *losses)

    history = []
    for _ in range(steps):
        weights, state, centers, (x, *losses) = step(weights, state, centers)
        history.append(losses)
    assert x.dtype == dtype
    assert centers["centers"].dtype == jnp.float32
    return np.float64(history), np.float64(centers["centers"])


@pytest.mark.few(1)
@pytest.mark.parametrize(("dtype", "scale"), [("bfloat16", 1.0), ("float16", 1.0), ("float16", 2.0**12)])
def test_a_model_in_half_precision_learns_as_one_in_float32(blobs, dtype, scale):
    want, centers = train(jnp.float32, *blobs)
    got, moved = train(jnp.dtype(dtype), *blobs, scale=scale)
    assert got[-1, 0] < 0.1 * got[0, 0]
    assert got[-1, 1] < 0.2 * got[0, 1]
    # A feature in [-1, 1] is rounded to within 2**-9 in bfloat16; its error in the loss is of first order.
    np.testing.assert_allclose(got, want, rtol=0.05, atol=0.02)
    np.testing.assert_allclose(moved, centers, atol=0.1)  # Of the range from -1 to 1.


@pytest.mark.slow
def test_what_underflows_in_float16_comes_back_by_loss_scaling(rng):
    # 2 (x - c) / N is below the smallest float16, 6e-8, for a difference of 0.01 among 2**20 samples.
    n = 2**20
    x = jnp.full((n, 1), 0.01, jnp.float16)
    args = jnp.zeros((1, 1)), x, jnp.zeros(n, jnp.int32)
    assert not np.any(jax.grad(jcl.center_loss, 1)(*args))
    scaled = jax.grad(lambda *a: 2.0**12 * jcl.center_loss(*a), 1)(*args)
    assert scaled.dtype == jnp.float16
    np.testing.assert_allclose(np.float64(scaled) / 2**12, 2 * np.float64(x) / n, rtol=2e-3)


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", HALF)
def test_many_samples_of_one_class_lose_nothing(rng, dtype):
    # Counted in bfloat16 they would stop at 256, and summed in it far from their sum.
    n = 5000
    x = (1 + rng.random((n, 2))).astype(np.float32)
    labels = np.zeros(n, np.int32)
    centers = jnp.zeros((2, 2), dtype)
    eps = float(jnp.finfo(dtype).eps)
    gradient = jax.grad(jcl.center_loss)(centers, x, labels)
    assert gradient.dtype == dtype
    np.testing.assert_allclose(np.float64(gradient[0]), -2 * np.float64(x).mean(0), rtol=eps)
    moved = jcl.update_centers(centers, x, labels, alpha=1.0)
    np.testing.assert_allclose(np.float64(moved[0]), np.float64(x).sum(0) / (n + 1), rtol=eps)
    forward = jax.jvp(lambda c: jcl.center_loss(c, x, labels), (centers,), (jnp.ones_like(centers),))[1]
    np.testing.assert_allclose(forward, -2 * np.float64(x).mean(0).sum(), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", *HALF])
def test_centers_stop_where_their_step_is_less_than_half_a_rounding(dtype):
    # What half precision for the centers costs: with alpha = 1/16 the paper's rule moves a center by 1/32 of
    # the way for one sample. The step is lost when that is below half the distance of neighbouring numbers,
    # so the center stops up to 16 of these distances short of the mean; float32 stops within 1e-5.
    centers = jnp.asarray([[1.0]], dtype)
    target = jnp.asarray([[1.7]])
    step = jax.jit(lambda c: jcl.update_centers(c, target, np.zeros(1, np.int32), alpha=1 / 16))
    for _ in range(2000):
        centers = step(centers)
    short = 1.7 - float(centers[0, 0])
    spacing = float(jnp.finfo(dtype).eps)
    assert short == pytest.approx(16 * spacing, rel=0.1 if dtype != "float32" else 0.6)
    assert (short < 1e-4) == (dtype == "float32")


@pytest.mark.parametrize("dtype", HALF)
def test_the_references_crash_under_mixed_precision(rng, dtype):
    # Features from an autocast layer are in half precision, the module's centers in float32.
    centers, x = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(6, 4)).astype(np.float32)
    labels = rng.integers(0, 3, 6)
    rounded = jnp.asarray(x, dtype)
    want = ref.oracle(centers, np.float64(rounded), labels)
    loss, grad = jax.value_and_grad(jcl.center_loss, 1)(centers, rounded, labels)
    np.testing.assert_allclose(loss, want.loss, rtol=1e-6)
    np.testing.assert_allclose(np.float64(grad), want.grad_x, rtol=float(jnp.finfo(dtype).eps))
    if ref.torch is not None:
        torch = ref.torch
        with torch.autocast("cpu", dtype=getattr(torch, dtype)), pytest.raises(RuntimeError, match="dtype"):
            ref.CenterLoss(3, 4)(torch.tensor(x).to(getattr(torch, dtype)), torch.tensor(labels))
