"""The Python of the README and of the pages runs, and does what they say of it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from pages import DOCS, ROOT, fences, python_of, text_of
from pages import defined as run

import jax_centerloss

pytestmark = pytest.mark.usefixtures("as_jax_promotes")

README = ROOT / "README.md"
PAGES = README, ROOT / "examples" / "README.md", *sorted(DOCS.glob("*.md"))
BLOCKS = [text for page in PAGES for _, text in fences(page.read_text(encoding="utf-8"), "python")]

eight_devices = pytest.mark.skipif(
    jax.default_backend() != "cpu" and jax.device_count() < 8, reason="shows the shards on eight devices"
)


def block(word):
    """The first block with this word in it."""
    return next(text for text in BLOCKS if word in text)


def lines(text):
    return len([line for line in text.splitlines() if line.strip()])


def test_functions():
    text = block("init_centers")
    space = run(text)
    assert lines(text) <= 10
    assert space["loss"].shape == ()
    assert space["params"]["centers"].shape == (10, 2)


def test_the_front_page_shows_a_step():
    (text,) = python_of("index")
    space = run(text)
    assert lines(text) <= 12
    assert space["by_x"].shape == space["x"].shape
    assert space["metrics"]["classes_seen"] == 10


SITE = "https://jax-centerloss.github.io/jax-centerloss/"


def anchors(page):
    """The anchors of the headings of a page of the site."""
    headings = re.findall(r"^##+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_pages_of_the_site_and_not_to_their_sources():
    links = re.findall(r"\]\(([^)\s]+)\)", README.read_text(encoding="utf-8"))
    assert not [link for link in links if link.startswith("docs/")]
    pages = [link.removeprefix(SITE) for link in links if link.startswith(SITE) and link != SITE]
    assert len(pages) > 20
    for link in pages:
        name, _, anchor = link.partition("#")
        if name == "api/":
            assert (DOCS / "api" / "index.md").exists()
            continue
        stem = name.removesuffix(".html")
        source = DOCS / f"{stem}.ipynb" if stem == "tutorial" else DOCS / f"{stem}.md"
        assert source.exists(), link
        assert not anchor or anchor in anchors(source), link


@pytest.mark.parametrize(
    "words",
    [
        "centers don't move",
        "mixup",
        "a million classes",
        "a PyTorch checkpoint",
        "bfloat16",
        "OCR",
        "several GPUs",
        "which λ",
        "sweeps",
        "imbalanced classes",
        "freeze",
        "new classes",
        "deploy",
    ],
)
def test_what_users_look_for_is_one_click_away(words):
    assert re.search(rf"\[[^\]]*{words}[^\]]*\]\({SITE}", README.read_text(encoding="utf-8"))


def test_a_label_out_of_range_is_named(capsys):
    run(block("checkify"))
    label, feature = capsys.readouterr().out.splitlines()
    assert label.startswith("label 10 is out of range for 10 classes")
    assert feature.startswith("a feature of a used sample, of class 9, is nan")


def test_every_guarantee_names_tests_that_exist():
    text = text_of("guarantees")
    rows = re.findall(r"^\| (.+?) \|(.*)\|$", text, flags=re.MULTILINE)[1:]  # Below the head.
    promises = {promise: tests for promise, tests in rows if not promise.startswith("**")}
    assert len(promises) > 15
    for promise, tests in promises.items():
        assert re.search(r"`test_\w+`", tests), promise
    linked = re.findall(r"\[`(test_\w+)`\]\(\.\./tests/(test_\w+\.py)\)", text)
    assert re.findall(r"`(test_\w+)`", text) == [name for name, _ in linked]
    for name, file in linked:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name


def test_the_speeds_are_those_of_the_page_on_speed():
    def rows(text):
        lines = [line for line in text.splitlines() if line.startswith("| ")]
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]

    page = {name: cells for name, *cells in rows(text_of("speed"))}
    shown = (
        "this library, the paper's rule",
        "plain JAX by hand, the paper's rule",
        "PyTorch, sparse SGD",
        "PyTorch, dense SGD",
        "[PyTorch module](https://github.com/KaiyangZhou/pytorch-center-loss)",
    )
    times = [[f"{float(cell):.2f}" if cell else "" for cell in page[name]] for name in shown]
    measured = [list(row) for row in zip(page["classes"], *times, strict=True)]
    section = README.read_text(encoding="utf-8").split("## Speed\n")[1].split("\n## ")[0]
    assert rows(section)[1:] == measured


def test_training_step(rng):
    text = block("train_step")
    space = run(text)
    assert lines(text) <= 25
    images = rng.normal(size=(64, 64)).astype(np.float32)
    labels = rng.integers(0, 10, 64)
    losses = [
        float(space["train_step"](space["model"], space["optimizer"], images, labels)) for _ in range(60)
    ]
    assert losses[-1] < losses[0] - 0.1


def falls(step, state, images, labels):
    """Takes 30 steps with `step(*state, images, labels) -> (*state, loss)`; the loss falls."""
    losses = []
    for _ in range(30):
        *state, loss = step(*state, images, labels)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    return state


@pytest.fixture
def many_classes(rng):
    return rng.normal(size=(64, 64)).astype(np.float32), rng.integers(0, 40, 64)


def test_touched_rows_with_plain_functions(many_classes):
    space = run(block("def rows_step"))
    start = jax.tree.map(jnp.copy, space["centers"])["centers"]
    names = ("weights", "opt_state", "centers", "row_state")
    _, _, centers, _ = falls(space["rows_step"], [space[name] for name in names], *many_classes)
    moved = np.any(centers["centers"] != start, axis=1)
    np.testing.assert_array_equal(np.flatnonzero(moved), np.unique(many_classes[1]))


def test_touched_rows_in_nnx(many_classes):
    space = run(block("def nnx_step(model, optimizer"))
    model, optimizer = space["model"], space["optimizer"]
    start = np.array(jax.tree.leaves(model.center_loss)[0])
    falls(lambda *batch: (space["nnx_step"](model, optimizer, *batch),), [], *many_classes)
    moved = np.any(np.asarray(jax.tree.leaves(model.center_loss)[0]) != start, axis=1)
    np.testing.assert_array_equal(np.flatnonzero(moved), np.unique(many_classes[1]))


def test_touched_rows_in_linen(many_classes):
    space = run(block("def linen_step"))
    start = np.array(jax.tree.leaves(space["centers"])[0])
    *_, centers = falls(
        space["linen_step"], [space[n] for n in ("params", "opt_state", "centers")], *many_classes
    )
    moved = np.any(np.asarray(jax.tree.leaves(centers)[0]) != start, axis=1)
    np.testing.assert_array_equal(np.flatnonzero(moved), np.unique(many_classes[1]))


def test_a_row_optimizer_in_nnx():
    space = run(block("def move("))
    start = jax_centerloss.nnx.CenterLoss(1000, 32, rngs=nnx.Rngs(0))
    moved = np.any(jax.tree.leaves(space["center_loss"])[0] != jax.tree.leaves(start)[0], axis=1)
    np.testing.assert_array_equal(np.flatnonzero(moved), np.arange(8))
    space["move"](space["center_loss"], space["row_state"], jnp.ones((8, 32)), jnp.arange(8))


def test_the_literal_port_and_the_recommended_form_take_the_same_steps(rng):
    """Two optimizers, the centers' gradient divided by hand, as in a script in PyTorch."""
    lam, params = 0.5, {"model": {"w": jnp.ones((4, 2))}, "center_loss": {"centers": jnp.zeros((10, 2))}}
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    tx_model, tx_centers = optax.sgd(0.01), optax.sgd(0.5)
    by_hand = jax.tree.map(lambda g: g / lam, grads["center_loss"])  # param.grad *= 1 / lam
    model, _ = tx_model.update(grads["model"], tx_model.init(params["model"]))
    centers, _ = tx_centers.update(by_hand, tx_centers.init(params["center_loss"]))
    literal = optax.apply_updates(params, {"model": model, "center_loss": centers})
    tx = jax_centerloss.with_center_optimizer(tx_model, tx_centers, weight=lam)
    updates, _ = tx.update(grads, tx.init(params), params)
    jax.tree.map(np.testing.assert_allclose, literal, optax.apply_updates(params, updates))


def test_sequences_with_padding(rng):
    loss_fn = run(block("def loss_fn(params, x"))["loss_fn"]
    x = rng.normal(size=(3, 7, 2)).astype(np.float32)
    logits = rng.normal(size=(3, 7, 5)).astype(np.float32)
    labels = rng.integers(-1, 5, (3, 7))
    centers = rng.normal(size=(5, 2)).astype(np.float32)
    keep = labels >= 0
    likelihood = np.exp(logits.astype(np.float64))[keep]
    likelihood = likelihood[np.arange(keep.sum()), labels[keep]] / likelihood.sum(-1)
    distance = ((x[keep].astype(np.float64) - centers[labels[keep]]) ** 2).sum(-1)
    expected = -np.log(likelihood).mean() + 0.01 * distance.mean()
    np.testing.assert_allclose(loss_fn(centers, x, logits, labels), expected, rtol=1e-5)


def test_sharded_step():
    text = block("sharded_step")
    space = run(text)
    assert lines(text) <= 15
    assert space["params"]["centers"].sharding.is_equivalent_to(space["by_class"], 2)
    assert float(space["sharded_step"](space["params"], space["x"], space["labels"])[1]) < float(
        space["loss"]
    )


def test_data_parallel_is_the_step_of_one_device():
    space = run(block("def parallel_step"))
    model, optimizer, batch = space["model"], space["optimizer"], space["batch"]
    for leaf in jax.tree.leaves(nnx.state((model, optimizer))):
        assert leaf.sharding.is_equivalent_to(space["replicated"], leaf.ndim)
    alone = space["Model"](nnx.Rngs(0))
    optimizer_alone = nnx.Optimizer(alone, optax.adam(1e-3), wrt=nnx.Param)
    images, labels = jax.random.normal(jax.random.key(1), batch[0].shape), batch[1].at[::3].set(-1)
    losses = [space["parallel_step"](alone, optimizer_alone, *batch)]
    np.testing.assert_allclose(space["loss"], losses[0], rtol=1e-5)
    for _ in range(5):
        split = jax.device_put((images, labels), space["by_sample"])
        losses.append(space["parallel_step"](alone, optimizer_alone, images, labels))
        np.testing.assert_allclose(space["parallel_step"](model, optimizer, *split), losses[-1], rtol=1e-5)
    assert losses[-1] < losses[1]
    np.testing.assert_allclose(
        model.center_loss.centers[...], alone.center_loss.centers[...], rtol=1e-5, atol=1e-6
    )


@eight_devices
def test_model_on_a_mesh():
    space = run(block("def parallel_step") + block('out_sharding=P("classes", None))'))
    centers = space["model"].center_loss.centers[...]
    assert {shard.data.shape for shard in centers.addressable_shards} == {(128, 32)}
    first = float(space["loss"])
    mesh = centers.sharding.mesh
    with jax.set_mesh(mesh):
        for _ in range(5):
            loss = space["parallel_step"](space["model"], space["optimizer"], *space["batch"])
    assert float(loss) < first


def test_plot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(block('savefig("features.png")'))
    assert (tmp_path / "features.png").read_bytes().startswith(b"\x89PNG")


@eight_devices
def test_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = run(block("CheckpointManager("))
    saved = space["fresh"](space["mesh_of"](1))
    jax.tree.map(np.testing.assert_array_equal, space["tree"], saved)
    assert {shard.data.shape for shard in space["tree"]["centers"]["centers"].addressable_shards} == {
        (128, 32)
    }


def test_a_bad_step_is_skipped():
    space = run(block("def careful"))
    assert np.isnan(space["loss"])
    np.testing.assert_array_equal(space["centers"], np.zeros((10, 2)))
    moved, _ = space["careful"](jnp.zeros((10, 2)), jnp.ones((1, 2)), jnp.array([3]))
    np.testing.assert_allclose(moved[3], 0.25)


def test_a_whole_model_is_saved_and_restored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = run(block("StandardCheckpointer"))
    other = nnx.state(space["fresh"](1))
    trained, restored = nnx.state(space["trained"]), nnx.state(space["restored"])
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (trained, other)), strict=True))
    jax.tree.map(np.testing.assert_array_equal, restored, trained)


@eight_devices
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_whole_model_is_restored_where_the_new_one_lies(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    space = run(block("StandardCheckpointer"))
    mesh = jax.make_mesh((2, 4), ("classes", "data"), axis_types=(kind,) * 2)

    def placed(leaf):  # The centers by class, all else on every device.
        return NamedSharding(mesh, P("classes") if leaf.shape == (10, 16) else P())

    later = space["fresh"](1)
    nnx.update(later, jax.tree.map(lambda leaf: jax.device_put(leaf, placed(leaf)), nnx.state(later)))
    with space["ocp"].StandardCheckpointer() as checkpointer:
        nnx.update(later, checkpointer.restore(space["folder"], nnx.state(later)))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(later), nnx.state(space["trained"]))
    for leaf in jax.tree.leaves(nnx.state(later)):
        assert leaf.sharding.is_equivalent_to(placed(leaf), leaf.ndim)


def test_a_linen_model_is_called_without_labels():
    space = run(block("labels=None"))
    without = {name: leaf for name, leaf in space["params"].items() if name != "center_loss"}
    x, logits, _ = space["net"].apply({"params": space["params"]}, space["images"], jnp.full(4, -1))
    for got in (space["net"].apply({"params": without}, space["images"]), (space["x"], space["logits"])):
        jax.tree.map(np.testing.assert_array_equal, got, (x, logits))
    np.testing.assert_array_equal(space["nearest"], space["classes"][:, 0])


def test_an_exported_step():
    space = run(block("exported_step"))
    assert float(space["loss"]) == 32.0
    np.testing.assert_allclose(space["centers"][:4], np.full((4, 32), 0.01), rtol=1e-4)
