"""The paper's picture in miniature: scikit-learn's digits, with softmax alone and with center loss.

    python examples/digits.py

trains a small Flax NNX network both ways, over several seeds, prints a table and draws the feature plane.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jax_centerloss

CLASSES = 10
ARMS = {"softmax": "softmax alone", "center": "with center loss"}
METRICS = {
    "accuracy": ("test accuracy, %", "test digits that the softmax classifies rightly"),
    "nearest_mean": (
        "nearest-class-mean accuracy, %",
        "the same by the nearest of the class means of the training features",
    ),
    "own_median": (
        "own-class distance, median",
        "Euclidean, from a test feature to the training mean of its own class; half of them are nearer",
    ),
    "own_mean": ("own-class distance, mean", "the mean of the same distances"),
    "between": ("distance between class means", "Euclidean, mean over the 45 pairs of training class means"),
    "ratio": ("ratio", "median own-class distance / distance between class means: lower is more compact"),
}

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


def divide_by_lam() -> optax.GradientTransformationExtraArgs:
    """Takes λ, which changes from step to step, out of the centers' gradient again; at λ = 0 they rest."""

    def update(updates: Any, state: Any, params: Any = None, *, lam: jax.Array, **_: Any) -> Any:
        del params
        inverse = jnp.where(lam > 0, 1 / jnp.where(lam > 0, lam, jnp.ones_like(lam)), jnp.zeros_like(lam))
        return jax.tree.map(lambda g: inverse * g, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def make_optimizer(args: argparse.Namespace, steps: int) -> optax.GradientTransformationExtraArgs:
    tx = optax.sgd(optax.cosine_decay_schedule(args.lr, steps), momentum=0.9)
    if args.centers == "optax":
        own = optax.chain(divide_by_lam(), optax.sgd(args.alpha))
        return jax_centerloss.with_center_optimizer(tx, centers=own)
    return optax.with_extra_args_support(tx)


def make_epoch(args: argparse.Namespace) -> Epoch:
    """One jitted program for every run: λ is traced, so λ = 0 (softmax alone) is no other program."""
    by_rule = args.centers == "rule"

    def loss_fn(model: Model, x: jax.Array, y: jax.Array, lam: jax.Array) -> tuple[jax.Array, jax.Array]:
        features = model.features(x)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(model.head(features), y).mean()
        return cross_entropy + lam * model.center_loss(features, y), features

    def step(model: Model, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array, lam: jax.Array) -> jax.Array:
        (loss, features), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, x, y, lam)
        optimizer.update(model, grads, lam=lam)
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


def train(
    args: argparse.Namespace,
    data: Data,
    epoch: Epoch,
    tx: optax.GradientTransformation,
    *,
    lam: float,
    seed: int,
    bar: tqdm,
) -> tuple[Model, list[float]]:
    """Trains a fresh model, the same one for the same seed, and returns it with the mean loss per epoch."""
    x, y = jnp.asarray(data[0]), jnp.asarray(data[1])
    model = Model(args.feat_dim, args.centers, rngs=nnx.Rngs(seed))
    graphdef, state = nnx.split((model, nnx.Optimizer(model, tx, wrt=nnx.Param)))
    shuffle = np.random.default_rng(seed)
    batches = len(y) // args.batch_size  # Samples beyond the last full batch wait for another epoch.
    losses = []
    for i in range(args.epochs):
        order = shuffle.permutation(len(y))[: batches * args.batch_size].reshape(batches, -1)
        steps = np.arange(i * batches, (i + 1) * batches)
        state, loss = epoch(graphdef, state, x, y, order, lam_at(steps, lam, args.warmup * batches))
        losses.append(float(loss))
        bar.set_postfix(seed=seed, lam=lam, loss=f"{losses[-1]:.3f}", refresh=False)
        bar.update()
    model, _ = nnx.merge(graphdef, state)
    return model, losses


@nnx.jit
def predict(model: Model, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    features = model.features(x)
    return features, jnp.argmax(model.head(features), axis=-1)


def class_means(features: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.stack([features[y == j].mean(0) for j in range(CLASSES)])


def evaluate(model: Model, data: Data) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """The metrics, the test features, and the class means of the training features."""
    x_train, y_train, x_test, y_test = data
    means = class_means(np.asarray(predict(model, jnp.asarray(x_train))[0]), y_train)
    features, predicted = map(np.asarray, predict(model, jnp.asarray(x_test)))
    nearest = np.asarray(jax_centerloss.nearest_center(means, features))
    own = np.linalg.norm(features - means[y_test], axis=-1)
    first, second = np.triu_indices(CLASSES, k=1)
    between = np.linalg.norm(means[first] - means[second], axis=-1).mean()
    metrics = {
        "accuracy": 100 * np.mean(predicted == y_test),
        "nearest_mean": 100 * np.mean(nearest == y_test),
        "own_median": np.median(own),
        "own_mean": own.mean(),
        "between": between,
        "ratio": np.median(own) / between,
    }
    return {name: float(value) for name, value in metrics.items()}, features, means


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Both arms side by side, mean ± standard deviation over the seeds, and what each line means."""

    def cell(name: str, values: list[float]) -> str:
        digits = {"accuracy": 1, "nearest_mean": 1, "ratio": 4}.get(name, 2)
        spread = f" ± {np.std(values):.{digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{spread}"

    lines = [f"{'':32}" + "".join(f"{title:>20}" for title in ARMS.values())]
    for name, (title, _) in METRICS.items():
        lines.append(f"{title:32}" + "".join(f"{cell(name, results[arm][name]):>20}" for arm in ARMS))
    return "\n".join([*lines, "", *(f"{title}: {meaning}" for title, meaning in METRICS.values())])


def draw(path: Path, y: np.ndarray, panels: Sequence[tuple[str, str, np.ndarray, np.ndarray]]) -> None:
    """Feature planes side by side, from `(title, name of the marks, features, marks)`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(12, 6), layout="constrained")
    colors = plt.get_cmap("tab10").colors
    for axis, (title, name, features, marks) in zip(axes, panels, strict=True):
        dots = [
            axis.scatter(*features[y == j].T, s=16, color=colors[j], linewidths=0) for j in range(CLASSES)
        ]
        cross = axis.scatter(*marks.T, s=80, marker="X", color="black", edgecolors="white", zorder=3)
        axis.legend([cross], [name], loc="lower left")
        low, high = features.min(0), features.max(0)
        reach = 0.55 * (high - low).max()
        middle = (low + high) / 2
        axis.set(title=title, xlabel="feature 1", ylabel="feature 2", aspect="equal")
        axis.set(xlim=middle[0] + reach * np.array([-1, 1]), ylim=middle[1] + reach * np.array([-1, 1]))
        axis.grid(alpha=0.3)
    figure.suptitle("Test digits in the feature plane (each panel has its own scale)")
    figure.legend(dots, range(CLASSES), loc="outside right center", title="digit", markerscale=2)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _number(kind: type, low: float, *, open_end: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite number from `low` up, `low` itself left out if `open_end`."""
    bound = f"above {low}" if open_end else f"at least {low}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a valid {kind.__name__}") from None
        if not math.isfinite(value) or value < low or (open_end and value == low):
            raise argparse.ArgumentTypeError(f"must be finite and {bound}, got {text}")
        return value

    return parse


def parse_args(argv: Sequence[str] | None, train_size: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Softmax alone against softmax + λ · center loss on scikit-learn's digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--lam", type=_number(float, 0), default=0.1, help="weight λ of the center loss")
    add("--warmup", type=_number(int, 0), default=0, help="epochs over which λ rises linearly to --lam")
    add("--alpha", type=_number(float, 0), default=0.5, help="rate of the centers, whatever λ is")
    add(
        "--centers",
        choices=["rule", "optax"],
        default="rule",
        help="what moves the centers: the paper's rule, or gradient descent by an optax chain of their own",
    )
    add("--epochs", type=_number(int, 1), default=60, help="epochs of each run")
    add("--seeds", type=_number(int, 1), default=5, help="runs of each kind, with seeds 0, 1, ...")
    add("--feat-dim", type=_number(int, 1), default=2, help="features per sample; drawn if they are 2")
    add("--batch-size", type=_number(int, 1), default=64, help="samples per step")
    add("--lr", type=_number(float, 0, open_end=True), default=0.1, help="peak rate of the network's SGD")
    add("--out", type=Path, default=Path("out"), help="folder for digits.png")
    add("--quick", action="store_true", help="one seed and at most 5 epochs, to see that it runs")
    args = parser.parse_args(argv)
    if args.batch_size > train_size:
        parser.error(f"argument --batch-size: {args.batch_size} is above the {train_size} training samples")
    if args.warmup > args.epochs:
        parser.error(f"argument --warmup: {args.warmup} is above the {args.epochs} epochs")
    if args.quick:
        args.seeds, args.epochs = 1, min(args.epochs, 5)
        args.warmup = min(args.warmup, args.epochs)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: can't make the folder {args.out}: {error.strerror}")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the comparison; per arm, every metric and the losses of every epoch, one entry per seed."""
    digits = load_digits()
    pixels, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    x_train, x_test, y_train, y_test = train_test_split(
        pixels, labels, test_size=0.25, stratify=labels, random_state=0
    )
    data = (x_train, y_train, x_test, y_test)
    args = parse_args(argv, len(y_train))
    tx = make_optimizer(args, args.epochs * (len(y_train) // args.batch_size))
    epoch = make_epoch(args)

    try:
        return compare(args, data, tx, epoch)
    except KeyboardInterrupt:
        print("\nStopped before the end.", file=sys.stderr)
        raise SystemExit(130) from None


def compare(args: argparse.Namespace, data: Data, tx: Any, epoch: Epoch) -> dict[str, Any]:
    """Trains every arm with every seed, prints the table and draws the picture."""
    results: dict[str, Any] = {arm: {name: [] for name in (*METRICS, "losses")} for arm in ARMS}
    results["picture"] = None
    panels = []
    pause = 0.1 if sys.stderr.isatty() else 5  # A log should not fill with bars.
    with tqdm(total=len(ARMS) * args.seeds * args.epochs, unit="epoch", mininterval=pause) as bar:
        for seed in range(args.seeds):
            for arm, title in ARMS.items():
                lam = args.lam if arm == "center" else 0.0
                model, losses = train(args, data, epoch, tx, lam=lam, seed=seed, bar=bar)
                if not np.isfinite(losses).all():
                    bar.close()
                    raise SystemExit(f"{title}, seed {seed}: the loss is not finite. Lower --lr or --lam.")
                metrics, features, means = evaluate(model, data)
                for name, value in {**metrics, "losses": losses}.items():
                    results[arm][name].append(value)
                if seed == 0:
                    marks = np.asarray(jax.tree.leaves(nnx.state(model.center_loss))[0])
                    heading = f"{title}{f' (λ = {lam:g})' if arm == 'center' else ''}: "
                    heading += f"{metrics['accuracy']:.1f} % of test digits right"
                    panels.append(
                        (heading, "learned centers", features, marks)
                        if arm == "center"
                        else (heading, "class means", features, means)
                    )
    print(
        f"\n{args.seeds} seed(s), {args.epochs} epochs, λ = {args.lam:g}, centers moved by {args.centers}\n"
    )
    print(table(results))
    if args.quick:
        print("\nA quick run shows that it works; it is too short to compare the two.")
    if args.feat_dim == 2:
        results["picture"] = args.out / "digits.png"
        draw(results["picture"], data[3], panels)
        print(f"\nThe feature planes of seed 0: {results['picture']}")
    else:
        print(f"\nNo picture: it needs --feat-dim 2, not {args.feat_dim}.")
    return results


if __name__ == "__main__":
    main()
