"""Centers in half the memory: where they stop, what a step costs, and what memory is taken.

    python benchmarks/half_precision.py [--check]

"Stops at" is the mean of 1,000 centers on their way from 1 to 1.7 by 1/32 of what is left at each step (one
sample a class, the paper's rule, alpha = 1/16), after 1,000 steps. The steps of a cell are timed in turn.
`--check` fails where a key takes more than 1.5 times the step without one, or 8 N D bytes of temporaries
more, or where a center that has a key ends 0.01 or more from 1.7. A CPU of JAX 0.10 or older converts a whole
bfloat16 table in each step: its times are not held to that.
"""

import argparse
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from timing import alternate

import jax_centerloss as jcl

CELLS = [(128, 128, 100_000), (1024, 128, 1_000_000), (1024, 512, 100_000), (8192, 128, 100_000)]
ADAM = optax.adam(1e-3)


def stops_at(dtype: str, with_key: bool) -> float:
    x, labels = jnp.full((1000, 1), 1.7), jnp.arange(1000)

    def step(centers: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        rounding_key = key if with_key else None
        moved = jcl.update_centers(centers, x, labels, alpha=1 / 16, rounding_key=rounding_key)
        return moved, None

    keys = jax.random.split(jax.random.key(0), 1000)
    centers, _ = jax.jit(partial(jax.lax.scan, step))(jnp.ones((1000, 1), dtype), keys)
    return float(jnp.mean(centers, dtype=jnp.float32))


def prepare(n: int, d: int, c: int, dtype: str, with_key: bool, rows: Any) -> Any:
    """What runs a step on tables of its own, and the bytes of these tables and of temporaries."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, labels = jax.random.normal(keys[0], (n, d)), jax.random.randint(keys[1], (n,), 0, c)
    centers = jcl.init_centers(keys[2], c, d, dtype=dtype)["centers"]

    def step(held: Any, key: jax.Array) -> Any:
        rounding_key = key if with_key else None
        if rows is None:
            return jcl.update_centers(held, x, labels, rounding_key=rounding_key)
        return rows.update(*held, x, labels, rounding_key=rounding_key)

    held = [centers if rows is None else (centers, rows.init(centers))]
    program = jax.jit(step, donate_argnums=0).lower(held[0], keys[0]).compile()
    tables = sum(leaf.nbytes for leaf in jax.tree.leaves(held[0]))

    def run() -> None:
        held[0] = jax.block_until_ready(program(held[0], keys[0]))

    return run, tables, program.memory_analysis().temp_size_in_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6, help="measuring time of a cell (default: 6)")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    args = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}\n")
    missed = []
    print("| centers | stops at |\n|---|--:|")
    for dtype in ("float32", "bfloat16", "float16"):
        for with_key in (False, True):
            stop = stops_at(dtype, with_key)
            print(f"| {dtype}{', with a key' * with_key} | {stop:.4f} |")
            if with_key and abs(stop - 1.7) > 0.01:
                missed.append(f"{dtype} with a key stops at {stop:.4f}")
    kinds = {
        "float32": ("float32", False, None),
        "bfloat16": ("bfloat16", False, None),
        "bfloat16, with a key": ("bfloat16", True, None),
        "Adam, float32": ("float32", False, jcl.row_optimizer(ADAM)),
        "Adam, bfloat16": ("bfloat16", False, jcl.row_optimizer(ADAM)),
        "Adam, bfloat16, with a key": ("bfloat16", True, jcl.row_optimizer(ADAM)),
        "Adam, bfloat16 state too": ("bfloat16", True, jcl.row_optimizer(ADAM, state_dtype="bfloat16")),
    }
    print("\n| N | D | C | step | MiB of tables | KiB of temporaries | µs | by the step without a key |")
    print("|--:|--:|--:|---|--:|--:|--:|--:|")
    for n, d, c in CELLS:
        prepared = {name: prepare(n, d, c, *kind) for name, kind in kinds.items()}
        medians = alternate([run for run, *_ in prepared.values()], args.seconds)
        took = dict(zip(prepared, (1e6 * median for median in medians), strict=True))  # Microseconds.
        for name, (_, tables, temporaries) in prepared.items():
            plain = {"bfloat16, with a key": "bfloat16", "Adam, bfloat16, with a key": "Adam, bfloat16"}
            ratio = took[name] / took[plain[name]] if name in plain else None
            line = f"| {n:,} | {d} | {c:,} | {name} | {tables / 2**20:,.0f} | {temporaries / 2**10:,.0f} "
            print(f"{line}| {took[name]:,.0f} | {f'{ratio:.2f}' if ratio else ''} |", flush=True)
            if ratio is None:
                continue
            more = temporaries - prepared[plain[name]][2]
            if more > 2 * n * d * 4:
                missed.append(f"{name}, N={n} D={d} C={c}: {more:,} bytes of temporaries more")
            if ratio > 1.5 and jax.__version_info__ >= (0, 11):
                missed.append(f"{name}, N={n} D={d} C={c}: {ratio:.2f} times the step without a key")
    print("\n" + ("\n".join(missed) or "No target is missed."))
    return int(args.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
