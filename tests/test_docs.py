"""Every page's Python runs, block after block, as a reader would run it, and does what the page says."""

import itertools
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import pytest
import reference as ref
from flax import nnx

import jax_centerloss

DOCS = Path(__file__).parents[1] / "docs"
# tests/test_layout.py runs it and looks at what comes out; tests/test_other_frameworks.py, if Keras is there.
ELSEWHERE = {"accelerators", "other_frameworks"}
PAGES = sorted(p for p in DOCS.glob("*.md") if p.stem not in ELSEWHERE)


@pytest.fixture(autouse=True)
def as_a_user(tmp_path, monkeypatch):
    """JAX's own settings, not the suite's strict ones, in a folder for what a page writes."""
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def text_of(page):
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def fences(text, kinds):
    """Each block of these kinds, with its kind."""
    return re.findall(rf"^```({kinds})\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def form(output):
    """What was printed, without its numbers but with their signs."""
    return re.sub(r"\d+(\.\d+)?", "#", output).strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page, capsys):
    check = CHECKS.get(page.stem, lambda space: None)
    text = page.read_text(encoding="utf-8")
    shown = [*fences(text, "python|text"), ("", "")]
    # A block that is not at the margin would be left out.
    assert text.count("```python\n") == sum(kind == "python" for kind, _ in shown)
    space, checked = {}, 0
    for (kind, block), (next_kind, next_block) in itertools.pairwise(shown):
        if kind != "python":
            continue
        exec(compile(block, page.name, "exec"), space)
        printed = capsys.readouterr().out
        # What a page prints stands behind the call that prints it, or in a block of text below: the numbers
        # of a training differ between versions and machines, and only the rest of it is compared.
        said = re.findall(r"^print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
        if printed.splitlines() != said:
            assert next_kind == "text", printed
            assert form(printed) == form(next_block)
        checked += bool(check(space))
    assert checked > 0 or page.stem not in CHECKS


def it_is_accurate(space):
    if "accuracy" not in space:
        return False
    assert space.pop("accuracy") > 0.95
    return True


def it_has_learned(space):
    """After a training, the page's table of a good run describes it."""
    if not it_is_accurate(space):
        return False
    metrics = space.pop("metrics")
    assert metrics["classes_seen"] == 10
    assert 0 < metrics["own_distance"] < metrics["gap"]
    assert metrics["own_distance"] / 30 < metrics["moved"] < metrics["own_distance"]
    return True


# What is asserted of a page's names, after each of its blocks that trains.
CHECKS = {"getting_started": it_has_learned, "coming_from": it_is_accurate}


def torch_script():
    """The parts of the PyTorch script, before and after its loop begins, and a namespace to run them in."""
    (_, script), *_ = fences(text_of("coming_from"), "py")
    return script.split("shuffle =")


@pytest.fixture
def center_loss_of_torch(monkeypatch):
    """The module `center_loss` that the PyTorch script imports."""
    torch = pytest.importorskip("torch")

    class CenterLoss(ref.CenterLoss):
        def __init__(self, num_classes, feat_dim, use_gpu):
            assert not use_gpu
            super().__init__(num_classes, feat_dim)

    module = types.ModuleType("center_loss")
    module.CenterLoss = CenterLoss
    monkeypatch.setitem(sys.modules, "center_loss", module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # The layers are small.
    yield
    torch.set_num_threads(threads)


def test_the_pytorch_script_runs_and_its_centers_are_read(center_loss_of_torch):
    space = {}
    exec("shuffle =".join(torch_script()), space)
    assert space["accuracy"] > 0.95
    centers = jax_centerloss.from_torch("last.pt", key="center_loss.centers")["centers"]
    np.testing.assert_array_equal(centers, space["criterion"].centers.detach().numpy())


def test_the_pytorch_script_and_its_port_take_the_same_steps(center_loss_of_torch):
    theirs, ours = {}, {}
    exec(torch_script()[0], theirs)
    _, script = fences(text_of("coming_from"), "python")[0]
    exec(script.split("shuffle =")[0], ours)
    model, port = theirs["model"], ours["model"]
    for layer, linear in (
        (model.features[0], port.features.layers[0]),
        (model.features[2], port.features.layers[2]),
        (model.head, port.head),
    ):
        nnx.update(linear, {"kernel": layer.weight.detach().numpy().T.copy()})
        nnx.update(linear, {"bias": layer.bias.detach().numpy().copy()})
    nnx.update(port.center_loss, jax_centerloss.from_torch(theirs["criterion"].state_dict()))
    np.testing.assert_array_equal(theirs["train_x"].numpy(), ours["train_x"])
    for batch in np.arange(1280).reshape(20, 64):
        loss = ours["step"](port, ours["optimizer"], ours["train_x"][batch], ours["train_y"][batch])
        np.testing.assert_allclose(
            loss, theirs["step"](theirs["train_x"][batch], theirs["train_y"][batch]), rtol=1e-4
        )
    np.testing.assert_allclose(
        jax.tree.leaves(port.center_loss)[0],
        theirs["criterion"].centers.detach().numpy(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_facenets_centers_take_its_own_step(rng):
    (block,) = (text for _, text in fences(text_of("coming_from"), "python") if "facenet" in text)
    space = {}
    exec(block, space)
    centers, x = rng.normal(size=(5, 3)).astype(np.float32), rng.normal(size=(8, 3)).astype(np.float32)
    labels = np.array([0, 1, 1, 2, 2, 2, 4, 4])
    loss, moved = space["facenet_center_loss"](centers, x, labels, alfa=0.9)
    np.testing.assert_allclose(loss, np.mean((x - centers[labels]) ** 2), rtol=1e-5)
    expected = centers.astype(np.float64)
    np.subtract.at(expected, labels, 0.1 * (centers[labels] - x).astype(np.float64))
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)


def test_pytorch_metric_learnings_steps_and_its_file(rng, tmp_path):
    (block,) = (text for _, text in fences(text_of("coming_from"), "python") if "embeddings" in text)
    space = {}
    exec(block, space)
    torch = pytest.importorskip("torch", reason="its state dict is a file of PyTorch")
    torch.save({"centers": torch.tensor(rng.normal(size=(6, 3)), dtype=torch.float32)}, tmp_path / "loss.pt")
    params = jax_centerloss.from_torch(tmp_path / "loss.pt")
    want = np.asarray(params["centers"], np.float64)
    for _ in range(4):
        x, labels = rng.normal(size=(8, 3)).astype(np.float32), rng.integers(0, 5, 8)
        want_loss, moved, _ = peers.metric_learning(want, x, labels, 0.5, None)
        np.testing.assert_allclose(space["loss_func"](params, x, labels), want_loss, rtol=1e-5)
        params, want = jax_centerloss.update_centers(params, x, labels, alpha=0.5), moved
        np.testing.assert_allclose(params["centers"], want, rtol=1e-5, atol=1e-6)
    with pytest.raises(KeyError, match=r"loss\.table \(6, 3\) float32"):
        jax_centerloss.from_torch({"loss": {"table": np.zeros((6, 3), np.float32)}})


def donated():
    centers = jnp.zeros((10, 2))
    jax.jit(jax_centerloss.update_centers, donate_argnums=0)(centers, jnp.ones((1, 2)), jnp.array([1]))
    jax_centerloss.center_loss(centers, jnp.ones((1, 2)), jnp.array([1]))


def replaced():
    params = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    params["centers"] = nnx.Param(jnp.zeros((3, 2)))
    with_center_optimizer().init(params)


def with_center_optimizer(**options):
    return jax_centerloss.with_center_optimizer(optax.adam(1e-3), **options)


def own_state_as_previous():
    module = jax_centerloss.nnx.CenterLoss(3, 2, rngs=nnx.Rngs(0))
    x, labels = jnp.ones((1, 2)), jnp.array([0])
    jax_centerloss.center_metrics(module, x, labels, previous=nnx.state(module))


TWO = {"rbf": {"centers": np.zeros((3, 2))}, "center_loss": {"centers": np.zeros((3, 2))}}
CENTERS, LABELS = np.zeros((10, 2), np.float32), np.array([1, 10])
ERRORS = {
    'no parameter is below a key "centers"': lambda: with_center_optimizer().init({"w": CENTERS}),
    "no parameter is known to belong to an nnx.CenterLoss": replaced,
    'several parameters are below a key "centers"': lambda: with_center_optimizer().init(TWO),
    "no parameter was picked by select": lambda: with_center_optimizer(select=lambda *_: False).init(TWO),
    "label 10 is out of range for 10 classes": lambda: jax_centerloss.center_loss(
        CENTERS, CENTERS[:2], LABELS
    ),
    "must hold exactly one array, the (C, D) centers": lambda: jax_centerloss.center_loss(
        TWO, CENTERS, LABELS
    ),
    "this transformation can't work row by row": lambda: jax_centerloss.row_optimizer(optax.lamb(1e-3)),
    "has been deleted": donated,
    "previous holds the centers themselves": own_state_as_previous,
    "x must be floating point": lambda: jax_centerloss.center_loss(CENTERS, np.zeros((2, 2), int), LABELS),
    "the modules are nnx.CenterLoss and linen.CenterLoss": lambda: jax_centerloss.CenterLoss,
}


@pytest.mark.parametrize("said", ERRORS)
def test_an_error_that_is_explained_is_raised(said):
    assert f"| `{said}`" in text_of("troubleshooting")
    with pytest.raises((AttributeError, RuntimeError, TypeError, ValueError), match=re.escape(said)):
        ERRORS[said]()


def test_each_error_that_is_explained_is_tested():
    table = text_of("troubleshooting").split("## Errors and what they mean")[1]
    assert re.findall(r"^\| `(.*?)`", table, flags=re.MULTILINE) == list(ERRORS)


def test_a_schedule_of_the_weight_is_that_of_the_loss():
    """After the page's warm-up steps, the centers' chain has counted as many as the optimizer."""
    ((_, block),) = fences(text_of("choosing"), "python")
    space = {}
    exec(compile(block, "choosing", "exec"), space)
    state = nnx.to_pure_dict(nnx.state(space["optimizer"]))
    counts = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.int32 or leaf.dtype == jnp.uint32]
    assert {int(count) for count in counts} == {3}
