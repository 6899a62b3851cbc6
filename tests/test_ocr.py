"""Reading lines, of strokes drawn for these tests, or of the real drawings in CENTERLOSS_DATA/omniglot."""

import dataclasses
import os
from pathlib import Path

import _lines
import _omniglot
import jax
import jax.numpy as jnp
import numpy as np
import ocr
import optax
import pytest
from flax import nnx
from test_omniglot import archive

pytestmark = pytest.mark.usefixtures("as_users_run_it")

REAL = os.environ.get("CENTERLOSS_DATA")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("omniglot")
    for seed, name in enumerate(("images_background", "images_evaluation")):
        archive(made, name, 1, 6, 20, seed)
    return made


@pytest.fixture(scope="module")
def drawings(folder):
    return _omniglot.load(folder, "images_evaluation", ocr.SIDE)


SMALL = "--characters 6 --length 4 --width 64 --test-lines 64 --mean-lines 64 --variants 2 --batch-size 16"


def arguments(out, *flags):
    return [*SMALL.split(), "--feat-dim", "16", "--seeds", "1", "--out", str(out), *flags]


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    return ocr.parse_args(arguments(tmp_path_factory.mktemp("out")))


@pytest.fixture(scope="module")
def text(args, drawings):
    return ocr.prepare(args, drawings)


@pytest.mark.slow
def test_learns_and_compares(folder, tmp_path, capsys):
    more = ["--steps", "300", "--more-steps", "20", "--sequence", "conv"]
    flags = arguments(tmp_path, "--data", str(folder), *more)
    if REAL:
        flags = ["--data", str(Path(REAL) / "omniglot"), "--quick", "--out", str(tmp_path)]
    results = ocr.main([*flags, "--lam", "0.5"])
    assert set(results) == set(ocr.ARMS)
    for (run,) in results.values():
        assert np.mean(run["losses"][-20:]) < 0.5 * np.mean(run["losses"][:20])
        assert run["cer"] < (70 if REAL else 50)
        assert 0 < run["blank"] < 100
    (plain,), (fixed,), (moved,), (norm,) = (results[arm] for arm in ocr.ARMS)
    # The arms part after the same steps, and centers pull frames in.
    steps = 200 if REAL else 300
    assert plain["losses"][:steps] == moved["losses"][:steps] == norm["losses"][:steps]
    assert plain["losses"][steps] == moved["losses"][steps]  # The CTC loss alone, of the same weights.
    assert plain["losses"][steps + 2] != moved["losses"][steps + 2]
    assert max(fixed["own_distance"], moved["own_distance"]) < plain["own_distance"]
    printed = capsys.readouterr().out
    # On easy strokes no two characters may be confused.
    drawn = ["ocr.png", *(["ocr_features.png"] if "ocr_features.png" in printed else [])]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == drawn
    assert all((tmp_path / picture).read_bytes().startswith(b"\x89PNG") for picture in drawn)
    assert "| centers moved by the paper's rule - CTC alone" in printed
    assert "±" not in printed


def test_lambda_is_chosen_on_characters_that_are_not_compared(folder, args, tmp_path, monkeypatch, capsys):
    seen = []

    def run(args, text, seed, arms, bar):
        seen.append((text, seed, arms))
        metrics = dict.fromkeys((*ocr.METRICS, "unknown"), 0)
        found = {(arm, lam): metrics | {"cer": 10 + abs(lam - 0.2)} for arm, lam in arms}
        reading = ocr.Reading(np.zeros((64, 16, 2)), np.zeros((64, 16), int), [[]] * 64, np.zeros(64, bool))
        return found, dict.fromkeys(("before", *ocr.ARMS), reading)

    monkeypatch.setattr(ocr, "run", run)
    grid = ["--grid", "0.01", "0.2", "0.5"]
    ocr.main(arguments(tmp_path, "--data", str(folder), "--select", "2", *grid))
    (chosen_on, first, tried), (_, second, _), (compared, seed, arms) = seen
    assert (first, second, seed) == (1000, 1001, 0)
    assert tried == [
        ("ctc", 0.0),
        *((arm, lam) for arm in ("fixed", "moved", "norm") for lam in (0.01, 0.2, 0.5)),
    ]
    assert arms == [("ctc", 0.0), ("fixed", 0.2), ("moved", 0.2), ("norm", 0.2)]
    names = {"images_evaluation": chosen_on, "images_background": compared}
    for name, text in names.items():
        again = ocr.prepare(args, _omniglot.load(folder, name, ocr.SIDE))
        np.testing.assert_array_equal(text.test.images, again.test.images)
    assert "Chosen: λ = 0.2 for centers fixed at the means" in capsys.readouterr().out


def test_lines_hold_the_characters_they_name(drawings):
    # Of glyphs that are blocks of so many columns as their number, lines can be read off by eye.
    images = np.zeros((3, _lines.GLYPH, _lines.GLYPH), np.uint8)
    for c, wide in enumerate((4, 6, 9)):
        images[c, :, :wide] = 255
    glyphs = _lines.Glyphs(images, np.array([4, 6, 9]), [np.array([c]) for c in range(3)])
    lines = _lines.compose(glyphs, 200, 5, 128, np.random.default_rng(0))
    lengths = np.count_nonzero(lines.labels, axis=1)
    assert sorted(set(lengths)) == [1, 2, 3, 4, 5]
    assert lines.images.shape == (200, _lines.HEIGHT, 128)
    for image, frames, labels, length in zip(lines.images, lines.frames, lines.labels, lengths, strict=True):
        assert np.all(labels[:length] > 0)
        assert not np.any(labels[length:])
        ink = np.flatnonzero((image > 120).sum(0) > _lines.GLYPH // 2)
        widths = np.array([4, 6, 9])[labels[:length] - 1].sum()
        # Two columns of each neighbour may lie under it, or three of paper between them.
        assert widths - 2 * (length - 1) <= len(ink) <= widths
        assert _lines.FRAME * frames >= ink[-1] + 1
        assert frames >= 2 * length - 1  # CTC needs a blank between equal characters.
        assert not np.any(image[:, _lines.FRAME * frames :])


def test_lines_are_of_the_writers_asked_for(drawings, args):
    # The drawings of writers above 14 are made blank. So then are test lines, and no glyph for training.
    blank = np.where(drawings.writers[:, None, None] > ocr.TRAIN_WRITERS, np.uint8(0), drawings.images)
    text = ocr.prepare(args, dataclasses.replace(drawings, images=blank))
    drawn = [glyph.max() for glyph in text.glyphs.images]
    named = (drawings.writers >= 1) & (drawings.writers <= ocr.TRAIN_WRITERS)  # 0 is of nobody.
    assert len(drawn) == args.variants * np.sum(named)
    assert min(drawn) > 60
    assert text.train.images.max() > 200
    noise = 20 * 5.5  # Grain of a standard deviation of up to 20, and 5.5 of them.
    assert text.test.images.max() < noise
    assert text.test.labels.max() == args.characters


def test_lines_of_one_seed_are_the_same(args, text):
    first, again, other = (next(ocr.make_lines(args, text, 1, seed)) for seed in ((0, 1), (0, 1), (1, 1)))
    # NumPy's generator of (1, 0) is that of 1: no lines for judging are those of a training.
    streams = [(seed, stage) for seed in range(5) for stage in (0, 1)] + [ocr.MEAN_LINES, ocr.TEST_LINES]
    assert len({np.random.default_rng(seed).integers(2**60) for seed in streams}) == len(streams)
    np.testing.assert_array_equal(first.images, again.images)
    assert not np.array_equal(first.images, other.images)


def test_frames_are_masked_where_they_have_no_character():
    logits = jnp.log(jnp.eye(3)[jnp.array([[0, 1, 1, 0, 2, 2], [2, 0, 1, 1, 0, 1]])] + 1e-3)
    frames = jnp.array([5, 3])
    labels, where = ocr.by_character(logits, frames, blanks=False)
    np.testing.assert_array_equal(labels, [[0, 1, 1, 0, 2, 2], [2, 0, 1, 1, 0, 1]])
    np.testing.assert_array_equal(where, [[0, 1, 1, 0, 1, 0], [1, 0, 1, 0, 0, 0]])
    _, where = ocr.by_character(logits, frames, blanks=True)
    np.testing.assert_array_equal(where, [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])


@pytest.mark.slow
def test_what_stands_in_the_padding_changes_nothing(text):
    model = ocr.Reader(6, "lstm", 16, rngs=nnx.Rngs(0))
    model.eval()
    short = np.flatnonzero(text.test.frames < 10)[:4]
    assert len(short) == 4
    images, frames = text.test.images[short].copy(), text.test.frames[short]
    x, _ = ocr.read_frames(model, images, frames)
    # Beyond what the convolutions see from the last frame.
    for image, n in zip(images, frames, strict=True):
        image[:, 4 * (n + 2) :] = 255
    y, _ = ocr.read_frames(model, images, frames)
    inside = np.asarray(ocr.within(frames, x.shape[1]))
    np.testing.assert_allclose(np.asarray(x)[inside], np.asarray(y)[inside], atol=1e-6)


@pytest.mark.slow
def test_the_arms_differ_in_nothing_but_their_centers(args, text):
    centers = np.random.default_rng(0).normal(size=(7, 16)).astype(np.float32)
    lines = next(ocr.make_lines(args, text, 1, (0, 0)))
    tx = ocr.make_optimizer("fall", 0.01, 10, 0.0)

    def step(lam, alpha, *, known=True, blanks=False):
        """What a step makes of the centers and of the last layer of the same network, and its loss."""
        model = ocr.Reader(6, "lstm", 16, rngs=nnx.Rngs(0))
        model.center_loss.centers = centers
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        given = (
            lines.images,
            lines.frames,
            lines.labels,
            np.float32(lam),
            np.float32(alpha),
            np.full(7, known),
        )
        ctc = ocr.train_step(model, optimizer, *given, blanks=blanks)
        (table,) = jax.tree.leaves(nnx.state(model.center_loss))
        return np.asarray(table), np.asarray(model.head.kernel[...]), float(ctc)

    plain, untouched, ctc = step(0.0, 0.0)
    fixed, pulled, _ = step(0.5, 0.0)
    moved, as_well, same = step(0.5, 0.5)
    np.testing.assert_array_equal(plain, centers)
    np.testing.assert_array_equal(fixed, centers)
    assert same == ctc  # The CTC loss alone is what is reported, before the step.
    # In the first step it does not matter whether centers move after it.
    np.testing.assert_array_equal(pulled, as_well)
    assert np.any(pulled != untouched)
    changed = np.any(moved != centers, axis=1)
    assert changed[1:].any()
    assert not changed[0]  # That of the blank.
    blank, *_ = step(0.5, 0.5, blanks=True)
    assert np.any(blank[0] != centers[0])
    # Frames of classes without a center pull nothing.
    table, masked, _ = step(0.5, 0.5, known=False)
    np.testing.assert_array_equal(table, centers)
    np.testing.assert_array_equal(masked, step(0.0, 0.5)[1])


@pytest.mark.slow
def test_the_padding_of_a_line_is_none_of_ctcs_business(text):
    frames, labels = text.test.frames[:8], text.test.labels[:8]
    logits = np.random.default_rng(0).normal(size=(8, 16, 7)).astype(np.float32)
    padding = 1.0 - ocr.within(frames, 16)
    found = optax.ctc_loss(logits, padding, labels, 1.0 * (labels == 0))
    for i, n in enumerate(frames):
        line = labels[i][labels[i] > 0]
        alone = optax.ctc_loss(logits[i : i + 1, :n], np.zeros((1, n)), line[None], np.zeros((1, len(line))))
        np.testing.assert_allclose(found[i], alone[0], rtol=1e-5)


def test_a_class_without_a_mean_is_nobodys_nearest(monkeypatch):
    # Of six characters two are read, 1 at (10, 0, ...) and 2 at (10, 3, ...); the other centers are at 0.
    frames = [[0, 1, 0, 2, 0, 0], [0, 2, 2, 0, 0, 0]]
    lines, reading = lines_and_reading([[1, 2], [2, 0]], frames)
    reading.features[:] = 0
    reading.features[reading.labels > 0, 0] = 10
    reading.features[reading.labels == 2, 1] = 3
    monkeypatch.setattr(ocr, "read", lambda *_: reading)
    found, _ = ocr.judge(ocr.Reader(6, "conv", 4, rngs=nnx.Rngs(0)), np.array([1]), lines, lines)
    assert found["own_distance"] == pytest.approx(0, abs=1e-5)
    assert found["gap"] == pytest.approx(3, abs=1e-4)
    assert found["ratio"] == pytest.approx(0, abs=1e-5)
    assert (found["cer"], found["lines"], found["wrong"]) == (0, 100, pytest.approx(0))
    assert found["blank"] == pytest.approx(100 * 8 / 12)


def test_reading_merges_repeats_and_drops_blanks():
    assert ocr.text_of(np.array([0, 3, 3, 0, 3, 1, 1, 0])) == [3, 3, 1]
    assert ocr.text_of(np.array([2, 2, 1, 2])) == [2, 1, 2]
    assert ocr.text_of(np.array([0, 0])) == []


def lines_and_reading(characters, frames):
    """Lines of these characters, and a reading with these labels of frames; -1 is behind the end of a line.

    The features of a frame are its label on each of four axes.
    """
    characters, frames = np.asarray(characters), np.asarray(frames)
    lengths = np.count_nonzero(frames >= 0, axis=1)
    lines = _lines.Lines(np.zeros((len(frames), 24, 4 * frames.shape[1])), lengths, characters)
    texts = [ocr.text_of(line[line >= 0]) for line in frames]
    right = np.asarray([text == ocr.truth(line) for text, line in zip(texts, characters, strict=True)])
    features = np.repeat(frames[..., None], 4, axis=-1).astype(np.float32)
    return lines, ocr.Reading(features, frames, texts, right)


def test_what_is_missed_and_the_hardest_quarter():
    # 2 is read as 3, then once left out; 4 is read rightly; 1 is written before the 3, where none stands.
    frames = [[0, 1, 1, 0, 3, 0], [0, 2, 2, 0, 4, 0], [1, 0, 3, 0, -1, -1]]
    lines, reading = lines_and_reading([[1, 2, 0], [2, 2, 4], [3, 0, 0]], frames)
    lost, stands = _lines.missed(reading, lines, 5)
    np.testing.assert_array_equal(stands, [0, 1, 3, 1, 1])
    np.testing.assert_array_equal(lost, [0, 0, 2, 0, 0])
    np.testing.assert_array_equal(ocr.hardest(reading, lines, 5), [2])
    np.testing.assert_array_equal(ocr.hardest(reading, lines, 9), [2, 1])  # Never the blank.


def test_class_means_are_of_lines_that_are_read_rightly():
    frames = [[0, 1, 1, 0, 2, 0], [0, 3, 3, 0, 0, 0], [4, 0, 3, 0, -1, -1]]  # Only the first is right.
    _, reading = lines_and_reading([[1, 2, 0], [2, 0, 0], [3, 0, 0]], frames)
    np.testing.assert_array_equal(reading.right, [True, False, False])
    model = ocr.Reader(4, "conv", 4, rngs=nnx.Rngs(0))
    means, known = ocr.class_means(model, reading, blanks=False)
    np.testing.assert_array_equal(known, [False, True, True, False, False])
    (table,) = jax.tree.leaves(means)
    np.testing.assert_allclose(table, [[j * (j in (1, 2))] * 4 for j in range(5)])
    assert ocr.class_means(model, reading, blanks=True)[1][0]


def test_the_character_under_a_frame():
    # The second character is read as 5, and an extra 4 is read at the end.
    lines, reading = lines_and_reading([[1, 2, 3]], [[0, 1, 1, 5, 0, 3, 4, -1]])
    np.testing.assert_array_equal(_lines.spoken(reading, lines), [[-1, 1, 1, 2, -1, 3, -1, -1]])


def test_drawings_that_are_too_few_are_refused(drawings, args):
    with pytest.raises(SystemExit, match="There are 5 characters, --characters asks for 6"):
        ocr.prepare(args, drawings.part(drawings.labels < 5))
    with pytest.raises(SystemExit, match="has no drawing by the drawers above 14"):
        ocr.prepare(args, drawings.part(drawings.writers <= ocr.TRAIN_WRITERS))
