"""Does center loss help to read lines of text? CTC on lines of handwritten characters, with a control.

    python examples/ocr.py

A small convolutional network and a bidirectional LSTM learn by CTC to read lines that are composed of
Omniglot's drawings: of each character those of the drawers 1 to 14, and for test lines those of the others.
There is no label for a frame: class means are made from the frames of lines, composed of the drawings for
training, that are read rightly, each under the character that the network reads there. Training then goes
on from the same weights on the same lines in four arms: CTC alone, centers that stay at these means, centers
that the paper's rule moves, and as a control centers at 0, which penalizes the norm of the same features.
"""

import argparse
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any

import _ctrl_c
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import (
    add_flags,
    check_finite,
    difference,
    make_folder,
    markdown,
    number,
    over_seeds,
    progress,
    say_if_quick,
    spread,
)
from _lines import FRAME, HEIGHT, Lines, Reading, Text, compose, make_glyphs, missed, spoken, text_of, truth
from _ocr_pictures import draw_confused, draw_lines
from _omniglot import Drawings, add_data_and_grid, check_selection, load
from flax import nnx
from rapidfuzz.distance import Levenshtein

import jax_centerloss

ARMS = {
    "ctc": "CTC alone",
    "fixed": "centers fixed at the means",
    "moved": "centers moved by the paper's rule",
    "norm": "norm of the features (control)",
}
METRICS = {
    "cer": ("characters wrong, %", 2),
    "hardest": ("the hardest quarter not read, %", 2),
    "lines": ("lines wholly right, %", 2),
    "own_distance": ("own distance", 2),
    "ratio": ("own / nearest other", 3),
    "blank": ("frames: blank, %", 1),
    "right": ("right, %", 1),
    "wrong": ("wrong, %", 1),
}
DIFFERENCES = (
    ("fixed", "ctc"),
    ("moved", "ctc"),
    ("norm", "ctc"),
    ("fixed", "norm"),
    ("moved", "norm"),
)
WIDTHS = (16, 32, 64)  # Channels of the convolutions.
TRAIN_WRITERS = 14  # Of 20; the others write the test lines.
SIDE = 105  # Of a drawing, as it is published.
MEAN_LINES, TEST_LINES = (2**31, 1), (2**31, 2)  # Seeds of lines, which no training has.


class Block(nnx.Module):
    def __init__(self, inputs: int, outputs: int, strides: tuple[int, int], *, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(inputs, outputs, (3, 3), strides=strides, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.norm(self.conv(x)))


class Reader(nnx.Module):
    """Three convolutions - bidirectional LSTM or convolutions along the line (the features) - softmax layer.

    The classes are the characters from 1 on and CTC's blank, 0. There is a center for each of them.
    """

    def __init__(self, characters: int, sequence: str, feat_dim: int, *, rngs: nnx.Rngs) -> None:
        layers = zip(pairwise((1, *WIDTHS)), ((2, 2), (2, 2), (2, 1)), strict=True)
        self.blocks = nnx.Sequential(*(Block(*sizes, strides, rngs=rngs) for sizes, strides in layers))
        rows = -(-HEIGHT // 8)
        self.sequence = sequence
        if sequence == "lstm":
            cells = (nnx.LSTMCell(WIDTHS[-1] * rows, feat_dim // 2, rngs=rngs) for _ in range(2))
            self.mix = nnx.Bidirectional(*(nnx.RNN(cell, rngs=rngs) for cell in cells), rngs=rngs)
        else:
            self.mix = nnx.Conv(WIDTHS[-1] * rows, feat_dim, 7, rngs=rngs)
        self.head = nnx.Linear(feat_dim, characters + 1, rngs=rngs)
        self.center_loss = jax_centerloss.nnx.CenterLoss(
            characters + 1, feat_dim, centers_as="state", centers_init=nnx.initializers.zeros, rngs=rngs
        )

    def features(self, images: jax.Array, frames: jax.Array) -> jax.Array:
        """`(batch, width / FRAME, feat_dim)` of `(batch, HEIGHT, width)`; `frames` of each are no padding."""
        x = self.blocks(images[..., None].astype(jnp.float32) / 255)
        x = x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
        return self.mix(x, seq_lengths=frames) if self.sequence == "lstm" else self.mix(x)


def within(frames: jax.Array, number: int) -> jax.Array:
    """`(batch, number)`: the frames that are no padding."""
    return jnp.arange(number) < frames[:, None]


def by_character(logits: jax.Array, frames: jax.Array, blanks: bool) -> tuple[jax.Array, jax.Array]:
    """The label of a frame is what the network itself reads there; blanks are left out unless `blanks`."""
    labels = jnp.argmax(logits, axis=-1)
    where = within(frames, logits.shape[1])
    return labels, where if blanks else where & (labels != 0)


# One program for all arms: λ = 0 is CTC alone, α = 0 leaves centers where they are, at 0 for the control.
@partial(nnx.jit, static_argnames="blanks", donate_argnums=(0, 1))
def train_step(
    model: Reader,
    optimizer: nnx.Optimizer,
    images: jax.Array,
    frames: jax.Array,
    characters: jax.Array,
    lam: jax.Array,
    alpha: jax.Array,
    known: jax.Array,
    *,
    blanks: bool = False,
) -> jax.Array:
    """A step by CTC and λ · center loss, of the frames whose class is `known (classes,)` to have a center."""

    def loss_fn(model: Reader) -> tuple[jax.Array, Any]:
        x = model.features(images, frames)
        logits = model.head(x)
        padding = 1.0 - within(frames, x.shape[1])
        ctc = optax.ctc_loss(logits, padding, characters, 1.0 * (characters == 0)).mean()
        labels, where = by_character(logits, frames, blanks)
        where &= known[labels]
        return ctc + lam * model.center_loss(x, labels, where=where), (ctc, x, labels, where)

    (loss, (ctc, x, labels, where)), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    model.center_loss.update_centers(x, labels, where=where, alpha=alpha, after=loss)
    return ctc


@nnx.jit
def read_frames(model: Reader, images: jax.Array, frames: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = model.features(images, frames)
    return x, jnp.argmax(model.head(x), axis=-1)


def read(model: Reader, lines: Lines) -> Reading:
    model.eval()
    size = 256
    features, labels = [], []
    for start in range(0, len(lines.frames), size):
        part = slice(start, start + size)
        x, found = map(np.asarray, read_frames(model, lines.images[part], lines.frames[part]))
        features.append(x)
        labels.append(found)
    model.train()
    labels = np.concatenate(labels)
    labels = np.where(np.arange(labels.shape[1]) < lines.frames[:, None], labels, -1)
    texts = [text_of(line[:n]) for line, n in zip(labels, lines.frames, strict=True)]
    right = np.asarray([text == truth(line) for text, line in zip(texts, lines.labels, strict=True)])
    return Reading(np.concatenate(features), labels, texts, right)


def class_means(model: Reader, reading: Reading, blanks: bool) -> tuple[Any, np.ndarray]:
    """Class means, and which classes have one, of frames in lines that are read rightly.

    Elsewhere what the network reads in a frame is not to be trusted.
    """
    labels = np.where(reading.right[:, None], reading.labels, -1)
    labels = labels if blanks else np.where(labels == 0, -1, labels)
    known = np.isin(np.arange(model.center_loss.num_classes), labels)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*never seen")  # They are counted below the table.
        centers = nnx.state(model.center_loss)
        return jax_centerloss.init_from_features(centers, [(reading.features, labels)]), known


def hardest(reading: Reading, lines: Lines, classes: int) -> np.ndarray:
    """The quarter of the characters that is missed most; at least one."""
    lost, stands = missed(reading, lines, classes)
    share = (lost / np.maximum(stands, 1))[1:]  # Without the blank.
    return 1 + np.argsort(-share, kind="stable")[: max(1, len(share) // 4)]


def judge(model: Reader, hard: np.ndarray, train: Lines, test: Lines) -> tuple[dict[str, float], Reading]:
    reading, texts = read(model, test), [truth(line) for line in test.labels]
    lost, stands = missed(reading, test, model.center_loss.num_classes)
    wrong = sum(map(Levenshtein.distance, reading.texts, texts))
    # The same in every arm, whatever its centers are: to the means of its own features.
    means, known = class_means(model, read(model, train), blanks=False)
    # A class without a mean is nobody's nearest center.
    means = jax.tree.map(lambda table: jnp.where(known[:, None], table, jnp.nan), means)
    labels, inside = spoken(reading, test), reading.labels >= 0
    metrics = jax_centerloss.center_metrics(
        means, reading.features, labels, where=(labels > 0) & known[labels]
    )
    kinds = {"blank": reading.labels == 0, "right": reading.labels == labels}
    frames = {name: 100 * float(np.mean(kind[inside])) for name, kind in kinds.items()}
    own, gap = float(metrics["own_distance"]), float(metrics["gap"])
    return {
        "cer": 100 * wrong / sum(map(len, texts)),
        "hardest": 100 * float(lost[hard].sum() / max(stands[hard].sum(), 1)),
        "lines": 100 * float(reading.right.mean()),
        "own_distance": own,
        "gap": gap,
        # Unlike the distance itself, this does not fall where all features shrink.
        "ratio": own / (own + gap) if own + gap else 0.0,
        **frames,
        "wrong": 100 - sum(frames.values()),
    }, reading


def prepare(args: argparse.Namespace, data: Drawings) -> Text:
    if data.labels.max() + 1 < args.characters:
        raise SystemExit(
            f"There are {data.labels.max() + 1} characters, --characters asks for {args.characters}. "
            "Ask for fewer."
        )
    data = data.part(data.labels < args.characters)
    ours = (data.writers >= 1) & (data.writers <= TRAIN_WRITERS)
    theirs = data.writers > TRAIN_WRITERS
    for mine, whose in ((ours, f"1 to {TRAIN_WRITERS}"), (theirs, f"above {TRAIN_WRITERS}")):
        if absent := {*range(args.characters)} - {*data.labels[mine].tolist()}:
            raise SystemExit(
                f"Character {min(absent) + 1} has no drawing by the drawers {whose}; the published ones have."
            )
    glyphs, others = make_glyphs(data, ours, args.variants, seed=0), make_glyphs(data, theirs, 1, seed=0)
    size = args.length, args.width
    train = compose(glyphs, args.mean_lines, *size, np.random.default_rng(MEAN_LINES))
    return Text(glyphs, train, compose(others, args.test_lines, *size, np.random.default_rng(TEST_LINES)))


def make_lines(
    args: argparse.Namespace, text: Text, steps: int, seed: tuple[int, int], short: int = 0
) -> Iterator[Lines]:
    """Batches of training lines, `short` of them of one or two characters, from which CTC learns faster."""
    random = np.random.default_rng(seed)
    for i in range(steps):
        size = (min(args.length, 2), min(args.width, 48)) if i < short else (args.length, args.width)
        yield compose(text.glyphs, args.batch_size, *size, random)


@cache  # One object for all runs: a new one would compile their step anew.
def make_optimizer(schedule: str, lr: float, steps: int, decay: float) -> optax.GradientTransformation:
    if schedule == "one cycle":
        rate = optax.cosine_onecycle_schedule(steps, lr)
    else:
        rate = optax.cosine_decay_schedule(lr, steps)
    return optax.chain(optax.clip_by_global_norm(5.0), optax.adamw(rate, weight_decay=decay))


def fit(
    args: argparse.Namespace,
    model: Reader,
    tx: optax.GradientTransformation,
    batches: Iterable[Lines],
    weights: tuple[float, float, np.ndarray],
    bar: Any,
) -> list[float]:
    """Trains by (λ, α, classes that have a center); returns the CTC loss of each step."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    lam, alpha, known = np.float32(weights[0]), np.float32(weights[1]), weights[2]
    losses = []
    for lines in batches:
        batch = lines.images, lines.frames, lines.labels
        losses.append(train_step(model, optimizer, *batch, lam, alpha, known, blanks=args.blanks))
        bar.update()
    losses = np.asarray(jax.device_get(losses)).tolist()
    check_finite(losses, f"λ = {lam:g}")
    return losses


def run(
    args: argparse.Namespace, text: Text, seed: int, arms: Sequence[tuple[str, float]], bar: Any
) -> tuple[dict[tuple[str, float], dict[str, Any]], dict[Any, Reading]]:
    """Trains by CTC, and goes on in each arm of a kind and λ; what each reads, and what was read before."""
    model = Reader(text.characters, args.sequence, args.feat_dim, rngs=nnx.Rngs(seed))
    none = 0.0, 0.0, np.ones(text.characters + 1, bool)
    bar.set_postfix(seed=seed, arm="CTC", refresh=False)
    tx = make_optimizer("one cycle", args.lr, args.steps, args.weight_decay)
    losses = fit(args, model, tx, make_lines(args, text, args.steps, (seed, 0), args.steps // 3), none, bar)
    before = read(model, text.train)
    means, known = class_means(model, before, args.blanks)
    hard = hardest(before, text.train, text.characters + 1)
    graph, state = nnx.split(model)
    batches = [*make_lines(args, text, args.more_steps, (seed, 1))]
    tx = make_optimizer("fall", args.more_lr, args.more_steps, args.weight_decay)
    found, readings = {}, {"before": read(model, text.test)}
    for arm, lam in arms:
        bar.set_postfix(seed=seed, arm=arm, lam=lam, refresh=False)
        model = nnx.merge(graph, jax.tree.map(jnp.copy, state))
        if arm in ("fixed", "moved"):
            nnx.update(model.center_loss, jax.tree.map(jnp.copy, means))
        alpha = args.alpha if arm == "moved" else 0.0
        more = fit(args, model, tx, batches, (lam, alpha, known), bar)
        found[arm, lam], readings[arm] = judge(model, hard, text.train, text.test)
        found[arm, lam] |= {"losses": losses + more, "unknown": int(np.sum(~known[1:]))}
    return found, readings


def select(args: argparse.Namespace, text: Text) -> dict[str, float]:
    """λ of each arm by the characters wrong, on characters that are not those of the comparison."""
    runs = [("ctc", 0.0), *((arm, lam) for arm in ("fixed", "moved", "norm") for lam in args.grid)]
    steps = args.select * (args.steps + len(runs) * args.more_steps)
    with progress(steps, "step") as bar:
        seeds = [run(args, text, seed, runs, bar)[0] for seed in range(1000, 1000 + args.select)]
    rows = [
        [ARMS[arm], f"{lam:g}", *cells(spread, [found[arm, lam] for found in seeds])] for arm, lam in runs
    ]
    print(f"\n{text.characters} characters of the other archive, {over_seeds(args.select)}:\n")
    print(markdown(["arm", "λ", *(title for title, _ in METRICS.values())], rows))
    score = {which: np.mean([found[which]["cer"] for found in seeds]) for which in runs}
    best = {arm: min((which for which in runs if which[0] == arm), key=score.get)[1] for arm in ARMS}
    print("\nChosen:", ", ".join(f"λ = {lam:g} for {ARMS[arm]}" for arm, lam in best.items() if lam), "\n")
    return best


def compare(args: argparse.Namespace, text: Text, lams: dict[str, float]) -> dict[str, Any]:
    """Trains every arm with every seed, prints the tables and draws the pictures of seed 0."""
    arms = [(arm, lams[arm]) for arm in args.arms]
    results: dict[str, Any] = {arm: [] for arm in args.arms}
    with progress(args.seeds * (args.steps + len(arms) * args.more_steps), "step") as bar:
        for seed in range(args.seeds):
            found, readings = run(args, text, seed, arms, bar)
            for arm, lam in arms:
                results[arm].append(found[arm, lam])
            if seed == 0:
                shown = readings["before"], {ARMS[arm]: readings[arm] for arm in args.arms}
    print(
        f"\n{args.test_lines:,} lines of {text.characters} characters drawn by others than in training, ",
        end="",
    )
    print(f"{over_seeds(args.seeds)}, {args.steps:,} steps and {args.more_steps:,} more\n")
    print(tables(results, lams))
    unknown = [run["unknown"] for run in results[args.arms[0]]]
    print(f"\nCharacters without a center, of no line that was read rightly: {max(unknown)} at most")
    before, ends = shown
    draw_lines(args.out / "ocr.png", text, ends)
    drawn = draw_confused(args.out / "ocr_features.png", text, before, ends)
    print(f"Pictures: ocr.png{' and ocr_features.png' if drawn else ''} in {args.out}")
    say_if_quick(args)
    return results


def cells(show: Callable[..., str], *runs: list[dict[str, Any]]) -> list[str]:
    """For each metric what `show` makes of its values in the runs of one arm, or of two."""
    return [
        show(*([run[name] for run in arm] for arm in runs), digits) for name, (_, digits) in METRICS.items()
    ]


def tables(results: dict[str, Any], lams: dict[str, float]) -> str:
    heads = [title for title, _ in METRICS.values()]
    rows = [[f"{ARMS[arm]}, λ = {lams[arm]:g}", *cells(spread, runs)] for arm, runs in results.items()]
    gains = [
        [f"{ARMS[one]} - {ARMS[other]}", *cells(difference, results[one], results[other])]
        for one, other in DIFFERENCES
        if {one, other} <= results.keys()
    ]
    several = len(next(iter(results.values()))) > 1
    paired = ", paired by seed; 95 % intervals by Student's t, over seeds, for these lines" if several else ""
    parts = [markdown(["arm", *heads], rows)]
    if gains:
        parts += [f"Differences{paired}:", markdown(["", *heads], gains)]
    parts.append(
        "Own distance is that of frames in which a character is read for one that stands there, to the\n"
        "mean of the arm's own features under that character, by `center_metrics`; it is also shown divided\n"
        "by the distance to the nearest other mean. In wrong frames another character is read, or one where\n"
        "none stands. The hardest quarter are the characters that are\n"
        "missed most often in lines by the writers for training, before the arms part."
    )
    return "\n\n".join(parts)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Lines of handwritten characters, read by CTC with and without center loss.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_data_and_grid(parser, [0.002, 0.01, 0.05, 0.2])
    add = parser.add_argument
    add("--lam", type=number(float, 0), default=0.01, help="weight λ of the loss with moved centers")
    add("--lam-fixed", type=number(float, 0), default=0.05, help="the same of that with fixed centers")
    add("--lam-norm", type=number(float, 0), default=0.01, help="the same of the control")
    add("--arms", choices=ARMS, nargs="+", default=list(ARMS), help="which to train")
    add("--blanks", action="store_true", help="frames of blanks have a center, too")
    add("--sequence", choices=["lstm", "conv"], default="lstm", help="what mixes the frames of a line")
    add("--feat-dim", type=number(int, 2), default=128, help="features of a frame")
    add("--characters", type=number(int, 2), default=100, help="how many, the first of the archive")
    add("--variants", type=number(int, 1), default=6, help="of each training drawing, with itself")
    add("--length", type=number(int, 1), default=8, help="characters of a line, at most")
    add("--width", type=number(int, 32), default=128, help="pixels of a line")
    add("--steps", type=number(int, 1), default=4000, help="by CTC, before the arms part")
    add("--more-steps", type=number(int, 1), default=400, help="of each arm")
    add(
        "--more-lr",
        type=number(float, 0, open_end=True),
        default=0.003,
        help="their first rate, which falls to 0",
    )
    add("--weight-decay", type=number(float, 0), default=1e-4, help="of all parameters of the network")
    add("--mean-lines", type=number(int, 1), default=2000, help="training lines that class means are made of")
    add("--test-lines", type=number(int, 1), default=1000, help="lines to judge by")
    add_flags(
        parser,
        warmup=None,
        batch_size=32,
        seeds=5,
        lr=0.01,
        quick="20 characters and 200 and 40 steps, at most",
    )
    args = parser.parse_args(argv)
    if args.quick:
        limits = {"characters": 20, "steps": 200, "more_steps": 40, "test_lines": 200, "mean_lines": 400}
        for name, limit in limits.items():
            setattr(args, name, min(getattr(args, name), limit))
        args.seeds = 1
    args.arms = [arm for arm in ARMS if arm in args.arms]
    check_selection(parser, args)
    if args.sequence == "lstm" and args.feat_dim % 2:
        parser.error("argument --feat-dim: the two directions of --sequence lstm need an even number")
    # Between two equal characters CTC needs a blank.
    if 2 * args.length - 1 > args.width // FRAME:
        parser.error(
            f"argument --length: {args.length} characters may need {2 * args.length - 1} frames, and --width "
            f"{args.width} makes {args.width // FRAME}; make the lines wider or shorter"
        )
    make_folder(parser, args.out)
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the comparison; per arm a list with every seed's metrics."""
    args = parse_args(argv)
    with _ctrl_c.stopped_by_hand():
        lams = {"ctc": 0.0, "fixed": args.lam_fixed, "moved": args.lam, "norm": args.lam_norm}
        if not args.only_select:
            text = prepare(args, load(args.data, "images_background", SIDE))
        if args.select:
            lams = select(args, prepare(args, load(args.data, "images_evaluation", SIDE)))
        return {"lams": lams} if args.only_select else compare(args, text, lams)


if __name__ == "__main__":
    main()
