"""The paper's toy experiment: MNIST in a feature plane, for several weights λ of the center loss.

    python examples/mnist.py

trains a small convolutional network of two features for every λ and several seeds, prints a table and draws
the feature planes side by side. A run that was stopped goes on from its last epoch when the same command is
given again.
"""

import argparse
import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import _ctrl_c
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from _common import (
    Plane,
    add_centers_flag,
    add_flags,
    check_finite,
    check_flags,
    compactness,
    compactness_table,
    download,
    draw_planes,
    how_centers_move,
    number,
    over_seeds,
    progress,
    say_if_quick,
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
SETTINGS = (
    *("centers", "precision", "warmup", "alpha", "images", "epochs"),
    *("batch_size", "lr", "weight_decay"),
)


def read_idx(path: Path, rank: int, limit: int | None = None) -> np.ndarray:
    """The bytes of an idx.gz file, of its first `limit` items: labels have rank 1, images 3.

    What it declares is not trusted: no more is kept than is asked for, and it is an error if there is less in
    the file or more. The file is read to its end, where its checksum stands.
    """
    try:
        with gzip.open(path) as file:
            if struct.unpack(">HBB", file.read(4)) != (0, 8, rank):
                raise ValueError(f"its first bytes are not those of {'images' if rank == 3 else 'labels'}")
            count, *shape = struct.unpack(f">{rank}I", file.read(4 * rank))
            if rank == 3 and shape != [SIDE, SIDE]:
                raise ValueError(f"its images are {shape[0]} x {shape[1]}, expected {SIDE} x {SIDE}")
            declared = count * math.prod(shape)
            count = min(count, limit or 70_000)
            content = file.read(count * math.prod(shape))
            length = len(content)
            while length <= declared and (rest := file.read(2**16)):
                length += len(rest)
            if length != declared:
                found = f"ends after {length:,}" if length < declared else "goes on"
                raise ValueError(f"it declares {declared:,} bytes and {found}")
    except (OSError, EOFError, struct.error, zlib.error, ValueError) as error:
        raise SystemExit(f"{path} is not an idx.gz file that can be used: {error}") from None
    return np.frombuffer(content, np.uint8).reshape(count, *shape)


def load(data: Path | None, limit: int) -> tuple[np.ndarray, ...]:
    """Training images and labels, test images and labels."""
    arrays = []
    for name, sha in SHA256.items():
        path = download(SOURCE + name, f"sha256:{sha}") if data is None else data / name
        if not path.is_file():
            raise SystemExit(f"There is no {name} in {data}.")
        rank = 3 if "idx3" in name else 1
        arrays.append(read_idx(path, rank, limit if name.startswith("train") else None))
    for images, labels, part in ((*arrays[:2], "training"), (*arrays[2:], "test")):
        if len(images) != len(labels) or not len(labels):
            raise SystemExit(f"There are {len(images)} {part} images and {len(labels)} labels.")
        if labels.max() >= CLASSES:
            raise SystemExit(f"A {part} label is {labels.max()}, expected 0 to {CLASSES - 1}.")
    if absent := sorted({*range(CLASSES)} - {*arrays[1].tolist()}):
        raise SystemExit(f"The {len(arrays[1])} training images hold none of class {absent[0]}.")
    return tuple(array.astype(np.int32) if array.ndim == 1 else array for array in arrays)


class PReLU(nnx.Module):
    """As `flax.nnx.PReLU`, which Flax 0.11 has not."""

    def __init__(self) -> None:
        self.slope = nnx.Param(jnp.asarray(0.01))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.where(x >= 0, x, self.slope[...] * x)


class Model(nnx.Module):
    """Three convolutions, two features, a softmax layer, and a center for each class.

    The paper's network has twice as many convolutions, of twice the width.
    """

    def __init__(self, centers: str, precision: str = "float32", *, rngs: nnx.Rngs) -> None:
        conv = partial(nnx.Conv, kernel_size=(5, 5), rngs=rngs)
        layers = []
        for inputs, outputs in pairwise((1, 16, 32, 64)):
            layers += [conv(inputs, outputs, strides=2), PReLU()]
        self.layers = nnx.Sequential(*layers)
        self.embed = nnx.Linear(4 * 4 * 64, 2, rngs=rngs)
        self.head = nnx.Linear(2, CLASSES, rngs=rngs)
        kind = "param" if centers == "optax" else "state"
        draw = nnx.initializers.zeros if centers == "zero" else nnx.initializers.normal(1.0)
        dtype = jnp.float32 if precision == "float32" else jnp.bfloat16
        self.center_loss = jax_centerloss.nnx.CenterLoss(
            CLASSES, 2, centers_as=kind, centers_init=draw, param_dtype=dtype, rngs=rngs
        )

    def features(self, images: jax.Array) -> jax.Array:
        x = self.layers(images[..., None].astype(jnp.float32) / 255)
        return self.embed(x.reshape(len(x), -1))


def lam_at(steps: np.ndarray, lam: float, warmup_steps: int) -> np.ndarray:
    """The weight of the center loss at each step: linear from lam / warmup_steps up to lam."""
    return (lam * np.minimum(1.0, (steps + 1) / max(warmup_steps, 1))).astype(np.float32)


@cache  # One object for all runs: a new one would compile their step anew.
def make_optimizer(lr: float, weight_decay: float, steps: int) -> optax.GradientTransformation:
    sgd = optax.sgd(optax.cosine_decay_schedule(lr, steps), momentum=0.9)
    return optax.chain(optax.add_decayed_weights(weight_decay), sgd)


@cache
def with_centers(
    tx: optax.GradientTransformation, alpha: float, lam: float, warmup_steps: int, steps: int
) -> optax.GradientTransformationExtraArgs:
    """`tx`, with plain SGD of rate `alpha` for the centers, whatever λ is."""
    lams = jnp.asarray(lam_at(np.arange(steps), lam, warmup_steps))
    return jax_centerloss.with_center_optimizer(tx, centers=optax.sgd(alpha), weight=lambda step: lams[step])


@partial(nnx.jit, static_argnames="by_rule", donate_argnums=(0, 1))
def train_step(
    model: Model,
    optimizer: nnx.Optimizer,
    images: jax.Array,
    labels: jax.Array,
    lam: jax.Array,
    alpha: jax.Array,
    key: jax.Array | None,
    *,
    by_rule: bool,
) -> jax.Array:
    def loss_fn(model: Model) -> tuple[jax.Array, jax.Array]:
        x = model.features(images)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(model.head(x), labels).mean()
        return cross_entropy + lam * model.center_loss(x, labels), x

    (loss, x), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    if by_rule:
        model.center_loss.update_centers(x, labels, alpha=alpha, after=loss, rounding_key=key)
    return loss


def run_folder(args: argparse.Namespace, data: tuple[np.ndarray, ...], lam: float, seed: int) -> Path:
    """Where a run keeps its last epoch: another folder for whatever else its numbers depend on."""
    settings = {name: getattr(args, name) for name in SETTINGS} | {"lam": lam, "seed": seed}
    versions = [jax.__version__, flax.__version__, optax.__version__, jax_centerloss.__version__]
    digest = hashlib.sha256(repr((sorted(settings.items()), versions)).encode())
    for array in data[:2]:
        digest.update(array)
    return (args.out / "mnist-runs" / f"lam{lam:g}-seed{seed}-{digest.hexdigest()[:12]}").absolute()


def restore(checkpoints: ocp.CheckpointManager, state: Any) -> tuple[int, Any]:
    """The number of finished epochs, and the state after them; `state` itself if there are none."""
    done = checkpoints.latest_step()
    if done is None:
        return 0, state
    try:
        return done, checkpoints.restore(done, args=ocp.args.StandardRestore(state))
    except Exception as error:  # Whatever Orbax meets in a torn file.
        raise SystemExit(f"{checkpoints.directory} can't be read, delete it: {error}") from None


def train(
    args: argparse.Namespace, data: tuple[np.ndarray, ...], lam: float, seed: int, bar: Any
) -> tuple[Model, np.ndarray, np.ndarray]:
    """The trained network, its centers one epoch before the end, and the mean loss of each epoch."""
    images, labels = data[:2]
    per_epoch = len(labels) // args.batch_size
    steps = args.epochs * per_epoch
    model = Model(args.centers, args.precision, rngs=nnx.Rngs(seed))
    tx = make_optimizer(args.lr, args.weight_decay, steps)
    if args.centers == "optax":
        tx = with_centers(tx, args.alpha, lam, args.warmup * per_epoch, steps)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    lams = lam_at(np.arange(steps), lam, args.warmup * per_epoch)
    alpha = np.float32(args.alpha)
    stochastic = args.precision == "stochastic"
    keys = jax.random.split(jax.random.key(seed), steps) if stochastic else [None] * steps

    # As a list of arrays, which any version of Flax and Orbax reads.
    leaves, tree = jax.tree.flatten(nnx.state((model, optimizer)))
    losses, previous = np.zeros(args.epochs), np.asarray(centers_of(model))
    folder = run_folder(args, data, lam, seed)
    checkpoints = ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False),
        item_handlers=ocp.StandardCheckpointHandler(),
    )
    done, (leaves, losses, previous) = restore(checkpoints, (leaves, losses, previous))
    nnx.update((model, optimizer), jax.tree.unflatten(tree, leaves))
    if done:
        bar.write(f"λ = {lam:g}, seed {seed}: {done} of {args.epochs} epochs from {folder}")
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
                keys[epoch * per_epoch + i],
                by_rule=args.centers == "rule",
            )
            for i, part in enumerate(parts)
        ]
        losses[epoch] = np.mean(jax.device_get(found))
        check_finite(losses, f"λ = {lam:g}, seed {seed}")
        finished = (jax.tree.leaves(nnx.state((model, optimizer))), losses, previous)
        checkpoints.save(epoch + 1, args=ocp.args.StandardSave(finished))
        bar.set_postfix(lam=lam, seed=seed, loss=f"{losses[epoch]:.3f}", refresh=False)
        bar.update()
    checkpoints.close()
    return model, previous, losses


def centers_of(model: Model) -> jax.Array:
    (table,) = jax.tree.leaves(nnx.state(model.center_loss))
    return table


@nnx.jit
def predict(model: Model, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The features of a network, and the classes that its softmax layer finds."""
    features = model.features(x)
    return features, jnp.argmax(model.head(features), axis=-1)


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
    print(f"\n{len(data[1]):,} training images, {over_seeds(args.seeds)}, {args.epochs} epochs, ", end="")
    print(f"λ over {args.warmup} of them, {how_centers_move(args)}, ", end="")
    print(f"in {args.precision.replace('stochastic', 'bfloat16, rounded stochastically')}\n")
    print(compactness_table({f"λ = {lam:g}": runs for lam, runs in results.items()}))
    picture = args.out / "mnist.png"
    heading = "Test images in the feature plane; crosses: centers, at λ = 0 means"
    draw_planes(picture, heading, planes, [str(j) for j in range(CLASSES)])
    print(f"\nThe feature planes of seed 0: {picture}")
    say_if_quick(args)
    return results


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="MNIST in a feature plane, for several weights of the center loss. A run that was "
        "stopped goes on from its last epoch when the same command is given again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, help=f"folder with {', '.join(SHA256)}; else MNIST is downloaded")
    add("--lams", type=number(float, 0), nargs="+", default=[0, 0.001, 0.01, 0.1, 1], help="weights λ")
    add_centers_flag(parser, "rule", "optax", "zero")
    add(
        "--precision",
        choices=["float32", "bfloat16", "stochastic"],
        default="float32",
        help="of the centers; stochastic: bfloat16, rounded stochastically",
    )
    unset = argparse.SUPPRESS  # Their defaults depend on --quick.
    add("--images", type=number(int, 1), default=unset, help="training images (default: 20000)")
    add("--epochs", type=number(int, 1), default=unset, help="epochs of each run (default: 8)")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="of all parameters of the network")
    quick = "λ of 0 and 0.1, by default 2,000 images and 3 epochs"
    add_flags(parser, warmup=2, batch_size=128, seeds=3, lr=0.05, quick=quick)
    args = parser.parse_args(argv)
    images, epochs = (2000, 3) if args.quick else (20_000, 8)
    args.images, args.epochs = getattr(args, "images", images), getattr(args, "epochs", epochs)
    if args.quick:
        args.lams = [0.0, 0.1]
    args.lams = sorted(set(args.lams))
    if args.precision == "stochastic" and args.centers != "rule":
        parser.error("argument --precision: only centers that the rule moves are rounded stochastically")
    check_flags(parser, args)
    return args


def main(argv: Sequence[str] | None = None) -> dict[float, list[dict[str, Any]]]:
    """Runs the comparison; for each λ a list with every seed's metrics and losses."""
    args = parse_args(argv)
    with _ctrl_c.stopped_by_hand(" The same command goes on from the last finished epoch."):
        data = load(args.data, args.images)
        if args.batch_size > len(data[1]):
            raise SystemExit(f"--batch-size: {args.batch_size} is above the {len(data[1])} training images")
        return compare(args, data)


if __name__ == "__main__":
    main()
