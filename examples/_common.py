"""What the examples share: flags, downloads, tables over seeds, and pictures."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy import linalg, stats
from tqdm import tqdm

import jax_centerloss

COMPACTNESS = {
    "accuracy": ("accuracy, %", "test samples that the softmax classifies rightly", 2),
    "nearest_mean": (
        "nearest mean, %",
        "test samples classified rightly by the nearest of the class means of the training features",
        2,
    ),
    "own_between": (
        "own / between",
        "median distance to the training mean of the class, over the mean distance between means",
        4,
    ),
    "own_distance": (
        "to center",
        "by `center_metrics`, from a test feature to the center of its class, mean",
        3,
    ),
    "moved": ("moved", "by `center_metrics`, how far centers moved in the last epoch, mean", 3),
}


def number(kind: type, low: float, *, open_end: bool = False) -> Callable[[str], Any]:
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


def add_flags(
    parser: argparse.ArgumentParser,
    *,
    warmup: int | None,
    batch_size: int,
    seeds: int,
    lr: float,
    quick: str,
) -> None:
    """The flags of every example that trains, with these defaults; `quick` is what --quick sets.

    Without a `warmup`, λ has its full weight from the start.
    """
    add = parser.add_argument
    if warmup is not None:
        add("--warmup", type=number(int, 0), default=warmup, help="epochs over which λ rises linearly")
    add("--alpha", type=number(float, 0), default=0.5, help="rate of the centers, whatever λ is")
    add("--batch-size", type=number(int, 1), default=batch_size, help="samples per step")
    add("--seeds", type=number(int, 1), default=seeds, help="runs of each kind, with seeds 0, 1, ...")
    add("--lr", type=number(float, 0, open_end=True), default=lr, help="peak rate of the network's optimizer")
    add("--out", type=Path, default=Path("out"), help="folder for what is written")
    add("--quick", action="store_true", help=f"to see that it runs: one seed, {quick}")


def add_centers_flag(parser: argparse.ArgumentParser, *choices: str) -> None:
    help_of = {
        "rule": "the paper's rule moves them",
        "optax": "gradient descent, by an optax chain of their own",
        "zero": "they stay at zero: the control, a penalty on the norm of the features",
    }
    told = "; ".join(f"{choice}: {help_of[choice]}" for choice in choices)
    parser.add_argument("--centers", choices=choices, default=choices[0], help=f"what moves them. {told}")


def how_centers_move(args: argparse.Namespace) -> str:
    return "centers at zero" if args.centers == "zero" else f"centers by {args.centers}, α = {args.alpha:g}"


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.quick:
        args.seeds, args.warmup = 1, min(args.warmup, args.epochs)
    if args.warmup > args.epochs:
        parser.error(f"argument --warmup: {args.warmup} is above the {args.epochs} epochs")
    make_folder(parser, args.out)


def make_folder(parser: argparse.ArgumentParser, out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: can't make the folder {out}: {error.strerror}")


def download(url: str, known_hash: str) -> Path:
    """The file at `url`, from the cache if it is there. One whose checksum differs is refused."""
    import pooch

    name, folder = url.rsplit("/", 1)[-1], pooch.os_cache("jax-centerloss")
    try:
        return Path(pooch.retrieve(url, known_hash, fname=name, path=folder, progressbar=True))
    except (OSError, ValueError) as error:  # Nothing came, or something else.
        raise SystemExit(
            f"Can't get {url}: {error}\nWith the data at hand, pass its folder as --data."
        ) from None


def progress(total: int, unit: str) -> tqdm:
    pause = 0.1 if sys.stderr.isatty() else 5  # A log should not fill with bars.
    return tqdm(total=total, unit=unit, mininterval=pause)


def say_if_quick(args: argparse.Namespace) -> None:
    if args.quick:
        print("\nA quick run shows that it works; it is too short to compare anything.")


def check_finite(losses: Sequence[float], run: str) -> None:
    if not np.isfinite(losses).all():
        raise SystemExit(f"{run}: the loss is not finite. Lower --lr or the weight of the center loss.")


def compactness(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    predicted: np.ndarray,
    centers: Any,
    previous: Any,
) -> tuple[dict[str, float], np.ndarray]:
    """The numbers of `COMPACTNESS` from features and labels, and the class means of the training features."""
    (x_train, y_train), (x_test, y_test) = train, test
    means = np.stack([x_train[y_train == j].mean(0) for j in range(y_train.max() + 1)])
    nearest = np.asarray(jax_centerloss.nearest_center(means, x_test))
    own = np.linalg.norm(x_test - means[y_test], axis=-1)
    first, second = np.triu_indices(len(means), k=1)
    between = np.linalg.norm(means[first] - means[second], axis=-1).mean()
    metrics = {
        **jax_centerloss.center_metrics(centers, x_test, y_test, previous=previous),
        "accuracy": 100 * np.mean(predicted == y_test),
        "nearest_mean": 100 * np.mean(nearest == y_test),
        "own_between": np.median(own) / between,  # Of class means, which softmax alone has too.
    }
    return {name: float(metrics[name]) for name in COMPACTNESS}, means


def compactness_table(arms: dict[str, list[dict[str, float]]]) -> str:
    """A line for each arm, its numbers by `spread` over the seeds, and what each column means."""
    rows = [
        [arm, *(spread([run[name] for run in runs], digits) for name, (*_, digits) in COMPACTNESS.items())]
        for arm, runs in arms.items()
    ]
    meanings = [f"{title}: {meaning}" for title, meaning, _ in COMPACTNESS.values()]
    return "\n".join([markdown(["", *(title for title, *_ in COMPACTNESS.values())], rows), "", *meanings])


def over_seeds(count: int) -> str:
    """What `spread` shows of so many seeds."""
    return f"mean ± standard deviation over {count} seeds" if count > 1 else "one seed"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation over the seeds (of the sample, with n - 1); of one seed its value."""
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def difference(first: Sequence[float], second: Sequence[float], digits: int) -> str:
    """The mean of `first - second`, paired by seed, with its 95 % interval by Student's t."""
    gained = np.subtract(first, second)
    text = f"{gained.mean():+.{digits}f}"
    if len(gained) < 2:
        return text
    reach = stats.sem(gained) * stats.t.ppf(0.975, len(gained) - 1)
    return f"{text} [{gained.mean() - reach:+.{digits}f}, {gained.mean() + reach:+.{digits}f}]"


def unit_length(features: np.ndarray) -> np.ndarray:
    # A feature of length 0, of a collapsed network, and those of a diverged one are like no other.
    features = np.nan_to_num(features, posinf=0, neginf=0)
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


def arm_differences(
    results: dict[str, list[Any]],
    titles: dict[str, str],
    pairs: Sequence[tuple[str, str]],
    columns: Sequence[Callable[[list[Any]], Sequence[float]]],
) -> list[list[str]]:
    """A row for each pair of arms that ran: the `difference` of each column, which reads an arm's runs."""
    return [
        [
            f"{titles[first]} - {titles[second]}",
            *(difference(column(results[first]), column(results[second]), 2) for column in columns),
        ]
        for first, second in pairs
        if {first, second} <= results.keys()
    ]


def entries(name: str) -> Callable[[list[Any]], list[float]]:
    """Reads the number of that name in each run."""
    return lambda runs: [run[name] for run in runs]


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up, for the eye and for Markdown alike."""
    lines = [list(heads), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, [f"{'-' * (width - 1)}:" if i else "-" * width for i, width in enumerate(widths)])
    padded = [
        [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


@dataclass
class Plane:
    """What one panel of a picture shows, all of two dimensions; see `jax_centerloss.plot`."""

    title: str
    centers: Any
    features: np.ndarray
    labels: np.ndarray
    previous: Any = None


def alike(planes: Sequence[Plane]) -> list[Plane]:
    """The planes, turned and mirrored so that their samples, the same in all, lie as in the first.

    Main directions have no sign of their own, and two of about the same variance have no order either.
    """

    def turned(plane: Plane) -> Plane:
        turn, _ = linalg.orthogonal_procrustes(plane.features, planes[0].features)
        centers, previous = jax.tree.map(lambda table: table @ turn, (plane.centers, plane.previous))
        return replace(plane, centers=centers, features=plane.features @ turn, previous=previous)

    return [turned(plane) for plane in planes]


def draw_planes(
    path: Path,
    title: str,
    planes: Sequence[Plane],
    names: Sequence[str],
    *,
    main_directions: bool = False,
) -> None:
    """Feature planes, at most three in a row, each on its own scale, and one legend of the classes.

    A dashed frame in a panel is the extent of the smallest one. With `main_directions` they are projections
    of the same samples, and are made to lie `alike`.
    """
    planes = alike(planes) if main_directions else planes
    rows = -(-len(planes) // 3)
    columns = -(-len(planes) // rows)
    figure = new_figure(5 * columns + 1, 5 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(planes) :]:
        axis.set_axis_off()
    axes = axes[: len(planes)]
    handles: dict[int, Any] = {}
    for axis, plane in zip(axes, planes, strict=True):
        jax_centerloss.plot(plane.centers, plane.features, plane.labels, previous=plane.previous, ax=axis)
        axis.set(title=plane.title)
        if main_directions:
            axis.set(xlabel="main directions, turned as in the first panel", ylabel="")
        if legend := axis.get_legend():
            numbers = [int(text.get_text()) for text in legend.get_texts()]
            handles |= zip(numbers, legend.legend_handles, strict=True)
            legend.remove()
    smallest = min(axes, key=lambda axis: np.ptp(axis.get_xlim()))
    (left, right), (low, high) = smallest.get_xlim(), smallest.get_ylim()
    for axis in axes:
        if np.ptp(axis.get_xlim()) > 1.5 * (right - left):
            frame = [left, right, right, left, left], [low, low, high, high, low]
            axis.plot(*frame, "--", color="gray", linewidth=1)
    shown = sorted(handles)
    figure.legend([handles[j] for j in shown], [names[j] for j in shown], loc="outside right center")
    figure.suptitle(f"{title} (own scales; dashed: the smallest panel)", wrap=True)
    figure.savefig(path, dpi=100)


def new_figure(width: float, height: float) -> Any:
    """A figure that no window and no notebook knows of: it is only to be saved."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
