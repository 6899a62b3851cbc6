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


def train(dtype, rng, images, labels, *, scale=1.0):
    """A model that computes in `dtype`, master weights and centers in float32, the loss scaled by `scale`."""
    sizes = {"hidden": (DIM, FEAT), "head": (FEAT, CLASSES)}
    weights = {name: np.float32(0.3 * rng.normal(size=size)) for name, size in sizes.items()}
    tx = optax.sgd(0.1, momentum=0.9)

    def step(carry, _):
        weights, state, centers = carry

        def loss_fn(weights):
            low = jax.tree.map(lambda w: w.astype(dtype), weights)
            x = jnp.tanh(images.astype(dtype) @ low["hidden"])
            logits = (x @ low["head"]).astype(jnp.float32)
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            center = jcl.center_loss(centers, x, labels)
            return scale * (cross_entropy + 0.1 * center), (x, jnp.stack([cross_entropy, center]))

        grads, (x, losses) = jax.grad(loss_fn, has_aux=True)(weights)
        assert x.dtype == dtype
        updates, state = tx.update(jax.tree.map(lambda g: g / scale, grads), state, weights)
        centers = jcl.update_centers(centers, x, labels)
        return (optax.apply_updates(weights, updates), state, centers), losses

    @jax.jit
    def run(weights, centers):
        (_, _, centers), losses = jax.lax.scan(step, (weights, tx.init(weights), centers), length=60)
        return losses, centers

    losses, centers = run(weights, rng.normal(size=(CLASSES, FEAT)).astype(np.float32))
    assert centers.dtype == jnp.float32
    return np.float64(losses), np.float64(centers)


@pytest.mark.few(1)
@pytest.mark.parametrize(("dtype", "scale"), [("bfloat16", 1.0), ("float16", 1.0), ("float16", 2.0**12)])
def test_a_model_in_half_precision_learns_as_one_in_float32(blobs, dtype, scale):
    want, centers = train(jnp.float32, np.random.default_rng(1), *blobs)
    got, moved = train(jnp.dtype(dtype), np.random.default_rng(1), *blobs, scale=scale)
    assert got[-1, 0] < 0.1 * got[0, 0]
    assert got[-1, 1] < 0.2 * got[0, 1]
    # A feature in [-1, 1] is rounded to within 2**-9 in bfloat16; its error in the loss is of first order.
    np.testing.assert_allclose(got, want, rtol=0.05, atol=0.02)
    np.testing.assert_allclose(moved, centers, atol=0.1)  # Of the range from -1 to 1.


@pytest.mark.slow
def test_what_underflows_in_float16_comes_back_by_loss_scaling():
    # 2 (x - c) / N is below the smallest float16, 6e-8, for a difference of 0.01 among 2**20 samples.
    n = 2**20
    x = np.full((n, 1), 0.01, np.float16)
    labels = np.zeros(n, np.int32)

    def loss(x, scale):
        return scale * jcl.center_loss(np.zeros((1, 1), np.float32), x, labels)

    gradient = jax.jit(jax.grad(loss))
    assert not np.asarray(gradient(x, np.float32(1))).any()
    scaled = gradient(x, np.float32(2**12))
    assert scaled.dtype == jnp.float16
    np.testing.assert_allclose(np.float64(scaled) / 2**12, 2 * np.float64(x) / n, rtol=2e-3)


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", HALF)
def test_many_samples_of_one_class_lose_nothing(rng, dtype):
    # Counted in bfloat16 they would stop at 256, and summed in it far from their sum.
    n = 5000
    x = (1 + rng.random((n, 2))).astype(np.float32)
    labels = np.zeros(n, np.int32)
    eps = float(jnp.finfo(dtype).eps)

    @jax.jit
    def steps(centers, x):
        def loss(centers):
            return jcl.center_loss(centers, x, labels)

        moved = jcl.update_centers(centers, x, labels, alpha=1.0)
        return jax.grad(loss)(centers), moved, jax.jvp(loss, (centers,), (jnp.ones_like(centers),))[1]

    gradient, moved, forward = steps(np.zeros((2, 2), jnp.dtype(dtype)), x)
    assert gradient.dtype == moved.dtype == dtype
    np.testing.assert_allclose(np.float64(gradient)[0], -2 * np.float64(x).mean(0), rtol=eps)
    np.testing.assert_allclose(np.float64(moved)[0], np.float64(x).sum(0) / (n + 1), rtol=eps)
    np.testing.assert_allclose(forward, -2 * np.float64(x).mean(0).sum(), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", *HALF])
def test_centers_stop_where_their_step_is_less_than_half_a_rounding(dtype):
    # What half precision for the centers costs: with alpha = 1/16 the paper's rule moves a center by 1/32 of
    # the way for one sample. The step is lost when that is below half the distance of neighbouring numbers,
    # so the center stops up to 16 of these distances short of the mean; float32 stops within 1e-5.
    target, label = np.asarray([[1.7]], np.float32), np.zeros(1, np.int32)

    @jax.jit
    def run(centers):
        def step(_, centers):
            return jcl.update_centers(centers, target, label, alpha=1 / 16)

        return jax.lax.fori_loop(0, 2000, step, centers)

    short = 1.7 - np.float64(run(np.ones((1, 1), jnp.dtype(dtype)))).item()
    spacing = float(jnp.finfo(dtype).eps)
    assert short == pytest.approx(16 * spacing, rel=0.1 if dtype != "float32" else 0.6)
    assert (short < 1e-4) == (dtype == "float32")


@pytest.mark.parametrize("dtype", HALF)
def test_the_references_crash_under_mixed_precision(rng, dtype):
    # Features from an autocast layer are in half precision, the module's centers in float32.
    centers, x = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(6, 4)).astype(np.float32)
    labels = rng.integers(0, 3, 6).astype(np.int32)
    rounded = x.astype(jnp.dtype(dtype))
    want = ref.oracle(centers, np.float64(rounded), labels)
    loss, grad = jax.jit(jax.value_and_grad(jcl.center_loss, 1))(centers, rounded, labels)
    np.testing.assert_allclose(loss, want.loss, rtol=1e-6)
    np.testing.assert_allclose(np.float64(grad), want.grad_x, rtol=float(jnp.finfo(dtype).eps))
    if ref.torch is not None:
        half = getattr(ref.torch, dtype)
        given = ref.torch.tensor(x).to(half), ref.torch.tensor(np.int64(labels))
        with ref.torch.autocast("cpu", dtype=half), pytest.raises(RuntimeError, match="dtype"):
            ref.CenterLoss(3, 4)(*given)
