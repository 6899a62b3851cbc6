"""What belongs to no class: sentences made for these tests, or the real ones in CENTERLOSS_DATA/clinc150."""

import json
import os
from pathlib import Path

import intents
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("as_users_run_it")

REAL = os.environ.get("CENTERLOSS_DATA")
TOPICS = {
    "greeting": ["hello", "hi", "morning", "evening", "welcome"],
    "weather": ["rain", "sun", "snow", "wind", "forecast"],
    "bank": ["balance", "money", "account", "transfer", "card"],
    "travel": ["flight", "hotel", "ticket", "train", "visa"],
}
NONE = ["poem", "planet", "violin", "soup", "dinosaur"]
FILLERS = ["please", "the", "my", "what", "is", "today", "now"]


def sentence(random, words):
    return " ".join([*random.choice(words, 2), *random.choice(FILLERS, 3)])


def write(folder, name, counts):
    random = np.random.default_rng(0)

    def known(of):
        return [[sentence(random, TOPICS[i]), i] for i, n in zip(TOPICS, of, strict=True) for _ in range(n)]

    made = {"train": known(counts), "val": known([10] * 4), "test": known([10] * 4)}
    for part in ("oos_train", "oos_val", "oos_test"):
        made[part] = [[sentence(random, NONE), "oos"] for _ in range(20)]
    (folder / name).write_text(json.dumps(made), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "data_full.json", [40] * 4)
    write(tmp_path, "data_imbalanced.json", [60, 60, 20, 20])
    return tmp_path


def test_sentences_become_numbers_and_what_belongs_to_none_minus_one(folder):
    data = intents.load(folder, "data_full.json")
    assert data.intents == sorted(TOPICS)
    text, words, labels = data.parts["train"]
    assert words.shape == (160, intents.WORDS)
    assert [data.intents[j] for j in labels[[0, 159]]] == ["greeting", "travel"]
    np.testing.assert_array_equal(np.count_nonzero(words, axis=1), [len(t.split()) for t in text])
    assert (data.parts["oos_test"].labels == -1).all()
    known = set(words.ravel()) - {0, intents.UNKNOWN}
    assert known <= set(range(intents.UNKNOWN + 1, data.words))
    # The topics' own words of sentences of no intent are words that training never saw.
    assert (data.parts["oos_test"].words[:, :2] == intents.UNKNOWN).all()


def test_auroc_is_the_share_of_pairs_in_the_right_order(folder, rng):
    data = intents.load(folder, "data_full.json")
    found = {
        part: {score: rng.integers(0, 9, n).astype(float) for score in intents.SCORES}
        | {"predicted": np.zeros(n, int)}
        for part, n in (("test", 40), ("oos_test", 20))
    }
    judged = intents.judge(data, found, "test", "oos_test")
    for score in intents.SCORES:
        known, others = found["test"][score][:, None], found["oos_test"][score][None]
        pairs = np.mean((others > known) + 0.5 * (others == known))
        assert judged[score] == pytest.approx(100 * pairs)
    assert judged["accuracy"] == 25.0


def test_weights_count_every_intent_alike():
    labels = np.array([0] * 6 + [1] * 2)
    weights = intents.sample_weights("weighted", labels)
    assert weights.mean() == pytest.approx(1)
    assert weights[:6].sum() == pytest.approx(weights[6:].sum())
    assert (intents.sample_weights("center", labels) == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("imbalanced", [False, True])
def test_it_tells_what_belongs_to_no_class(folder, tmp_path, capsys, imbalanced):
    flags = ["--seeds", "2", "--select", "1", "--grid", "0.01", "0.03", "--out", str(tmp_path)]
    flags += ["--imbalanced"] * imbalanced
    if REAL:
        flags += ["--data", str(Path(REAL) / "clinc150"), "--epochs", "3", "--warmup", "1"]
    else:
        flags += ["--data", str(folder), "--batch-size", "16", "--epochs", "15", "--lr", "0.005"]
    results = intents.main(flags)
    assert list(results) == [arm for arm in intents.ARMS if imbalanced or arm != "weighted"]
    for runs in results.values():
        for run in runs:
            assert run["accuracy"] > (60 if REAL else 90)
            assert run["probability"] > 75
    printed = capsys.readouterr().out
    assert "Chosen: λ = 0 for softmax alone" in printed
    assert "| center loss - norm penalty" in printed
    assert ("Accuracy by how many training sentences" in printed) == imbalanced
    name = "intents_imbalanced.png" if imbalanced else "intents.png"
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "data_full.json").write_text('{"train": []}', encoding="utf-8")
    with pytest.raises(SystemExit, match=r"data_full\.json is no file of CLINC150: KeyError"):
        intents.load(tmp_path, "data_full.json")
