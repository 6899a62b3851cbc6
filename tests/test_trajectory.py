"""A whole training run goes as it goes in PyTorch, whichever way the centers are moved."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference as ref
from reference import LAM

from jax_centerloss import center_loss, row_optimizer, update_centers, with_center_optimizer

# About a hundred roundings of the largest center (4.5) and joint loss (2): 300 steps, each with its own
# rounding, of a run that converges and so forgets them. Measured: 3e-6 and 5e-15.
TOLERANCES = {"float32": 5e-5, "float64": 1e-13}


@functools.cache
def training() -> ref.Training:
    return ref.Training(**ref.golden("training"))


@functools.cache
def in_torch(source: str, precision: str) -> tuple[np.ndarray, np.ndarray]:
    if source == "live":
        return ref.train_in_torch(training(), precision)
    golden = ref.golden("trained")
    return golden["losses"], golden["centers"]


def joint_loss(params: dict, x: jax.Array, labels: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["w1"] + params["b1"][None])
    features = hidden @ params["w2"] + params["b2"][None]
    logits = features @ params["head"]
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return cross_entropy + LAM * center_loss(params["loss"], features, labels)


@jax.jit
def train_by_optax(params: dict, data: jax.Array, labels: jax.Array, batches: jax.Array) -> tuple:
    without_lam = optax.chain(optax.scale(1 / LAM), optax.sgd(ref.CENTER_LR))
    tx = with_center_optimizer(optax.sgd(ref.MODEL_LR, momentum=ref.MOMENTUM), without_lam)

    def step(carry, rows):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(joint_loss)(params, data[rows], labels[rows])
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), (loss, params["loss"]["centers"])

    return jax.lax.scan(step, (params, tx.init(params)), batches)[1]


@functools.partial(jax.jit, static_argnames="rows")
def train_by_rule(
    params: dict, data: jax.Array, labels: jax.Array, batches: jax.Array, *, rows: bool
) -> tuple:
    """The centers are no parameters, and lambda is nowhere near their step."""
    tx = optax.sgd(ref.MODEL_LR, momentum=ref.MOMENTUM)
    by_rows = row_optimizer(optax.sgd(ref.CENTER_LR))
    weights, centers = {k: v for k, v in params.items() if k != "loss"}, params["loss"]

    def step(carry, chosen):
        weights, opt_state, centers, row_state = carry
        x, y = data[chosen], labels[chosen]
        loss, grads = jax.value_and_grad(lambda w: joint_loss({**w, "loss": centers}, x, y))(weights)
        features = jnp.tanh(x @ weights["w1"] + weights["b1"][None]) @ weights["w2"] + weights["b2"][None]
        updates, opt_state = tx.update(grads, opt_state, weights)
        weights = optax.apply_updates(weights, updates)
        if rows:
            centers, row_state = by_rows.update(centers, row_state, features, y, after=loss)
        else:
            centers = update_centers(centers, features, y, alpha=ref.CENTER_LR, rule="gradient", after=loss)
        return (weights, opt_state, centers, row_state), (loss, centers["centers"])

    return jax.lax.scan(step, (weights, tx.init(weights), centers, by_rows.init(centers)), batches)[1]


WAYS = {
    "with_center_optimizer": train_by_optax,
    "update_centers": functools.partial(train_by_rule, rows=False),
    "row_optimizer": functools.partial(train_by_rule, rows=True),
}


def in_jax(precision: str, train) -> tuple[np.ndarray, np.ndarray]:
    t = training()
    params = {name: getattr(t, name) for name in ("w1", "b1", "w2", "b2", "head")}
    params["loss"] = {"centers": t.centers}
    params, data = jax.tree.map(lambda a: a.astype(precision), (params, t.data))
    with ref.enable_x64() if precision == "float64" else contextlib.nullcontext():
        return jax.device_get(train(params, data, t.labels, t.batches.astype(np.int32)))


@pytest.mark.few(4)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("source", ref.SOURCES)
def test_joint_training_follows_torch(source, precision, way):
    losses, centers = in_jax(precision, way)
    assert losses.dtype == centers.dtype == np.dtype(precision)
    want_losses, want_centers = in_torch(source, precision)
    assert len(losses) == 300
    assert want_losses[-1] < want_losses[0] / 20  # It did learn something.
    for got, want in ((losses, want_losses), (centers, want_centers)):
        np.testing.assert_allclose(np.float64(got), np.float64(want), rtol=0, atol=TOLERANCES[precision])
