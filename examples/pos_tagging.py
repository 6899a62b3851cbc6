"""Center loss on sequences: a bidirectional LSTM that tags the words of Universal Dependencies English EWT.

    python examples/pos_tagging.py

trains the tagger for several weights λ and seeds. The features of all words of a batch of sentences, shape
`(batch, seq, 256)`, go into the center loss as they are, with `where` for the padding; with `--time-major`
they are `(seq, batch, 256)`.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import _ctrl_c
import conllu
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import (
    Plane,
    add_centers_flag,
    add_flags,
    check_finite,
    check_flags,
    download,
    draw_planes,
    how_centers_move,
    markdown,
    number,
    over_seeds,
    progress,
    say_if_quick,
    spread,
)
from flax import nnx
from sklearn.decomposition import PCA

import jax_centerloss

SOURCE = "https://raw.githubusercontent.com/UniversalDependencies/UD_English-EWT/r2.16/en_ewt-ud-"
SHA256 = {
    "train": "3fb78e2b55482c8ee00caa653af436c88c9e5bc9a73ce26e4ae3ddc79d2b7e7b",
    "dev": "531a54ff90d6ab12201c5a50c3e78e6ddac4de69abc4bce5d275d3cd29efe2b6",
    "test": "e266e515a0a7547657ed3d90d9ba46487d6bd251f27ad4269d4e8a427c8555cd",
}
TAGS = [
    *("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM"),
    *("PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM", "VERB", "X"),
]
UNKNOWN = 1  # The number of a word that training saw once or never; 0 is padding.
WIDTHS = (16, 32, 64)  # Sentences are padded to one of these, or above to a multiple of the last.
METRICS = {
    "dev": ("dev accuracy, %", 2),
    "test": ("test accuracy, %", 2),
    "own_distance": ("to center", 3),
    "gap": ("gap", 3),
    "moved": ("moved", 3),
}

Sentence = tuple[list[str], list[int]]  # Words and tags; a tag of -1 is not known.
Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # Words and labels (batch, seq), lengths (batch,).


def read(path: Path) -> list[Sentence]:
    """The sentences of a CoNLL-U file, and a line on what was left out."""
    sentences, left_out = [], Counter()
    try:
        with path.open(encoding="utf-8") as file:
            for found in conllu.parse_incr(file):
                # Of "1-2 don't, 1 do, 2 n't" the last two are words; "8.1" stands for a word left unsaid.
                tokens = [token for token in found if isinstance(token["id"], int)]
                left_out["multiword or empty tokens"] += len(found) - len(tokens)
                left_out["empty sentences"] += not tokens
                left_out["words without a tag"] += sum(token["upos"] == "_" for token in tokens)
                if tokens:
                    if unknown := {token["upos"] for token in tokens} - {*TAGS, "_"}:
                        raise ValueError(f"unknown tag {min(unknown)}")
                    tags = [-1 if token["upos"] == "_" else TAGS.index(token["upos"]) for token in tokens]
                    sentences.append(([token["form"] for token in tokens], tags))
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} can't be read: {error}") from None
    except (conllu.exceptions.ParseException, KeyError, ValueError, TypeError) as error:
        raise SystemExit(
            f"{path} is broken in or after sentence {len(sentences) + 1}: {error}. Expected CoNLL-U with the "
            f"tags {' '.join(TAGS)}, or _ where none is known."
        ) from None
    if not sentences:
        raise SystemExit(f"{path} holds no sentences.")
    kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.items() if count)
    print(f"{path.name}: {len(sentences):,} sentences{f'; left out: {kinds}' if kinds else ''}")
    return sentences


def load(data: Path | None) -> dict[str, list[Sentence]]:
    """Training, dev and test sentences of a treebank in the folder `data`, or of EWT if that is `None`."""
    found = {}
    for part, sha in SHA256.items():
        if data is None:
            found[part] = read(download(f"{SOURCE}{part}.conllu", f"sha256:{sha}"))
            continue
        paths = sorted(data.glob(f"*-ud-{part}.conllu"))
        if len(paths) != 1:
            raise SystemExit(f"Expected one file *-ud-{part}.conllu in {data}, found {len(paths)}.")
        found[part] = read(paths[0])
    return found


def vocabulary(sentences: list[Sentence]) -> dict[str, int]:
    """Numbers of the words that occur twice or more."""
    counts = Counter(word for words, _ in sentences for word in words)
    return {word: i for i, word in enumerate((w for w, n in counts.items() if n > 1), start=UNKNOWN + 1)}


def batches(sentences: list[Sentence], numbers: dict[str, int], size: int) -> list[Batch]:
    """Sentences of about one length together, padded to few shapes, so that few programs are compiled."""
    groups: dict[int, list[Sentence]] = {}
    for sentence in sentences:
        length = len(sentence[0])
        width = next((w for w in WIDTHS if w >= length), -(-length // WIDTHS[-1]) * WIDTHS[-1])
        groups.setdefault(width, []).append(sentence)
    found = []
    for width, group in sorted(groups.items()):
        for start in range(0, len(group), size):
            words, labels = np.zeros((size, width), np.int32), np.full((size, width), -1, np.int32)
            lengths = np.zeros(size, np.int32)
            for i, (text, tags) in enumerate(group[start : start + size]):
                words[i, : len(text)] = [numbers.get(word, UNKNOWN) for word in text]
                labels[i, : len(text)] = tags
                lengths[i] = len(text)
            found.append((words, labels, lengths))
    return found


class Tagger(nnx.Module):
    """Embedding - dropout - bidirectional LSTM (the features) - softmax layer, and one center per tag."""

    def __init__(self, words: int, hidden: int, time_major: bool, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(words, 100, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        forward, backward = (nnx.RNN(nnx.LSTMCell(100, hidden, rngs=rngs), rngs=rngs) for _ in range(2))
        self.lstm = nnx.Bidirectional(forward, backward, time_major=time_major, rngs=rngs)
        self.head = nnx.Linear(2 * hidden, len(TAGS), rngs=rngs)
        self.center_loss = jax_centerloss.nnx.CenterLoss(len(TAGS), 2 * hidden, centers_as="state", rngs=rngs)
        self.time_major = time_major

    def features(self, words: jax.Array, lengths: jax.Array) -> jax.Array:
        """`(batch, seq, 2 * hidden)`, or `(seq, batch, 2 * hidden)` if `words` are `(seq, batch)`."""
        x = self.embed(words)
        # Drawn batch-major in both layouts, so that they drop the same units.
        x = self.dropout(x.swapaxes(0, 1)).swapaxes(0, 1) if self.time_major else self.dropout(x)
        return self.lstm(x, seq_lengths=lengths)


def tag_loss(
    model: Tagger, words: jax.Array, labels: jax.Array, lengths: jax.Array, lam: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and λ · center loss, both as means over the words whose tag is known."""
    x, where = model.features(words, lengths), labels >= 0
    # The padding's label becomes a class that exists, as optax wants it, and is then masked.
    each = optax.softmax_cross_entropy_with_integer_labels(model.head(x), jnp.maximum(labels, 0))
    cross_entropy = jnp.sum(each, where=where) / jnp.maximum(jnp.sum(where), 1)
    return cross_entropy + lam * model.center_loss(x, labels, where=where), x


@nnx.jit(donate_argnums=(0, 1))
def train_step(
    model: Tagger,
    optimizer: nnx.Optimizer,
    words: jax.Array,
    labels: jax.Array,
    lengths: jax.Array,
    lam: jax.Array,
    alpha: jax.Array,
) -> jax.Array:
    loss_fn = partial(tag_loss, words=words, labels=labels, lengths=lengths, lam=lam)
    (loss, x), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    model.center_loss.update_centers(x, labels, where=labels >= 0, alpha=alpha, after=loss)
    return loss


@nnx.jit
def predict(model: Tagger, words: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = model.features(words, lengths)
    return x, jnp.argmax(model.head(x), axis=-1)


def layout(batch: Batch, time_major: bool) -> Batch:
    words, labels, lengths = batch
    return (words.T, labels.T, lengths) if time_major else batch


def epochs(args: argparse.Namespace, train: list[Batch], seed: int) -> Iterator[list[Batch]]:
    random = np.random.default_rng(seed)
    for _ in range(args.epochs):
        yield [layout(train[i], args.time_major) for i in random.permutation(len(train))]


@cache  # One object for all runs: a new one would compile their step anew.
def make_optimizer(lr: float, steps: int) -> optax.GradientTransformation:
    adam = optax.adam(optax.cosine_decay_schedule(lr, steps))
    return optax.chain(optax.clip_by_global_norm(5.0), adam)


def fit(
    args: argparse.Namespace, train: list[Batch], words: int, lam: float, seed: int, bar: Any
) -> tuple[Tagger, Any, list[float]]:
    """The trained tagger, its centers one epoch before the end, and the mean loss of each epoch."""
    model = Tagger(words, args.hidden, args.time_major, rngs=nnx.Rngs(seed))
    alpha = np.float32(args.alpha)
    if args.centers == "zero":
        model.center_loss.centers = jnp.zeros_like(model.center_loss.centers[...])
        alpha = np.float32(0)
    steps = args.epochs * len(train)
    optimizer = nnx.Optimizer(model, make_optimizer(args.lr, steps), wrt=nnx.Param)
    # From lam / (steps of the warm-up) up to lam.
    lams = np.float32(lam * np.minimum(1.0, np.arange(1, steps + 1) / max(args.warmup * len(train), 1)))
    losses = []
    for epoch, weights in zip(epochs(args, train, seed), lams.reshape(args.epochs, -1), strict=True):
        previous = jax.tree.map(jnp.copy, nnx.state(model.center_loss))
        found = [
            train_step(model, optimizer, *batch, weight, alpha)
            for batch, weight in zip(epoch, weights, strict=True)
        ]
        losses.append(float(np.mean(jax.device_get(found))))
        bar.set_postfix(lam=lam, seed=seed, loss=f"{losses[-1]:.3f}", refresh=False)
        bar.update()
    check_finite(losses, f"λ = {lam:g}, seed {seed}")
    model.eval()
    return model, previous, losses


def judge(model: Tagger, data: list[Batch]) -> tuple[float, np.ndarray, np.ndarray]:
    """The accuracy over all words in per cent, and the features `(n, D)` and labels `(n,)` of all words."""
    features, labels, right = [], [], []
    for batch in data:
        words, truth, lengths = layout(batch, model.time_major)
        x, predicted = map(np.asarray, predict(model, words, lengths))
        known = truth >= 0
        features.append(x[known])
        labels.append(truth[known])
        right.append(predicted[known] == truth[known])
    return 100 * np.concatenate(right).mean(), np.concatenate(features), np.concatenate(labels)


def plane(title: str, features: np.ndarray, labels: np.ndarray, centers: Any, previous: Any) -> Plane:
    """Features and centers on the features' two main directions."""
    pca = PCA(2, random_state=0).fit(features)
    now, then = (pca.transform(np.asarray(jax.tree.leaves(tree)[0])) for tree in (centers, previous))
    return Plane(title, now, pca.transform(features), labels, then)


def unseen(data: dict[str, list[Sentence]]) -> Counter[int]:
    """How many dev words have a tag that training never saw, by tag: its center is where it was drawn."""
    train, dev = (Counter(tag for _, tags in data[part] for tag in tags) for part in ("train", "dev"))
    if not any(tag in train for tag in dev if tag >= 0):
        raise SystemExit("No dev word has a tag that training saw.")
    return Counter({tag: count for tag, count in dev.items() if tag >= 0 and tag not in train})


def compare(args: argparse.Namespace, data: dict[str, list[Sentence]]) -> dict[float, list[dict[str, Any]]]:
    """Trains every λ with every seed, prints the table and draws the picture of seed 0."""
    numbers = vocabulary(data["train"])
    parts = {part: batches(sentences, numbers, args.batch_size) for part, sentences in data.items()}
    results: dict[float, list[dict[str, Any]]] = {lam: [] for lam in args.lams}
    planes = []
    if strange := unseen(data):
        tags = ", ".join(TAGS[tag] for tag in sorted(strange))
        print(f"{strange.total()} dev words have tags that training never saw ({tags}): ", end="")
        print("they count in the accuracy only.")
    with progress(len(args.lams) * args.seeds * args.epochs, "epoch") as bar:
        for seed in range(args.seeds):
            for lam in args.lams:
                model, previous, losses = fit(args, parts["train"], len(numbers) + 2, lam, seed, bar)
                dev, x, labels = judge(model, parts["dev"])
                trained = ~np.isin(labels, list(strange))
                x, labels = x[trained], labels[trained]
                metrics = jax_centerloss.center_metrics(model.center_loss, x, labels, previous=previous)
                found = {name: float(value) for name, value in metrics.items()}
                found |= {"dev": dev, "test": judge(model, parts["test"])[0], "losses": losses}
                results[lam].append(found)
                if seed == 0:
                    planes.append(plane(f"λ = {lam:g}", x, labels, nnx.state(model.center_loss), previous))
    print(f"\n{over_seeds(args.seeds)}, {args.epochs} epochs, ", end="")
    print(f"λ over {args.warmup} of them, {how_centers_move(args)}\n")
    rows = [
        [
            f"λ = {lam:g}",
            *(spread([run[name] for run in runs], digits) for name, (_, digits) in METRICS.items()),
        ]
        for lam, runs in results.items()
    ]
    print(markdown(["", *(title for title, _ in METRICS.values())], rows))
    print("\nTo center, gap and moved are `center_metrics` of the dev words, the last over the last epoch.")
    picture = args.out / "pos_tagging.png"
    heading = "Words of the dev set; arrows: centers in the last epoch"
    draw_planes(picture, heading, planes, TAGS, main_directions=True)
    print(f"\nThe dev words of seed 0: {picture}")
    say_if_quick(args)
    return results


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A part-of-speech tagger with and without center loss.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        help="folder of a UD treebank, with *-ud-{train,dev,test}.conllu; else downloaded",
    )
    add("--lams", type=number(float, 0), nargs="+", default=[0, 0.001, 0.01], help="weights λ")
    add_centers_flag(parser, "rule", "zero")
    add("--time-major", action="store_true", help="features as (seq, batch, D): the same numbers")
    add("--hidden", type=number(int, 1), default=128, help="units of the LSTM in each direction")
    add("--epochs", type=number(int, 1), default=6, help="epochs of each run")
    quick = f"at most 2 epochs, 1,000 sentences of up to {WIDTHS[1]} words"
    add_flags(parser, warmup=1, batch_size=64, seeds=5, lr=3e-3, quick=quick)
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs = min(args.epochs, 2)
    args.lams = sorted(set(args.lams))
    check_flags(parser, args)
    return args


def main(argv: Sequence[str] | None = None) -> dict[float, list[dict[str, Any]]]:
    """Runs the comparison; for each λ a list with every seed's metrics and losses."""
    args = parse_args(argv)
    with _ctrl_c.stopped_by_hand():
        data = load(args.data)
        if args.quick:  # Short sentences, for which few programs are compiled.
            short = {part: [s for s in found if len(s[0]) <= WIDTHS[1]] for part, found in data.items()}
            data = {part: sentences[:1000] for part, sentences in short.items()}
        return compare(args, data)


if __name__ == "__main__":
    main()
