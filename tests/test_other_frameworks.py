"""docs/other_frameworks.md: its wrappers in Keras, and in kauldron or a stand-in for what they use of it."""

import dataclasses
import sys
import types
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pages import defined, python_of

import jax_centerloss as jcl

# Keras's own, about its Variables.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
KERAS_LAYER, KERAS_TRAINING, KAULDRON = python_of("other_frameworks")


@pytest.fixture(autouse=True)
def as_a_reader(as_jax_promotes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def keras():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "jax")
        module = pytest.importorskip(
            "keras", minversion="3.0", reason="the layer is for Keras 3, which is not here"
        )
        yield module


@pytest.fixture(scope="module")
def layer(keras):
    """What the page's block for the layer defines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "jax")
        return defined(KERAS_LAYER)


def test_the_keras_model_learns_and_is_saved_and_loaded(layer):
    space = dict(layer)
    exec(compile(KERAS_TRAINING, "other_frameworks", "exec"), space)
    pixels, digits, model, again = (space[name] for name in ("pixels", "digits", "model", "again"))
    logits = space["classifier"].predict(pixels, verbose=0)
    assert np.mean(logits.argmax(-1) == digits) > 0.95
    np.testing.assert_array_equal(again.predict([pixels, digits], verbose=0), logits)
    centers = [np.asarray(m.get_layer("center_loss").centers) for m in (model, again)]
    np.testing.assert_array_equal(*centers)
    config = again.get_layer("center_loss").get_config()
    assert (config["rule"], config["weight"], config["warmup"]) == ("paper", 0.01, 100)
    # The count of steps is saved too, so that λ goes on where it was.
    assert again.get_layer("center_loss").steps == model.get_layer("center_loss").steps == 5 * 57
    again.fit([pixels, digits], digits, epochs=1, verbose=0)  # It goes on from there.
    assert np.abs(np.asarray(again.get_layer("center_loss").centers) - centers[1]).max() > 1e-3
    model.evaluate([pixels, digits], digits, verbose=0)
    np.testing.assert_array_equal(np.asarray(model.get_layer("center_loss").centers), centers[0])


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_keras_step_is_the_librarys(keras, layer, rng, policy):
    warmup = 2  # Of three steps, so that λ both rises and stays.
    images, labels = keras.Input((4,)), keras.Input((), dtype="int32")
    x = keras.layers.Dense(3, use_bias=False, name="features")(images)
    options = {"weight": 0.25, "warmup": warmup, "alpha": 0.4, "name": "center_loss", "dtype": policy}
    out = layer["CenterLoss"](5, **options)(x, labels)
    model = keras.Model([images, labels], out)
    model.compile(keras.optimizers.SGD(0.1), None)
    w, c = (
        np.asarray(v) for v in (model.get_layer("features").kernel, model.get_layer("center_loss").centers)
    )
    dtype = jnp.float32 if policy == "float32" else jnp.bfloat16
    close = {"rtol": 1e-5, "atol": 1e-6} if policy == "float32" else {"rtol": 0.02, "atol": 0.02}

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def step_of(w, c, z, y, lam):
        x = (z @ w).astype(dtype)
        return lam * jcl.center_loss(c, x, y), jcl.update_centers(c, x, y, alpha=0.4)

    for step in range(1, 4):
        lam = 0.25 * min(1, step / warmup)
        z, y = rng.normal(size=(8, 4)).astype(np.float32), rng.integers(-1, 5, 8).astype(np.int32)
        (want, c), grad = step_of(w, c, z, y, np.float32(lam))
        w = w - 0.1 * np.asarray(grad)
        np.testing.assert_allclose(model.train_on_batch([z, y]), want, **close)
        np.testing.assert_allclose(model.get_layer("features").kernel, w, **close)
        np.testing.assert_allclose(model.get_layer("center_loss").centers, c, **close)
    assert model.get_layer("center_loss").centers.value.dtype == jnp.float32


# kauldron. What stands in for it has the part of its documented interface that the wrapper uses.

KEY = object()


@dataclasses.dataclass(frozen=True)
class Mean:
    value: Any
    count: Any

    @classmethod
    def from_values(cls, values, mask=None, weight=1.0, normalize_by="mask"):
        mask = jnp.ones(values.shape) if mask is None else jnp.broadcast_to(mask, values.shape)
        count = mask.sum() if normalize_by == "mask" else values.size
        return cls(weight * jnp.sum(values * mask), count)

    def compute(self):
        return self.value / jnp.maximum(self.count, 1e-8)


@dataclasses.dataclass(eq=True, frozen=True, kw_only=True)
class Loss:
    step: Annotated[Any, KEY] = "step"
    mask: Annotated[Any, KEY] = None
    weight: Any = 1.0
    normalize_by: str = "mask"
    State = Mean

    def get_weight(self, step=None):
        return self.weight(step) if callable(self.weight) else jnp.float32(self.weight)


def resolve_from_keyed_obj(context, loss):
    found = {}
    for field in dataclasses.fields(loss):
        path = getattr(loss, field.name)
        if field.name in ("step", "mask", "x", "labels", "centers") and path is not None:
            value = context
            for part in path.split("."):
                value = value[part]
            found[field.name] = value
    return found


def stand_in():
    kontext = types.SimpleNamespace(
        Key=Annotated[Any, KEY], REQUIRED="", resolve_from_keyed_obj=resolve_from_keyed_obj
    )
    module = types.ModuleType("kauldron")
    module.kd = types.SimpleNamespace(losses=types.SimpleNamespace(Loss=Loss), kontext=kontext)
    return module


@pytest.fixture(params=["kauldron", "a stand-in for it"])
def kauldron_loss(request, monkeypatch):
    if request.param == "kauldron":
        pytest.importorskip("kauldron", reason="kauldron is not here; the test runs with a stand-in for it")
    else:
        monkeypatch.setitem(sys.modules, "kauldron", stand_in())
    space = defined(KAULDRON)
    return space["CenterLoss"], space["loss"]


@pytest.fixture
def context(rng):
    def normal(*size):
        return rng.normal(size=size).astype(np.float32)

    return {
        "step": np.int32(3),
        "preds": {"features": normal(12, 3)},
        "params": {"centers": normal(5, 3)},
        "batch": {"label": rng.integers(-1, 5, 12).astype(np.int32), "mask": np.zeros(12, np.float32)},
    }


def test_kauldrons_weight_and_mask_mean_what_is_meant_here(kauldron_loss, rng, context):
    _, loss = kauldron_loss
    batch = context["batch"]
    batch["mask"][:9] = rng.uniform(size=9)  # The rest stays out,
    batch["label"][9:] = 1
    context["preds"]["features"][9:] = np.nan  # whatever is in it.
    column = {name: leaf[:, None] for name, leaf in batch.items()}  # Kauldron's own `(*b, 1)`.
    context["step"] = np.int32(500)  # After the warm-up.

    def theirs(arrays, batch):
        centers, x = arrays
        given = context | {"params": {"centers": centers}, "preds": {"features": x}, "batch": batch}
        return loss.get_state_from_context(given).compute()

    def ours(arrays):
        return 0.01 * jcl.center_loss(*arrays, batch["label"], weights=batch["mask"])

    @jax.jit
    def results(arrays):
        found = [jax.value_and_grad(theirs)(arrays, given) for given in (batch, column)]
        return found, jax.value_and_grad(ours)(arrays)

    found, want = results((context["params"]["centers"], context["preds"]["features"]))
    for one in found:
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(want), strict=True):
            assert np.isfinite(np.asarray(a)).all()
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


def test_a_kauldron_loss_without_a_mask_with_a_schedule_and_with_nothing_to_count(kauldron_loss, context):
    of, page = kauldron_loss
    labels = context["batch"]["label"]
    own = context["params"]["centers"][labels]
    squares = np.sum((context["preds"]["features"] - own) ** 2, axis=-1)[labels >= 0]
    cases = (
        ({"weight": lambda step: 0.1 * step}, 0.3 * squares.mean()),
        ({"weight": page.weight}, 0.01 * 3 / 500 * squares.mean()),
        ({"normalize_by": "values"}, squares.sum() / 12),
        ({"mask": "batch.mask"}, 0.0),
    )

    @jax.jit
    def results(context):
        losses = [of(x="preds.features", labels="batch.label", **options) for options, _ in cases]
        return [loss.get_state_from_context(context).compute() for loss in losses]

    np.testing.assert_allclose(results(context), [want for _, want in cases], rtol=1e-5)


def test_a_kauldron_training_moves_its_centers_without_lambda(kauldron_loss, context):
    of, _ = kauldron_loss
    loss = of(x="preds.features", labels="batch.label", weight=0.1)
    tx = jcl.with_center_optimizer(optax.sgd(0.1), optax.sgd(0.5), weight=0.1)

    @jax.jit
    def results(context):
        params = context["params"] | {"w": jnp.ones(2)}
        grads = jax.grad(lambda p: loss.get_state_from_context(context | {"params": p}).compute())(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        batch = context["preds"]["features"], context["batch"]["label"]
        want = jcl.update_centers(params["centers"], *batch, alpha=0.5, rule="gradient")
        return optax.apply_updates(params, updates)["centers"], want

    np.testing.assert_allclose(*results(context), rtol=1e-5, atol=1e-6)
