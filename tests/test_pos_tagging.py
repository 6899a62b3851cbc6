"""The tagger, on sentences made for these tests, or on the real ones in CENTERLOSS_DATA/ud-english-ewt."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pos_tagging
import pytest
from flax import nnx

import jax_centerloss

pytestmark = pytest.mark.usefixtures("as_users_run_it")

REAL = os.environ.get("CENTERLOSS_DATA")
WORDS = {
    "DET": ["the", "a", "every"],
    "ADJ": ["small", "old", "green"],
    "NOUN": ["cat", "house", "run", "walk"],
    "VERB": ["sees", "run", "walk"],  # "run" and "walk" are told from nouns by what is around them.
    "ADV": ["slowly", "often"],
    "PUNCT": ["."],
}
PATTERNS = ["DET NOUN VERB PUNCT", "DET ADJ NOUN VERB ADV PUNCT", "DET NOUN VERB DET ADJ NOUN ADV PUNCT"]


def line(number, form, tag):
    return "\t".join([str(number), form, form, tag, *["_"] * 6])


def sentence(random):
    tags = PATTERNS[random.integers(len(PATTERNS))].split()
    return "\n".join(line(i, random.choice(WORDS[tag]), tag) for i, tag in enumerate(tags, start=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("treebank")
    random = np.random.default_rng(0)
    for part, count in (("train", 200), ("dev", 40), ("test", 40)):
        text = "".join(f"# sent_id = {i}\n{sentence(random)}\n\n" for i in range(count))
        (made / f"xx_made-ud-{part}.conllu").write_text(text, encoding="utf-8")
    return made


@pytest.mark.slow
def test_learns_and_compacts(folder, tmp_path, capsys):
    flags = ["--seeds", "1", "--lams", "0", "0.1", "--out", str(tmp_path)]
    made = ["--data", str(folder), "--epochs", "12", "--hidden", "16", "--batch-size", "16", "--lr", "0.02"]
    real = ["--data", str(Path(REAL) / "ud-english-ewt"), "--quick"] if REAL else None
    results = pos_tagging.main([*flags, *(real or made)])
    (softmax,), (center,) = results[0.0], results[0.1]
    for run in (softmax, center):
        assert run["losses"][-1] < 0.8 * run["losses"][0]
        assert run["dev"] > (30 if REAL else 90)
        assert abs(run["test"] - run["dev"]) < 10
    assert center["own_distance"] < 0.8 * softmax["own_distance"]
    assert 0 < center["moved"] < center["own_distance"]
    assert (tmp_path / "pos_tagging.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| λ = 0.1" in printed
    assert "one seed, " in printed
    assert "±" not in printed


def batch_of(folder, part="train", size=8):
    sentences = pos_tagging.read(folder / f"xx_made-ud-{part}.conllu")
    numbers = pos_tagging.vocabulary(sentences)
    return pos_tagging.batches(sentences, numbers, size)[0], len(numbers) + 2


@pytest.mark.slow
def test_time_major_is_the_same(folder):
    batch, words = batch_of(folder)
    found = []
    for time_major in (False, True):
        model = pos_tagging.Tagger(words, 8, time_major, rngs=nnx.Rngs(0))
        given = pos_tagging.layout(batch, time_major)
        # With dropout, as in training.
        loss, x = nnx.jit(pos_tagging.tag_loss)(model, *given, 0.1)
        assert x.shape == (*given[0].shape, 16)
        found.append(float(loss))
    assert batch[0].shape[0] != batch[0].shape[1]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


@pytest.mark.slow
def test_padding_changes_nothing(folder):
    (words, labels, lengths), count = batch_of(folder)
    model = pos_tagging.Tagger(count, 8, False, rngs=nnx.Rngs(0))
    model.eval()
    features = nnx.jit(pos_tagging.Tagger.features)
    x = np.asarray(features(model, words, lengths), np.float64)
    centers = np.asarray(jax.tree.leaves(nnx.state(model.center_loss))[0], np.float64)
    # The same words one sentence at a time, without padding, by hand in float64.
    cross_entropy, distance = [], []
    head = [np.asarray(leaf[...], np.float64) for leaf in (model.head.kernel, model.head.bias)]
    for i, n in enumerate(lengths):
        alone = np.asarray(features(model, words[i : i + 1, :n], lengths[i : i + 1])[0], np.float64)
        np.testing.assert_allclose(x[i, :n], alone, rtol=1e-5, atol=1e-6)
        logits = alone @ head[0] + head[1]
        likelihood = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        cross_entropy += list(-np.log(likelihood[np.arange(n), labels[i, :n]]))
        distance += list(np.sum((alone - centers[labels[i, :n]]) ** 2, axis=-1))
    loss, _ = pos_tagging.tag_loss(model, words, labels, lengths, lam=0.1)
    np.testing.assert_allclose(loss, np.mean(cross_entropy) + 0.1 * np.mean(distance), rtol=1e-5)
    assert jax_centerloss.center_loss(model.center_loss, x.astype(np.float32), labels) == pytest.approx(
        np.mean(distance), rel=1e-5
    )


@pytest.mark.slow
def test_tags_that_training_never_saw_are_left_out_and_said(folder, tmp_path, monkeypatch, capsys):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    dev = tmp_path / "xx_made-ud-dev.conllu"
    words = sum(bool(row) and not row.startswith("#") for row in dev.read_text().splitlines())
    strange = "\n".join([line(1, "hm", "INTJ"), line(2, "%", "SYM"), line(3, "ah", "INTJ")])
    dev.write_text(f"{strange}\n\n{dev.read_text()}")
    drawn = []

    def fit(args, train, words, lam, seed, bar):
        model = pos_tagging.Tagger(words, 2, False, rngs=nnx.Rngs(0))
        model.eval()
        return model, jax.tree.map(jnp.copy, nnx.state(model.center_loss)), [1.0]

    monkeypatch.setattr(pos_tagging, "fit", fit)
    monkeypatch.setattr(
        pos_tagging, "draw_planes", lambda path, title, planes, *_, **__: drawn.extend(planes)
    )
    flags = ["--data", str(tmp_path), "--out", str(tmp_path), "--seeds", "1", "--lams", "0.1"]
    (run,) = pos_tagging.main(flags)[0.1]
    assert "3 dev words have tags that training never saw (INTJ, SYM)" in capsys.readouterr().out
    assert run["classes_seen"] == len(WORDS)
    (plane,) = drawn
    assert {pos_tagging.TAGS[label] for label in plane.labels} == {*WORDS}
    assert len(plane.features) == len(plane.labels) == words

    dev.write_text(f"{line(1, 'hm', 'INTJ')}\n\n")
    with pytest.raises(SystemExit, match="No dev word has a tag that training saw"):
        pos_tagging.main(flags)


def write(tmp_path, text):
    path = tmp_path / "xx_made-ud-train.conllu"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_what_is_no_word_is_left_out_and_said(tmp_path, capsys):
    rows = [
        *(line("1-2", "don't", "_"), line(1, "do", "AUX"), line(2, "n't", "PART"), line("2.1", "go", "VERB")),
        *(line(3, "hm", "_"), "", "# only a comment: an empty sentence", "", line(1, "yes", "INTJ"), ""),
    ]
    sentences = pos_tagging.read(write(tmp_path, "\n".join(rows)))
    tags = pos_tagging.TAGS
    assert sentences == [
        (["do", "n't", "hm"], [tags.index("AUX"), tags.index("PART"), -1]),
        (["yes"], [tags.index("INTJ")]),
    ]
    printed = capsys.readouterr().out
    assert "2 sentences; left out: 2 multiword or empty tokens" in printed
    assert "1 words without a tag" in printed


BROKEN = {
    "unknown tag": (
        f"{line(1, 'a', 'DET')}\n\n{line(1, 'b', 'NOM')}\n\n",
        "sentence 2: unknown tag NOM.*Expected CoNLL-U",
    ),
    "no tabs": ("1 no tabs here\n\n", "sentence 1: .*Expected CoNLL-U"),
    "cut line": ("1\tcut\n", "sentence 1: .*Expected CoNLL-U"),
    "no number": (f"{line('x', 'a', 'DET')}\n\n", "sentence 1: .*Expected CoNLL-U"),
    "not text": (b"\xff\xfe\x00\x01", "can't be read"),
    "empty": ("", "holds no sentences"),
    "only comments": ("# only a comment\n\n", "holds no sentences"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named(tmp_path, text, message):
    with pytest.raises(SystemExit, match=message) as stopped:
        pos_tagging.read(write(tmp_path, text))
    assert "xx_made-ud-train.conllu" in str(stopped.value)


def test_batches_hold_every_word_once():
    sentences = [
        ([f"w{i}"] * n, [i % 17] * n) for i, n in enumerate([1, 16, 17, 32, 33, 64, 65, 128, 129, 5])
    ]
    numbers = pos_tagging.vocabulary(sentences)
    assert sorted(numbers.values()) == list(range(2, 2 + 9))  # The first word occurs once.
    found = pos_tagging.batches(sentences, numbers, 2)
    assert {words.shape for words, _, _ in found} == {(2, w) for w in (16, 32, 64, 128, 192)}
    seen = {}
    for words, labels, lengths in found:
        for row, tags, n in zip(words, labels, lengths, strict=True):
            assert np.all(row[n:] == 0)
            assert np.all(tags[n:] == -1)
            assert np.all(row[:n] > 0)
            if n:
                seen[int(n)] = (set(row[:n].tolist()), set(tags[:n].tolist()))
    assert seen == {len(w): ({numbers.get(w[0], 1)}, {t[0]}) for w, t in sentences}
