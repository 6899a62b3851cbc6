"""What the compilers of GPUs and TPUs make of a training step, on any Linux machine, without a device.

    python benchmarks/compiled.py [--quick] [--check] [--targets T4 H100 v5e]

A target whose compiler is not installed is left out, with the command that installs it; the two take some
1.5 GB each, and an environment of their own each. No program is run: every figure is a compiler's, and its
time an estimate, not a clock's. `--check` fails where a target is missed. `benchmarks/on_device.py` runs the
same steps on a device at hand, by a clock.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import targets  # First: it keeps JAX from looking for devices.

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from placements import collectives
from steps import CELLS, HALF, IN_HALF, QUICK, ROUNDED, RULES, SCATTER, STEPS, by_rule, dense, program

import jax_centerloss as jcl

# In a step by rule of QUICK's cells, at most. Where classes are few, at most 8 on each of them.
KERNELS = {"T4": 12, "A100": 9, "H100": 8}


class Found(NamedTuple):
    """What a program takes, as its compiler says."""

    temporaries: int  # Bytes.
    aliased: int  # Bytes of results written in place.
    copies: int  # Of something as large as the table.
    loops: int
    kernels: int  # Launched on a GPU, copies left out; operations on a TPU. Those in a loop count once.
    swaps: int  # Compare-and-swap loops, one for each number that a thread adds.
    atomics: int  # Atomic sums of floats.
    travels: int  # Bytes of collectives.
    micros: float  # Estimated microseconds, where there is an estimate.


COLUMNS = (
    *("target", "step", "N", "D", "C", "KiB of temporaries", "MiB in place", "copies of the table", "loops"),
    *("kernels", "swaps", "atomics", "KiB that travel", "estimate, µs"),
)
Where = Callable[[Any], Any]  # From a shape to where it lies.


def look(step: Callable[..., Any], arguments: Any, where: Where, table: tuple[int, int], gpu: bool) -> Found:
    """Compiles a step, its results placed as its arguments are, and reads what came out."""
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where(a)), arguments)
    results = jax.tree.map(where, jax.eval_shape(step, *arguments))
    donated = () if step in (dense, jcl.nearest_center) else (0,)
    lowered = jax.jit(step, donate_argnums=donated, out_shardings=results).lower(*placed)
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder}
        if jax.__version_info__ >= (0, 11):  # There PTX is written only where emitters are.
            dump["xla_dump_emitter_re"] = ".*"
        made = lowered.compile(dump if gpu else None)
        ptx, launches, text = (
            "".join(path.read_text() for path in Path(folder).glob(pattern))
            for pattern in ("*.ptx", "*thunk_sequence.txt", "*gpu_after_optimizations.txt")
        )
    text = text or made.as_text()
    memory, cost = made.memory_analysis(), made.cost_analysis() or {}
    launched = re.findall(r"^\s*\d+: k(?!While|Sequential|Conditional|Copy|Mem)", launches, re.M)
    operation = r"= (?:\([^=]*?\)|\S+) (?:fusion|copy|sort|custom-call|convolution)\("
    operations = re.findall(operation, text[text.index("\nENTRY ") :])
    as_the_table = "|".join(f"{a},{b}" for a, b in (table, table[::-1]))
    return Found(
        temporaries=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        copies=len(re.findall(rf"= \(?\w+\[(?:{as_the_table})\][^=]*? copy(?:-start)?\(", text)),
        loops=len(re.findall(r" while\(", text)),
        kernels=len(launched or operations),  # JAX 0.7 does not tell the former.
        swaps=len(re.findall(r"\batom\S*\.cas\b", ptx)),
        atomics=len(re.findall(r"\b(?:atom|red)\S*\.add\S*\.f\d", ptx)),
        travels=sum(size * number for (_, size), number in collectives(text).items()),
        micros=1e6 * cost.get("optimal_seconds", 0),
    )


class Report:
    """Prints what was found, and keeps what misses its target."""

    def __init__(self) -> None:
        self.missed: list[str] = []
        print(f"| {' | '.join(COLUMNS)} |\n" + "|---" * 2 + "|--:" * (len(COLUMNS) - 2) + "|")

    def line(self, target: str, step: str, n: int, d: int, c: int, found: Found) -> None:
        sizes = f"{found.temporaries / 2**10:,.0f} | {found.aliased / 2**20:,.0f}"
        counts = f"{found.copies} | {found.loops} | {found.kernels} | {found.swaps} | {found.atomics}"
        estimate = f"{found.micros:,.1f}" if found.micros > 0 else ""
        print(f"| {target} | {step} | {n:,} | {d} | {c:,} | {sizes} | {counts} ", end="")
        print(f"| {found.travels / 2**10:,.0f} | {estimate} |", flush=True)

    def expect(self, what: str, got: float, most: float) -> None:
        if got > most:
            self.missed.append(f"{what}: {got:,.2f}, at most {most:,.2f} expected")


def one_device(target: str, cells: list[tuple[int, int, int]], report: Report) -> None:
    device, gpu = targets.devices(target)[0], target in targets.GPUS
    here = SingleDeviceSharding(device)
    row_major = Format(Layout((0, 1)), here)
    found: dict[tuple[Any, ...], Found] = {}

    def run(name: str, n: int, d: int, c: int, where: Where, note: str = "") -> Found:
        got = look(*program(name, n, d, c), where, (c, d), gpu)
        report.line(target, name + note, n, d, c, got)
        found[name + note, n, d, c] = got
        return got

    for n, d, c in cells:
        for name in STEPS:
            got, cell = run(name, n, d, c, lambda _: here), f"{target}, {name}, N={n} D={d} C={c}"
            if name == SCATTER and gpu:
                report.expect(
                    f"{cell}: nothing seen of sums that are surely there", 1, got.swaps + got.atomics
                )
            if name in (SCATTER, "nearest_center"):  # The latter goes through the table in blocks, in a loop.
                continue
            report.expect(f"{cell}: loops", got.loops, 0)
            # Flax models have a sum of their own, of the cross-entropy with integer labels.
            sums, theirs = got.swaps + got.atomics, int(name in ("NNX", "Linen"))
            report.expect(f"{cell}: compare-and-swap loops and atomic sums", sums, theirs)
            if name in RULES:
                room = 6 * n * d * 4 + 2**16 + (0 if c > n else 4 * n * c)
                if gpu or d % 128 == 0:
                    report.expect(f"{cell}: temporaries", got.temporaries, room)
                if gpu and (n, d, c) in QUICK:
                    report.expect(f"{cell}: kernels", got.kernels, 8 if c <= 128 else KERNELS[target])
        with_key, without = (found[name, n, d, c] for name in (ROUNDED, HALF))
        cell = f"{target}, bfloat16, N={n} D={d} C={c}"
        report.expect(
            f"{cell}: temporaries for the key", with_key.temporaries - without.temporaries, 2 * n * d * 4
        )
        if c > n:
            report.expect(f"{cell}: copies", sum(found[name, n, d, c].copies for name in IN_HALF), 0)
    if gpu:
        return
    many, few = (found["paper", 1024, 128, c].micros for c in (1_000_000, 1_000))
    if few > 0 and many > 0:  # Not for every chip is there an estimate.
        report.expect(f"{target}: a million classes, by a thousand's estimate", many / few, 1.3)
    c = 1_000_000
    for d in (64, 192, 300):
        run("paper", 1024, d, c, lambda _: here)  # What it costs to leave the layout to JAX.
        tables = partial(lambda size, a: row_major if a.shape == size else here, (c, d))
        for name in ("paper", "row Adam", "NNX"):
            got, cell = run(name, 1024, d, c, tables, ", row-major"), f"{target}, {name}, D={d}, row-major"
            report.expect(f"{cell}: copies", got.copies, 0)
            padded = -(-d // 128) * 128
            report.expect(f"{cell}: temporaries", got.temporaries, 6 * 1024 * padded * 4 + 2**16)


def full_memory(report: Report) -> None:
    """A hundred million centers in bfloat16 on one H200 of 141 GB."""
    here = SingleDeviceSharding(targets.devices("H200")[0])
    n, d, c = 1024, 512, 100_000_000
    for name in (HALF, ROUNDED):
        got = look(*program(name, n, d, c), lambda _: here, (c, d), gpu=True)
        report.line("H200", name, n, d, c, got)
        report.expect(f"H200, {name}: bytes not in place", c * d * 2, got.aliased)
        report.expect(f"H200, {name}: temporaries", got.temporaries, 8 * n * d * 4 + 2**16)


def pod(report: Report) -> None:
    """A billion centers in bfloat16 on 256 chips: a table of 1 TiB, 4 GiB on each."""
    devices, n, d = targets.devices(targets.POD), 32_768, 512
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = Mesh(devices, ("chips",), axis_types=(kind,))
        found = []
        for c in (2**20, 2**30):
            shape = jax.ShapeDtypeStruct
            arguments = shape((c, d), jnp.bfloat16), shape((n, d), jnp.float32), shape((n,), jnp.int32)
            split = NamedSharding(mesh, P("chips"))
            whole = NamedSharding(mesh, P())
            where = partial(lambda split, whole, a: split if a.ndim else whole, split, whole)
            with jax.set_mesh(mesh):
                found.append(look(partial(by_rule, "paper"), arguments, where, (c // len(devices), d), False))
            report.line(f"{targets.POD}, {kind.name}", "paper, bfloat16", n, d, c, found[-1])
        few, many = found
        report.expect(f"pod, {kind.name}: bytes that travel", many.travels, few.travels)
        report.expect(f"pod, {kind.name}: temporaries of a chip", many.temporaries, 1.01 * few.temporaries)
        report.expect(f"pod, {kind.name}: a table not in place", 2**30 * d * 2 / 256, many.aliased)


ALONE = {"pod": pod, "H200": full_memory}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = (*targets.GPUS, *targets.TPUS, "pod")
    parser.add_argument("--targets", nargs="+", choices=every, default=every, help="these only")
    parser.add_argument("--quick", action="store_true", help="N = 1024 and D = 128 only")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    args = parser.parse_args()
    print(f"jax {jax.__version__}. Every figure is a compiler's; nothing was run.\n")
    there = []
    for target in args.targets:
        command = targets.missing(target)
        if command:
            print(f"{target} is left out, without its compiler: {command}")
        else:
            there.append(target)
    if not there:
        sys.exit("No compiler is installed.")
    report = Report()
    for target in there:
        if target in ALONE:
            ALONE[target](report)
        else:
            one_device(target, QUICK if args.quick else CELLS, report)
    print("\n" + ("\n".join(report.missed) or "No target is missed."))
    return int(args.check and bool(report.missed))


if __name__ == "__main__":
    sys.exit(main())
