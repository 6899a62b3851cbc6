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


def test_scores_are_those_of_their_formulas(folder, monkeypatch, rng):
    data = intents.load(folder, "data_full.json")
    features = {part: rng.normal(size=(len(data.parts[part].labels), 3)) for part in ("train", "val")}
    labels, head = data.parts["train"].labels, rng.normal(size=(3, 4))
    features["train"] += 3 * rng.normal(size=(4, 3))[labels]
    sizes = {len(x): x for x in features.values()}
    monkeypatch.setattr(
        intents, "predict", lambda _, words: (np.float32(sizes[len(words)]), sizes[len(words)] @ head)
    )
    found = intents.scores_of(None, data, ("val",))["val"]
    x, logits = features["val"], features["val"] @ head
    means = np.stack([features["train"][labels == j].mean(0) for j in range(4)])
    difference = x[:, None] - means
    inverse = np.linalg.inv(intents.LedoitWolf().fit(features["train"] - means[labels]).covariance_)
    unit = [v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (x, features["train"])]
    likelihood = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = {
        "probability": -likelihood.max(-1),
        "energy": -np.log(np.exp(logits).sum(-1)),
        "mean": (difference**2).sum(-1).min(-1),
        "mahalanobis": np.einsum("ncd,de,nce->nc", difference, inverse, difference).min(-1),
        "neighbors": np.sort(np.linalg.norm(unit[0][:, None] - unit[1], axis=-1))[:, intents.NEIGHBORS - 1],
    }
    for score, values in want.items():
        np.testing.assert_allclose(found[score], values, rtol=1e-3, atol=1e-5, err_msg=score)


def test_the_weight_is_chosen_without_the_test(folder, monkeypatch, tmp_path):
    seen = []

    def scores_of(model, data, parts):
        seen.extend(parts)
        score = dict.fromkeys(intents.SCORES, 0.0)
        return {p: {s: np.zeros(len(data.parts[p].labels)) for s in score} | {"predicted": 0} for p in parts}

    monkeypatch.setattr(intents, "scores_of", scores_of)
    monkeypatch.setattr(intents, "train", lambda *_: None)
    args = intents.parse_args(["--out", str(tmp_path), "--batch-size", "16"])
    intents.select(args, intents.load(folder, "data_full.json"))
    assert set(seen) == {"val", "oos_val"}


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
    for arm, runs in results.items():
        for run in runs:
            assert run["accuracy"] > (60 if REAL else 90)
            for score in intents.SCORES:
                assert run[score] > 75 or (REAL and arm == "softmax"), (arm, score)
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
