"""Time of center loss with both gradients against the PyTorch reference, and the forward pass's memory.

python benchmarks/loss.py            # prints the table; needs torch
python benchmarks/loss.py --check    # fails where a target is missed
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import torch
from timing import alternate, keep_freed_memory

import jax_centerloss

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from reference import CenterLoss

# N, C, D, and how many times faster than the reference it has to be.
CELLS = [(256, 10_000, 512, 20), (256, 10, 128, 2), (1024, 10_000, 128, None)]


def speed(n: int, c: int, d: int, seconds: float) -> list[float]:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(c, d)).astype(np.float32)
    x, labels = rng.normal(size=(n, d)).astype(np.float32), rng.integers(0, c, n)

    step = jax.jit(jax.value_and_grad(jax_centerloss.center_loss, (0, 1)))
    ours = [jax.numpy.asarray(a) for a in (centers, x, labels)]

    module = CenterLoss(c, d)
    module.centers.data = torch.from_numpy(centers)
    theirs = torch.from_numpy(x).requires_grad_(), torch.from_numpy(labels)

    def reference() -> None:
        module.centers.grad = theirs[0].grad = None
        module(*theirs).backward()

    return alternate([lambda: jax.block_until_ready(step(*ours)), reference], seconds)


def forward_memory(n: int, c: int, d: int) -> int:
    """Bytes of temporaries of the jitted forward pass, by XLA's own analysis."""
    shapes = [((c, d), "float32"), ((n, d), "float32"), ((n,), "int32")]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    compiled = jax.jit(jax_centerloss.center_loss).lower(*arrays).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def import_time() -> float:
    """Seconds that the import adds to jax's, from bytecode: the median over fresh processes."""
    code = "import time, jax; s = time.perf_counter(); import jax_centerloss; print(time.perf_counter() - s)"
    # Where Python writes no bytecode, a checkout is compiled at each import; an installed package never is.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, check=True, env=environment) for _ in range(8)]
    return statistics.median(float(run.stdout) for run in runs[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--seconds", type=float, default=6, help="measuring time of a row (default: 6)")
    args = parser.parse_args()
    keep_freed_memory()
    missed = []
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, torch {torch.__version__}")
    print("| N | C | D | jax_centerloss | torch reference | ratio | target |\n|--:|--:|--:|--:|--:|--:|--:|")
    for n, c, d, target in CELLS:
        ours, theirs = speed(n, c, d, args.seconds)
        wanted = "" if target is None else f"≥ {target}x"
        ratio = theirs / ours
        print(f"| {n} | {c} | {d} | {ours * 1e3:.3f} ms | {theirs * 1e3:.3f} ms | {ratio:.1f}x | {wanted} |")
        if target is not None and ratio < target:
            missed.append(f"{ratio:.1f}x at N={n}, C={c}, D={d}")
    n, c, d = 256, 100_000, 512
    used, allowed = forward_memory(n, c, d), 2 * n * d * 4 + 1024
    print(f"forward temporaries at N={n}, C={c}, D={d}: {used} bytes, target ≤ {allowed}")
    if used > allowed:
        missed.append("forward memory")
    took = import_time()
    print(f"import beyond jax: {took * 1e3:.0f} ms, target ≤ 50 ms")
    if took > 0.05:
        missed.append("import time")
    if missed:
        print("missed: " + "; ".join(missed))
    return int(args.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
