"""Optax by rows, against optax on the dense gradient with the rows of absent classes put back."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_centerloss as jcl
from jax_centerloss._checks import RULES
from jax_centerloss._rows import moves, separability

D = 4


@pytest.fixture(autouse=True)
def as_optax_needs_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


ACCEPTED = {
    "sgd": optax.sgd(0.3),
    "momentum": optax.sgd(0.3, momentum=0.9),
    "nesterov": optax.sgd(0.3, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "amsgrad": optax.amsgrad(0.1),
    "nadam": optax.nadam(0.1),
    "adagrad": optax.adagrad(0.1),
    "rmsprop": optax.rmsprop(0.1, momentum=0.9, centered=True),
    "lion": optax.lion(0.1),
    "schedule": optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1.0, 2, 6)),
    "clipping": optax.chain(optax.clip_by_global_norm(0.1), optax.clip(0.05), optax.adam(0.1)),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(0.1, 0.0, 10)),
    "masked": optax.masked(optax.adam(0.1), {"centers": True}),
    "partition": optax.partition({"a": optax.sgd(0.1, momentum=0.9)}, {"centers": "a"}),
    "weight decay": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)),
    "apply if finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "half precision momentum": optax.adam(0.1, mu_dtype="bfloat16"),
}
REFUSED = {
    "lamb": lambda: optax.lamb(0.1),
    "tiny lamb": lambda: optax.lamb(1e-8),
    "lars": lambda: optax.lars(0.1),
    "adafactor": lambda: optax.adafactor(0.1),
    "factored second moments": lambda: optax.chain(optax.scale_by_factored_rms(), optax.scale(-0.1)),
    "fromage": lambda: optax.fromage(0.1),
    "muon": lambda: optax.contrib.muon(0.1),
    "adaptive clipping": lambda: optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),
    "lax adaptive clipping": lambda: optax.chain(optax.adaptive_grad_clip(10.0), optax.sgd(0.1)),
    "block rms": lambda: optax.chain(optax.clip_by_block_rms(10.0), optax.sgd(0.1)),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(0)), optax.sgd(0.1)),
    "several steps": lambda: optax.MultiSteps(optax.sgd(0.1), 2),
    "several steps inside": lambda: optax.chain(
        optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(), optax.scale(2.0)
    ),
    "apply every": lambda: optax.chain(optax.apply_every(2), optax.sgd(0.1)),
    "sharpness-aware": lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)),
    "lookahead": lambda: optax.lookahead(optax.sgd(0.1), 2, 0.5),
    "line search": lambda: optax.lbfgs(0.1),
    "mechanic": lambda: optax.contrib.mechanize(optax.sgd(0.1)),
    "polyak's step": lambda: optax.polyak_sgd(0.1),
    "dog": lambda: optax.contrib.dog(1.0),
    "prodigy": lambda: optax.contrib.prodigy(),
    "norm of decayed weights": lambda: optax.chain(
        optax.add_decayed_weights(5e-4), optax.clip_by_global_norm(1.0), optax.sgd(0.5)
    ),
    "norm of momentum": lambda: optax.chain(optax.trace(0.9), optax.clip_by_global_norm(1e5)),
    "lax block rms": lambda: optax.chain(optax.clip_by_block_rms(5e3), optax.sgd(0.1)),
    "laxest adaptive clipping": lambda: optax.chain(optax.adaptive_grad_clip(1e6), optax.sgd(0.1)),
}


def step_with_absent_rows_frozen(tx, params, state, x, labels):
    """Optax on the whole table; then what belongs to classes that are not in the batch is put back."""
    grads = jax.grad(jcl.center_loss)(params, x, labels)
    updates, moved_state = tx.update(grads, state, params)
    moved = optax.apply_updates(params, updates)
    (centers,) = jax.tree.leaves(params)
    here = jnp.any(labels[None, :] == jnp.arange(len(centers))[:, None], axis=1)[:, None]

    def freeze(new, old):
        return jnp.where(here, new, old) if jnp.shape(new) == centers.shape else new

    return jax.tree.map(freeze, moved, params), jax.tree.map(freeze, moved_state, state)


def batches(rng, classes, num, steps, *, every):
    """Batches with duplicates; with every class in each of them, or with ignored samples."""
    for _ in range(steps):
        labels = rng.integers(0 if every else -2, classes, num)
        if every:
            labels[:classes] = rng.permutation(classes)
        yield rng.normal(size=(num, D)).astype(np.float32), labels.astype(np.int32)


# Classes, samples, and whether each batch has all classes. More classes than samples are searched for.
BATCHES = {
    "some": (40, 24, False),
    "all": (6, 16, True),
    "hashed": (5000, 12, False),
    "blocks": (40, 24, False),
}


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ACCEPTED for kind in ("some", "blocks")]
    + [(name, kind) for name in ("sgd", "adamw", "clipping") for kind in ("all", "hashed")],
)
def test_equals_the_dense_optimizer_with_absent_rows_frozen(rng, name, kind, monkeypatch):
    if kind == "blocks":  # Of seven classes, as a large batch has blocks of many.
        monkeypatch.setattr(moves, "_BLOCK_ENTRIES", 7 * D)
    tx, (classes, num, every) = ACCEPTED[name], BATCHES[kind]
    rows = jcl.row_optimizer(tx)
    params = {"centers": rng.normal(size=(classes, D)).astype(np.float32)}
    ours, dense = (params, rows.init(params)), (params, tx.init(params))

    @jax.jit
    def step(ours, dense, x, labels):
        return rows.update(*ours, x, labels), step_with_absent_rows_frozen(tx, *dense, x, labels)

    half = "bfloat16" in {str(leaf.dtype) for leaf in jax.tree.leaves(ours)}
    # A moment rounded to 8 bits may round the other way.
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if half else {"rtol": 1e-4, "atol": 1e-6}
    for x, labels in batches(rng, classes, num, 5, every=every):
        ours, dense = step(ours, dense, x, labels)
        chex.assert_trees_all_equal_shapes_and_dtypes(ours, dense)
        chex.assert_trees_all_close(ours, dense, **tolerance)


TOGETHER = {
    "a norm": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5)),
    "a norm that few rows don't reach": lambda: optax.chain(
        optax.clip(1.0), optax.clip_by_global_norm(30.0), optax.sgd(0.5)
    ),
    "whether all is finite": lambda: optax.apply_if_finite(optax.adam(0.1), 5),
    "whether something is NaN": lambda: optax.chain(optax.zero_nans(), optax.sgd(0.5)),
}


def test_adamw_is_taken_in_parts():
    assert separability.find_separability(optax.adamw(0.1)) == (None, True)


@pytest.mark.parametrize("make", TOGETHER.values(), ids=TOGETHER)
def test_what_looks_at_all_rows_of_the_batch_is_not_taken_in_parts(make):
    assert separability.find_separability(make()) == (None, False)


def test_a_state_of_python_numbers(rng):
    def update(grads, state, params=None):
        return jax.tree.map(lambda g: -0.5 * g, grads), {"steps": state["steps"] + 1}

    rows = jcl.row_optimizer(optax.GradientTransformation(lambda params: {"steps": 0}, update))
    centers, x = np.zeros((3, 2), np.float32), rng.normal(size=(2, 2)).astype(np.float32)
    moved, state = rows.update(centers, rows.init(centers), x, [0, 2])
    # The gradient of a row is -2 / N times its difference, and N is 2.
    np.testing.assert_allclose(moved, [x[0] / 2, [0, 0], x[1] / 2], rtol=1e-6)
    assert state["steps"] == 1


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_does_not_work_by_rows_is_refused(make):
    with pytest.raises(ValueError, match=r"can't work row by row: .*with_center_optimizer"):
        jcl.row_optimizer(make())


def test_what_is_no_transformation_is_refused():
    with pytest.raises(TypeError, match=r"tx must be an optax transformation.*got 0\.5"):
        jcl.row_optimizer(0.5)


def test_a_state_of_something_else_is_refused():
    rows = jcl.row_optimizer(optax.adam(0.1))
    centers = np.zeros((3, 2), np.float32)
    states = {
        "more classes": rows.init(jnp.zeros((4, 2))),
        "other features": rows.init(jnp.zeros((3, 1))),
        "other optimizer": jcl.row_optimizer(optax.sgd(0.5, momentum=0.9)).init(centers),
        "none": None,
        "swapped": centers,
    }
    words = r"state does not belong to this .* and centers \(3, 2\): expected"
    for state in states.values():
        with pytest.raises(ValueError, match=words):
            rows.update(centers, state, np.ones((1, 2), np.float32), [0])


def test_a_row_optimizer_is_no_optax_transformation():
    rows = jcl.row_optimizer(optax.sgd(0.1))
    with pytest.raises(TypeError, match="tx must be an optax transformation"):
        jcl.row_optimizer(rows)
    with pytest.raises(TypeError, match="centers must be an optax transformation"):
        jcl.with_center_optimizer(optax.sgd(0.1), rows)


def test_a_state_that_holds_the_centers_can_be_donated_with_them():
    def update(updates, start, params):
        """A pull towards where a row was at first, as that of COCOB."""
        return jax.tree.map(lambda g, p, s: -0.1 * g + (s - p), updates, params, start), start

    rows = jcl.row_optimizer(optax.GradientTransformation(lambda params: params, update))
    centers = jnp.zeros((3, 2))
    step = jax.jit(rows.update, donate_argnums=(0, 1))
    moved, _ = step(centers, rows.init(centers), np.ones((1, 2), np.float32), np.array([1]))
    np.testing.assert_allclose(moved, [[0, 0], [0.2, 0.2], [0, 0]], rtol=1e-6)


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")
def test_cocob_moves_the_rows_of_the_batch_when_all_is_donated():
    rows = jcl.row_optimizer(optax.contrib.cocob())
    centers = jnp.zeros((3, 2))
    step = jax.jit(rows.update, donate_argnums=(0, 1))
    moved, state = step(centers, rows.init(centers), np.ones((1, 2), np.float32), np.array([1]))
    moved, _ = step(moved, state, np.ones((1, 2), np.float32), np.array([1]))
    assert np.all(moved[1] > 0)
    np.testing.assert_array_equal(moved[::2], np.zeros((2, 2)))


def test_construction_under_jit_and_with_strict_promotion(rng):
    x, labels = rng.normal(size=(5, D)).astype(np.float32), np.array([0, 1, 1, 3, -1])

    @jax.jit
    def step(centers):
        with jax.numpy_dtype_promotion("strict"):
            rows = jcl.row_optimizer(optax.sgd(0.5, momentum=0.9))
        want = jcl.update_centers(centers, x, labels, alpha=0.5, rule="gradient")
        return rows.update(centers, rows.init(centers), x, labels)[0], want

    moved, want = step(rng.normal(size=(4, D)).astype(np.float32))
    np.testing.assert_allclose(moved, want, rtol=1e-6)


@pytest.mark.parametrize("classes", [6, 5000])
def test_the_papers_layer_with_momentum_by_hand(rng, classes):
    # The direction of Eq. 4 into v <- m v + a d, c <- c - v, on the rows of the batch: in a float64 loop.
    alpha, momentum = 0.5, 0.9
    centers = rng.normal(size=(classes, D)).astype(np.float32)
    want, velocity = centers.astype(np.float64), np.zeros((classes, D))
    rows = jcl.row_optimizer(optax.sgd(alpha, momentum=momentum))
    params, state = centers, rows.init(centers)
    step = jax.jit(partial(rows.update, rule="paper"))
    for x, labels in batches(rng, 6, 20, 6, every=False):
        params, state = step(params, state, x, labels)
        for j in np.unique(labels[labels >= 0]):
            mine = x[labels == j].astype(np.float64)
            velocity[j] = momentum * velocity[j] + (want[j] - mine).sum(0) / (1 + len(mine))
            want[j] -= alpha * velocity[j]
    np.testing.assert_allclose(params, want, rtol=1e-5, atol=1e-6)


def test_the_stateless_case_is_update_centers(rng):
    centers = rng.normal(size=(50, D)).astype(np.float32)
    x, labels, where = rng.normal(size=(3, 8, D)), rng.integers(-1, 50, (3, 8)), rng.random((3, 8)) < 0.7
    x = x.astype(np.float32)
    rows = jcl.row_optimizer(optax.sgd(0.3))

    @jax.jit
    def run():
        return [
            (
                rows.update(centers, rows.init(centers), x, labels, rule=rule, where=where)[0],
                jcl.update_centers(centers, x, labels, alpha=0.3, rule=rule, where=where),
            )
            for rule in RULES
        ]

    for moved, want in run():
        # Sums of steps, or the steps one by one: a rounding of the center for each sample of a class.
        np.testing.assert_allclose(moved, want, rtol=1e-6, atol=4 * 2.0**-24)


def test_bfloat16_centers_are_moved_in_float32():
    # 64 pulls of a half each: summed or added in bfloat16, most of them would be lost.
    centers = np.full((3, D), 1.0, jnp.bfloat16)
    rows = jcl.row_optimizer(optax.sgd(1.0))
    x = np.full((64, D), 1.5, np.float32)
    moved, _ = rows.update(centers, rows.init(centers), x, np.zeros(64, np.int32), rule="paper")
    assert moved.dtype == jnp.bfloat16
    want = np.array(1 + 0.5 * 64 / 65, jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(moved)[0], np.full(D, want))


def test_injected_rates_can_be_changed(rng):
    rows = jcl.row_optimizer(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5))
    centers = np.zeros((3, 1), np.float32)
    state = rows.init(centers)
    state.hyperparams["learning_rate"] = np.float32(0.25)
    moved, _ = rows.update(centers, state, np.ones((1, 1), np.float32), np.array([1]))
    np.testing.assert_allclose(moved, [[0], [2 * 0.25], [0]])


def test_bad_batches_raise_as_everywhere():
    rows = jcl.row_optimizer(optax.sgd(0.5))
    centers = np.zeros((3, 2), np.float32)
    with pytest.raises(ValueError, match="label 3 is out of range for 3 classes"):
        rows.update(centers, rows.init(centers), centers[:1], [3])
    with pytest.raises(ValueError, match="rule must be one of"):
        rows.update(centers, rows.init(centers), centers[:1], [1], rule="newton")


def test_a_traced_rate_is_named():
    with pytest.raises(TypeError, match="being traced"):
        jax.jit(lambda rate: jcl.row_optimizer(optax.sgd(rate)).init(jnp.zeros((3, 2))))(0.1)


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "tx", [optax.apply_if_finite(optax.adam(0.1), 3), optax.novograd(0.1), optax.adamw(0.1)]
)
def test_half_precision_centers_with_a_state_in_float32(rng, dtype, tx):
    rows = jcl.row_optimizer(tx)
    centers = rng.normal(size=(20, D)).astype(dtype)
    wide = centers.astype(np.float32)
    ours, dense = (centers, rows.init(centers)), (wide, tx.init(wide))

    @jax.jit
    def step(ours, dense, x, labels):
        return rows.update(*ours, x, labels), step_with_absent_rows_frozen(tx, *dense, x, labels)

    for x, labels in batches(rng, 20, 12, 3, every=False):
        ours, dense = step(ours, dense, x, labels)
    params, state = ours
    assert params.dtype == dtype
    assert not {leaf.dtype.name for leaf in jax.tree.leaves(state)} & {"bfloat16", "float16"}
    # Each of the three steps rounds the center once.
    atol = 3 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.float32(params), dense[0], atol=atol, rtol=1e-2)


def test_a_state_that_was_restored_as_numpy():
    rows = jcl.row_optimizer(optax.adam(0.1))
    centers = np.zeros((3, 2), np.float32)
    state = jax.tree.map(np.asarray, rows.init(centers))
    moved, _ = rows.update(centers, state, np.ones((1, 2), np.float32), np.array([1]))
    np.testing.assert_allclose(moved, [[0, 0], [0.1, 0.1], [0, 0]], rtol=1e-5)


def test_a_key_in_the_state_is_no_obstacle():
    """A transformation that keeps a typed key, and does not use it on rows."""

    def init(params):
        return jax.random.key(0)

    def update(updates, state, params=None):
        return jax.tree.map(lambda g: -0.1 * g, updates), jax.random.split(state, 1)[0]

    rows = jcl.row_optimizer(optax.GradientTransformation(init, update))
    params, x, labels = np.zeros((4, 2), np.float32), np.ones((1, 2), np.float32), np.array([1])
    moved, _ = rows.update(params, rows.init(params), x, labels)
    np.testing.assert_allclose(moved, [[0, 0], [0.2, 0.2], [0, 0], [0, 0]], rtol=1e-6)
