"""A million centers, split over devices and trained where they lie.

    python examples/sharded.py

Without accelerators this makes eight virtual devices of the CPU; on GPUs or TPUs it takes those. Features are
synthetic: each class has a mean that is drawn anew from its number, so that nothing as long as the classes
stands anywhere but in the table. Classes are long-tailed, as identities are in a collection of faces. The
metrics are those of the thousand most common ones: their centers soon lie near the means of their classes,
and the distance to them falls towards that of the noise.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import _ctrl_c
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jax_centerloss

NOISE = 0.5
COMMON = 1000  # Classes, from number 0 on, of which metrics are taken.


def samples(key: jax.Array, number: int, args: argparse.Namespace) -> tuple[jax.Array, jax.Array]:
    """Features and labels of a batch; low class numbers are common, high ones rare."""
    pick, spread = jax.random.split(key)
    labels = (args.classes * jax.random.uniform(pick, (number,)) ** args.tail).astype(jnp.int32)

    def mean(label: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.key(1), label), (args.feat_dim,))

    noise = NOISE * jax.random.normal(spread, (number, args.feat_dim))
    return jax.vmap(mean)(labels) + noise, labels


def make_step(args: argparse.Namespace) -> tuple[Any, Any]:
    """The state's maker, and a step that moves the centers of one batch and reports on it."""
    rows = jax_centerloss.row_optimizer(optax.sgd(args.alpha, momentum=args.momentum or None))

    def step(params: Any, state: Any, x: jax.Array, labels: jax.Array) -> tuple[Any, Any, Any]:
        metrics = jax_centerloss.center_metrics(params, x, labels, where=labels < COMMON)
        metrics["loss"] = jax_centerloss.center_loss(params, x, labels)
        params, state = rows.update(params, state, x, labels, rule="paper", after=metrics)
        return params, state, metrics

    return rows.init, jax.jit(step, donate_argnums=(0, 1))


def mebibytes(number: float) -> str:
    return f"{number / 2**20:,.1f} MiB"


def held(tree: Any, device: jax.Device) -> int:
    """Bytes of the arrays in `tree` that lie on one device."""
    shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Centers split by class over devices, moved by the paper's rule with momentum.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--classes", type=int, default=1_000_000, help="number of classes")
    add("--feat-dim", type=int, default=128, help="features per sample")
    add("--batch-size", type=int, default=1024, help="samples per step, of all devices together")
    add("--steps", type=int, default=300, help="steps of training")
    add("--alpha", type=float, default=0.5, help="rate of the centers")
    add("--momentum", type=float, default=0.0, help="momentum of the centers; its state is a second table")
    add("--tail", type=float, default=6.0, help="how much more common low class numbers are; 1 for alike")
    add("--virtual", type=int, default=8, help="devices to make of the CPU where there is nothing else")
    add("--data", type=int, default=0, help="parts of a batch (0: two, on an odd number of devices one)")
    add("--quick", action="store_true", help="30 steps, to see that it runs")
    args = parser.parse_args(argv)
    for name in ("classes", "feat_dim", "batch_size", "steps", "virtual"):
        if (value := getattr(args, name)) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least 1, got {value}")
    if args.quick:
        args.steps = min(args.steps, 30)
    # Virtual devices share the threads of the CPU, by default one for each of them. A device that waits for
    # the others holds one, and those it waits for may find none left.
    os.environ.setdefault("NPROC", str(4 * args.virtual))
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_num_cpu_devices", args.virtual)
    devices = jax.device_count()
    args.data = args.data or 2 - devices % 2
    if args.data < 0 or devices % args.data:
        parser.error(f"argument --data: {args.data} does not divide the {devices} devices")
    if args.batch_size % args.data:
        parser.error(f"argument --batch-size: {args.batch_size} does not divide by --data {args.data}")
    shards = devices // args.data
    rounded = -(-args.classes // shards) * shards
    if args.classes == parser.get_default("classes"):
        args.classes = rounded
    if args.classes != rounded:
        parser.error(
            f"argument --classes: {args.classes} does not divide into {shards} shards: {rounded} does"
        )
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Trains, and returns each metric at each report."""
    args = parse_args(argv)
    mesh = jax.make_mesh((args.data, jax.device_count() // args.data), ("data", "classes"))
    with _ctrl_c.stopped_by_hand(), jax.set_mesh(mesh):
        return train(args, mesh)


def train(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> dict[str, list[float]]:
    table, batch = P("classes", None), P("data")
    params = jax_centerloss.init_centers(
        jax.random.key(0), args.classes, args.feat_dim, out_sharding=NamedSharding(mesh, table)
    )
    init, step = make_step(args)
    state = init(params)
    draw = jax.jit(lambda key: samples(key, args.batch_size, args), out_shardings=NamedSharding(mesh, batch))
    x, labels = draw(jax.random.key(2))
    program = step.lower(params, state, x, labels).compile()

    kinds = {device.device_kind for device in mesh.devices.flat}
    print(f"{mesh.size} devices ({', '.join(sorted(kinds))}), mesh {dict(mesh.shape)}")
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state)))
    print(f"centers and state: {mebibytes(whole)}, temporaries of a step on each device: ", end="")
    print(mebibytes(program.memory_analysis().temp_size_in_bytes))

    reports: dict[str, list[float]] = {}
    pause = 0.1 if sys.stderr.isatty() else 5  # A log should not fill with bars.
    start = time.perf_counter()
    with tqdm(total=args.steps, unit="step", mininterval=pause) as bar:
        for i in range(args.steps):
            x, labels = draw(jax.random.fold_in(jax.random.key(3), i))
            params, state, metrics = program(params, state, x, labels)
            if i % 10 == 0 or i == args.steps - 1:
                for name, value in metrics.items():
                    reports.setdefault(name, []).append(float(value))
                bar.set_postfix({name: f"{values[-1]:.3g}" for name, values in reports.items()})
            bar.update()
    seconds = time.perf_counter() - start

    print(
        f"\n{args.steps / seconds:.1f} steps per second, {args.classes:,} classes of {args.feat_dim} features"
    )
    for device in mesh.devices.flat:
        stats = device.memory_stats() or {}
        peak = f", at most {mebibytes(stats['peak_bytes_in_use'])}" if "peak_bytes_in_use" in stats else ""
        print(f"  {device}: {mebibytes(held((params, state), device))} of centers and state{peak}")
    first, last = (reports["own_distance"][i] for i in (0, -1))
    noise = NOISE * args.feat_dim**0.5
    print(
        f"distance to the center of a common class: {first:.2f}, then {last:.2f}; of the noise: {noise:.2f}"
    )
    return reports


if __name__ == "__main__":
    main()
