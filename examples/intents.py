"""Does center loss help to tell what belongs to no class? CLINC150, with a control.

    python examples/intents.py

trains a network on sentences of 150 intents, and tells the test sentences from 1,000 others that have none of
these intents. Three arms: softmax alone, softmax with a penalty on the norm of the features (centers fixed at
zero), and softmax with center loss. The weight λ of each arm is chosen on the validation sentences alone.

    python examples/intents.py --imbalanced

trains on the uneven version of the data: accuracy by how often an intent was seen, and as a fourth arm center
loss with a weight for each sample, by which every intent counts the same.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import _ctrl_c
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import (
    add_flags,
    arm_differences,
    check_finite,
    check_flags,
    download,
    entries,
    markdown,
    new_figure,
    number,
    over_seeds,
    progress,
    say_if_quick,
    spread,
    unit_length,
)
from flax import nnx
from scipy.special import logsumexp, softmax
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

import jax_centerloss

SOURCE = "https://raw.githubusercontent.com/clinc/oos-eval/828f8093932c8fe6ca7936c3d2e52903b1c523de/data/"
SHA256 = {
    "data_full.json": "36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0",
    "data_imbalanced.json": "4886730b20c51eece26aa392ecae2717bfe9908680419e96255351c6148eb4cc",
}
PARTS = ("train", "val", "test", "oos_val", "oos_test")
UNKNOWN = 1  # The number of a word that training saw once or never; 0 is padding.
WORDS = 32  # Sentences are padded to so many words; what is beyond is cut off.
NEIGHBORS = 10  # The distance to the training feature that is the tenth nearest.
ARMS = {
    "softmax": "softmax alone",
    "norm": "norm penalty",
    "center": "center loss",
    "weighted": "center loss, weighted",
}
# The scores, each high for a sentence that belongs to no class.
SCORES = {
    "probability": "largest probability",
    "energy": "energy",
    "mean": "nearest mean",
    "mahalanobis": "Mahalanobis",
    "neighbors": "nearest neighbors",
}
SHOWN = "neighbors"  # The score of the picture and of the sentences that are printed.


class Sentences(NamedTuple):
    text: list[str]
    words: np.ndarray  # (N, WORDS), the numbers of the words, 0 after the last one.
    labels: np.ndarray  # (N,), -1 for a sentence of none of the intents.


class Data(NamedTuple):
    intents: list[str]
    words: int
    parts: dict[str, Sentences]


def tokens(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def load(folder: Path | None, name: str) -> Data:
    path = download(SOURCE + name, f"sha256:{SHA256[name]}") if folder is None else folder / name
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        pairs = {part: found[part] for part in PARTS}
        intents = sorted({intent for _, intent in pairs["train"]})
        number_of = {intent: i for i, intent in enumerate(intents)}
        counts = Counter(word for text, _ in pairs["train"] for word in tokens(text))
        # A sentence of an intent that training lacks belongs to none.
        classes = {part: [number_of.get(intent, -1) for _, intent in pairs[part]] for part in PARTS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is no file of CLINC150: {type(error).__name__}: {error}") from None
    if empty := [part for part in PARTS if not pairs[part]]:
        raise SystemExit(f"{path} has no sentences in {', '.join(empty)}.")
    numbers = {word: i for i, word in enumerate((w for w, n in counts.items() if n > 1), start=UNKNOWN + 1)}
    parts = {}
    for part in PARTS:
        words = np.zeros((len(pairs[part]), WORDS), np.int32)
        for row, (text, _) in zip(words, pairs[part], strict=True):
            found = [numbers.get(word, UNKNOWN) for word in tokens(text)[:WORDS]]
            row[: len(found)] = found
        labels = np.asarray(classes[part], np.int32)
        parts[part] = Sentences([text for text, _ in pairs[part]], words, labels)
    return Data(intents, len(numbers) + UNKNOWN + 1, parts)


class Model(nnx.Module):
    """The mean of word embeddings, two layers to 64 features, a softmax layer, and one center per intent."""

    def __init__(self, words: int, intents: int, feat_dim: int, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(words, 256, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.hidden = nnx.Linear(256, 256, rngs=rngs)
        self.last = nnx.Linear(256, feat_dim, rngs=rngs)
        self.head = nnx.Linear(feat_dim, intents, rngs=rngs)
        # At zero: an arm whose centers don't move has a penalty on the norm of the features.
        self.center_loss = jax_centerloss.nnx.CenterLoss(
            intents, feat_dim, centers_as="state", centers_init=nnx.initializers.zeros, rngs=rngs
        )

    def features(self, words: jax.Array) -> jax.Array:
        where = words[..., None] > 0
        total = jnp.sum(self.embed(words), axis=-2, where=where)
        x = total / jnp.sqrt(jnp.maximum(jnp.sum(where, axis=-2), 1))
        x = nnx.relu(self.hidden(self.dropout(x)))
        return self.last(self.dropout(x))


@nnx.jit(donate_argnums=(0, 1))
def train_step(
    model: Model,
    optimizer: nnx.Optimizer,
    words: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    lam: jax.Array,
    alpha: jax.Array,
) -> jax.Array:
    def loss_fn(model: Model) -> tuple[jax.Array, jax.Array]:
        x = model.features(words)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(model.head(x), labels).mean()
        return cross_entropy + lam * model.center_loss(x, labels, weights=weights), x

    (loss, x), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    model.center_loss.update_centers(x, labels, weights=weights, alpha=alpha, after=loss)
    return loss


@nnx.jit
def predict(model: Model, words: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = model.features(words)
    return x, model.head(x)


def batches(args: argparse.Namespace, size: int, seed: int) -> Iterator[np.ndarray]:
    """The indices of every step, the same in every arm."""
    random = np.random.default_rng(seed)
    for _ in range(args.epochs):
        order = random.permutation(size)
        yield from (
            order[i : i + args.batch_size] for i in range(0, size - args.batch_size + 1, args.batch_size)
        )


@cache  # One object for all runs: a new one would compile their step anew.
def make_optimizer(lr: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(lr, steps))


def sample_weights(arm: str, labels: np.ndarray) -> np.ndarray:
    """Of mean 1. In the weighted arm every intent weighs the same, however often it was seen."""
    if arm != "weighted":
        return np.ones(len(labels), np.float32)
    counts = np.bincount(labels)
    return np.float32(len(labels) / (np.count_nonzero(counts) * counts[labels]))


def steps_of(args: argparse.Namespace, data: Data) -> int:
    """The steps of a run."""
    return args.epochs * (len(data.parts["train"].labels) // args.batch_size)


def train(args: argparse.Namespace, data: Data, arm: str, lam: float, seed: int, bar: Any) -> Model:
    _, words, labels = data.parts["train"]
    steps = steps_of(args, data)
    model = Model(data.words, len(data.intents), args.feat_dim, rngs=nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, make_optimizer(args.lr, steps), wrt=nnx.Param)
    weights = sample_weights(arm, labels)
    # From lam / (steps of the warm-up) up to lam.
    warm = max(args.warmup * steps // args.epochs, 1)
    lams = np.float32(lam * np.minimum(1.0, np.arange(1, steps + 1) / warm))
    alpha = np.float32(args.alpha if arm in ("center", "weighted") else 0)
    losses = []
    for weight, chosen in zip(lams, batches(args, len(labels), seed), strict=True):
        losses.append(
            train_step(model, optimizer, words[chosen], labels[chosen], weights[chosen], weight, alpha)
        )
        bar.update()
    check_finite(jax.device_get(losses), f"{ARMS[arm]}, λ = {lam:g}, seed {seed}")
    bar.set_postfix(arm=arm, lam=lam, seed=seed, loss=f"{float(losses[-1]):.3f}", refresh=False)
    model.eval()
    return model


def scores_of(model: Model, data: Data, parts: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """For each part its scores, each high for what belongs to no class, and the predicted intents."""
    x, _ = map(np.asarray, predict(model, data.parts["train"].words))
    labels = data.parts["train"].labels
    means = jax_centerloss.init_from_features(
        np.zeros((len(data.intents), x.shape[1]), np.float32), [(x, labels)]
    )
    # Mahalanobis: the squared distance to the nearest mean, of features whose covariance within classes is 1.
    whiten = np.linalg.cholesky(LedoitWolf().fit(x - np.asarray(means)[labels]).precision_).astype(np.float32)

    def to_nearest(means: Any, x: np.ndarray) -> np.ndarray:
        nearest = jax_centerloss.nearest_center(means, x)
        return np.asarray(jax_centerloss.center_loss(means, x, nearest, reduce_fn=None, clip=None))

    neighbors = NearestNeighbors(n_neighbors=NEIGHBORS, algorithm="brute").fit(unit_length(x))
    found = {}
    for part in parts:
        x, logits = map(np.asarray, predict(model, data.parts[part].words))
        found[part] = {
            "predicted": logits.argmax(-1),
            "probability": -softmax(logits, axis=-1).max(-1),
            "energy": -logsumexp(logits, axis=-1),
            "mean": to_nearest(means, x),
            "mahalanobis": to_nearest(means @ whiten, x @ whiten),
            "neighbors": neighbors.kneighbors(unit_length(x))[0][:, -1],
        }
    return found


def judge(data: Data, found: dict[str, dict[str, np.ndarray]], known: str, others: str) -> dict[str, float]:
    """AUROC of each score and the accuracy of the known sentences, in per cent."""
    truth = np.repeat([0, 1], [len(data.parts[known].labels), len(data.parts[others].labels)])
    auroc = {
        score: 100 * roc_auc_score(truth, np.concatenate([found[known][score], found[others][score]]))
        for score in SCORES
    }
    right = found[known]["predicted"] == data.parts[known].labels
    return auroc | {"accuracy": 100 * right.mean()}


def select(args: argparse.Namespace, data: Data) -> dict[str, float]:
    """λ of each arm, by the mean of the five AUROCs on the validation sentences."""
    runs = [(arm, lam) for arm in args.arms for lam in (args.grid if arm != "softmax" else [0.0])]
    means, rows = {}, []
    with progress(len(runs) * args.select * steps_of(args, data), "step") as bar:
        for arm, lam in runs:
            found = []
            for seed in range(1000, 1000 + args.select):  # Other seeds than those of the comparison.
                model = train(args, data, arm, lam, seed, bar)
                found.append(judge(data, scores_of(model, data, ("val", "oos_val")), "val", "oos_val"))
            means[arm, lam] = np.mean([[run[score] for score in SCORES] for run in found])
            rows.append([ARMS[arm], f"{lam:g}", *cells(found), f"{means[arm, lam]:.2f}"])
    print(f"\nOn the validation sentences, {over_seeds(args.select)}, in per cent:\n")
    print(markdown(["arm", "λ", *SCORES.values(), "accuracy", "mean AUROC"], rows))
    best = {arm: max((run for run in runs if run[0] == arm), key=means.get)[1] for arm in args.arms}
    print("\nChosen:", ", ".join(f"λ = {lam:g} for {ARMS[arm]}" for arm, lam in best.items()))
    return best


def cells(runs: Sequence[dict[str, float]]) -> list[str]:
    return [spread([run[name] for run in runs], 1) for name in (*SCORES, "accuracy")]


def compare(args: argparse.Namespace, data: Data, lams: dict[str, float]) -> dict[str, list[dict[str, Any]]]:
    """Trains every arm with every seed, and prints and draws what the test sentences show."""
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in args.arms}
    shown = {}
    counts = np.bincount(data.parts["train"].labels)
    test = data.parts["test"].labels
    with progress(len(args.arms) * args.seeds * steps_of(args, data), "step") as bar:
        for seed in range(args.seeds):
            for arm in args.arms:
                model = train(args, data, arm, lams[arm], seed, bar)
                found = scores_of(model, data, ("val", "test", "oos_test"))
                run = judge(data, found, "test", "oos_test")
                right = found["test"]["predicted"] == test
                by_count = {f"seen {n}": 100 * right[counts[test] == n].mean() for n in np.unique(counts)}
                results[arm].append(run | by_count)
                if seed == 0:
                    shown[arm] = found
    others = len(data.parts["oos_test"].labels)
    print(f"\n{len(test):,} test sentences and {others:,} that belong to no intent, ", end="")
    print(f"{over_seeds(args.seeds)}; AUROC by each score, and accuracy, in per cent:\n")
    print(tables(results, lams))
    if args.imbalanced:
        names = [name for name in results[args.arms[0]][0] if name.startswith("seen ")]
        rows = [
            [ARMS[arm], *(spread([run[n] for run in runs], 1) for n in names)]
            for arm, runs in results.items()
        ]
        print("\nAccuracy by how many training sentences an intent has, in per cent:\n")
        print(markdown(["arm", *(name.removeprefix("seen ") for name in names)], rows))
    print(examples(data, shown[args.arms[-1]], ARMS[args.arms[-1]]))
    name = "intents_imbalanced.png" if args.imbalanced else "intents.png"
    draw(args.out / name, shown, results)
    print(f"\nThe scores of seed 0: {args.out / name}")
    say_if_quick(args)
    return results


def tables(results: dict[str, list[dict[str, Any]]], lams: dict[str, float]) -> str:
    heads = [*SCORES.values(), "accuracy"]
    rows = [[f"{ARMS[arm]}, λ = {lams[arm]:g}", *cells(runs)] for arm, runs in results.items()]
    pairs = [("center", "softmax"), ("norm", "softmax"), ("center", "norm"), ("weighted", "center")]
    gains = arm_differences(results, ARMS, pairs, [entries(name) for name in (*SCORES, "accuracy")])
    several = len(next(iter(results.values()))) > 1
    paired = ", paired by seed, with 95 % intervals by Student's t" if several else ""
    ending = [f"Differences{paired}:", markdown(["", *heads], gains)] if gains else []
    return "\n\n".join([markdown(["arm", *heads], rows), *ending])


def examples(data: Data, found: dict[str, dict[str, np.ndarray]], arm: str) -> str:
    """Sentences that are refused rightly and wrongly, if 5 % of the validation sentences are refused."""
    limit = np.quantile(found["val"][SHOWN], 0.95)
    rows = []
    for part, verdict in (("oos_test", "rightly"), ("test", "wrongly")):
        score = found[part][SHOWN]
        refused = np.flatnonzero(score > limit)
        for i in refused[np.argsort(-score[refused])][:5]:
            label = data.parts[part].labels[i]
            meant = "none" if label < 0 else data.intents[label]
            rows.append([data.parts[part].text[i], verdict, meant, data.intents[found[part]["predicted"][i]]])
    accepted = found["oos_test"][SHOWN] <= limit
    for i in np.flatnonzero(accepted)[np.argsort(found["oos_test"][SHOWN][accepted])][:5]:
        guess = data.intents[found["oos_test"]["predicted"][i]]
        rows.append([data.parts["oos_test"].text[i], "wrongly not", "none", guess])
    shares = [f"{100 * np.mean(found[part][SHOWN] > limit):.1f} %" for part in ("oos_test", "test")]
    title = (
        f"Refused by {SCORES[SHOWN]}, {arm}, seed 0: {shares[0]} of those of no intent, {shares[1]} of the"
    )
    heads = ["sentence", "refused", "intent", "prediction"]
    return f"\n{title} others. The clearest:\n\n{markdown(heads, rows)}"


def draw(path: Path, shown: dict[str, dict[str, Any]], results: dict[str, list[dict[str, Any]]]) -> None:
    """Histograms of one score for the sentences in and out, one panel for each arm."""
    figure = new_figure(4.5 * len(shown), 4)
    for axis, (arm, found) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
    ):
        known, others = found["test"][SHOWN], found["oos_test"][SHOWN]
        bins = np.linspace(0, max(known.max(), others.max()), 50)
        axis.hist(known, bins, density=True, alpha=0.6, label="of the 150 intents")
        axis.hist(others, bins, density=True, alpha=0.6, label="of no intent")
        limit = np.quantile(found["val"][SHOWN], 0.95)
        axis.axvline(limit, color="black", linestyle=":", label="5 % of the validation\nsentences are beyond")
        axis.set(title=f"{ARMS[arm]}: AUROC {results[arm][0][SHOWN]:.1f} %", yticks=[])
        axis.set(xlabel=f"distance to the {NEIGHBORS}th nearest training sentence")
    figure.axes[0].legend(fontsize="small")
    figure.suptitle("Test sentences: how far each lies from what training saw")
    figure.savefig(path, dpi=100)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What belongs to no class, with center loss and with a control.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, help="folder with data_full.json and data_imbalanced.json; else downloaded")
    add("--imbalanced", action="store_true", help="the uneven version, and a fourth arm with weights")
    add("--arms", choices=ARMS, nargs="+", help="which to train")
    add(
        "--grid",
        type=number(float, 0),
        nargs="+",
        default=[0.003, 0.01, 0.03, 0.1, 0.3],
        help="λ to choose from",
    )
    add("--select", type=number(int, 1), default=3, metavar="SEEDS", help="choose λ with so many seeds")
    add("--feat-dim", type=number(int, 2), default=64, help="features per sentence")
    add("--epochs", type=number(int, 1), default=20, help="epochs of each run")
    add_flags(parser, warmup=2, batch_size=256, seeds=10, lr=2e-3, quick="3 epochs, two λ")
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs, args.select, args.grid = min(args.epochs, 3), 1, args.grid[:2]
    chosen = args.arms or [arm for arm in ARMS if args.imbalanced or arm != "weighted"]
    args.arms = [arm for arm in ARMS if arm in chosen]
    check_flags(parser, args)
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Runs the comparison; per arm a list with every seed's numbers."""
    args = parse_args(argv)
    with _ctrl_c.stopped_by_hand():
        data = load(args.data, f"data_{'imbalanced' if args.imbalanced else 'full'}.json")
        if args.batch_size > len(data.parts["train"].labels):
            raise SystemExit(f"--batch-size: there are only {len(data.parts['train'].labels)} sentences")
        return compare(args, data, select(args, data))


if __name__ == "__main__":
    main()
