"""The paper's toy experiment: MNIST in a feature plane, for several weights λ of the center loss.

    python examples/mnist.py

trains a small convolutional network of two features for every λ and several seeds, prints a table and draws
the feature planes side by side. `--full` takes the paper's network and all 60,000 images. A run that was
stopped goes on from its last epoch when the same command is given again.
"""

import argparse
import gzip
import hashlib
import struct
import zlib
from collections.abc import Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from _common import (
    Plane,
    check_finite,
    compactness,
    compactness_table,
    divide_by_lam,
    download,
    draw_planes,
    lam_at,
    make_folder,
    number,
    progress,
    stopped_by_hand,
)
from flax import nnx

import jax_centerloss

CLASSES = 10
SIDE = 28
SOURCE = "https://storage.googleapis.com/cvdf-datasets/mnist/"
SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}

# What a run depends on besides λ and its seed.
SETTINGS = ("warmup", "alpha", "images", "epochs", "batch_size", "lr", "weight_decay", "full")


def read_idx(path: Path, limit: int | None = None) -> np.ndarray:
    """The bytes of an idx.gz file, of its first `limit` items.

    What it declares is not trusted: no more is unpacked than is asked for, and what is missing is an error.
    """
    try:
        with gzip.open(path) as file:
            zeros, kind, rank = struct.unpack(">HBB", file.read(4))
            if zeros != 0 or kind != 8 or rank not in (1, 3):
                raise ValueError("its first bytes are not those of images or labels in single bytes")
            count, *shape = struct.unpack(f">{rank}I", file.read(4 * rank))
            if rank == 3 and shape != [SIDE, SIDE]:
                raise ValueError(f"its images are {shape[0]} x {shape[1]}, expected {SIDE} x {SIDE}")
            count = min(count, limit or 70_000)
            size = count * int(np.prod(shape))
            content = file.read(size)
            if len(content) < size:
                raise ValueError(f"it ends after {len(content):,} of {size:,} bytes")
    except (OSError, EOFError, struct.error, zlib.error, ValueError) as error:
        raise SystemExit(f"{path} is not an idx.gz file that can be used: {error}") from None
    return np.frombuffer(content, np.uint8).reshape(count, *shape)


def load(data: Path | None, limit: int) -> tuple[np.ndarray, ...]:
    """Training images and labels, test images and labels."""
    arrays = []
    for name, sha in SHA256.items():
        path = download(SOURCE + name, f"sha256:{sha}") if data is None else data / name
        arrays.append(read_idx(path, limit if name.startswith("train") else None))
    for images, labels, part in ((*arrays[:2], "training"), (*arrays[2:], "test")):
        if len(images) != len(labels) or not len(labels):
            raise SystemExit(f"There are {len(images)} {part} images and {len(labels)} labels.")
        if labels.max() >= CLASSES:
            raise SystemExit(f"A {part} label is {labels.max()}, expected 0 to {CLASSES - 1}.")
    return tuple(array.astype(np.int32) if array.ndim == 1 else array for array in arrays)


class Model(nnx.Module):
    """Convolutions, two features, a softmax layer, and a center for each class.

    The paper's network has three stages of two 5 x 5 convolutions with PReLU and max pooling. The small one
    has three of one convolution of stride 2 and half the width.
    """

    def __init__(self, full: bool, centers: str, *, rngs: nnx.Rngs) -> None:
        conv = partial(nnx.Conv, kernel_size=(5, 5), rngs=rngs)
        widths = (1, 32, 64, 128) if full else (1, 16, 32, 64)
        layers = []
        for inputs, outputs in pairwise(widths):
            if full:
                layers += [conv(inputs, outputs), nnx.PReLU(), conv(outputs, outputs), nnx.PReLU(), pool]
            else:
                layers += [conv(inputs, outputs, strides=2), nnx.PReLU()]
        self.layers = nnx.Sequential(*layers)
        side = 3 if full else 4
        self.embed = nnx.Linear(side * side * widths[-1], 2, rngs=rngs)
        self.head = nnx.Linear(2, CLASSES, rngs=rngs)
        kind = "state" if centers == "rule" else "param"
        self.center_loss = jax_centerloss.nnx.CenterLoss(CLASSES, 2, centers_as=kind, rngs=rngs)

    def features(self, images: jax.Array) -> jax.Array:
        x = self.layers(images[..., None].astype(jnp.float32) / 255)
        return self.embed(x.reshape(len(x), -1))


def pool(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (2, 2), (2, 2))


@cache  # One object for all runs: a new one would compile their step anew.
def make_optimizer(
    centers: str, lr: float, weight_decay: float, alpha: float, steps: int
) -> optax.GradientTransformationExtraArgs:
    sgd = optax.sgd(optax.cosine_decay_schedule(lr, steps), momentum=0.9)
    tx = optax.chain(optax.add_decayed_weights(weight_decay), sgd)
    if centers == "optax":
        own = optax.chain(divide_by_lam(), optax.sgd(alpha))
        return jax_centerloss.with_center_optimizer(tx, centers=own)
    return optax.with_extra_args_support(tx)


@partial(nnx.jit, static_argnames="by_rule", donate_argnums=(0, 1))
def train_step(
    model: Model,
    optimizer: nnx.Optimizer,
    images: jax.Array,
    labels: jax.Array,
    lam: jax.Array,
    alpha: jax.Array,
    *,
    by_rule: bool,
) -> jax.Array:
    def loss_fn(model: Model) -> tuple[jax.Array, jax.Array]:
        x = model.features(images)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(model.head(x), labels).mean()
        return cross_entropy + lam * model.center_loss(x, labels), x

    (loss, x), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads, lam=lam)
    if by_rule:
        model.center_loss.update_centers(x, labels, alpha=alpha, after=loss)
    return loss


class Checkpoints:
    """The last finished epoch of one run, in a folder named after everything that the run depends on."""

    def __init__(self, args: argparse.Namespace, lam: float, seed: int) -> None:
        settings = {name: getattr(args, name) for name in SETTINGS} | {"data": str(args.data)}
        digest = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:8]
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(
            (args.out / "mnist-runs" / f"{args.centers}-{lam:g}-{seed}-{digest}").absolute(),
            options=options,
            item_handlers=ocp.StandardCheckpointHandler(),
        )

    def restore(self, state: Any) -> tuple[int, Any]:
        """The number of finished epochs, and the state after them; `state` itself if there are none."""
        epoch = self.manager.latest_step()
        if epoch is None:
            return 0, state
        return epoch, self.manager.restore(epoch, args=ocp.args.StandardRestore(state))

    def save(self, epoch: int, state: Any) -> None:
        self.manager.save(epoch, args=ocp.args.StandardSave(state))


def train(
    args: argparse.Namespace, data: tuple[np.ndarray, ...], lam: float, seed: int, bar: Any
) -> tuple[Model, np.ndarray, np.ndarray]:
    """The trained network, its centers one epoch before the end, and the mean loss of each epoch."""
    images, labels = data[:2]
    per_epoch = len(labels) // args.batch_size
    steps = args.epochs * per_epoch
    model = Model(args.full, args.centers, rngs=nnx.Rngs(seed))
    tx = make_optimizer(args.centers, args.lr, args.weight_decay, args.alpha, steps)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    lams = lam_at(np.arange(steps), lam, args.warmup * per_epoch)
    alpha = np.float32(args.alpha)

    # As a list of arrays, which any version of Flax and Orbax reads.
    leaves, tree = jax.tree.flatten(nnx.state((model, optimizer)))
    losses, previous = np.zeros(args.epochs), np.asarray(centers_of(model))
    checkpoints = Checkpoints(args, lam, seed)
    done, (leaves, losses, previous) = checkpoints.restore((leaves, losses, previous))
    nnx.update((model, optimizer), jax.tree.unflatten(tree, leaves))
    bar.update(done)
    for epoch in range(done, args.epochs):
        previous = np.asarray(centers_of(model)).copy()
        order = np.random.default_rng((seed, epoch)).permutation(len(labels))
        parts = order[: per_epoch * args.batch_size].reshape(per_epoch, -1)
        found = [
            train_step(
                model,
                optimizer,
                images[part],
                labels[part],
                lams[epoch * per_epoch + i],
                alpha,
                by_rule=args.centers == "rule",
            )
            for i, part in enumerate(parts)
        ]
        losses[epoch] = np.mean(found)
        check_finite(losses, f"λ = {lam:g}, seed {seed}")
        checkpoints.save(epoch + 1, (jax.tree.leaves(nnx.state((model, optimizer))), losses, previous))
        bar.set_postfix(lam=lam, seed=seed, loss=f"{losses[epoch]:.3f}", refresh=False)
        bar.update()
    return model, previous, losses


def centers_of(model: Model) -> jax.Array:
    (table,) = jax.tree.leaves(nnx.state(model.center_loss))
    return table


@nnx.jit
def predict(model: Model, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = model.features(images)
    return x, jnp.argmax(model.head(x), axis=-1)


def predict_all(model: Model, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = [predict(model, part) for part in np.array_split(images, max(1, len(images) // 1000))]
    features, classes = zip(*parts, strict=True)
    return np.concatenate(features), np.concatenate(classes)


def compare(args: argparse.Namespace, data: tuple[np.ndarray, ...]) -> dict[float, list[dict[str, Any]]]:
    """Trains every λ with every seed, prints the table and draws the picture of seed 0."""
    results: dict[float, list[dict[str, Any]]] = {lam: [] for lam in args.lams}
    planes = []
    with progress(len(args.lams) * args.seeds * args.epochs, "epoch") as bar:
        for seed in range(args.seeds):
            for lam in args.lams:
                model, previous, losses = train(args, data, lam, seed, bar)
                features, predicted = predict_all(model, data[2])
                train_features, _ = predict_all(model, data[0])
                metrics, means = compactness(
                    (train_features, data[1]), (features, data[3]), predicted, model.center_loss, previous
                )
                results[lam].append(metrics | {"losses": losses.tolist()})
                if seed == 0:
                    # Softmax alone pays no heed to centers that the rule moves, nor to those that rest.
                    marks = model.center_loss if lam else means
                    heading = f"λ = {lam:g}: {metrics['accuracy']:.1f} % right"
                    planes.append(Plane(heading, marks, features, data[3]))
    print(f"\n{len(data[1]):,} training images, {args.seeds} seed(s), {args.epochs} epochs, ", end="")
    print(f"λ over {args.warmup} of them, α = {args.alpha:g}, centers moved by {args.centers}\n")
    print(compactness_table({f"λ = {lam:g}": runs for lam, runs in results.items()}))
    picture = args.out / "mnist.png"
    heading = "Test images in the feature plane; crosses are centers, for λ = 0 class means"
    draw_planes(picture, heading, planes, [str(j) for j in range(CLASSES)])
    print(f"\nThe feature planes of seed 0: {picture}")
    return results


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="MNIST in a feature plane, for several weights of the center loss.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, help=f"folder with {', '.join(SHA256)}; else MNIST is downloaded")
    add("--lams", type=number(float, 0), nargs="+", default=[0, 0.001, 0.01, 0.1, 1], help="weights λ")
    add("--warmup", type=number(int, 0), default=2, help="epochs over which λ rises linearly")
    add("--alpha", type=number(float, 0), default=0.5, help="rate of the centers, whatever λ is")
    add(
        "--centers",
        choices=["rule", "optax"],
        default="rule",
        help="what moves the centers: the paper's rule, or gradient descent by an optax chain of their own",
    )
    unset = argparse.SUPPRESS  # Their defaults depend on --full and --quick.
    add("--images", type=number(int, 1), default=unset, help="training images (default: 20000)")
    add("--epochs", type=number(int, 1), default=unset, help="epochs of each run (default: 8)")
    add("--seeds", type=number(int, 1), default=5, help="runs of each λ, with seeds 0, 1, ...")
    add("--batch-size", type=number(int, 1), default=128, help="images per step")
    add("--lr", type=number(float, 0, open_end=True), default=0.05, help="peak rate of the network's SGD")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="of all parameters of the network")
    add("--out", type=Path, default=Path("out"), help="folder for mnist.png and what runs resume from")
    add("--full", action="store_true", help="the paper's network, by default on 60,000 images in 20 epochs")
    add("--quick", action="store_true", help="λ of 0 and 0.1, one seed, by default 2,000 images in 3 epochs")
    args = parser.parse_args(argv)
    images, epochs = (2000, 3) if args.quick else (60_000, 20) if args.full else (20_000, 8)
    args.images, args.epochs = getattr(args, "images", images), getattr(args, "epochs", epochs)
    if args.quick:
        args.lams, args.seeds, args.warmup = [0.0, 0.1], 1, min(args.warmup, args.epochs)
    args.lams = sorted(set(args.lams))
    if args.warmup > args.epochs:
        parser.error(f"argument --warmup: {args.warmup} is above the {args.epochs} epochs")
    make_folder(parser, args.out)
    return args


def main(argv: Sequence[str] | None = None) -> dict[float, list[dict[str, Any]]]:
    """Runs the comparison; for each λ a list with every seed's metrics and losses."""
    args = parse_args(argv)
    data = load(args.data, args.images)
    if args.batch_size > len(data[1]):
        raise SystemExit(f"--batch-size: {args.batch_size} is above the {len(data[1])} training images")
    with stopped_by_hand():
        return compare(args, data)


if __name__ == "__main__":
    main()
