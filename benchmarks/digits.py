"""What center loss adds to the time of a training step of examples/digits.py.

python benchmarks/digits.py
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import digits

SAMPLES = 12_800  # In one compiled scan, as in the example's epochs.


class Nothing(nnx.Module):
    """In place of the center loss."""

    def __call__(self, x: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.zeros((), x.dtype)


def prepare(centers: str, width: int, batch: int, steps: int) -> Callable[[], None]:
    """What runs `steps` steps."""
    args = argparse.Namespace(centers=centers, lr=0.1, alpha=0.5)
    model = digits.Model(2, centers, rngs=nnx.Rngs(0))
    model.hidden1, model.hidden2 = (nnx.Linear(n, width, rngs=nnx.Rngs(1)) for n in (64, width))
    model.embed = nnx.Linear(width, 2, rngs=nnx.Rngs(2))
    if centers == "none":
        model.center_loss = Nothing()
    tx = digits.make_optimizer(args.lr, 10_000)
    if centers == "optax":
        tx = digits.with_centers(tx, args.alpha, 0.1, 0, 10_000)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.random((1347, 64)), jnp.float32), jnp.asarray(rng.integers(0, 10, 1347), jnp.int32)
    order = jnp.asarray(rng.integers(0, 1347, (steps, batch)))
    lams = jnp.full(steps, 0.1, jnp.float32)
    program = digits.make_epoch(args).lower(graphdef, state, x, y, order, lams).compile()
    held = [state]

    def run() -> None:
        held[0], loss = program(held[0], x, y, order, lams)
        loss.block_until_ready()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6, help="measuring time of a row (default: 6)")
    args = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}\n")
    print("| hidden units | batch | softmax alone | centers by rule | by optax |\n|--:|--:|--:|--:|--:|")
    for width, batch in ((128, 64), (512, 256), (1024, 512)):
        steps = SAMPLES // batch
        runs = {kind: prepare(kind, width, batch, steps) for kind in ("none", "rule", "optax")}
        times: dict[str, list[float]] = {kind: [] for kind in runs}
        end = time.perf_counter() + args.seconds
        while time.perf_counter() < end or len(times["none"]) < 6:
            for kind, run in runs.items():
                start = time.perf_counter()
                run()
                times[kind].append((time.perf_counter() - start) / steps)
        none, rule, optax = (statistics.median(kept[1:]) * 1e6 for kept in times.values())
        cells = (f"{t:.0f} µs ({100 * (t / none - 1):+.0f} %)" for t in (rule, optax))
        print(f"| {width} | {batch} | {none:.0f} µs | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
