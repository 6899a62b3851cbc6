"""The recipe of person re-identification with and without center loss; drawers are the cameras.

    python examples/reid.py

trains on Omniglot's background alphabets as the widely copied PyTorch scripts do, characters in the place of
people. On the features there are the triplet loss of the hardest pairs and the center loss, of weight λ =
0.0005; behind them a batch normalization, the neck, and a smoothed cross-entropy. A batch is P characters
with K drawings each. Adam moves the network, SGD at rate 0.5 the centers. Every drawing by four of the
drawers of characters never trained on then looks for those of its character by all other drawers, with
features from behind the neck and from before it.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import _ctrl_c
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import (
    add_centers_flag,
    add_flags,
    check_finite,
    difference,
    how_centers_move,
    make_folder,
    markdown,
    new_figure,
    number,
    over_seeds,
    progress,
    say_if_quick,
    spread,
    unit_length,
)
from _omniglot import MD5, Drawings, load
from flax import nnx
from omniglot import SIDE, Block, shifted

import jax_centerloss

MARGIN, SMOOTHING = 0.3, 0.1
QUERY_DRAWERS = 4
METRICS = {
    "map": ("mAP, %", 2),
    "rank1": ("rank-1, %", 2),
    "map_before": ("mAP before the neck, %", 2),
    "rank1_before": ("rank-1 before the neck, %", 2),
    "loss": ("last loss", 3),
    "center": ("λ · center loss in it", 4),
}


class Model(nnx.Module):
    def __init__(self, classes: int, feat_dim: int, *, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.Sequential(
            Block(1, 32, 2, rngs=rngs), Block(32, 64, 2, rngs=rngs), Block(64, 128, 2, rngs=rngs)
        )
        self.embed = nnx.Linear(4 * 4 * 128, feat_dim, rngs=rngs)
        self.neck = nnx.BatchNorm(feat_dim, momentum=0.9, use_bias=False, rngs=rngs)
        small = nnx.initializers.normal(0.001)
        self.head = nnx.Linear(feat_dim, classes, use_bias=False, kernel_init=small, rngs=rngs)
        self.center_loss = jax_centerloss.nnx.CenterLoss(classes, feat_dim, rngs=rngs)

    def features(self, images: jax.Array) -> jax.Array:
        x = self.blocks(images[..., None].astype(jnp.float32) / 255)
        return self.embed(x.reshape(len(x), -1))


def hard_triplet(x: jax.Array, labels: jax.Array) -> jax.Array:
    """Each sample's farthest of its class has to be nearer, by a margin, than the nearest of another."""
    distance = jnp.sqrt(jnp.maximum(jax_centerloss.distance_map(x, x), 1e-12))
    same = labels[:, None] == labels
    farthest = jnp.max(jnp.where(same, distance, 0.0), axis=-1)
    nearest = jnp.min(jnp.where(same, jnp.inf, distance), axis=-1)
    return jnp.maximum(farthest - nearest + MARGIN, 0.0).mean()


@nnx.jit(donate_argnums=(0, 1))
def train_step(
    model: Model, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array, lam: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the loss, and what of it is the center loss times λ."""

    def loss_fn(model: Model) -> tuple[jax.Array, jax.Array]:
        x = model.features(images)
        logits = model.head(model.neck(x))
        target = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), SMOOTHING)
        cross_entropy = optax.softmax_cross_entropy(logits, target).mean()
        center = lam * model.center_loss(x, labels)
        return cross_entropy + hard_triplet(x, labels) + center, center

    (loss, center), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    return loss, center


move = jax.jit(shifted)


@cache  # One object for all runs: a new one would compile their step anew.
def make_optimizer(lam: float, lr: float, alpha: float, steps: int) -> optax.GradientTransformation:
    """What PyTorch's scripts do by two optimizers and `param.grad *= 1 / lam`."""
    # Of 120 epochs there, the rate rises in the first 10 and falls tenfold after 40 and after 70.
    rise, *falls = (steps * epoch // 120 for epoch in (10, 40, 70))
    fall = optax.piecewise_constant_schedule(lr, {step - rise: 0.1 for step in falls})
    rate = optax.join_schedules([optax.linear_schedule(lr / 100, lr, rise), fall], [rise])
    adam = optax.chain(optax.add_decayed_weights(5e-4), optax.adam(rate))
    return jax_centerloss.with_center_optimizer(adam, centers=optax.sgd(alpha), weight=lam)


def batches(labels: np.ndarray, size: int, instances: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """P x K: batches of K drawings of P characters; an epoch has the first multiple of K of each once."""
    random = np.random.default_rng(seed)
    count = np.bincount(labels).min() // instances * instances
    drawings = np.stack([np.flatnonzero(labels == j)[:count] for j in range(labels.max() + 1)])
    for _ in range(epochs):
        drawings = random.permuted(drawings, axis=1)
        for start in range(0, count, instances):
            part = random.permutation(drawings[:, start : start + instances]).ravel()
            yield from part[: len(part) // size * size].reshape(-1, size)


def train(
    args: argparse.Namespace, data: Drawings, lam: float, seed: int, bar: Any
) -> tuple[Model, dict[str, Any]]:
    """A trained network, and the mean loss of each epoch."""
    steps = [*batches(data.labels, args.batch_size, args.instances, args.epochs, seed)]
    shifts = np.random.default_rng(seed).integers(0, 5, (len(steps), args.batch_size, 2))
    model = Model(data.labels.max() + 1, args.feat_dim, rngs=nnx.Rngs(seed))
    alpha = args.alpha
    if args.centers == "zero":
        model.center_loss.centers = jnp.zeros_like(model.center_loss.centers[...])
        alpha = 0.0
    tx = make_optimizer(lam, args.lr, alpha, len(steps))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = []
    for chosen, by in zip(steps, shifts, strict=True):
        images = move(data.images[chosen], by)
        losses.append(train_step(model, optimizer, images, data.labels[chosen], np.float32(lam)))
        bar.update()
    losses = np.asarray(jax.device_get(losses))
    check_finite(losses, f"λ = {lam:g}, seed {seed}")
    losses, centers = losses.reshape(args.epochs, -1, 2).mean(1).T.tolist()
    return model, {"losses": losses, "loss": losses[-1], "center": centers[-1]}


@nnx.jit
def before_and_behind_neck(model: Model, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = model.features(images)
    return x, model.neck(x)


def embed(model: Model, images: np.ndarray) -> list[np.ndarray]:
    """Features of length 1, from before the neck and from behind it."""
    model.eval()
    parts = np.array_split(images, max(1, len(images) // 1024))
    found = [jax.device_get(before_and_behind_neck(model, part)) for part in parts]
    return [unit_length(np.concatenate(features)) for features in zip(*found, strict=True)]


def retrieve(
    features: np.ndarray, labels: np.ndarray, cameras: np.ndarray, queries: np.ndarray
) -> tuple[float, float]:
    """Mean average precision and rank-1, in per cent, by cosine similarity of features of length 1.

    A query is looked for in what all cameras but its own have seen. A wrong one that is exactly as alike as
    a right one counts as found before it, so that a network to which all images are alike finds nothing.
    """
    precisions, first = [], []
    for query in queries:
        alike = features @ features[query]
        same, elsewhere = labels == labels[query], cameras != cameras[query]
        right = np.sort(alike[same & elsewhere])[::-1]
        if not len(right):  # Nothing is there to be found: the query does not count.
            continue
        wrong_before = np.sum(alike[~same & elsewhere] >= right[:, None], axis=-1)
        place = np.arange(1, len(right) + 1)
        precisions.append(np.mean(place / (place + wrong_before)))
        first.append(wrong_before[0] == 0)
    return 100 * float(np.mean(precisions)), 100 * float(np.mean(first))


def draw(path: Path, data: Drawings, queries: np.ndarray, arms: dict[float, np.ndarray]) -> None:
    """Some queries, and what was found for each: framed green if it is the same character, red if not."""
    shown = queries[:: max(1, len(queries) // 8)][:8]
    figure = new_figure(5 * len(arms), 4)
    axes = figure.subplots(1, len(arms), squeeze=False)[0]
    for axis, (lam, features) in zip(axes, arms.items(), strict=True):
        canvas = np.full((len(shown) * (SIDE + 6), 11 * (SIDE + 6), 3), 255, np.uint8)
        for row, query in enumerate(shown):
            order = np.argsort(-(features @ features[query]), kind="stable")
            found = order[data.writers[order] != data.writers[query]][:10]
            for column, j in enumerate([query, *found]):
                cell = canvas[(SIDE + 6) * row :, (SIDE + 6) * column :][: SIDE + 4, : SIDE + 4]
                right = data.labels[j] == data.labels[query]
                cell[:] = (0, 0, 0) if column == 0 else (0, 150, 0) if right else (220, 0, 0)
                cell[2:-2, 2:-2] = 255 - data.images[j][..., None]
        axis.imshow(canvas)
        axis.set_title(f"λ = {lam:g}: the query, and the ten found first")
        axis.axis("off")
    figure.savefig(path, dpi=110)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Re-identification of characters never trained on, with and without center loss.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        help="folder with images_background*.zip and images_evaluation*.zip; else downloaded",
    )
    add("--lams", type=number(float, 0), nargs="+", default=[0.0, 5e-4], help="weights λ of the center loss")
    add("--instances", type=number(int, 2), default=4, help="K, the drawings of each character in a batch")
    add("--feat-dim", type=number(int, 2), default=128, help="features per drawing")
    add("--epochs", type=number(int, 1), default=8, help="epochs of each run")
    add_centers_flag(parser, "optax", "zero")
    quick = "at most 2 epochs, 5 alphabets for training and 5 others"
    add_flags(parser, warmup=None, batch_size=64, seeds=5, lr=3e-3, quick=quick)
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.epochs = 1, min(args.epochs, 2)
    if args.batch_size % args.instances or args.batch_size == args.instances:
        words = f"{args.batch_size} is no multiple of --instances {args.instances}, or too few"
        parser.error(f"argument --batch-size: {words}")
    make_folder(parser, args.out)
    return args


def tables(results: dict[float, list[dict[str, Any]]]) -> str:
    def cells(show: Callable[..., str], *lams: float) -> list[str]:
        arms = [results[lam] for lam in lams]
        return [show(*([run[name] for run in arm] for arm in arms), by) for name, (_, by) in METRICS.items()]

    heads = ["", *(title for title, _ in METRICS.values())]
    parts = [markdown(heads, [[f"λ = {lam:g}", *cells(spread, lam)] for lam in results])]
    first, *others = results
    if others:
        several = len(results[first]) > 1
        paired = ", paired by seed; 95 % intervals by Student's t, over seeds" if several else ""
        rows = [[f"λ = {lam:g} - λ = {first:g}", *cells(difference, lam, first)] for lam in others]
        parts += [f"Differences{paired}:", markdown(heads, rows)]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> dict[float, list[dict[str, Any]]]:
    """Runs the comparison; per λ a list with every seed's metrics."""
    args = parse_args(argv)
    with _ctrl_c.stopped_by_hand():
        learn, judge = (load(args.data, name, SIDE) for name in MD5)
        if args.quick:  # Five alphabets of each.
            learn, judge = (data.part(data.alphabets < 5) for data in (learn, judge))
        queries = np.flatnonzero((judge.writers >= 1) & (judge.writers <= QUERY_DRAWERS))
        if not len(queries):
            raise SystemExit(
                f"There is no drawing by the drawers 1 to {QUERY_DRAWERS}; the published ones have."
            )
        steps = sum(1 for _ in batches(learn.labels, args.batch_size, args.instances, args.epochs, seed=0))
        if not steps:
            wanted = f"{args.batch_size} with --instances {args.instances}"
            raise SystemExit(f"--batch-size: {wanted} is too much for {learn.labels.max() + 1} characters")
        results: dict[float, list[dict[str, Any]]] = {lam: [] for lam in args.lams}
        shown = {}
        with progress(args.seeds * len(results) * steps, "step") as bar:
            for seed in range(args.seeds):
                for lam in results:
                    bar.set_postfix(lam=lam, seed=seed, refresh=False)
                    model, found = train(args, learn, lam, seed, bar)
                    for kind, features in zip(("_before", ""), embed(model, judge.images), strict=True):
                        ranked = retrieve(features, judge.labels, judge.writers, queries)
                        found |= dict(zip((f"map{kind}", f"rank1{kind}"), ranked, strict=True))
                    results[lam].append(found)
                    shown.setdefault(lam, features)
        print(f"\n{len(queries):,} queries among {len(judge.labels):,} drawings, ", end="")
        print(f"{how_centers_move(args)}, {over_seeds(args.seeds)}, {args.epochs} epochs\n")
        print(tables(results))
        draw(args.out / "reid.png", judge, queries, shown)
        print(f"\nPicture: reid.png in {args.out}")
        say_if_quick(args)
        return results


if __name__ == "__main__":
    main()
