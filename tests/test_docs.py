"""Every page's Python runs, block after block, as a reader would run it, and does what the page says."""

import ast
import itertools
import math
import re
import sys
import textwrap
import types
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import pytest
import reference as ref
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from pages import DOCS, ROOT, block_of, defined, fences, python_of, text_of

import jax_centerloss

# tests/test_layout.py runs it and looks at what comes out; tests/test_other_frameworks.py, if Keras is there.
ELSEWHERE = {"accelerators", "other_frameworks"}
PAGES = [ROOT / "README.md", *sorted(p for p in DOCS.glob("*.md") if p.stem not in ELSEWHERE)]
TAKES_LONG = {"deploy", "half_precision", "many_classes", "many_devices", "reading_lines"}


@pytest.fixture(autouse=True)
def as_a_user(as_jax_promotes, tmp_path, monkeypatch):
    """JAX's own promotion, in a folder for what a page writes."""
    monkeypatch.chdir(tmp_path)


def form(output):
    """What was printed, without its numbers but with their signs."""
    return re.sub(r"\d+(\.\d+)?", "#", output).strip()


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in TAKES_LONG), id=p.stem) for p in PAGES]
)
def test_a_page_runs(page, capsys):
    text = page.read_text(encoding="utf-8")
    shown = [*fences(text, "python|text"), ("", "")]
    # A block that is not at the margin would be left out.
    assert text.count("```python\n") == sum(kind == "python" for kind, _ in shown)
    checks = CHECKS.get(page.stem, {})
    space, checked = {}, set()
    for (kind, block), (next_kind, next_block) in itertools.pairwise(shown):
        if kind != "python":
            continue
        if "Each block runs alone" in " ".join(text.split()):
            space = {}
        exec(compile(block, page.name, "exec"), space)
        printed = capsys.readouterr().out
        # What a page prints stands behind the call that prints it, or in a block of text below: the numbers
        # of a training differ between versions and machines, and only the rest of it is compared.
        said = re.findall(r"^print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
        if printed.splitlines() != said:
            assert next_kind == "text", printed
            assert form(printed) == form(next_block)
        for words in checks:
            if words in block:
                checks[words](space)
                checked.add(words)
    assert checked == checks.keys()


def it_moves_centers(space):
    assert space["loss"].shape == ()
    assert space["params"]["centers"].shape == (10, 2)


def it_has_a_gradient(space):
    assert space["by_x"].shape == space["x"].shape
    assert space["metrics"]["classes_seen"] == 10


def ratios_of_the_page():
    """The ratios that Getting started shows of a good run, and of softmax alone."""
    (row,) = re.findall(r"^\| `ratio` \|.*$", text_of("getting_started"), flags=re.MULTILINE)
    return [float(cell) for cell in row.split("|")[2:4]]


def it_is_accurate(space):
    assert space["accuracy"] > 0.95


def it_has_learned(space):
    """After a training, the page's table of a good run describes it."""
    it_is_accurate(space)
    metrics = space["metrics"]
    assert metrics["classes_seen"] == 10
    assert 0 < metrics["own_distance"] < metrics["gap"]
    assert metrics["own_distance"] / 30 < metrics["moved"] < metrics["own_distance"]
    with_center_loss, alone = ratios_of_the_page()
    assert metrics["ratio"] < (with_center_loss + alone) / 2


def it_is_drawn(space):
    assert Path("features.png").read_bytes().startswith(b"\x89PNG")


def it_skips_a_bad_step(space):
    assert np.isnan(space["loss"])
    np.testing.assert_array_equal(space["centers"], np.zeros((10, 2)))
    moved, _ = space["careful"](jnp.zeros((10, 2)), jnp.ones((1, 2)), jnp.array([3]))
    np.testing.assert_allclose(moved[3], 0.25)


def it_moves_the_classes_of_the_batch(space):
    start = jax_centerloss.nnx.CenterLoss(1000, 32, rngs=nnx.Rngs(0))
    moved = np.any(jax.tree.leaves(space["center_loss"])[0] != jax.tree.leaves(start)[0], axis=1)
    np.testing.assert_array_equal(np.flatnonzero(moved), np.arange(8))
    space["move"](space["center_loss"], space["row_state"], jnp.ones((8, 32)), jnp.arange(8))


def falls(step, state, classes):
    """Thirty steps `step(*state, images, labels) -> (*state, loss)` on one batch, whose loss falls."""
    random = np.random.default_rng(0)
    images, labels = random.normal(size=(64, 64)).astype(np.float32), random.integers(0, classes, 64)
    losses = []
    for _ in range(30):
        *state, loss = step(*state, images, labels)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    return state, labels


def in_place(step):
    """A step of NNX in the form of one that returns what it moves."""
    return lambda model, optimizer, *batch: (model, optimizer, step(model, optimizer, *batch))


def it_trains(space):
    falls(in_place(space["train_step"]), (space["model"], space["optimizer"]), 10)


def it_trains_touched_rows(step, names, centers_of):
    def check(space):
        state = [space[name] for name in names]
        start = np.array(jax.tree.leaves(centers_of(state))[0])
        state, labels = falls(step(space), state, 40)
        moved = np.any(np.asarray(jax.tree.leaves(centers_of(state))[0]) != start, axis=1)
        np.testing.assert_array_equal(np.flatnonzero(moved), np.unique(labels))

    return check


def it_ignores_padding(space):
    random = np.random.default_rng(0)
    centers, x, logits = (random.normal(size=s).astype(np.float32) for s in ((5, 2), (3, 7, 2), (3, 7, 5)))
    labels = random.integers(-1, 5, (3, 7))
    keep = labels >= 0
    likelihood = np.exp(logits.astype(np.float64))[keep]
    likelihood = likelihood[np.arange(keep.sum()), labels[keep]] / likelihood.sum(-1)
    distance = ((x[keep].astype(np.float64) - centers[labels[keep]]) ** 2).sum(-1)
    expected = -np.log(likelihood).mean() + 0.01 * distance.mean()
    np.testing.assert_allclose(jax.jit(space["loss_fn"])(centers, x, logits, labels), expected, rtol=1e-5)


def it_loads_a_checkpoint(space):
    """In float16, which neither a module nor a tree of parameters keeps."""
    for found in (space["center_loss"].centers[...], space["params"]["center_loss"]["centers"]):
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, np.eye(10, 16))


def it_takes_facenets_step(space):
    random = np.random.default_rng(0)
    centers, x = (random.normal(size=size).astype(np.float32) for size in ((5, 3), (8, 3)))
    labels = np.array([0, 1, 1, 2, 2, 2, 4, 4])
    loss, moved = jax.jit(partial(space["facenet_center_loss"], alfa=0.9))(centers, x, labels)
    want_loss, want, _ = peers.facenet(centers.astype(np.float64), x, labels, 0.1, None)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    np.testing.assert_allclose(moved, want, rtol=1e-5, atol=1e-6)


def it_sweeps_as_trainings_alone(space):
    run, found = jax.jit(space["run"]), np.stack([space["ratios"], space["accuracies"]], axis=1)
    np.testing.assert_allclose(found, [run(lam) for lam in space["lams"]], rtol=0.01)
    assert (np.diff(space["ratios"]) < 0).all()


# What is asserted of a page's names, after each of its blocks that has the words.
CHECKS = {
    "README": {"init_centers": it_moves_centers, "def train_step": it_trains},
    "choosing": {"vmap": it_sweeps_as_trainings_alone},
    "coming_from": {
        "accuracy =": it_is_accurate,
        'state_dict = {"center_loss': it_loads_a_checkpoint,
        "def facenet": it_takes_facenets_step,
    },
    "getting_started": {
        "metrics =": it_has_learned,
        "features.png": it_is_drawn,
        "def loss_fn(params, x": it_ignores_padding,
    },
    "index": {"by_x": it_has_a_gradient},
    "moving_centers": {
        "def rows_step": it_trains_touched_rows(
            lambda space: space["rows_step"],
            ("weights", "opt_state", "centers", "row_state"),
            lambda state: state[2],
        ),
        "def nnx_step": it_trains_touched_rows(
            lambda space: in_place(space["nnx_step"]),
            ("model", "optimizer"),
            lambda state: state[0].center_loss,
        ),
        "def move(": it_moves_the_classes_of_the_batch,
        "def linen_step": it_trains_touched_rows(
            lambda space: space["linen_step"], ("params", "opt_state", "centers"), lambda state: state[2]
        ),
    },
    "troubleshooting": {"def careful": it_skips_a_bad_step},
}


def test_softmax_alone_has_another_ratio_and_its_own_distance_is_below_the_gap_too():
    block = block_of("getting_started", "def features")
    pulled = 'center_loss(params["center_loss"], x, labels)'
    followed = pulled.replace("x,", "jax.lax.stop_gradient(x),")
    assert block.count(pulled) == 1
    metrics = defined(block.replace(pulled, followed))["metrics"]
    with_center_loss, alone = ratios_of_the_page()
    assert metrics["ratio"] > (with_center_loss + alone) / 2
    assert metrics["own_distance"] < metrics["gap"]
    assert metrics["moved"] > metrics["own_distance"] / 30


def torch_script():
    """The parts of the PyTorch script, before and after its loop begins, and a namespace to run them in."""
    (_, script), *_ = fences(text_of("coming_from"), "py")
    return script.split("shuffle =")


@pytest.fixture
def center_loss_of_torch(monkeypatch):
    """The module `center_loss` that the PyTorch script imports."""
    torch = pytest.importorskip("torch", reason="the script is in PyTorch")

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
    space = defined("shuffle =".join(torch_script()))
    assert space["accuracy"] > 0.95
    centers = jax_centerloss.from_torch("last.pt", key="center_loss.centers")["centers"]
    np.testing.assert_array_equal(centers, space["criterion"].centers.detach().numpy())


def test_the_pytorch_script_and_its_port_take_the_same_steps(center_loss_of_torch):
    """To the end of the warm-up and beyond: in the first step λ is 0, and centers rest."""
    theirs = defined(torch_script()[0])
    ours = defined(python_of("coming_from")[0].split("shuffle =")[0])
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
    start = theirs["criterion"].centers.detach().numpy().copy()
    batches = np.arange(1280).reshape(20, 64)
    for count, batch in enumerate(np.tile(batches, (5, 1))):
        loss = ours["step"](port, ours["optimizer"], ours["train_x"][batch], ours["train_y"][batch])
        want = theirs["step"](count, theirs["train_x"][batch], theirs["train_y"][batch])
        np.testing.assert_allclose(loss, want, rtol=1e-4)
        rests = np.array_equal(theirs["criterion"].centers.detach(), start)
        assert np.array_equal(port.center_loss.centers[...], start) == rests == (count == 0)
    np.testing.assert_allclose(
        jax.tree.leaves(port.center_loss)[0],
        theirs["criterion"].centers.detach().numpy(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_pytorch_metric_learnings_steps_and_its_file(rng, tmp_path):
    space = defined(block_of("coming_from", "embeddings"))
    torch = pytest.importorskip("torch", reason="its state dict is a file of PyTorch")
    torch.save({"centers": torch.tensor(rng.normal(size=(6, 3)), dtype=torch.float32)}, tmp_path / "loss.pt")
    params = jax_centerloss.from_torch(tmp_path / "loss.pt")
    want = np.asarray(params["centers"], np.float64)

    @jax.jit
    def step(params, x, labels):
        loss = space["loss_func"](params, x, labels)
        return loss, jax_centerloss.update_centers(params, x, labels, alpha=0.5)

    for _ in range(4):
        x, labels = rng.normal(size=(8, 3)).astype(np.float32), rng.integers(0, 5, 8)
        want_loss, want, _ = peers.metric_learning(want, x, labels, 0.5, None)
        loss, params = step(params, x, labels)
        np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
        np.testing.assert_allclose(params["centers"], want, rtol=1e-5, atol=1e-6)
    with pytest.raises(KeyError, match=r"loss\.table \(6, 3\) float32"):
        jax_centerloss.from_torch({"loss": {"table": np.zeros((6, 3), np.float32)}})


def donated():
    centers = jnp.zeros((10, 2))
    jax.jit(jax_centerloss.update_centers, donate_argnums=0)(centers, jnp.ones((1, 2)), jnp.array([1]))
    jax_centerloss.center_loss(centers, jnp.ones((1, 2)), jnp.array([1]))


def uncounted():
    opt_state = optax.adam(1e-3).init({"centers": CENTERS})
    return optax.tree_utils.tree_get(opt_state, "center_step")[...]


CENTERS, LABELS = np.zeros((10, 2), np.float32), np.array([1, 10])
MASKED, SWAPPED = np.ma.masked_array(LABELS, mask=LABELS == 1), LABELS.astype(">i4")
LOSS, MOVE = jax.jit(jax_centerloss.center_loss), jax.jit(jax_centerloss.update_centers)
ERRORS = [
    ("numpy masked arrays are not supported", lambda: LOSS(CENTERS, CENTERS[:2], MASKED)),
    ("Error interpreting argument", lambda: LOSS(CENTERS, CENTERS[:2], SWAPPED)),
    ("Error interpreting argument", lambda: MOVE(CENTERS, CENTERS[:2], LABELS, rule="paper")),
    ("'NoneType' object is not subscriptable", uncounted),
    ("has been deleted", donated),
    ("the modules are nnx.CenterLoss and linen.CenterLoss", lambda: jax_centerloss.CenterLoss),
]


@pytest.mark.parametrize(("said", "call"), ERRORS, ids=[said for said, _ in ERRORS])
def test_an_error_that_is_explained_is_raised(said, call):
    with pytest.raises((AttributeError, RuntimeError, TypeError, ValueError), match=re.escape(said)):
        call()


def test_each_error_that_is_explained_is_tested():
    table = text_of("troubleshooting").split("## Errors and what they mean")[1]
    assert re.findall(r"^\| `(.*?)`", table, flags=re.MULTILINE) == list(dict(ERRORS))


def test_the_warm_up_of_the_page_is_counted_once_an_update_and_with_accumulated_gradients():
    """The centers' chain counts as all else, and batches that come twice, for an update, train alike."""
    program = block_of("getting_started", "class Model").split("shuffle =")[0]
    program += """
for i in range(steps):
    loss = step(model, optimizer, *batch)
"""
    batch = some(32, 64), jnp.arange(32) % 10
    usual, accumulated = {"steps": 3, "batch": batch}, {"steps": 6, "batch": batch}
    exec(program, usual)
    twice = "nnx.Optimizer(model, optax.MultiSteps(tx, 2)"
    exec(program.replace("nnx.Optimizer(model, tx", twice), accumulated)
    state = nnx.to_pure_dict(nnx.state(usual["optimizer"]))
    counts = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.int32 or leaf.dtype == jnp.uint32]
    assert {int(count) for count in counts} == {3}
    got, want = (nnx.to_pure_dict(nnx.state(space["model"], nnx.Param)) for space in (accumulated, usual))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, want)


def test_a_traced_weight_is_divided_out():
    """A sweep of centers that are parameters: they move alike at every λ, and rest at 0."""
    params = {"center_loss": jax_centerloss.init_centers(jax.random.key(0), 4, 2)}
    x, labels = some(64, 2), jnp.arange(64) % 4

    @jax.jit
    @jax.vmap
    def moved(lam):
        tx = jax_centerloss.with_center_optimizer(optax.adam(1e-3), weight=lam)
        grads = jax.grad(lambda p: lam * jax_centerloss.center_loss(p["center_loss"], x, labels))(params)
        return tx.update(grads, tx.init(params), params)[0]["center_loss"]["centers"]

    none, small, large = moved(jnp.array([0.0, 0.001, 0.1]))
    np.testing.assert_allclose(small, large, rtol=1e-4)
    assert (none == 0).all()
    assert (large != 0).all()


def test_a_lone_sample_moves_its_center_as_the_page_says():
    rows = re.findall(r'^\| `"(\w+)"`.*\| ([\d.]+) \|$', text_of("moving_centers"), flags=re.MULTILINE)
    rules = [rule for rule, _ in rows]
    assert rules == ["paper", "gradient", "mean"]

    @jax.jit
    def moved():
        centers, x = jnp.zeros((128, 2)), jnp.zeros((128, 2)).at[0, 0].set(1.0)
        batch = x, jnp.arange(128)
        return [jax_centerloss.update_centers(centers, *batch, rule=rule, alpha=0.5) for rule in rules]

    for found, (_, said) in zip(moved(), rows, strict=True):
        assert float(said) == round(float(found[0, 0]), 4)
        assert (found[1:] == 0).all()


def test_a_center_loss_that_is_off_shows():
    """Never called, or given a table that is another than the optimizer's: no gradient, and `moved` is 0."""
    params = {"w": some(3, 2), "center_loss": jax_centerloss.init_centers(jax.random.key(0), 4, 2)}
    other = jax_centerloss.init_centers(jax.random.key(1), 4, 2)
    images, labels = some(64, 3), jnp.arange(64) % 4
    tx = jax_centerloss.with_center_optimizer(optax.sgd(0.1), weight=0.01)

    @jax.jit
    def step(params, called, own):
        def loss_fn(params):
            x = images @ params["w"]
            table = jax.tree.map(partial(jnp.where, own), params["center_loss"], other)
            return jnp.mean(x**2) + 0.01 * called * jax_centerloss.center_loss(table, x, labels)

        grads = jax.grad(loss_fn)(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        after = optax.apply_updates(params, updates)["center_loss"]
        x = images @ params["w"]
        metrics = jax_centerloss.center_metrics(after, x, labels, previous=params["center_loss"])
        return jnp.any(grads["center_loss"]["centers"] != 0), metrics["moved"] > 0

    for called, own in itertools.product((False, True), repeat=2):
        assert step(params, called, own) == (called and own, called and own)


def test_small_weights_freeze_the_centers_of_the_papers_rule():
    """Weights of one over the number of a class's samples, with the page's numbers."""
    params = jax_centerloss.init_centers(jax.random.key(0), num_classes=3, feat_dim=2)
    x, labels = jax.random.normal(jax.random.key(1), (6, 2)), jnp.array([0, 0, 0, 0, 1, 2])
    weights = 1 / jnp.array([4000.0, 1000.0, 1000.0])[labels]

    @jax.jit
    def moved():
        afters = [
            jax_centerloss.update_centers(params, x, labels, weights=weights, rule="paper"),
            jax_centerloss.update_centers(params, x, labels, weights=weights, rule="mean"),
            jax_centerloss.update_centers(params, x, labels, weights=weights / weights.mean(), rule="paper"),
        ]
        return [jax_centerloss.center_metrics(after, x, labels, previous=params)["moved"] for after in afters]

    paper, mean, paper_of_mean_1 = map(float, moved())
    (item,) = re.findall(r"^8\. .*?(?=\n\n|^9\. )", text_of("troubleshooting"), re.MULTILINE | re.DOTALL)
    assert {f"{paper:.4f}", f"{mean:.2f}"} == set(re.findall(r"\b\d\.\d+", item))
    assert paper_of_mean_1 > 0.6 * mean


def test_centers_freeze_as_the_page_says():
    section = text_of("moving_centers").split("## Freeze centers")[1].split("\n## ")[0]
    at_once = "optax.set_to_zero()"
    from_a_step_on = "optax.sgd(optax.piecewise_constant_schedule(0.5, {1000: 0.0}))"
    assert f"`centers={at_once}`" in section
    assert f"`{from_a_step_on}`" in section
    x, labels = some(16, 2), jnp.arange(16) % 4
    params = {"head": jnp.ones(2), "center_loss": jax_centerloss.init_centers(jax.random.key(0), 4, 2)}

    @jax.jit
    @jax.grad
    def gradient(params):
        return jax_centerloss.center_loss(params["center_loss"], x, labels) + params["head"].sum()

    grads = gradient(params)
    for chain, steps in ((at_once, 0), (from_a_step_on, 1000)):
        tx = jax_centerloss.with_center_optimizer(optax.sgd(0.1), centers=eval(chain))

        def step(state, _, tx=tx):
            updates, state = tx.update(grads, state, params)
            return state, updates

        _, updates = jax.jit(partial(jax.lax.scan, step, length=steps + 2))(tx.init(params))
        rests = np.all(updates["center_loss"]["centers"] == 0, axis=(1, 2))
        np.testing.assert_array_equal(rests, np.arange(steps + 2) >= steps)
        assert (updates["head"] != 0).all()
    resting = jnp.array([True, False, False, True])
    moved = jax_centerloss.update_centers(params["center_loss"], x, labels, where=~resting[labels])["centers"]
    np.testing.assert_array_equal((moved == params["center_loss"]["centers"]).all(axis=1), resting)


DIGITS = "import jax.numpy as jnp; images, labels = some(64, 64), jnp.arange(64) % 10"
# What a reader does with the functions of a block, page by page, after the block that has the words.
USES = {
    "README": {"def train_step": f"{DIGITS}; loss = train_step(model, optimizer, images, labels)"},
    "coming_from": {
        "train_test_split": f"{DIGITS}; loss = step(model, optimizer, images, labels)",
        "hard_triplet": """
            images, labels = some(16, 256), jnp.arange(16) // 4
            loss = step(model, optimizer, images, labels)
        """,
        "facenet": "found = jax.jit(facenet_center_loss)(jnp.zeros((8, 4)), some(8, 4), jnp.arange(8))",
    },
    "getting_started": {
        "class Model": f"{DIGITS}; loss = step(model, optimizer, images, labels)",
        "class Net": f"{DIGITS}; params, opt_state, loss = step(params, opt_state, images, labels)",
        "def features": f"{DIGITS}; params, opt_state, loss = step(params, opt_state, images, labels)",
        "def loss_fn(params, x, logits": """
            params = jax_centerloss.init_centers(jax.random.key(0), 8, 4)
            x, logits, labels = some(8, 4, 4), some(8, 4, 8), jnp.arange(32).reshape(8, 4) % 9 - 1
            found = jax.jit(jax.value_and_grad(loss_fn, (0, 1, 2)))(params, x, logits, labels)
        """,
    },
    "moving_centers": {
        "def rows_step": """
            images, labels = some(64, 64), jnp.arange(64) * 3
            weights, opt_state, centers, row_state, loss = rows_step(
                weights, opt_state, centers, row_state, images, labels
            )
        """,
        "def nnx_step": f"{DIGITS}; loss = nnx_step(model, optimizer, images, labels)",
        "def linen_step": f"{DIGITS}; moved = linen_step(params, opt_state, centers, images, labels)",
    },
    "recipes": {
        "def euclidean": """
            centers, x, labels = some(8, 4), some(24, 4) + 1.0, jnp.arange(24) % 5
            losses = mean_per_class, euclidean, cosine
            found = [jax.jit(jax.value_and_grad(loss, (0, 1)))(centers, x, labels) for loss in losses]
            within = jax.jit(jax.value_and_grad(up_to_a_radius, (0, 1)))(centers, x, labels, 0.5)
        """,
        "def every_row": """
            state, row_state = solver.init(centers), rows.init(centers)
            dense = jax.jit(every_row)(centers, state, x, labels)
            by_rows = jax.jit(touched_rows)(centers, row_state, x, labels)
        """,
    },
    "troubleshooting": {
        "def careful": "moved, loss = careful(jnp.zeros((8, 2)), some(16, 2), jnp.arange(16) % 7)",
    },
    "variants": {
        "def cosine_loss": "of_cosine = graded(cosine_loss)(centers, x, labels)",
        "def ws_dan": """
            of_ws_dan = graded(ws_dan_loss)(centers, x, labels)
            ws_dan_moved = jax.jit(ws_dan_update)(centers, x, labels)
        """,
        "def dacl": """
            attention = jnp.abs(some(8, 3))
            of_dacl = graded(dacl_loss, (0, 1, 3))(centers, x, labels, attention)
            dacl_moved = jax.jit(dacl_update)(centers, x, labels, attention)
        """,
        "def twice": """
            other_labels, shares = labels[::-1], jnp.arange(8) / 8
            of_mixup = graded(mixup_loss)(centers, x, labels, other_labels, shares)
            mixup_moved = jax.jit(mixup_update)(centers, x, labels, other_labels, 0.3)
        """,
        "def pairs": """
            several = jax.jit(pairs, static_argnums=2)(x, jnp.arange(40).reshape(8, 5) % 3 == 0, 2)
            of_several = graded(three_c_net_loss)(centers, *several)
        """,
        "def radius_loss": "of_radius = graded(radius_loss)(centers, x, labels, 1.0)",
        "def arcface": "of_arcface = jax.jit(arcface_logits)(some(5, 3), x, labels)",
        "def outlier_score": "scores = jax.jit(outlier_score)(centers, x)",
        "def single_center": "of_single = graded(single_center_loss)(centers[:1], x, labels % 2)",
        "def contrastive": "of_contrastive = graded(contrastive_center_loss)(centers, x, labels)",
        "def triplet": "of_triplet = graded(triplet_center_loss)(centers, x, labels)",
        "def island": "of_island = graded(island_loss)(centers, x, labels, 0.3)",
        "def oltr": """
            loss, (gradient, _) = graded(oltr_loss)(centers, x, labels)
            oltr_moved = jax.jit(oltr_update)(centers, gradient, x, labels, 0.1)
        """,
        "def prototypical": """
            query, query_labels = x + 0.5, labels[::-1]
            prototypes_of = partial(prototypical_loss, num_classes=5)
            of_prototypes = graded(prototypes_of, (0, 2))(x, labels, query, query_labels)
        """,
        "def hetero": """
            hetero_of = partial(hetero_center_loss, num_classes=5)
            of_hetero = graded(hetero_of, (0, 2))(x, labels, query, query_labels)
        """,
        "def add_micro": """
            carried = jnp.zeros((8, 3)), jnp.zeros(8)
            carried = jax.jit(add_micro_batch)(carried, x, labels)
            by_sums = jax.jit(update_by_sums)(some(8, 3), carried)
        """,
        "def grown": "wider = grown({'a': jnp.ones((5, 3))}, {'a': jnp.zeros((7, 3))})",
        "def fixed_loss": "of_fixed = graded(fixed_loss)(centers, x, labels)",
    },
}
# The statements, by words of theirs, that are not run with what is split over a mesh, and why.
ALONE = {
    "print(": "it shows numbers of one device",
}
# Pages that are not run on a mesh, or on Auto axes only, and why.
UNSPLIT = {
    "speed": "a mesh is one of the things that its plain lines get wrong: tests/test_plain.py",
    "deploy": "its program is exported for one device",
    "other_frameworks": "Keras and kauldron place arrays themselves",
    "many_devices": "its arrays lie on meshes of their own, which its own test looks at",
}
AUTO_ONLY = {
    "reading_lines": "optax.ctc_loss and nnx.RNN refuse a batch that is split over Explicit axes",
    "many_classes": "JAX sorts no labels that are split over Explicit axes",
}
if jax.__version_info__ < (0, 10):
    AUTO_ONLY["troubleshooting"] = "checkify of JAX 0.7 takes Explicit axes for Auto ones inside of auto_axes"
SPLIT = [page for page in (*PAGES, DOCS / "accelerators.md") if page.stem not in UNSPLIT]
SPLIT = [page for page in SPLIT if fences(page.read_text(encoding="utf-8"), "python")]


def some(*shape):
    return jax.random.normal(jax.random.key(0), shape)


def graded(loss, argnums=(0, 1)):
    return jax.jit(jax.value_and_grad(loss, argnums))


def statements(page, mesh):
    """Those of a page and of what is done with its functions. A long training takes three steps."""
    for _, block in fences(page.read_text(encoding="utf-8"), "python"):
        uses = [textwrap.dedent(use) for words, use in USES.get(page.stem, {}).items() if words in block]
        block = re.sub(r"in range\(\d\d+\):", "in range(3):", block.split("shuffle =")[0])
        if mesh is not None:
            block = block.replace("SingleDeviceSharding(jax.devices()[0])", "by_class")
        for source in (block, *uses):
            for statement in ast.parse(source).body:
                yield ast.unparse(statement), statement


def names_in(statement, context):
    return {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, context)}


def is_there(leaf):
    """Whether it is an array of numbers that no step was given to write in place."""
    is_array = isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return is_array and not leaf.is_deleted()


def split_over(mesh, dtype, name, value):
    """What a page gives a name is split by samples or classes; the weights of a model are on every device.

    All but the centers become of that dtype.
    """

    def moved(path, leaf):
        path = name + jax.tree_util.keystr(path)
        if not is_there(leaf):
            return leaf
        halved = leaf.ndim and jnp.issubdtype(leaf.dtype, jnp.floating) and "centers" not in path
        splits = leaf.ndim and (path == name or "centers" in path or "row_state" in path)
        shards = math.gcd(leaf.shape[0], 8) if splits else 1
        axes = mesh.axis_names[: shards.bit_length() - 1]
        # Through NumPy, since JAX compiles a program for each array that moves between devices.
        leaf = np.asarray(leaf).astype(dtype if halved else leaf.dtype)
        return jax.device_put(leaf, NamedSharding(mesh, P(axes) if axes else P()))

    if isinstance(value, nnx.Module):
        state = nnx.state(value, nnx.Not(nnx.BatchStat))  # Flax keeps those in float32.
        nnx.update(value, jax.tree_util.tree_map_with_path(moved, state))
        return value
    return value if isinstance(value, type) else jax.tree_util.tree_map_with_path(moved, value)


def arrays_of(page, mesh=None, dtype=None):
    """The arrays that are there after a page's code."""
    space = {"some": some, "graded": graded, "partial": partial}
    if mesh is not None:
        space["by_class"] = NamedSharding(mesh, P(mesh.axis_names))
    for text, statement in statements(page, mesh):
        if any(words in text for words in ALONE):
            continue
        exec(compile(text, page.name, "exec"), space)
        if mesh is not None:
            for name in space.keys() & names_in(statement, ast.Store):
                space[name] = split_over(mesh, dtype, name, space[name])
    values = {
        n: nnx.state(v) if isinstance(v, nnx.Module) else v
        for n, v in space.items()
        if n not in ("__builtins__", "error", "_")
    }
    return {
        name + jax.tree_util.keystr(path): np.asarray(leaf)
        for name, value in values.items()
        if not isinstance(value, type)
        for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]
        if is_there(leaf)
    }


MAKE_MESH = jax.make_mesh


def mesh_of(kind, shape, names, **options):
    return MAKE_MESH(shape, names, axis_types=(getattr(AxisType, kind),) * len(names), **options)


arrays_on_one_device = cache(arrays_of)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("Explicit", jnp.float32), ("Auto", jnp.bfloat16)],
    ids=["Explicit-float32", "Auto-bfloat16"],
)
@pytest.mark.parametrize("page", SPLIT, ids=lambda page: page.stem)
def test_a_page_on_a_mesh(page, kind, dtype, tmp_path, monkeypatch):
    """With its arrays split over eight devices, and inside `jit`, a page has the numbers of one device."""
    if kind == "Explicit" and page.stem in AUTO_ONLY:
        pytest.skip(AUTO_ONLY[page.stem])
    wanted = arrays_on_one_device(page)
    (tmp_path / kind).mkdir()
    monkeypatch.chdir(tmp_path / kind)  # A page's checkpoints are written anew.
    make_mesh = partial(mesh_of, kind)
    monkeypatch.setattr(jax, "make_mesh", make_mesh)
    mesh = make_mesh((2, 2, 2), ("a", "b", "c"))
    with jax.set_mesh(mesh):
        found = arrays_of(page, mesh, dtype)
    assert found.keys() >= wanted.keys()
    exact = dtype == jnp.float32
    # Adam's first steps have the sign of a gradient, and in bfloat16 one near 0 may have the other.
    share, least = (1e-3, 1e-6) if exact else (0.1, 0.01)
    for name, want in wanted.items():
        if exact or jnp.issubdtype(want.dtype, jnp.floating):
            want, got = want.astype(np.float32), found[name].astype(np.float32)
            atol = least + share * np.abs(want).max(initial=0.0)
            np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("page", SPLIT, ids=lambda page: page.stem)
def test_each_function_of_a_page_is_run_on_a_mesh(page):
    defined, used = set(), set()
    for text, statement in statements(page, None):
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            defined.add(statement.name)
        if not any(words in text for words in ALONE):
            used |= names_in(statement, ast.Load) - {getattr(statement, "name", None)}
    assert defined <= used


def test_each_use_and_exception_belongs_to_a_page():
    texts = {page.stem: page.read_text(encoding="utf-8") for page in SPLIT}
    assert all(words in texts[page] for page, uses in USES.items() for words in uses)
    assert all(any(words in text for text in texts.values()) for words in ALONE)


def many_classes_step(sizes):
    """What the first block of the page on many classes defines, for tables of these sizes."""
    block = block_of("many_classes", "num_classes, feat_dim =")
    assert "= 100_000, 64\n" in block
    return defined(block.split("x, labels =")[0].replace("= 100_000, 64\n", f"= {sizes[0]}, {sizes[1]}\n"))


def test_the_step_of_many_classes_is_that_of_the_full_softmax_if_all_are_drawn(rng):
    space = many_classes_step((6, 3))
    x, labels = rng.normal(size=(8, 3)).astype(np.float32), rng.integers(0, 6, 8).astype(np.int32)
    table, centers = (np.array(space[name]["centers"]) for name in ("head", "centers"))
    tx = optax.adam(1e-3)

    def full(x, table):
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(x @ table.T, labels).mean()
        return cross_entropy + 0.01 * jnp.mean(jnp.sum((x - centers[labels]) ** 2, axis=-1))

    want, (by_x, by_table) = jax.value_and_grad(full, (0, 1))(x, table)
    updates, _ = tx.update(by_table, tx.init(table))
    held = space["head"], space["head_state"], space["centers"]
    head, _, moved, loss, found = space["step"](*held, x, labels, np.arange(6, dtype=np.int32), 0.01)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(found, by_x, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(head["centers"], optax.apply_updates(table, updates), rtol=1e-4, atol=1e-6)
    _, want_centers, _ = peers.paper(centers.astype(np.float64), x, labels, 0.5, None)
    np.testing.assert_allclose(moved["centers"], want_centers, rtol=1e-5, atol=1e-6)


def test_the_step_of_many_classes_writes_the_drawn_rows_alone_and_in_place(rng):
    space = many_classes_step((50_000, 64))
    x, labels = rng.normal(size=(4, 64)).astype(np.float32), np.array([7, 7, 40_000, 3], np.int32)
    drawn = np.array([9, 40_000, 11], np.int32)
    before = np.array(space["head"]["centers"])
    held = space["head"], space["head_state"], space["centers"]
    program = space["step"].lower(*held, x, labels, drawn, 0.01).compile()
    assert program.memory_analysis().temp_size_in_bytes < before.nbytes / 4
    head, *_ = space["step"](*held, x, labels, drawn, 0.01)
    changed = np.flatnonzero(np.any(np.asarray(head["centers"]) != before, axis=1))
    np.testing.assert_array_equal(changed, [3, 7, 9, 11, 40_000])
