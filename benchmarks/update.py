"""Time of a training step of the centers (loss, gradient of the features, moved centers) against the classes.

python benchmarks/update.py                   # every cell: prints the table, draws update.png, speed.png
python benchmarks/update.py --quick --check   # a few cells; fails where a target is missed
python benchmarks/update.py --plain --check   # beside plain JAX by hand only, in cells of everyday sizes

Needs torch and matplotlib. On a GPU the peers run there too (`--device cuda`).
"""

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import steps
import torch
from torch.nn import functional

import jax_centerloss as jcl

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from reference import CenterLoss

RATE = 0.5
LABEL_SETS = 8  # Taken in turn, so that no step finds its rows in the cache from the step before.
CELLS = list(itertools.product((128, 1024, 8192), (2, 128, 512), (10, 1_000, 100_000, 10_000_000)))
QUICK = [
    (1024, 128, 1_000),
    (1024, 128, 100_000),
    (1024, 128, 10_000_000),
    (8192, 128, 100_000),
    (1024, 512, 100_000),
]
# From digits over person re-identification, text lines and faces to a million classes.
PLAIN_CELLS = [
    (128, 128, 10),
    (64, 2048, 751),
    (1024, 128, 1_000),
    (1600, 96, 6_625),
    (256, 512, 85_742),
    (1024, 128, 1_000_000),
    (8192, 128, 100_000),
]
Cell = tuple[int, int, int]  # N, D, C.
Step = Callable[[int], Any]  # Takes a step on the label set of that number and returns what to wait for.

OURS = ["paper", "gradient", "row Adam"]
BY_HAND = {"paper": "plain paper", "gradient": "plain gradient", "row Adam": "plain Adam"}  # In JAX.
AUTOGRAD = ["reference", "dense SGD", "sparse SGD", "SparseAdam"]  # Torch's.
COLUMNS = [*OURS, *BY_HAND.values(), "jax dense", *AUTOGRAD, "by hand", "rows", "copy"]
# The lines of the pictures, and what each is called there.
SHOWN = {
    "paper": ("tab:blue", "this library"),
    "plain paper": ("tab:green", "plain JAX by hand"),
    "sparse SGD": ("tab:brown", "PyTorch, sparse SGD"),
    "dense SGD": ("tab:orange", "PyTorch,\ndense SGD"),
    "reference": ("tab:red", "PyTorch module"),
}
IN_PANELS = ("paper", "plain paper", "sparse SGD", "dense SGD")


class Bench:
    """The peers of one cell. Torch's all train one table, JAX's another: two fit where ten would not."""

    def __init__(self, cell: Cell, device: str) -> None:
        self.n, self.d, self.c = cell
        self.device = device
        rng = np.random.default_rng(0)
        part = rng.standard_normal((min(self.c, 10_000), self.d), dtype=np.float32)
        # Each library's own memory: NumPy's would come in huge pages, which the others do not ask for.
        self.table = torch.empty((self.c, self.d), device=device)
        for start in range(0, self.c, len(part)):
            rows = self.table[start : start + len(part)]
            rows.copy_(torch.from_numpy(part[: len(rows)]))
        self.x = rng.standard_normal((self.n, self.d), dtype=np.float32)
        self.labels = [rng.integers(0, self.c, self.n) for _ in range(LABEL_SETS)]

    def torch_peers(self) -> Iterator[tuple[str, float, Callable[[], Step]]]:
        """Name, bytes beyond the table, and what makes the step."""
        size = 4.0 * self.c * self.d
        table, x = self.table, torch.from_numpy(self.x).to(self.device)
        labels = [torch.from_numpy(y).to(self.device) for y in self.labels]

        def by_autograd(loss: Callable[..., torch.Tensor], make: Callable[..., Any]) -> Callable[[], Step]:
            def prepare() -> Step:
                centers = torch.nn.Parameter(table)
                optimizer, features = make([centers], lr=RATE), x.clone().requires_grad_()

                def step(i: int) -> None:
                    optimizer.zero_grad()
                    features.grad = None
                    loss(centers, features, labels[i]).backward()
                    optimizer.step()

                return step

            return prepare

        def gather(centers: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x - centers[y]).square().sum() / self.n

        def embedding(centers: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x - functional.embedding(y, centers, sparse=True)).square().sum() / self.n

        def by_hand() -> Step:
            def step(i: int) -> tuple[torch.Tensor, torch.Tensor]:
                difference = x - table[labels[i]]
                loss = difference.square().sum() / self.n
                table.index_add_(0, labels[i], difference, alpha=2 * RATE / self.n)
                return loss, difference * (2 / self.n)

            return step

        def reference() -> Step:
            module = CenterLoss(1, self.d)
            module.centers = torch.nn.Parameter(table)
            return by_autograd(
                lambda _, x, y: module(x, y), lambda _, lr: torch.optim.SGD(module.parameters(), lr)
            )()

        yield "reference", 16.0 * self.n * self.c + size, reference
        yield "dense SGD", 2 * size, by_autograd(gather, torch.optim.SGD)
        yield "sparse SGD", 0, by_autograd(embedding, torch.optim.SGD)
        yield "SparseAdam", 2 * size, by_autograd(embedding, torch.optim.SparseAdam)
        yield "by hand", 0, by_hand

    def jax_peers(self) -> Iterator[tuple[str, float, Callable[[], Step]]]:
        size = 4.0 * self.c * self.d
        held: list[Any] = [
            jnp.array(self.table.numpy() if self.device == "cpu" else jnp.from_dlpack(self.table))
        ]
        x, labels = jnp.asarray(self.x), [jnp.asarray(y, jnp.int32) for y in self.labels]
        adam = jcl.row_optimizer(optax.adam(RATE))
        sgd = optax.sgd(RATE)

        def loss_of(centers: Any, y: Any) -> Any:
            return jax.value_and_grad(lambda x: jcl.center_loss(centers, x, y))(x)

        def by_rule(rule: str) -> Callable[..., Any]:
            def step(centers: Any, state: Any, y: Any) -> Any:
                loss, grad = loss_of(centers, y)
                moved = jcl.update_centers(centers, x, y, alpha=RATE, rule=rule, after=loss)
                return moved, state, loss, grad

            return step

        def by_rows(centers: Any, state: Any, y: Any) -> Any:
            loss, grad = loss_of(centers, y)
            moved, state = adam.update(centers, state, x, y, after=loss)
            return moved, state, loss, grad

        def dense(centers: Any, state: Any, y: Any) -> Any:
            loss, (grads, grad) = jax.value_and_grad(jcl.center_loss, (0, 1))(centers, x, y)
            updates, state = sgd.update(grads, state)
            return optax.apply_updates(centers, updates), state, loss, grad

        def prepared(step: Callable[..., Any], init: Callable[[Any], Any]) -> Callable[[], Step]:
            def prepare() -> Step:
                compiled = jax.jit(step, donate_argnums=(0, 1))
                state = [init(held[0])]

                def take(i: int) -> Any:
                    held[0], state[0], *rest = compiled(held[0], state[0], labels[i])
                    return held[0], state[0], rest

                return take

            return prepare

        def by_hand(rule: str) -> Callable[..., Any]:
            def step(centers: Any, state: Any, y: Any) -> Any:
                moved, *rest = steps.plain_rule(rule, centers, x, y)
                return moved, state, *rest

            return step

        def adam_by_hand(centers: Any, state: Any, y: Any) -> Any:
            held, *rest = steps.plain_adam((centers, state), x, y)
            return *held, *rest

        for rule in ("paper", "gradient"):
            yield rule, 0, prepared(by_rule(rule), lambda _: ())
            yield f"plain {rule}", 0, prepared(by_hand(rule), lambda _: ())
        yield "row Adam", 2 * size, prepared(by_rows, adam.init)
        yield "plain Adam", 2 * size, prepared(adam_by_hand, steps.plain_state)
        yield "jax dense", 2 * size, prepared(dense, sgd.init)

    def floors(self) -> Iterator[tuple[str, float, Callable[[], Step]]]:
        """What the memory takes: the features read and their gradient written, and the rows read and written.

        The rows lie one after the other for "copy", with as many others between two visits as in training,
        and at random places of the table for "rows".
        """
        x, table = torch.from_numpy(self.x).to(self.device), self.table
        grad, rows = torch.empty_like(x), torch.empty_like(x)
        kept = min(self.c, LABEL_SETS * self.n)
        starts = [i * self.n % max(kept - self.n, 1) for i in range(LABEL_SETS)]

        def copy(i: int) -> None:
            part = table[starts[i] : starts[i] + self.n]
            grad.copy_(x)
            rows[: len(part)].copy_(part)
            part.copy_(rows[: len(part)])

        def numpy_rows(i: int) -> None:
            np.copyto(grad.numpy(), self.x)
            np.take(table.numpy(), self.labels[i], axis=0, out=rows.numpy(), mode="clip")
            table.numpy()[self.labels[i]] = rows.numpy()

        labels = [torch.from_numpy(y).to(self.device) for y in self.labels]

        def device_rows(i: int) -> None:
            grad.copy_(x)
            table.index_copy_(0, labels[i], torch.index_select(table, 0, labels[i], out=rows))

        yield "copy", 0, lambda: copy
        yield "rows", 0, lambda: numpy_rows if self.device == "cpu" else device_rows

    def run(self, memory: float, seconds: float, skip: set[str]) -> tuple[dict[str, float], dict[str, float]]:
        """Median seconds of a step, over blocks of steps that the peers take in turn; and ours by plain's.

        A block's ratio is to the block of plain JAX after it: what else the machine does then slows both.
        """
        budget = memory - 2 * self.table.nbytes
        prepared: dict[str, Step] = {}
        for name, extra, prepare in itertools.chain(self.jax_peers(), self.torch_peers(), self.floors()):
            if name not in skip and extra <= budget:
                prepared[name] = prepare()
                # Held from step to step.
                budget -= extra if name in ("SparseAdam", "row Adam", "plain Adam") else 0
        times: dict[str, list[float]] = {name: [] for name in prepared}
        order = itertools.cycle(range(LABEL_SETS))

        def block(step: Step, number: int) -> float:
            start = time.perf_counter()
            for _ in range(number):
                result = step(next(order))
            jax.block_until_ready(result)
            if self.device != "cpu":
                torch.cuda.synchronize()
            return (time.perf_counter() - start) / number

        length = 0.005 if "by hand" in skip else 0.02  # Seconds of a block, longer beside Torch.
        slow = {name for name, step in prepared.items() if (block(step, 1), block(step, 1))[1] > 0.3}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or min(map(len, times.values())) < 3:
            for name, step in prepared.items():
                if name in slow:
                    if len(times[name]) < 3:
                        times[name].append(block(step, 1))
                    continue
                # Not kept: the threads of Torch spin on for some milliseconds.
                calm = time.perf_counter() + length
                once = block(step, 1)
                while time.perf_counter() < calm:
                    once = block(step, 1)
                times[name].append(block(step, max(1, min(50, math.ceil(length / once)))))
        ratios = {
            name: statistics.median(a / b for a, b in zip(times[name], times[plain], strict=False))
            for name, plain in BY_HAND.items()
            if name in times and plain in times
        }
        return {name: statistics.median(kept) for name, kept in times.items()}, ratios


def draw_lines(
    ax: Any, results: dict[Cell, dict[str, float]], n: int, d: int, names: Iterable[str]
) -> dict[str, tuple[float, float]]:
    """The lines of one N and D, and where each of them ends."""
    ends: dict[str, tuple[float, float]] = {}
    for name in names:
        color, label = SHOWN[name]
        points = [(cell[2], t[name] * 1e3) for cell, t in results.items() if cell[:2] == (n, d) and name in t]
        if points:
            width = 3 if name in OURS else 1.8
            ax.plot(*zip(*points, strict=True), color=color, marker="o", linewidth=width, label=label)
            ends[name] = points[-1]
    ax.set(xscale="log", yscale="log", xlabel="number of classes")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    ax.minorticks_off()
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    return ends


def draw(path: Path, results: dict[Cell, dict[str, float]], d: int = 128) -> None:
    """A panel for each N. Without this D among the results, it is of the first that there is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if not any(cell[1] == d for cell in results):
        d = next(iter(results))[1]
    sizes = sorted({cell[0] for cell in results if cell[1] == d})
    figure, axes = plt.subplots(
        1, len(sizes), squeeze=False, sharey=True, figsize=(9, 3.4), layout="constrained"
    )
    for ax, n in zip(axes.flat, sizes, strict=True):
        draw_lines(ax, results, n, d, IN_PANELS)
        ax.set_title(f"{n:,} samples", loc="left")
    axes[0, 0].set_ylabel("milliseconds a step")
    lines, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        lines,
        [label.replace("\n", " ") for label in labels],
        loc="outside upper center",
        ncols=4,
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def draw_one(path: Path, results: dict[Cell, dict[str, float]], n: int = 1024, d: int = 128) -> None:
    """The picture for newcomers: one N and D, each line with its name at its end.

    Without this N and D among the results, it is of the first that there is.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if not any(cell[:2] == (n, d) for cell in results):
        n, d = next(iter(results))[:2]
    figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    ends = draw_lines(ax, results, n, d, SHOWN)
    for name, (x, y) in ends.items():
        color, label = SHOWN[name]
        # Of two lines that end within a third of each other, the lower one's name stands lower.
        beside = [other for x_, other in ends.values() if x_ == x and y / 1.5 < other < y * 1.5]
        shift = -7 if y < max(beside) else 7 if y > min(beside) else 0
        style = {"color": color, "va": "center", "weight": "bold" if name in OURS else "normal"}
        ax.annotate(label, (x, y), (8, shift), textcoords="offset points", **style)
    ax.set_ylabel("milliseconds a step")
    ax.set_title(f"A step of {n:,} samples with {d} features", loc="left")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    low, high = ax.get_xlim()
    ax.set_xlim(low, high * (high / low) ** 0.3)  # Room for the names.
    ax.set_xticks([tick for tick in ax.get_xticks() if low <= tick <= high])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def report(results: dict[Cell, dict[str, float]], ratios: dict[Cell, dict[str, float]]) -> list[str]:
    """Prints what the targets ask for, and returns those that were missed."""
    missed = []

    def check(text: str, value: float, limit: float, *, at_least: bool) -> None:
        good = value >= limit if at_least else value <= limit
        print(
            f"{text}: {value:.2f} (target {'≥' if at_least else '≤'} {limit:g}){'' if good else '  MISSED'}"
        )
        if not good:
            missed.append(text)

    for cell, times in results.items():
        for rule in ("paper", "gradient"):
            plain = times[BY_HAND[rule]]
            if cell in PLAIN_CELLS:
                # A step of some microseconds is dearer for each small operation that a promise needs.
                most = 1.2 if plain < 30e-6 else 1.1
                text = f"{rule}: ours / plain JAX at N={cell[0]} D={cell[1]} C={cell[2]}"
                check(text, ratios[cell][rule], most, at_least=False)
    if not any(name in times for times in results.values() for name in AUTOGRAD):
        return missed
    for rule in ("gradient", "paper"):
        ahead = {
            cell: min(times[name] for name in AUTOGRAD if name in times) / times[rule]
            for cell, times in results.items()
            if any(name in times for name in AUTOGRAD)
        }
        mean = math.exp(statistics.fmean(map(math.log, ahead.values())))
        worst = min(ahead, key=lambda cell: ahead[cell])
        check(
            f"{rule}: best autograd peer / ours, geometric mean of {len(ahead)} cells",
            mean,
            2,
            at_least=True,
        )
        check(
            f"{rule}: the same, worst cell N={worst[0]} D={worst[1]} C={worst[2]}",
            ahead[worst],
            1,
            at_least=True,
        )
    large, small = results.get((1024, 128, 10_000_000)), results.get((1024, 128, 100_000))
    for rule in OURS:
        if large and small and rule in large and rule in small:
            ratio = large[rule] / small[rule]
            rows = large["rows"] / small["rows"]
            allowed = max(1.5, 1.3 * rows)
            check(
                f"{rule}: C=10,000,000 / C=100,000 at N=1024 D=128 (rows: {rows:.2f})",
                ratio,
                allowed,
                at_least=False,
            )
    cell = results.get((8192, 128, 100_000))
    if cell:
        for rule in ("gradient", "paper"):
            check(
                f"{rule}: ours / rows at N=8192 D=128 C=100,000", cell[rule] / cell["rows"], 3, at_least=False
            )
        print(f"There, rows / copy: {cell['rows'] / cell['copy']:.2f}")
    cell = results.get((1024, 512, 100_000))
    if cell and "reference" in cell:
        check(
            "reference / paper at N=1024 D=512 C=100,000",
            cell["reference"] / cell["paper"],
            3000,
            at_least=True,
        )
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", default="cpu", help="where torch runs: cpu or cuda; JAX runs on its default"
    )
    parser.add_argument("--quick", action="store_true", help="a few cells only")
    parser.add_argument("--plain", action="store_true", help="beside plain JAX only, in other cells")
    parser.add_argument("--cells", type=str, help="only these, as N,D,C N,D,C ...")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument(
        "--seconds", type=float, default=3, help="measuring time of a cell, at least (default: 3)"
    )
    parser.add_argument("--memory", type=float, default=18, help="GiB that tables may take (default: 18)")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)"
    )
    args = parser.parse_args()
    cells = QUICK if args.quick else PLAIN_CELLS if args.plain else CELLS
    if args.cells:
        cells = [tuple(map(int, cell.split(","))) for cell in args.cells.split()]
    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}, torch {torch.__version__} on {args.device}"
    )
    print("\nMilliseconds a step.\n")
    print("| N | D | C | " + " | ".join(COLUMNS) + " |\n" + "|--:" * (3 + len(COLUMNS)) + "|")
    results: dict[Cell, dict[str, float]] = {}
    ratios: dict[Cell, dict[str, float]] = {}
    for n, d, c in cells:
        if 2 * 4 * c * d > args.memory * 2**30:
            print(f"| {n} | {d} | {c:,} |" + " |" * len(COLUMNS) + " does not fit")
            continue
        # The reference takes seconds a step there; it is measured where a target asks for it.
        skip = {"reference"} if n * c > 2e8 else set()
        if args.plain:
            skip = set(COLUMNS) - {*OURS, *BY_HAND.values()}
        times, ratios[n, d, c] = Bench((n, d, c), args.device).run(args.memory * 2**30, args.seconds, skip)
        results[n, d, c] = times
        shown = (f"{times[name] * 1e3:.3f}" if name in times else "" for name in COLUMNS)
        print(f"| {n} | {d} | {c:,} | " + " | ".join(shown) + " |", flush=True)
    if not results:
        parser.error("argument --memory: no cell fits")
    print()
    missed = report(results, ratios)
    draw(args.out / "update.png", results)
    draw_one(args.out / "speed.png", results)
    print(f"\nCost against the classes: {args.out / 'speed.png'}, and for each N: {args.out / 'update.png'}")
    return int(args.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
