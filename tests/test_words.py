"""The spelling corrector: its typos, its softmax over some of the classes, and its training."""

from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import words as example

import jax_centerloss

pytestmark = pytest.mark.usefixtures("as_users_run_it")

FLAGS = ["--steps", "60", "--batch-size", "32", "--negatives", "64", "--feat-dim", "16", "--warmup", "10"]


def arguments(*flags):
    return example.parse_args([*FLAGS, "--buckets", "512", "--lr", "0.01", *flags])


def run(args, words, seed):
    trainer = example.Trainer(args, len(words), example.make_mesh())
    return trainer, example.run(trainer, words, "center", 0.01, seed, example.progress(0, "step"))


@pytest.fixture(scope="module")
def words():
    pytest.importorskip("english_words")
    return example.load_words(200)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(example, "make_mesh", lambda: None)


def is_one_edit(word, typo):
    letters = [chr(ord("a") + i) for i in range(26)]
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    one_off = {a + b[1:] for a, b in cuts if b} | {a + c + b for a, b in cuts for c in letters}
    one_off |= {a + c + b[1:] for a, b in cuts if b for c in letters}
    one_off |= {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
    return typo in one_off - {word}


def test_every_class_is_a_word_of_the_list():
    pytest.importorskip("english_words")
    every = example.load_words(None)
    assert len(every) == len(np.unique(every, axis=0)) == 257_195
    lengths = np.count_nonzero(every, axis=1)
    assert (lengths.min(), lengths.max()) == (4, 16)
    np.testing.assert_array_equal(example.load_words(5), every[:5])


def test_a_typo_is_one_edit_and_none_of_the_test_is_in_the_training(words):
    random = np.random.default_rng(0)
    kinds = set()
    seen = {unseen: set() for unseen in (False, True)}
    for _ in range(20):
        for unseen in seen:
            found = example.as_text(example.typos(words, random, unseen=unseen))
            for word, typo in zip(example.as_text(words), found, strict=True):
                assert is_one_edit(word, typo)
                kinds.add(len(typo) - len(word))
            seen[unseen] |= set(found)
    assert kinds == {-1, 0, 1}
    assert not seen[False] & seen[True]


def test_grams_are_those_of_the_marked_word():
    one, other = (example.as_letters([word]) for word in ("abcd", "abce"))
    grams = [set(example.grams_of(letters, 2**31).ravel().tolist()) - {0} for letters in (one, other)]
    # Of ^abcd$: 6 letters, 5 pairs, 4 triples, 3 quadruples. Those with the last letter differ.
    assert [len(found) for found in grams] == [18, 18]
    assert len(grams[0] & grams[1]) == 4 + 1 + 3 + 2 + 1
    assert example.grams_of(one, 64).max() < 64


def test_with_all_classes_it_is_the_full_softmax(rng):
    x, head = rng.normal(size=(7, 3)).astype(np.float32), rng.normal(size=(11, 3)).astype(np.float32)
    labels = rng.integers(0, 11, 7)

    def sampled(x, head):
        return example.sampled_softmax(x, head, jnp.arange(11), labels)

    def full(x, head):
        return optax.softmax_cross_entropy_with_integer_labels(x @ head.T, labels).mean()

    found, expected = (jax.jit(jax.value_and_grad(loss, (0, 1)))(x, head) for loss in (sampled, full))
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-7)


def test_over_some_classes_it_is_the_softmax_of_these(rng):
    x, head = rng.normal(size=(4, 3)), rng.normal(size=(11, 3))
    classes, labels = np.array([-1, -1, 0, 3, 5, 9]), np.array([3, 3, 9, 0])

    def by_hand(margin):
        a, b = x, head
        if margin:
            a, b = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (x, head))
        logits = a @ b[classes[2:]].T
        own = np.searchsorted(classes[2:], labels)
        logits[np.arange(4), own] -= margin
        logits *= 16 if margin else 1
        return np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(4), own])

    rows = np.float32(np.where(classes[:, None] >= 0, head[np.maximum(classes, 0)], 1.0))
    sampled = jax.jit(example.sampled_softmax, static_argnames="margin")
    for margin in (0.0, 0.2):
        found = sampled(np.float32(x), rows, classes, labels, margin=margin)
        np.testing.assert_allclose(found, by_hand(margin), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_it_names_typos_that_training_never_saw(words, capsys, tmp_path):
    flags = [*FLAGS, "--classes", "200", "--steps", "300", "--lr", "0.01", "--typos", "100"]
    results = example.main([*flags, "--select", "--grid", "0.01", "--out", str(tmp_path)])
    for runs in results.values():
        assert runs[0]["center"] > 60
        assert runs[0]["head"] > 30
    assert "200 classes, 100 typos never seen" in capsys.readouterr().out
    scaled = example.main([*flags, "--scaling", "--out", str(tmp_path)])
    assert list(scaled) == [200]
    assert (tmp_path / "words.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_restart_goes_on_where_the_run_was(words, tmp_path, monkeypatch):
    args = arguments("--checkpoints", str(tmp_path), "--every", "25")
    _, whole = run(arguments(), words, 3)
    steps, batches = [], example.batches

    def stops(*given):
        for batch in batches(*given):
            if len(steps) == 40:
                raise KeyboardInterrupt
            steps.append(batch)
            yield batch

    monkeypatch.setattr(example, "batches", stops)
    with pytest.raises(KeyboardInterrupt):
        run(args, words, 3)
    monkeypatch.setattr(example, "batches", batches)
    _, resumed = run(args, words, 3)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    with pytest.raises(SystemExit, match="is of a run with other flags"):
        run(arguments("--checkpoints", str(tmp_path), "--alpha", "0.1"), words, 3)


@pytest.mark.slow
def test_on_a_mesh_the_numbers_are_those_of_one_device(words, monkeypatch):
    args = arguments("--steps", "20")
    with monkeypatch.context() as patch:
        patch.setattr(example, "make_mesh", lambda: None)
        _, one = run(args, words, 0)
    trainer, eight = run(args, words, 0)
    assert trainer.mesh.size == jax.device_count() > 1
    for found, expected in ((eight.head, one.head), (eight.centers, one.centers)):
        assert found["centers"].sharding.spec[0] == "classes"
        np.testing.assert_allclose(found["centers"][:200], expected["centers"][:200], rtol=1e-3, atol=1e-4)
    assert np.abs(eight.centers["centers"]).max() > 0.1
    assert len(example.judge(trainer, eight, words, np.arange(100))["typos"]) > 90


@pytest.mark.slow
def test_a_step_writes_its_rows_in_place(words):
    trainer = example.Trainer(arguments(), 200_000)
    batch = next(example.batches(arguments(), words, 0))
    program = trainer.step.lower(trainer.start(0), batch, np.float32(0), pull=True).compile()
    assert program.memory_analysis().temp_size_in_bytes < 200_000 * 16 * 4 / 4  # A quarter of one table.


def test_the_benchmark_compares_steps_that_are_the_same(rng, monkeypatch):
    """With all classes drawn: by `apply_gradients`, by hand, and the full softmax with optax.adam."""
    pytest.importorskip("torch", reason="the benchmark has peers in torch")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import head as benchmark

    table = rng.normal(size=(9, 3)).astype(np.float32)
    by_rows, dense = jax_centerloss.row_optimizer(optax.adam(benchmark.RATE)), optax.adam(benchmark.RATE)
    zeros = jnp.zeros_like(table)
    ways = {
        "here": (partial(benchmark.here, by_rows), (table, by_rows.init(table))),
        "plain": (benchmark.plain, (table, (jnp.zeros((), jnp.int32), zeros, zeros))),
        "full": (partial(benchmark.full, dense), (table, dense.init(table))),
    }
    for _ in range(3):
        x, labels = rng.normal(size=(4, 3)).astype(np.float32), rng.integers(0, 9, 4).astype(np.int32)
        found = {}
        for name, (step, held) in ways.items():
            held, *found[name] = jax.jit(step)(held, x, labels, jnp.arange(9, dtype=jnp.int32))
            found[name].append(held[0])
            ways[name] = step, held
        chex.assert_trees_all_close(found["here"], found["full"], rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_close(found["plain"], found["full"], rtol=1e-4, atol=1e-6)
