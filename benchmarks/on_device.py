"""Time of the steps of benchmarks/compiled.py on the device that JAX finds, by a clock.

    python benchmarks/on_device.py [--cells "1024,128,1000 ..."]
    python benchmarks/on_device.py --large 100000000,512

Steps of one cell are timed in turn, 50 at once, so that the host starts the next while the device works.
`--large` takes a step by the paper's rule on a bfloat16 table of C rows of D features instead, compares the
rows that moved with NumPy's, and sets the time beside that with a million classes in the same run. For a
table that leaves little of a GPU's memory, set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.
"""

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from steps import HALF, PLAIN, QUICK, SCATTER, STEPS, dense, program
from timing import alternate

import jax_centerloss as jcl

LABEL_SETS = 8  # Taken in turn, so that no step finds its rows in the cache from the step before.
BLOCK = 50


def filled(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Numbers between 0 and 0.1, which can be second moments of an optimizer too; integers are 0."""
    if jnp.issubdtype(shape.dtype, jnp.floating):
        return jax.jit(lambda: jax.random.uniform(jax.random.key(0), shape.shape, shape.dtype, 0, 0.1))()
    return jnp.zeros(shape.shape, shape.dtype)


class Runner:
    """A compiled step, and what it takes; `fill` makes the centers and the state that it holds."""

    def __init__(self, name: str, n: int, d: int, c: int, fill: Callable[[Any], jax.Array] = filled) -> None:
        step, (held, x, *others) = program(name, n, d, c)
        self.keeps = step in (dense, jcl.nearest_center)  # It returns nothing that the next step takes.
        self.bare = name == SCATTER
        self.compiled = jax.jit(step, donate_argnums=() if self.keeps else 0)
        self.held, self.x = jax.tree.map(fill, held), filled(x)
        keys = jax.random.split(jax.random.key(1), LABEL_SETS)
        labels = (jax.random.randint(key, (n,), 0, c) for key in keys)
        self.sets = [[y, *map(filled, others[1:])] if others else [] for y in labels]

    def block(self) -> None:
        for i in range(BLOCK):
            result = self.compiled(self.held, self.x, *self.sets[i % LABEL_SETS])
            if not self.keeps:
                self.held = result if self.bare else result[0]
        jax.block_until_ready(result)


def micros(runners: Iterable[Runner], seconds: float) -> list[float]:
    """Microseconds of a step of each runner."""
    return [1e6 * block / BLOCK for block in alternate([runner.block for runner in runners], seconds)]


def large(c: int, d: int, seconds: float) -> None:
    n = 1024
    row = np.asarray(jnp.linspace(-1, 1, d).astype(jnp.bfloat16))
    small = Runner(HALF, n, d, 1_000_000)
    big = Runner(HALF, n, d, c, fill=lambda table: jax.jit(lambda: jnp.broadcast_to(row, table.shape))())

    labels, x = np.asarray(big.sets[0][0]), np.asarray(big.x, np.float64)
    big.held = big.compiled(big.held, big.x, labels)[0]
    classes, where = np.unique(labels, return_inverse=True)
    counts, sums = np.bincount(where)[:, None], np.zeros((len(classes), d))
    np.add.at(sums, where, x)
    want = row - 0.5 * (counts * row.astype(np.float64) - sums) / (1 + counts)
    got = np.asarray(big.held[jnp.asarray(classes)], np.float64)
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=2**-9)
    # A block at a time, since the comparison of a whole table takes as much memory again.
    block = next(size for size in range(min(c, 1_000_000), 0, -1) if c % size == 0)
    differ = jax.jit(lambda t, i: jnp.any(jax.lax.dynamic_slice_in_dim(t, i, block) != row, axis=1).sum())
    changed = sum(int(differ(big.held, i)) for i in range(0, c, block))
    assert changed == len(classes), (changed, len(classes))

    few, many = micros((small, big), seconds)
    size = f"{c:,} x {d} in bfloat16, {c * d * 2 / 1e9:.1f} GB"
    print(f"A table of {size}: one step moved {changed:,} rows, those of its batch, to NumPy's numbers.")
    print(f"A step takes {many:.1f} µs, with 1,000,000 classes {few:.1f}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", help="these, as N,D,C N,D,C ..., not N = 1024 and D = 128 only")
    parser.add_argument("--large", metavar="C,D", help="a bfloat16 table of this size instead")
    parser.add_argument("--seconds", type=float, default=3, help="of a cell, at least (default: 3)")
    args = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}\n")
    if args.large:
        large(*map(int, args.large.split(",")), args.seconds)
        return
    names = (*PLAIN, *STEPS)
    print("Microseconds of a step.\n")
    print("| N | D | C | " + " | ".join(names) + " |\n" + "|--:" * (3 + len(names)) + "|")
    cells = [tuple(map(int, cell.split(","))) for cell in args.cells.split()] if args.cells else QUICK
    for n, d, c in cells:
        times = micros((Runner(name, n, d, c) for name in names), args.seconds)
        print(f"| {n:,} | {d} | {c:,} | " + " | ".join(f"{t:.1f}" for t in times) + " |", flush=True)


if __name__ == "__main__":
    main()
