"""The re-identification example and its page: they take the steps of PyTorch's scripts, and rank rightly."""

import os
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import reid
from flax import nnx
from pages import defined, fences, text_of
from sklearn.metrics import average_precision_score
from test_docs import as_a_user, center_loss_of_torch  # noqa: F401
from test_omniglot import archive, folder  # noqa: F401

import jax_centerloss

REAL = os.environ.get("CENTERLOSS_DATA")
HEADING = "## Coming from a re-identification script"
P, K, CLASSES = 16, 4, 751
STEPS = 24


def run_tab(kind, *edits):
    """What the code of a tab of the page defines, edited as the page says."""
    section = text_of("coming_from").split(HEADING)[1].split("\n## ")[0]
    ((_, code),) = fences(section, kind)
    for old, new in edits:
        assert code.count(old) == 1
        code = code.replace(old, new)
    return defined(code)


class Given(reid.Model):
    """The example's network, with features from a single layer, as on the page."""

    def __init__(self, *, rngs):
        super().__init__(CLASSES, 64, rngs=rngs)
        self.embed = nnx.Linear(256, 64, rngs=rngs)

    def features(self, images):
        return self.embed(images)


def page():
    space = run_tab("python")
    model = space["model"]
    return model, model.features, lambda *batch: space["step"](model, space["optimizer"], *batch), 3.5e-4


def example():
    model = Given(rngs=nnx.Rngs(0))
    tx = reid.make_optimizer(5e-4, 3.5e-4, 0.5, STEPS)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    # The schedule of 120 epochs: up in the first 10, a tenth after 40 and after 70.
    rise = 3.5e-4 * np.linspace(0.01, 1, STEPS * 10 // 120 + 1)
    rates = [*rise[:-1], *np.repeat([3.5e-4, 3.5e-5, 3.5e-6], [6, 6, 10])]

    def step(images, labels):
        return reid.train_step(model, optimizer, images, labels, np.float32(5e-4))[0]

    return model, model.embed, step, rates


def take_weights(features, head, theirs):
    for ours, layer in ((features, theirs.features), (head, theirs.head)):
        nnx.update(ours, {"kernel": layer.weight.detach().numpy().T.copy()})
    nnx.update(features, {"bias": theirs.features.bias.detach().numpy().copy()})


def make_batches(rng):
    """P x K images each, of classes that come back, so that centers go on from where they were."""
    identities = rng.normal(size=(40, 256))
    for _ in range(STEPS):
        labels = np.repeat(rng.permutation(40)[:P], K)
        images = identities[labels] + rng.normal(size=(P * K, 256))
        yield images.astype(np.float32), labels.astype(np.int32)


@pytest.mark.parametrize("port", [page, example], ids=["page", "example"])
def test_steps_are_those_of_the_script(port, center_loss_of_torch, rng):  # noqa: F811
    torch = pytest.importorskip("torch")
    theirs = run_tab("py")
    model, layer, step, rates = port()
    take_weights(layer, model.head, theirs["model"])
    nnx.update(model.center_loss, jax_centerloss.from_torch(theirs["criterion"].state_dict()))
    first = np.array(model.center_loss.centers[...])
    for (images, labels), rate in zip(make_batches(rng), np.broadcast_to(rates, STEPS), strict=True):
        theirs["optimizer"].param_groups[0]["lr"] = rate
        want = theirs["step"](torch.tensor(images), torch.tensor(labels).long())
        np.testing.assert_allclose(step(images, labels), want, rtol=1e-4)
    for ours, name in ((layer.kernel, "features"), (model.neck.scale, "neck"), (model.head.kernel, "head")):
        want = getattr(theirs["model"], name).weight.detach()
        np.testing.assert_allclose(ours[...].T, want, atol=1e-4)
    centers = np.asarray(model.center_loss.centers[...])
    np.testing.assert_allclose(centers, theirs["criterion"].centers.detach(), rtol=1e-4, atol=1e-4)
    assert np.all(np.abs(centers - first)[:40].max(-1) > 0.1)  # They moved;
    np.testing.assert_array_equal(centers[40:], first[40:])  # these were never seen.


def test_what_the_page_says_has_no_effect(center_loss_of_torch, rng):  # noqa: F811
    torch = pytest.importorskip("torch")
    images, labels = map(torch.tensor, next(make_batches(rng)))
    moved = []
    for lam in (5e-4, 1.0):
        torch.manual_seed(0)
        space = run_tab("py")
        space["lam"] = lam
        before = space["criterion"].centers.detach().clone()
        with torch.no_grad():
            x = space["model"].features(images)
        space["step"](images, labels.long())
        moved.append(space["criterion"].centers.detach())
    # The same at any λ: 1/P of the way to the mean of the K images.
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-5, atol=1e-5)
    for j in labels.unique():
        want = before[j] + (x[labels == j].mean(0) - before[j]) / P
        torch.testing.assert_close(moved[0][j], want, rtol=1e-4, atol=1e-4)
    space["lam"] = 0.0
    with pytest.raises(ZeroDivisionError):
        space["step"](images, labels.long())


# What the step of a script that never calls its center loss lacks, and a port of what it trains.
NEVER_CALLED = [
    ("    loss = loss + lam * criterion(x, labels)  # Some scripts lack this line.\n", ""),
    ("        param.grad.data *= 1.0 / lam\n", "        assert param.grad is None\n"),
]
NO_CENTER_LOSS = [
    ("        self.center_loss = jax_centerloss.nnx.CenterLoss(751, 64, rngs=rngs)\n", ""),
    ("return loss + lam * model.center_loss(x, labels)", "return loss"),
    ("nnx.Optimizer(model, tx, wrt=nnx.Param)", "nnx.Optimizer(model, adam, wrt=nnx.Param)"),
]


@pytest.mark.parametrize("edits", [NO_CENTER_LOSS, NO_CENTER_LOSS[1:2]], ids=["left out", "never called"])
def test_a_script_that_never_calls_its_center_loss_and_its_port(edits, center_loss_of_torch, rng):  # noqa: F811
    torch = pytest.importorskip("torch")
    theirs, ours = run_tab("py", *NEVER_CALLED), run_tab("python", *edits)
    model, their_model = ours["model"], theirs["model"]
    take_weights(model.features, model.head, their_model)
    first = theirs["criterion"].centers.detach().clone()
    drawn = jax.tree.map(np.array, nnx.state(model.center_loss)) if hasattr(model, "center_loss") else None
    for images, labels in make_batches(rng):
        want = theirs["step"](torch.tensor(images), torch.tensor(labels).long())
        np.testing.assert_allclose(ours["step"](model, ours["optimizer"], images, labels), want, rtol=1e-4)
    assert torch.equal(theirs["criterion"].centers, first)
    if drawn is not None:
        x = model.features(images)
        metrics = jax_centerloss.center_metrics(model.center_loss, x, labels, previous=drawn)
        assert metrics["moved"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_ranks_as_scikit_learn_and_a_loop_do(seed):
    random = np.random.default_rng(seed)
    labels, cameras = random.integers(0, 6, 80), random.integers(0, 5, 80)
    labels[0], cameras[0] = 6, 4  # Seen once: it can't be found, and does not count.
    features = reid.unit_length(random.normal(size=(80, 4)) + 0.7 * np.eye(7, 4)[labels])
    queries = np.arange(30)
    precisions, first = [], []
    for q in queries[1:]:
        gallery = [j for j in range(80) if cameras[j] != cameras[q]]
        alike = [float(features[q] @ features[j]) for j in gallery]
        precisions.append(average_precision_score(labels[gallery] == labels[q], alike))
        first.append(labels[gallery[int(np.argmax(alike))]] == labels[q])
    found = reid.retrieve(features, labels, cameras, queries)
    assert found == pytest.approx((100 * np.mean(precisions), 100 * np.mean(first)))


def test_precision_by_hand():
    # Found first, third and sixth: precisions 1/1, 2/3, 3/6. The query's own camera has the most alike.
    angles = np.deg2rad([0, 1, 10, 20, 30, 40, 50, 60])
    features = np.stack([np.cos(angles), np.sin(angles)], -1)
    labels, cameras = np.array([0, 0, 0, 1, 0, 1, 1, 0]), np.array([1, 1, 2, 2, 3, 2, 3, 2])
    found = reid.retrieve(features, labels, cameras, np.array([0]))
    assert found == pytest.approx((100 * (1 + 2 / 3 + 3 / 6) / 3, 100))


def test_where_all_are_alike_nothing_is_found():
    labels, cameras = np.repeat(np.arange(10), 2), np.tile([1, 2], 10)
    # The one right answer comes after nine wrong ones.
    for features in (np.ones((20, 2)), np.zeros((20, 2)), np.full((20, 2), np.nan)):
        found = reid.retrieve(reid.unit_length(features), labels, cameras, np.arange(20))
        assert found == pytest.approx((10, 0))


def test_batches_hold_k_drawings_of_p_characters():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 9))
    found = [*reid.batches(labels, 12, 4, epochs=3, seed=0)]
    assert len(found) == 3 * 2 * (10 // 3)  # Of 9 drawings twice 4, of 10 characters three times 3.
    for batch in found:
        np.testing.assert_array_equal(np.sort(np.bincount(labels[batch], minlength=10)), [0] * 7 + [4] * 3)
        assert len(np.unique(batch)) == 12
    for epoch in np.split(np.stack(found), 3):
        assert len(np.unique(epoch)) == epoch.size  # None twice in an epoch.


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_run_it")
def test_learns_and_finds(folder, tmp_path, capsys):  # noqa: F811
    flags = ["--batch-size", "32", "--epochs", "6", "--seeds", "1", "--lams", "0.0005"]
    ((run,),) = reid.main(["--data", str(folder), "--out", str(tmp_path), *flags]).values()
    assert len(run["losses"]) == 6
    assert run["loss"] == run["losses"][-1] < 0.95 * run["losses"][0]
    assert 0 < run["center"] < 0.1 * run["loss"]
    assert run["map"] > 30  # Of ten characters, by chance about 10.
    assert (tmp_path / "reid.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "40 queries among 120 drawings, centers by optax, α = 0.5, one seed, 6 epochs" in printed
    assert "±" not in printed


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_run_it")
def test_the_control_leaves_its_centers_at_zero(folder, tmp_path):  # noqa: F811
    flags = ["--centers", "zero", "--epochs", "1", "--batch-size", "32"]
    args = reid.parse_args([*flags, "--data", str(folder), "--out", str(tmp_path)])
    data = reid.load(folder, next(iter(reid.MD5)), reid.SIDE)
    model, found = reid.train(args, data, 0.1, 0, SimpleNamespace(update=lambda: None))
    assert found["center"] > 0
    np.testing.assert_array_equal(model.center_loss.centers[...], 0)


def test_one_seed_has_no_spread_and_one_arm_no_difference():
    run = dict.fromkeys(reid.METRICS, 0.5)
    one, two = (reid.tables({0.0: [run] * seeds, 5e-4: [run] * seeds}) for seeds in (1, 2))
    assert "0.50 |" in one
    assert "0.50 ± 0.00 |" in two
    for words in ("±", "paired by seed", "intervals"):
        assert (words in one, words in two) == (False, True)
    assert "λ = 0.0005 - λ = 0 " in one
    assert "ifference" not in reid.tables({5e-4: [run] * 2})


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="needs CENTERLOSS_DATA")
@pytest.mark.usefixtures("as_users_run_it")
def test_quick_on_the_real_drawings(tmp_path):
    results = reid.main(["--data", str(Path(REAL) / "omniglot"), "--quick", "--out", str(tmp_path)])
    (without,), (center,) = results[0.0], results[5e-4]
    assert without["center"] == 0 < center["center"]
    assert min(without["rank1"], center["rank1"]) > 20


def test_drawings_by_known_drawers_are_needed(tmp_path):
    archive(tmp_path, "images_background", 1, 4, 4, seed=0)
    archive(tmp_path, "images_evaluation", 1, 2, 1, seed=0)
    with pytest.raises(SystemExit, match="no drawing by the drawers 1 to 4"):
        reid.main(["--data", str(tmp_path), "--out", str(tmp_path)])


def test_too_few_drawings_for_a_batch(folder, tmp_path):  # noqa: F811
    with pytest.raises(SystemExit, match="256 with --instances 4 is too much for 20 characters"):
        reid.main(["--data", str(folder), "--batch-size", "256", "--out", str(tmp_path)])
