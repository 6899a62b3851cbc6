"""Whatever the batch holds: values, gradients and steps are within the stated bounds of a float64 oracle."""

import contextlib
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Batch, Bounded, Precision
from reference import enable_x64

import jax_centerloss as jcl
from jax_centerloss._checks import RULES

CLIP = (1e-12, 1e12)
CLIPS = (CLIP, None, (1.0, 4.0))
REDUCE = {"mean": jnp.mean, "sum": jnp.sum, None: None}
ALPHA = 0.1
# Leading dimensions, classes, features, and the dtype of the labels: with more classes than samples and
# fewer, one of each, and none.
SHAPES = [
    ((3, 5), 40, 16, "int8"),
    ((2, 30), 6, 3, "int32"),
    ((7,), 3, 2, "int16"),
    ((), 1, 1, "int32"),
    ((0,), 2, 2, "int8"),
]
# Of the features and of the centers.
DTYPES = [
    ("float32", "float32"),
    ("bfloat16", "float32"),
    ("float16", "float32"),
    ("float32", "bfloat16"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float64", "float64"),
    ("float64", "float32"),
    ("float32", "float64"),
]


def precision_of(kinds, storage=None):
    compute = np.float64 if "float64" in kinds else np.float32
    return Precision.of(compute, None if storage is None else jnp.dtype(storage).type)


def precise(kinds):
    return enable_x64() if "float64" in kinds else contextlib.nullcontext()


@st.composite
def batches(draw, shape, kinds):
    """Hypothesis picks the kind of everything and a seed; NumPy makes the numbers."""
    lead, classes, dim, dtype = shape
    number = int(np.prod(lead))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = draw(st.sampled_from(["normal", "whole numbers", "far away", "small", "at the centers"]))
    kinds_of_labels = [
        rng.integers(0, classes, number),
        rng.integers(-classes, classes, number),
        np.full(number, rng.integers(classes)),
        rng.permutation(max(classes, number))[:number] % classes,
        np.full(number, -1),
    ]
    labels = draw(st.sampled_from(kinds_of_labels)).astype(dtype)
    where = draw(st.sampled_from([np.ones(number, bool), rng.random(number) < 0.5, np.zeros(number, bool)]))
    centers, x = rng.normal(size=(classes, dim)), rng.normal(size=(number, dim))
    if values == "whole numbers":  # Ties, and distances at the very ends of a clamp.
        centers, x = np.round(2 * centers), np.round(2 * x)
    elif values == "far away":
        centers, x = centers + 100, x + 100
    elif values == "small":
        centers, x = centers / 64, x / 64
    elif values == "at the centers":
        x = centers[np.maximum(labels, 0)] + 0.75 * np.round(x)  # By which no distance is near a clamp's end.
    return Batch(centers.astype(jnp.dtype(kinds[1])), x.astype(jnp.dtype(kinds[0])), labels, where)


def shaped(batch, lead):
    """As the library takes it."""
    return batch.centers, *(a.reshape(lead + a.shape[1:]) for a in (batch.x, batch.labels, batch.where))


def assert_within(got, want: Bounded, name: str):
    error = np.abs(np.asarray(got, np.float64).reshape(want.value.shape) - want.value)
    worst = np.max(error - want.bound, initial=0)
    assert not worst > 0, f"{name}: {error.max()} off, granted {np.max(want.bound)}"
    assert not np.isnan(worst), name


@jax.jit
def everything(c, x, y, w):
    """One program for all options, so that hypothesis can run it often."""

    def by_clip(clip):
        loss = partial(jcl.center_loss, labels=y, where=w, clip=clip)
        return [loss(c, x, reduce_fn=f) for f in REDUCE.values()], jax.grad(loss, (0, 1))(c, x)

    moved = [jcl.update_centers(c, x, y, where=w, alpha=ALPHA, rule=rule) for rule in RULES]
    return [by_clip(clip) for clip in CLIPS], moved


@pytest.mark.few(6)
@pytest.mark.parametrize(
    ("shape", "kinds"),
    [(SHAPES[0], kinds) for kinds in DTYPES] + [(shape, DTYPES[0]) for shape in SHAPES[1:]],
    ids=str,
)
@settings(max_examples=20)
@given(data=st.data())
def test_losses_gradients_and_steps_by_rule(shape, kinds, data):
    batch = data.draw(batches(shape, kinds))
    with precise(kinds):
        by_clip, by_rule = jax.device_get(everything(*shaped(batch, shape[0])))
    for clip, (values, (by_centers, by_x)) in zip(CLIPS, by_clip, strict=True):
        for reduce, value in zip(REDUCE, values, strict=True):
            assert value.dtype == ("float64" if "float64" in kinds else "float32")
            assert_within(value, oracle.loss(batch, reduce, clip, precision_of(kinds)), f"{reduce}, {clip}")
        want = oracle.gradients(batch, clip, *(precision_of(kinds, kind) for kind in kinds))
        for got, bounded, kind in zip((by_x, by_centers), want, kinds, strict=True):
            assert got.dtype == kind
            assert_within(got, bounded, f"gradient, {clip}")
    for rule, got in zip(RULES, by_rule, strict=True):
        assert got.dtype == kinds[1]
        assert_within(got, oracle.moved(batch, rule, ALPHA, CLIP, precision_of(kinds, kinds[1])), rule)


def momentum(centers, state, gradient, touched):
    velocity = state.get("velocity", np.zeros_like(centers))
    velocity[touched] = 0.875 * velocity[touched] + gradient[touched]
    centers[touched] -= 0.375 * velocity[touched]
    return {"velocity": velocity}


def adam(centers, state, gradient, touched):
    """Kingma and Ba, Algorithm 1, on the touched rows; the count of steps is everybody's."""
    t, m, v = (
        state.get("t", 0) + 1,
        state.get("m", np.zeros_like(centers)),
        state.get("v", np.zeros_like(centers)),
    )
    m[touched] = 0.9 * m[touched] + 0.1 * gradient[touched]
    v[touched] = 0.999 * v[touched] + 0.001 * gradient[touched] ** 2
    step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 0.5)
    centers[touched] -= 0.125 * step[touched]
    return {"t": t, "m": m, "v": v}


# By hand and by optax.
OPTIMIZERS = {
    "momentum": (momentum, optax.sgd(0.375, momentum=0.875)),
    # With the usual eps of 1e-8 the step jumps where a gradient is zero in one of the precisions only.
    "adam": (adam, optax.adam(0.125, eps=0.5)),
}


@cache
def three_steps(name):
    """By each of the rules, in one program."""
    rows = jcl.row_optimizer(OPTIMIZERS[name][1])

    def step(held, batch):
        x, labels, where = batch
        return [
            rows.update(*one, x, labels, where=where, rule=rule)
            for one, rule in zip(held, RULES, strict=True)
        ], None

    @jax.jit
    def run(centers, *batches):
        return jax.lax.scan(step, [(centers, rows.init(centers))] * len(RULES), batches)[0]

    return run


@pytest.mark.few(3)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@settings(max_examples=8)
@given(data=st.data())
def test_steps_by_rows(shape, name, data):
    three = [data.draw(batches(shape, ("float32", "float32"))) for _ in range(3)]
    stacked = [
        np.stack(arrays) for arrays in zip(*(shaped(batch, shape[0])[1:] for batch in three), strict=True)
    ]
    with jax.numpy_dtype_promotion("standard"):
        by_rule = three_steps(name)(three[0].centers, *stacked)
    for rule, (got, _) in zip(RULES, by_rule, strict=True):
        centers, own = np.float64(three[0].centers), {}
        scale = np.abs(centers).max()
        for batch in three:
            # From where the oracle's centers are, which have not been rounded.
            batch = batch._replace(centers=centers)
            step, _ = oracle.directions(batch, rule, CLIP)
            own = OPTIMIZERS[name][0](centers, own, -step, np.unique(batch.labels[batch.used]))
            scale = max(scale, np.abs(batch.x).max(), np.abs(centers).max())
        # As if the largest number were rounded 64 times.
        np.testing.assert_allclose(got, centers, rtol=0, atol=64 * 2.0**-24 * scale, err_msg=rule)


@settings(max_examples=4)
@given(data=st.data())
def test_any_shape(data):
    lead = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
    shape = lead, data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)), "int32"
    batch = data.draw(batches(shape, ("float32", "float32")))

    @jax.jit
    def run(c, x, y, w):
        return jcl.center_loss(c, x, y, where=w), jcl.update_centers(c, x, y, where=w, alpha=ALPHA)

    loss, moved = run(*shaped(batch, lead))
    precision = precision_of(("float32",))
    assert_within(loss, oracle.loss(batch, "mean", CLIP, precision), "mean")
    assert_within(moved, oracle.moved(batch, "paper", ALPHA, CLIP, precision), "paper")


def test_at_the_ends_of_the_clamp_the_gradient_is_whole_or_zero(rng):
    # Which of the two, rounding decides: the distances are within an eighth of a millionth of the end.
    x = np.float32(rng.normal(size=(200, 3)))
    x /= np.linalg.norm(x, axis=1, keepdims=True)  # To rounding.
    loss = partial(jcl.center_loss, np.zeros((1, 3), np.float32), labels=0, clip=(1.0, 4.0))
    gradient = np.asarray(jax.jit(jax.vmap(jax.grad(loss)))(x))
    whole = np.all(np.abs(gradient - 2 * x) <= 1e-6, axis=1)
    zero = np.all(gradient == 0, axis=1)
    assert np.all(whole ^ zero)
    assert 20 < np.sum(whole) < 180
