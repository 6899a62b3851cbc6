"""The Omniglot example, on strokes drawn for these tests, or on the real ones in CENTERLOSS_DATA/omniglot."""

import io
import os
import struct
import zipfile
from pathlib import Path

import _common
import numpy as np
import omniglot
import pytest
from flax import nnx
from PIL import Image, ImageDraw

pytestmark = pytest.mark.usefixtures("as_users_run_it")

REAL = os.environ.get("CENTERLOSS_DATA")


def archive(folder, name, alphabets, characters, drawings, seed):
    """Characters of three strokes each; every drawing of one moves their ends a little."""
    random = np.random.default_rng(seed)
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as file:
        for alphabet in range(alphabets):
            for character in range(characters):
                ends = random.uniform(15, 90, (3, 4))
                for drawing in range(drawings):
                    picture = Image.new("1", (105, 105), 1)
                    for stroke in ends + random.normal(0, 3, (3, 4)):
                        ImageDraw.Draw(picture).line(stroke.tolist(), fill=0, width=3)
                    content = io.BytesIO()
                    picture.save(content, "png")
                    path = f"{name}/alphabet{alphabet}/character{character:02}"
                    file.writestr(f"{path}/{character:02}_{drawing:02}.png", content.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("omniglot")
    archive(made, "images_background", 5, 4, 12, seed=0)
    archive(made, "images_evaluation", 2, 5, 12, seed=1)
    return made


@pytest.mark.slow
def test_learns_and_verifies(folder, tmp_path, capsys):
    flags = ["--batch-size", "32", "--epochs", "6", "--warmup", "0", "--seeds", "1", "--lr", "0.05"]
    if REAL:
        results = omniglot.main(["--data", str(Path(REAL) / "omniglot"), "--quick", "--out", str(tmp_path)])
    else:
        results = omniglot.main(["--data", str(folder), "--out", str(tmp_path), *flags])
    (softmax,), (center,), (frozen,) = (results[arm] for arm in ("softmax", "center", "frozen"))
    for run in (softmax, center, frozen):
        assert run["losses"][-1] < 0.9 * run["losses"][0]
    assert softmax["all"]["tar1"] > 0.05  # Five times what guessing finds.
    # Only the second arm's centers move; both pull features in.
    assert center["moved"] > 0 == frozen["moved"] == softmax["moved"]
    assert center["norm"] < softmax["norm"]
    assert frozen["norm"] < softmax["norm"]
    for picture in ("omniglot.png", "omniglot_features.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "center loss - frozen centers (control)" in printed
    assert REAL or "never trained on, one seed, 6 epochs" in printed
    assert "±" not in printed


@pytest.mark.slow
def test_means_made_anew_are_those_of_the_network_before_its_epoch(folder, tmp_path):
    data = omniglot.load(folder, "images_background", omniglot.SIDE)
    args = omniglot.parse_args(
        ["--epochs", "1", "--batch-size", "32", "--warmup", "0", "--out", str(tmp_path)]
    )
    untrained = omniglot.Model(20, args.feat_dim, rngs=nnx.Rngs(3))
    x = omniglot.embed(untrained, data.images).astype(np.float64)
    with omniglot.progress(1, "epoch") as bar:
        model, found = omniglot.train(args, data, "means", 0.1, 3, bar)
    means = [x[data.labels == character].mean(0) for character in range(20)]
    np.testing.assert_allclose(model.center_loss.centers[...], means, rtol=1e-4, atol=1e-5)
    assert found["moved"] == 0  # Within an epoch they rest.


def test_lambda_is_chosen_on_alphabets_that_are_not_trained_on(folder, tmp_path, monkeypatch, capsys):
    background = omniglot.load(folder, "images_background", omniglot.SIDE)
    trained, judged = [], []

    def train(args, data, arm, lam, seed, bar):
        trained.append((arm, lam, seed, {image.tobytes() for image in data.images}, data.labels.max() + 1))
        metrics = dict.fromkeys(omniglot.TRAINED, 0.0)
        return lam, metrics

    def verify(features, chosen):
        judged.append(features)
        lam = features[0]
        return {kind: {"tar1": 1 - abs(lam - 0.02)} for kind in omniglot.NEGATIVES}

    monkeypatch.setattr(omniglot, "train", train)
    monkeypatch.setattr(omniglot, "embed", lambda model, images: (model, images))
    monkeypatch.setattr(omniglot, "verify", verify)
    flags = ["--select", "2", "--only-select", "--grid", "0.1", "0.03", "0.003", "--out", str(tmp_path)]
    args = omniglot.parse_args(flags)
    assert omniglot.select(args, background) == {"softmax": 0.0, "center": 0.03, "frozen": 0.03}
    assert len(trained) == (1 + 3 + 3) * 2
    held_out = {image.tobytes() for image in background.images[background.alphabets == 4]}
    for (*_, images, classes), (_, judge) in zip(trained, judged, strict=True):
        assert classes == 16
        assert {image.tobytes() for image in judge} == held_out
        assert not images & held_out
        assert len(images | held_out) == len({image.tobytes() for image in background.images})
    assert not {seed for _, _, seed, *_ in trained} & {*range(100)}  # Other seeds than the comparison's.
    printed = capsys.readouterr().out
    assert "Chosen: λ = 0 for softmax alone, λ = 0.03 for center loss, λ = 0.03 for frozen" in printed


def test_loads_what_was_drawn(folder):
    data = omniglot.load(folder, "images_background", omniglot.SIDE)
    assert data.images.shape == (240, 28, 28)
    np.testing.assert_array_equal(np.bincount(data.labels), np.full(20, 12))
    np.testing.assert_array_equal(np.bincount(data.alphabets), np.full(5, 48))
    np.testing.assert_array_equal(data.alphabets, data.labels // 4)
    assert data.images[:, 0, 0].max() == 0  # Paper is 0, ink is not.
    assert data.images.max() > 200
    part = data.part(data.alphabets % 2 == 1)
    np.testing.assert_array_equal(part.labels, np.repeat(np.arange(8), 12))
    np.testing.assert_array_equal(part.images[:48], data.images[48:96])


def test_pairs_are_what_they_are_called(folder):
    data = omniglot.load(folder, "images_evaluation", omniglot.SIDE)
    pairs = omniglot.pairs(data, 2000)
    same_character = data.labels[:, None] == data.labels
    same_alphabet = data.alphabets[:, None] == data.alphabets
    upper = np.triu(np.ones_like(same_character), k=1)
    for kind, expected in [("match", same_character), ("same", same_alphabet & ~same_character)]:
        found = np.zeros_like(upper)
        found[tuple(pairs[kind])] = True
        np.testing.assert_array_equal(found, expected & upper)
        assert pairs[kind].shape[1] == np.count_nonzero(found)  # Each once.
    assert not np.any(same_character[tuple(pairs["all"])])
    # Of 120 drawings, 108 have another character than a given one, 60 another alphabet.
    assert np.mean(~same_alphabet[tuple(pairs["all"])]) == pytest.approx(60 / 108, abs=0.05)


def test_rates_against_counting():
    def at(cosine):
        return np.stack([np.asarray(cosine), np.sqrt(1 - np.square(cosine))], -1)

    # Negatives of any kind at 1, 2, ..., 1,000 thousandths; those of the same alphabet at half of that.
    others = np.arange(1, 1001) / 1000
    # Five of ten matches are above all but no negative (FAR 0), two between the first and the tenth highest
    # negative (0.1 to 1 %), one between the tenth and the hundredth, two below all of them.
    matches = np.array([1.0] * 5 + [0.9945, 0.9955] + [0.9505] + [0.0005, 0.0001])
    parts = [at(1.0)[None], at(matches), at(others), at(others / 2)]
    features = np.concatenate(parts) * np.arange(1, 2012)[:, None]  # Lengths don't matter.
    numbers = np.arange(2011)
    chosen = {
        kind: np.stack([np.zeros(count, int), numbers[start : start + count]])
        for kind, start, count in (("match", 1, 10), ("all", 11, 1000), ("same", 1011, 1000))
    }
    found = omniglot.verify(features, chosen)
    # The highest negative, at 1, ties with the five matches there: they are accepted together.
    assert found["all"]["tar01"] == pytest.approx(0.5)
    assert found["all"]["tar1"] == pytest.approx(0.7)
    # With eight of ten accepted, 20 % of the matches are refused: between FAR 5 % and 100 %.
    assert found["all"]["eer"] == pytest.approx(0.2, abs=1e-3)
    assert np.interp(0.04, omniglot.FAR, found["all"]["curve"]) == pytest.approx(0.7, abs=0.01)
    assert np.interp(0.06, omniglot.FAR, found["all"]["curve"]) == pytest.approx(0.8, abs=0.01)
    # No negative of the same alphabet is above 0.5: eight of ten matches are, at every rate.
    assert found["same"]["tar01"] == found["same"]["tar1"] == pytest.approx(0.8)


def test_a_collapsed_network_verifies_nothing():
    chosen = {kind: np.array([[0, 1, 2], [3, 4, 5]]) for kind in ("match", "all", "same")}
    for features in (np.zeros((6, 2)), np.ones((6, 2)), np.full((6, 2), np.nan)):
        found = omniglot.verify(features, chosen)["all"]
        assert (found["tar1"], found["tar01"], found["eer"]) == pytest.approx((0.01, 0.001, 0.5))


def test_drawings_without_pairs_are_refused(tmp_path):
    data = omniglot.Drawings(
        np.zeros((4, 28, 28)), np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), np.arange(4)
    )
    with pytest.raises(SystemExit, match="no pairs of this kind: same"):
        omniglot.pairs(data, 100)
    few = omniglot.parse_args(["--select", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="there have to be five"):
        omniglot.select(few, data)


def test_one_seed_has_no_spread_and_one_arm_no_difference():
    rates = {"tar1": 0.5, "tar01": 0.25, "eer": 0.125}
    run = dict.fromkeys(omniglot.NEGATIVES, rates) | dict.fromkeys(omniglot.TRAINED, 1.0)
    lams = dict.fromkeys(omniglot.ARMS, 0.1)
    one = omniglot.tables({"softmax": [run], "center": [run]}, lams)
    two = omniglot.tables({"softmax": [run] * 2, "center": [run] * 2}, lams)
    assert "50.00 |" in one
    assert "50.00 ± 0.00 |" in two
    for words in ("±", "paired by seed", "intervals", "over seeds"):
        assert (words in one, words in two) == (False, True)
    assert "center loss - softmax alone" in one
    assert "ifference" not in omniglot.tables({"center": [run] * 2}, lams)


def test_planes_of_mirrored_features_are_alike(folder):
    data = omniglot.load(folder, "images_evaluation", omniglot.SIDE)
    features = np.random.default_rng(0).normal(size=(len(data.labels), 8)).astype(np.float32)
    features += np.eye(8, dtype=np.float32)[data.labels % 8] * [[6, 5, 4, 3, 2, 1, 0, 0]]
    # A network is as good with its features mirrored; only what the projection makes of it differs.
    first, second = (omniglot.plane("", x, data) for x in (features, -features))
    np.testing.assert_allclose(second.features, -first.features, atol=1e-4)
    _, turned = _common.alike([first, second])
    np.testing.assert_allclose(turned.features, first.features, atol=1e-4)
    means = [first.features[first.labels == j].mean(0) for j in range(first.labels.max() + 1)]
    np.testing.assert_allclose(turned.centers["centers"], means, atol=1e-4)


def test_shifts_move_the_drawing():
    images = np.zeros((3, 28, 28), np.uint8)
    images[:, 10, 12] = 255
    shifted = np.asarray(omniglot.shifted(images, np.array([[2, 2], [0, 2], [4, 0]])))
    assert [tuple(map(int, np.argwhere(image)[0])) for image in shifted] == [(10, 12), (12, 12), (8, 14)]


def archive_of(member, content, compression=zipfile.ZIP_STORED):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as file:
        file.writestr(member, content)
    return made.getvalue()


def damaged(content, start, by):
    return content[:start] + by + content[start + len(by) :]


STORED = archive_of("a/b/c/d.png", b"no picture")
DEFLATED = archive_of("a/b/c/d.png", b"no picture" * 100, zipfile.ZIP_DEFLATED)
DATA = 30 + len("a/b/c/d.png")  # Behind the header of the member.
SIZES = STORED.index(b"PK\x01\x02") + 20  # In the list of members at the end.
BROKEN = {
    "empty": (b"", "File is not a zip file"),
    "something else": (b"no archive", "File is not a zip file"),
    "half": (STORED[: len(STORED) // 2], "File is not a zip file"),
    "other bytes": (damaged(DEFLATED, DATA, b"\xff\xff"), "Error.* while decompressing"),
    "longer than the file": (damaged(STORED, SIZES, struct.pack("<II", 2**19, 2**19)), "a member is cut off"),
    "no picture": (STORED, "a/b/c/d.png is no picture"),
    "other folders": (archive_of("a/d.png", b""), "not enough values"),
    "too large": (archive_of("a/b/c/d.png", bytes(2**21)), "a/b/c/d.png is larger than a drawing"),
    "no drawings": (archive_of("readme.txt", b"nothing"), "holds no drawings"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_archives_are_named(content, message, tmp_path):
    path = tmp_path / "images_background.zip"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=rf"background\.zip (is not an archive of .*: )?{message}"):
        omniglot.load(tmp_path, "images_background", omniglot.SIDE)
