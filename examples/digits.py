"""The paper's picture in miniature: scikit-learn's digits, with softmax alone and with center loss.

    python examples/digits.py

trains a small Flax NNX network both ways, over several seeds, prints a table and draws the feature plane.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import _ctrl_c
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
    compactness,
    compactness_table,
    draw_planes,
    how_centers_move,
    number,
    over_seeds,
    progress,
    say_if_quick,
)
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jax_centerloss

CLASSES = 10
ARMS = {"softmax": "softmax alone", "center": "center loss"}
Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Epoch = Callable[..., tuple[Any, jax.Array]]


class Model(nnx.Module):
    """64 pixels - 128 - 128 - features - 10 classes, and one center per class."""

    def __init__(self, feat_dim: int, centers: str, *, rngs: nnx.Rngs) -> None:
        self.hidden1 = nnx.Linear(64, 128, rngs=rngs)
        self.hidden2 = nnx.Linear(128, 128, rngs=rngs)
        self.embed = nnx.Linear(128, feat_dim, rngs=rngs)
        # No bias: with one, classes could be told apart by how far out they lie along one line; without, the
        # softmax has to give each class its own direction from the origin, as in the paper's picture.
        self.head = nnx.Linear(feat_dim, CLASSES, use_bias=False, rngs=rngs)
        # What the rule moves is no parameter: it has no gradient, and the optimizer does not see it.
        kind = "state" if centers == "rule" else "param"
        self.center_loss = jax_centerloss.nnx.CenterLoss(CLASSES, feat_dim, centers_as=kind, rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        return self.embed(nnx.relu(self.hidden2(nnx.relu(self.hidden1(x)))))


def lam_at(steps: np.ndarray, lam: float, warmup_steps: int) -> np.ndarray:
    """The weight of the center loss at each step: linear from lam / warmup_steps up to lam."""
    return (lam * np.minimum(1.0, (steps + 1) / max(warmup_steps, 1))).astype(np.float32)


@cache  # One object for all runs: a new one would compile their step anew.
def make_optimizer(lr: float, steps: int) -> optax.GradientTransformation:
    return optax.sgd(optax.cosine_decay_schedule(lr, steps), momentum=0.9)


@cache
def with_centers(
    tx: optax.GradientTransformation, alpha: float, lam: float, warmup_steps: int, steps: int
) -> optax.GradientTransformationExtraArgs:
    """`tx`, with plain SGD of rate `alpha` for the centers, whatever λ is."""
    lams = jnp.asarray(lam_at(np.arange(steps), lam, warmup_steps))
    return jax_centerloss.with_center_optimizer(tx, centers=optax.sgd(alpha), weight=lambda step: lams[step])


def make_epoch(args: argparse.Namespace) -> Epoch:
    """One jitted program for every run by rule: λ is traced, so λ = 0 (softmax alone) is no other program."""
    by_rule = args.centers == "rule"

    def loss_fn(model: Model, x: jax.Array, y: jax.Array, lam: jax.Array) -> tuple[jax.Array, jax.Array]:
        features = model.features(x)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(model.head(features), y).mean()
        return cross_entropy + lam * model.center_loss(features, y), features

    def step(model: Model, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array, lam: jax.Array) -> jax.Array:
        (loss, features), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, x, y, lam)
        optimizer.update(model, grads)
        if by_rule:
            model.center_loss.update_centers(features, y, alpha=args.alpha, after=loss)
        return loss

    # Donated, so that parameters and centers are written in place.
    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def epoch(
        graphdef: Any, state: Any, x: jax.Array, y: jax.Array, order: jax.Array, lams: jax.Array
    ) -> tuple[Any, jax.Array]:
        def body(state: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            chosen, lam = batch
            model, optimizer = nnx.merge(graphdef, state)
            loss = step(model, optimizer, x[chosen], y[chosen], lam)
            return nnx.state((model, optimizer)), loss

        state, losses = jax.lax.scan(body, state, (order, lams))
        return state, jnp.mean(losses)

    return epoch


@nnx.jit
def predict(model: Model, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The features of a network, and the classes that its softmax layer finds."""
    features = model.features(x)
    return features, jnp.argmax(model.head(features), axis=-1)


def train(
    args: argparse.Namespace,
    data: Data,
    epoch: Epoch,
    *,
    lam: float,
    seed: int,
    bar: tqdm,
) -> tuple[Model, Any, list[float]]:
    """A trained network, its centers one epoch before the end, and the mean loss of each epoch."""
    x, y = jnp.asarray(data[0]), jnp.asarray(data[1])
    batches = len(y) // args.batch_size  # Samples beyond the last full batch wait for another epoch.
    steps, warmup_steps = args.epochs * batches, args.warmup * batches
    lams = lam_at(np.arange(steps), lam, warmup_steps).reshape(args.epochs, batches)
    tx = make_optimizer(args.lr, steps)
    if args.centers == "optax":
        tx = with_centers(tx, args.alpha, lam, warmup_steps, steps)
    model = Model(args.feat_dim, args.centers, rngs=nnx.Rngs(seed))
    graphdef, state = nnx.split((model, nnx.Optimizer(model, tx, wrt=nnx.Param)))
    shuffle = np.random.default_rng(seed)
    losses = []
    for i in range(args.epochs):
        previous = jax.tree.map(jnp.copy, nnx.state(nnx.merge(graphdef, state)[0].center_loss))
        order = shuffle.permutation(len(y))[: batches * args.batch_size].reshape(batches, -1)
        state, loss = epoch(graphdef, state, x, y, order, lams[i])
        losses.append(float(loss))
        bar.set_postfix(seed=seed, lam=lam, loss=f"{losses[-1]:.3f}", refresh=False)
        bar.update()
    check_finite(losses, f"λ = {lam:g}, seed {seed}")
    model, _ = nnx.merge(graphdef, state)
    return model, previous, losses


def parse_args(argv: Sequence[str] | None, train_size: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Softmax alone against softmax + λ · center loss on scikit-learn's digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--lam", type=number(float, 0), default=0.1, help="weight λ of the center loss")
    add_centers_flag(parser, "rule", "optax")
    add("--feat-dim", type=number(int, 1), default=2, help="features per sample; drawn if they are 2")
    add("--epochs", type=number(int, 1), default=60, help="epochs of each run")
    add_flags(parser, warmup=0, batch_size=64, seeds=5, lr=0.1, quick="at most 5 epochs")
    args = parser.parse_args(argv)
    if args.batch_size > train_size:
        parser.error(f"argument --batch-size: {args.batch_size} is above the {train_size} training samples")
    if args.quick:
        args.epochs = min(args.epochs, 5)
    check_flags(parser, args)
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the comparison; per arm a list with every seed's metrics and losses."""
    digits = load_digits()
    pixels, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    x_train, x_test, y_train, y_test = train_test_split(
        pixels, labels, test_size=0.25, stratify=labels, random_state=0
    )
    data = (x_train, y_train, x_test, y_test)
    args = parse_args(argv, len(y_train))
    epoch = make_epoch(args)

    with _ctrl_c.stopped_by_hand():
        return compare(args, data, epoch)


def compare(args: argparse.Namespace, data: Data, epoch: Epoch) -> dict[str, Any]:
    """Trains every arm with every seed, prints the table and draws the picture of seed 0."""
    x_train, y_train, x_test, y_test = data
    results: dict[str, Any] = {arm: [] for arm in ARMS}
    planes = []
    with progress(len(ARMS) * args.seeds * args.epochs, "epoch") as bar:
        for seed in range(args.seeds):
            for arm, title in ARMS.items():
                lam = args.lam if arm == "center" else 0.0
                model, previous, losses = train(args, data, epoch, lam=lam, seed=seed, bar=bar)
                features, predicted = map(np.asarray, predict(model, x_test))
                train_features, _ = predict(model, x_train)
                metrics, means = compactness(
                    (np.asarray(train_features), y_train),
                    (features, y_test),
                    predicted,
                    model.center_loss,
                    previous,
                )
                results[arm].append(metrics | {"losses": losses})
                if seed == 0:
                    # Softmax alone pays no heed to its centers.
                    marks = ("class means", means) if arm == "softmax" else ("centers", model.center_loss)
                    heading = f"{title}: {metrics['accuracy']:.1f} % right, crosses are {marks[0]}"
                    planes.append(Plane(heading, marks[1], features, y_test))
    print(f"\n{over_seeds(args.seeds)}, {args.epochs} epochs, λ = {args.lam:g}, ", end="")
    print(f"{how_centers_move(args)}\n")
    print(compactness_table({title: results[arm] for arm, title in ARMS.items()}))
    say_if_quick(args)
    results["picture"] = args.out / "digits.png" if args.feat_dim == 2 else None
    if results["picture"]:
        heading = "Test digits in the feature plane"
        draw_planes(results["picture"], heading, planes, [str(j) for j in range(CLASSES)])
        print(f"\nThe feature planes of seed 0: {results['picture']}")
    else:
        print(f"\nNo picture: it needs --feat-dim 2, not {args.feat_dim}.")
    return results


if __name__ == "__main__":
    main()
