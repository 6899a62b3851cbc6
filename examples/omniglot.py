"""Does center loss help to tell apart what was never seen? Verification on Omniglot, with a control.

    python examples/omniglot.py

trains on the 964 characters of Omniglot's background alphabets and verifies pairs of drawings of the 659
characters of the evaluation alphabets by cosine similarity: are both of the same character? Three arms:
softmax alone, softmax with center loss, and the same with centers that stay near zero, in effect a penalty on
the norm of the features. Only the second has centers that move. A fourth arm asks whether they lag behind:
`--arms center means` compares them with class means that are made anew before each epoch.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import _ctrl_c
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import (
    Plane,
    add_flags,
    arm_differences,
    check_finite,
    check_flags,
    draw_planes,
    markdown,
    new_figure,
    number,
    over_seeds,
    progress,
    say_if_quick,
    spread,
    unit_length,
)
from _omniglot import MD5, Drawings, add_data_and_grid, check_selection, load
from flax import nnx
from sklearn.decomposition import PCA
from sklearn.metrics import roc_curve

import jax_centerloss

SIDE = 28
ARMS = {
    "softmax": "softmax alone",
    "center": "center loss",
    "frozen": "frozen centers (control)",
    "means": "means anew",
}
NEGATIVES = {"all": "all alphabets", "same": "same alphabet"}
METRICS = {"tar1": "TAR at FAR 1 %", "tar01": "TAR at FAR 0.1 %", "eer": "EER"}
TRAINED = {
    "own_distance": "own distance",
    "gap": "gap",
    "moved": "moved",
    "norm": "norm of features",
    "last": "last loss",
}
FAR = np.logspace(-4, 0, 200)  # Where the picture's curves are drawn.


class Block(nnx.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(inputs, outputs, (3, 3), strides=stride, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.norm(self.conv(x)))


class Model(nnx.Module):
    """Four convolutions with batch norm, 64 features, a softmax layer and one center per character."""

    def __init__(self, classes: int, feat_dim: int, *, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.Sequential(
            Block(1, 32, 2, rngs=rngs),
            Block(32, 64, 2, rngs=rngs),
            Block(64, 128, 2, rngs=rngs),
            Block(128, 128, 1, rngs=rngs),
        )
        self.embed = nnx.Linear(4 * 4 * 128, feat_dim, rngs=rngs)
        self.head = nnx.Linear(feat_dim, classes, rngs=rngs)
        # They start near zero in every arm, so that the arms differ in nothing but whether centers move.
        self.center_loss = jax_centerloss.nnx.CenterLoss(
            classes, feat_dim, centers_init=nnx.initializers.normal(0.01), centers_as="state", rngs=rngs
        )

    def features(self, images: jax.Array) -> jax.Array:
        x = self.blocks(images[..., None].astype(jnp.float32) / 255)
        return self.embed(x.reshape(len(x), -1))


def shifted(images: jax.Array, shifts: jax.Array) -> jax.Array:
    """Each image moved by its own `(rows, columns)`, from 0 to 4 for -2 to 2; what comes in is paper."""
    padded = jnp.pad(images, ((0, 0), (2, 2), (2, 2)))
    return jax.vmap(lambda image, by: jax.lax.dynamic_slice(image, by, (SIDE, SIDE)))(padded, shifts)


# One program for all arms: λ = 0 is softmax alone, α = 0 leaves centers where they are.
@nnx.jit(donate_argnums=(0, 1))
def train_step(
    model: Model,
    optimizer: nnx.Optimizer,
    images: jax.Array,
    shifts: jax.Array,
    labels: jax.Array,
    lam: jax.Array,
    alpha: jax.Array,
) -> jax.Array:
    def loss_fn(model: Model) -> tuple[jax.Array, jax.Array]:
        x = model.features(shifted(images, shifts))
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(model.head(x), labels).mean()
        return cross_entropy + lam * model.center_loss(x, labels), x

    (loss, x), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    model.center_loss.update_centers(x, labels, alpha=alpha, after=loss)
    return loss


@nnx.jit
def features_of(model: Model, images: jax.Array) -> jax.Array:
    return model.features(images)


def embed(model: Model, images: np.ndarray) -> np.ndarray:
    model.eval()
    batches = np.array_split(images, max(1, len(images) // 1024))
    features = np.concatenate([np.asarray(features_of(model, batch)) for batch in batches])
    model.train()
    return features


def batches(args: argparse.Namespace, size: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices and shifts of every step, the same in every arm."""
    random = np.random.default_rng(seed)
    for _ in range(args.epochs):
        order = random.permutation(size)
        for start in range(0, size - args.batch_size + 1, args.batch_size):
            yield order[start : start + args.batch_size], random.integers(0, 5, (args.batch_size, 2))


@cache  # One object for all runs: a new one would compile their step anew.
def make_optimizer(lr: float, weight_decay: float, steps: int) -> optax.GradientTransformation:
    sgd = optax.sgd(optax.cosine_decay_schedule(lr, steps), momentum=0.9)
    return optax.chain(optax.add_decayed_weights(weight_decay), sgd)


def train(
    args: argparse.Namespace, data: Drawings, arm: str, lam: float, seed: int, bar: Any
) -> tuple[Model, dict[str, Any]]:
    """A trained network, the mean loss of each epoch, and how compact the training characters are."""
    per_epoch = len(data.labels) // args.batch_size
    steps = args.epochs * per_epoch
    model = Model(data.labels.max() + 1, args.feat_dim, rngs=nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, make_optimizer(args.lr, args.weight_decay, steps), wrt=nnx.Param)
    # From lam / (steps of the warm-up) up to lam.
    lams = np.float32(lam * np.minimum(1.0, np.arange(1, steps + 1) / max(args.warmup * per_epoch, 1)))
    alpha = np.float32(args.alpha if arm == "center" else 0)
    losses, previous = [], None
    for i, (chosen, shifts) in enumerate(batches(args, len(data.labels), seed)):
        if arm == "means" and i % per_epoch == 0:
            means = jax_centerloss.init_from_features(
                model.center_loss, [(embed(model, data.images), data.labels)]
            )
            model.center_loss.centers = jax.tree.leaves(means)[0]
        if i == steps - per_epoch:
            previous = jax.tree.map(jnp.copy, nnx.state(model.center_loss))
        losses.append(
            train_step(model, optimizer, data.images[chosen], shifts, data.labels[chosen], lams[i], alpha)
        )
        if (i + 1) % per_epoch == 0:
            bar.set_postfix(arm=arm, lam=lam, seed=seed, loss=f"{float(losses[-1]):.3f}", refresh=False)
            bar.update()
    some = np.random.default_rng(0).permutation(len(data.labels))[:2048]
    x = embed(model, data.images[some])
    metrics = jax_centerloss.center_metrics(model.center_loss, x, data.labels[some], previous=previous)
    found = {name: float(value) for name, value in metrics.items()}
    found["norm"] = float(np.linalg.norm(x, axis=-1).mean())
    found["losses"] = np.reshape(jax.device_get(losses), (args.epochs, per_epoch)).mean(1).tolist()
    found["last"] = found["losses"][-1]
    return model, found


def pairs(data: Drawings, count: int) -> dict[str, np.ndarray]:
    """Pairs of drawings, `(2, n)`, of three kinds.

    All that are of one character, all of two characters of one alphabet, and some `count` at random of two
    characters from anywhere.
    """
    first, second = [], []
    for alphabet in np.unique(data.alphabets):
        members = np.flatnonzero(data.alphabets == alphabet)
        i, j = np.triu_indices(len(members), k=1)
        first.append(members[i])
        second.append(members[j])
    within = np.stack([np.concatenate(first), np.concatenate(second)])
    match = data.labels[within[0]] == data.labels[within[1]]
    anywhere = np.random.default_rng(0).integers(0, len(data.labels), (2, count))
    anywhere = anywhere[:, data.labels[anywhere[0]] != data.labels[anywhere[1]]]
    found = {"match": within[:, match], "same": within[:, ~match], "all": anywhere}
    if empty := [kind for kind, pair in found.items() if not pair.size]:
        raise SystemExit(f"The drawings hold no pairs of this kind: {', '.join(empty)}.")
    return found


def verify(features: np.ndarray, chosen: dict[str, np.ndarray]) -> dict[str, Any]:
    """Per kind of negatives: TAR at FAR 1 % and 0.1 %, EER, and the curve at `FAR`."""
    unit = unit_length(features)

    def similarity(pair: np.ndarray) -> np.ndarray:
        parts = np.array_split(pair, max(1, pair.shape[1] // 65536), axis=1)
        return np.concatenate([np.sum(unit[i] * unit[j], axis=-1) for i, j in parts])

    match = similarity(chosen["match"])
    found = {}
    for kind in NEGATIVES:
        other = similarity(chosen[kind])
        truth = np.repeat([True, False], [len(match), len(other)])
        far, tar, _ = roc_curve(truth, np.concatenate([match, other]))
        tar1, tar01 = np.interp([0.01, 0.001], far, tar)
        eer = np.interp(0, far + tar - 1, far)  # Where as many matches are refused as others accepted.
        found[kind] = {"tar1": tar1, "tar01": tar01, "eer": eer, "curve": np.interp(FAR, far, tar)}
    return found


def select(args: argparse.Namespace, background: Drawings) -> dict[str, float]:
    """λ of each arm by TAR at FAR 1 % on every fifth training alphabet, which these runs don't train on."""
    held_out = background.alphabets % 5 == 4
    if not held_out.any():
        raise SystemExit("--select holds every fifth training alphabet out: there have to be five.")
    learn, judge = background.part(~held_out), background.part(held_out)
    chosen = pairs(judge, args.negatives)
    runs = [(arm, lam) for arm in args.arms for lam in (args.grid if arm != "softmax" else [0.0])]
    scores, rows = {}, []
    with progress(len(runs) * args.select * args.epochs, "epoch") as bar:
        for arm, lam in runs:
            found = []
            for seed in range(1000, 1000 + args.select):  # Other seeds than those of the comparison.
                model, trained = train(args, learn, arm, lam, seed, bar)
                verified = verify(embed(model, judge.images), chosen)
                found.append(trained | {kind: 100 * verified[kind]["tar1"] for kind in NEGATIVES})
            scores[arm, lam] = np.mean([run["all"] for run in found])
            cells = [spread([run[name] for run in found], 2) for name in (*NEGATIVES, *TRAINED)]
            rows.append([ARMS[arm], f"{lam:g}", *cells])
            bar.write(" ".join(rows[-1]))
    heads = [f"{METRICS['tar1']}, {title}" for title in NEGATIVES.values()]
    print(f"\nOn the held-out training alphabets, {over_seeds(args.select)}, α = {args.alpha:g}, ", end="")
    print(f"λ over {args.warmup} of {args.epochs} epochs:\n")
    print(markdown(["arm", "λ", *heads, *TRAINED.values()], rows))
    best = {arm: max((run for run in runs if run[0] == arm), key=scores.get)[1] for arm in args.arms}
    print("\nChosen:", ", ".join(f"λ = {lam:g} for {ARMS[arm]}" for arm, lam in best.items()), "\n")
    return best


def compare(
    args: argparse.Namespace, background: Drawings, evaluation: Drawings, lams: dict[str, float]
) -> dict[str, Any]:
    """Trains every arm with every seed on all training characters and verifies the unseen ones."""
    chosen = pairs(evaluation, args.negatives)
    results: dict[str, Any] = {arm: [] for arm in args.arms}
    planes = []
    with progress(len(args.arms) * args.seeds * args.epochs, "epoch") as bar:
        for seed in range(args.seeds):
            for arm in args.arms:
                model, found = train(args, background, arm, lams[arm], seed, bar)
                check_finite(found["losses"], f"{ARMS[arm]}, λ = {lams[arm]:g}, seed {seed}")
                features = embed(model, evaluation.images)
                results[arm].append({**found, **verify(features, chosen)})
                if seed == 0:
                    planes.append(plane(ARMS[arm], features, evaluation))
    print(
        f"\n{len(evaluation.images)} drawings of {evaluation.labels.max() + 1} characters never trained on, ",
        end="",
    )
    print(f"{over_seeds(args.seeds)}, {args.epochs} epochs; pairs: ", end="")
    print(", ".join(f"{chosen[kind].shape[1]:,} {kind}" for kind in chosen), "\n")
    print(tables(results, lams))
    draw_curves(args.out / "omniglot.png", results)
    heading = "Ten characters never trained on: features of length 1, and their means"
    names = [f"character {j + 1}" for j in range(10)]
    draw_planes(args.out / "omniglot_features.png", heading, planes, names, main_directions=True)
    print(f"\nPictures: omniglot.png and omniglot_features.png in {args.out}")
    say_if_quick(args)
    return results


def column(runs: Sequence[dict[str, Any]], kind: str, metric: str) -> list[float]:
    return [100 * run[kind][metric] for run in runs]


def tables(results: dict[str, Any], lams: dict[str, float]) -> str:
    """Verification in per cent; differences between arms, paired by seed; and the metrics of training."""
    kinds = [(kind, metric) for kind in NEGATIVES for metric in METRICS]
    heads = [f"{METRICS[metric]}, {NEGATIVES[kind]}" for kind, metric in kinds]
    rows = [
        [f"{ARMS[arm]}, λ = {lams[arm]:g}", *(spread(column(results[arm], *which), 2) for which in kinds)]
        for arm in results
    ]
    pairs = [("center", "softmax"), ("frozen", "softmax"), ("center", "frozen"), ("means", "center")]
    gains = arm_differences(
        results, ARMS, pairs, [partial(column, kind=kind, metric=metric) for kind, metric in kinds]
    )
    trained = [
        [ARMS[arm], *(spread([run[name] for run in runs], 2) for name in TRAINED)]
        for arm, runs in results.items()
    ]
    several = len(next(iter(results.values()))) > 1
    paired = ", paired by seed; 95 % intervals by Student's t, over seeds, for these characters"
    differences = [f"Differences{paired if several else ''}:", markdown(["", *heads], gains)]
    return "\n\n".join(
        [
            "In per cent. Negatives are pairs of two characters, of any alphabets or of the same alphabet.",
            markdown(["arm", *heads], rows),
            *(differences if gains else []),
            "By `center_metrics`, of training drawings at the end, `moved` over the last epoch. Centers\n"
            "that don't move lie near zero: the own distance is the norm, and no gap tells classes apart.",
            markdown(["arm", *TRAINED.values()], trained),
        ]
    )


def draw_curves(path: Path, results: dict[str, Any]) -> None:
    figure = new_figure(12, 5)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (kind, title) in zip(axes, NEGATIVES.items(), strict=True):
        for arm, runs in results.items():
            curves = np.stack([run[kind]["curve"] for run in runs])
            (line,) = axis.plot(FAR, curves.mean(0), label=ARMS[arm])
            axis.fill_between(
                FAR, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.25, linewidth=0
            )
        axis.set(
            xscale="log",
            xlabel="false acceptance rate",
            title=f"negatives from {title.replace('same', 'the same')}",
        )
        axis.set(xlim=(1e-4, 1), ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="true acceptance rate")
    several = len(next(iter(results.values()))) > 1
    axes[0].legend(loc="lower right", title="mean and range over seeds" if several else None)
    figure.suptitle("Verification of characters never trained on")
    figure.savefig(path, dpi=100)


def plane(title: str, features: np.ndarray, data: Drawings) -> Plane:
    """Ten unseen characters of the first evaluation alphabet, on their features' two main directions."""
    characters = np.unique(data.labels[data.alphabets == data.alphabets[0]])[:10]
    chosen = np.isin(data.labels, characters)
    labels = np.searchsorted(characters, data.labels[chosen])
    points = PCA(2, random_state=0).fit_transform(unit_length(features[chosen]))
    params = jax_centerloss.init_centers(jax.random.key(0), len(characters), 2)
    return Plane(title, jax_centerloss.init_from_features(params, [(points, labels)]), points, labels)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Verification of characters never trained on, with and without center loss.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_data_and_grid(parser, [0.001, 0.003, 0.01, 0.03, 0.1])
    add = parser.add_argument
    add("--lam-center", type=number(float, 0), default=0.03, help="weight λ of the center loss")
    add("--lam-frozen", type=number(float, 0), default=0.01, help="the same with frozen centers")
    add("--arms", choices=ARMS, nargs="+", default=["softmax", "center", "frozen"], help="which to train")
    add("--feat-dim", type=number(int, 2), default=64, help="features per drawing")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="of all parameters of the network")
    add("--negatives", type=number(int, 1), default=1_000_000, help="pairs of two characters from anywhere")
    add("--epochs", type=number(int, 1), default=12, help="epochs of each run")
    quick = "at most 2 epochs, 5 alphabets for training and 5 others"
    add_flags(parser, warmup=3, batch_size=128, seeds=5, lr=0.1, quick=quick)
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs = min(args.epochs, 2)
    args.arms = [arm for arm in ARMS if arm in args.arms]
    check_selection(parser, args)
    check_flags(parser, args)
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the comparison; per arm a list with every seed's metrics."""
    args = parse_args(argv)
    lams = {"softmax": 0.0, "center": args.lam_center, "frozen": args.lam_frozen, "means": args.lam_center}
    with _ctrl_c.stopped_by_hand():
        background, evaluation = (load(args.data, name, SIDE) for name in MD5)
        if args.quick:  # Five alphabets of each.
            background, evaluation = (data.part(data.alphabets < 5) for data in (background, evaluation))
        count = len(background.labels)
        if args.batch_size > count // (2 if args.select else 1):  # --select trains on a part.
            raise SystemExit(f"--batch-size: {args.batch_size} is too much for {count} drawings")
        if args.select:
            lams = select(args, background)
        return {"lams": lams} if args.only_select else compare(args, background, evaluation, lams)


if __name__ == "__main__":
    main()
