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


def test_programs_are_short():
    """The first one of README, that of the front page, a step of training, and one on a mesh."""
    for text, most in (
        (block("init_centers"), 10),
        (python_of("index")[0], 12),
        (block("train_step"), 25),
        (block("sharded_step"), 15),
    ):
        assert len([line for line in text.splitlines() if line.strip()]) <= most


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


def test_what_users_look_for_is_one_click_away():
    text = README.read_text(encoding="utf-8")
    for words in (
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
    ):
        assert re.search(rf"\[[^\]]*{words}[^\]]*\]\({SITE}", text), words


def test_every_guarantee_names_tests_that_exist():
    text = text_of("guarantees")
    promises = text.split("\n- ")[1:]
    assert len(promises) > 15
    for promise in promises:
        assert re.search(r"<br>\n  \[`test_\w+`\]", promise), promise
    linked = re.findall(r"\[`(test_\w+)`\]\(\.\./tests/(test_\w+\.py)\)", text)
    assert re.findall(r"`(test_\w+)`", text) == [name for name, _ in linked]
    texts = {file: (ROOT / "tests" / file).read_text(encoding="utf-8") for _, file in linked}
    assert [name for name, file in linked if f"def {name}(" not in texts[file]] == []


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


def test_sharded_step():
    space = run(block("sharded_step"))
    assert space["params"]["centers"].sharding.is_equivalent_to(space["by_class"], 2)
    _, loss = space["sharded_step"](space["params"], space["x"], space["labels"])
    assert float(loss) < float(space["loss"])


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


@eight_devices
def test_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = run(block("CheckpointManager("))
    saved = space["fresh"](space["mesh_of"](1))
    jax.tree.map(np.testing.assert_array_equal, space["tree"], saved)
    assert {shard.data.shape for shard in space["tree"]["centers"]["centers"].addressable_shards} == {
        (128, 32)
    }


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
