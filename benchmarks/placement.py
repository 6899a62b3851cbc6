"""What each placement of centers and batch costs on each of eight devices: bytes that travel, temporaries.

    python benchmarks/placement.py [--check]

Programs are compiled for virtual devices of the CPU, and not run. What travels is the size of the results of
all collectives in the compiled text. `--check` fails if either number grows from ten thousand classes to a
million. (Below, samples are counted in a vector of the classes, which saves an array of the samples' size.)
"""

import argparse
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import jax
import jax.numpy as jnp
import optax
from placements import PLACEMENTS, Placement, collectives, shapes

import jax_centerloss as jcl

N, D = 512, 128
FEW, MANY = 10_000, 1_000_000
ADAM = jcl.row_optimizer(optax.adam(0.1))


def gradients(centers, state, x, labels):
    return jax.grad(jcl.center_loss, argnums=(0, 1))(centers, x, labels)


def by_rule(centers, state, x, labels):
    loss, grad = jax.value_and_grad(jcl.center_loss, argnums=1)(centers, x, labels)
    return jcl.update_centers(centers, x, labels, after=loss), loss, grad


def by_rows(centers, state, x, labels):
    loss, grad = jax.value_and_grad(jcl.center_loss, argnums=1)(centers, x, labels)
    return *ADAM.update(centers, state, x, labels, after=loss), loss, grad


FUNCTIONS = {
    "loss, dense gradient": (gradients, ()),
    "loss, update_centers": (by_rule, (0,)),
    "loss, Adam by rows": (by_rows, (0, 1)),
    "nearest_center": (lambda c, s, x, y: jcl.nearest_center(c, x), ()),
    "center_metrics": (lambda c, s, x, y: jcl.center_metrics(c, x, y), ()),
}


def costs(placement: Placement, name: str, classes: int) -> tuple[int, int]:
    """Bytes that travel, and of temporaries, on one device."""
    function, donated = FUNCTIONS[name]
    table = jax.ShapeDtypeStruct((classes, D), jnp.float32)
    given = {
        "table": table,
        "table state": jax.eval_shape(ADAM.init, table),
        "x": jax.ShapeDtypeStruct((N, D), jnp.float32),
        "labels": jax.ShapeDtypeStruct((N,), jnp.int32),
    }
    program = jax.jit(function, donate_argnums=donated).lower(*shapes(placement, given, classes)).compile()
    travelling = sum(size * number for (_, size), number in collectives(program.as_text()).items())
    return travelling, program.memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a number grows with the classes")
    args = parser.parse_args()
    print(f"N = {N}, D = {D}, features {N * D * 4 // 1024} KiB. Cells: KiB that travel / of temporaries.\n")
    print("| mesh | centers | batch | " + " | ".join(FUNCTIONS) + " |")
    print("|---" * (3 + len(FUNCTIONS)) + "|")
    grown = []
    for placement in PLACEMENTS:
        if placement.context or placement.kind != "Explicit":
            continue
        cells = []
        for name in FUNCTIONS:
            small, large = (costs(placement, name, classes) for classes in (FEW, MANY))
            if any(b > a for a, b in zip(small, large, strict=True)):
                grown.append(
                    f"{name} at {placement}: {small} bytes with {FEW:,} classes, {large} with {MANY:,}"
                )
            cells.append(" / ".join(f"{number / 1024:,.0f}" for number in large))
        mesh = " × ".join(f"{n} {a}" for n, a in zip(placement.shape, placement.names, strict=True))
        specs = " | ".join(f"`{placement.of(name, 2).spec}`" for name in ("table", "x"))
        print(f"| {mesh} | {specs} | {' | '.join(cells)} |")
    print("\n" + ("\n".join(grown) or f"No more with {MANY:,} classes than with {FEW:,}."))
    if args.check and grown:
        sys.exit(1)


if __name__ == "__main__":
    main()
