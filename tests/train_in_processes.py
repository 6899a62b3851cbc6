"""Trains centers on eight devices that belong to one process or to several, and writes what came out.

python train_in_processes.py OUT.npz PROCESSES PROCESS ADDRESS
"""

import os
import sys

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_centerloss as jcl

C, D, N, STEPS = 64, 8, 32, 4
LAYOUTS = [
    (("d",), (8,), "Auto", "d", "d"),
    (("data", "classes"), (2, 4), "Explicit", "classes", "data"),
]


def train(rows, names, shape, kind, classes, samples):
    mesh = jax.make_mesh(shape, names, axis_types=(getattr(AxisType, kind),) * len(names))
    table, batch = NamedSharding(mesh, P(classes, None)), NamedSharding(mesh, P(samples))

    def shared(array):
        """The array of all processes, of which each brings what lies on its devices."""
        return jax.make_array_from_callback(array.shape, batch, lambda index: array[index])

    @jax.jit
    def step(by_rule, by_rows, state, x, labels, where):
        loss = jcl.center_loss(by_rule, x, labels, where=where)
        moved = jcl.update_centers(by_rule, x, labels, where=where, after=loss)
        by_rows, state = rows.update(by_rows, state, x, labels, where=where)
        return moved, by_rows, state, loss

    by_rule = jcl.init_centers(jax.random.key(0), C, D, out_sharding=table)
    by_rows = jcl.init_centers(jax.random.key(1), C, D, out_sharding=table)
    state = rows.init(by_rows)
    losses = []
    for i in range(STEPS):
        rng = np.random.default_rng(i)
        labels = rng.integers(0, C, N).astype(np.int32)
        labels[0], labels[1:4], labels[::8] = -1, 7, 3  # Class 7 in the first process only, 3 in all.
        x, where = rng.normal(size=(N, D)).astype(np.float32), rng.random(N) < 0.9
        arguments = shared(x), shared(labels), shared(where)
        by_rule, by_rows, state, loss = step(by_rule, by_rows, state, *arguments)
        losses.append(float(loss))
    # Outside of jit one process would raise. No one of several sees all labels: a bad one in the last of them
    # must not leave the others waiting, and shows in the loss of all.
    beyond = labels.copy()
    beyond[-1] = C
    center_loss = jax.jit(jcl.center_loss) if jax.process_count() == 1 else jcl.center_loss
    eager = center_loss(by_rule, shared(x), shared(beyond))
    means = jcl.init_from_features(by_rule, [(shared(x), shared(np.arange(N, dtype=np.int32)))])
    metrics = jcl.center_metrics(by_rule, *arguments[:2], where=arguments[2], previous=means)
    nearest = jcl.nearest_center(by_rule, arguments[0])
    arrays = (by_rule, by_rows, state, eager, means, metrics, nearest)
    whole = [
        leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
        for leaf in jax.tree.leaves(arrays)
    ]
    return [np.asarray(losses), *map(np.asarray, whole)]


def main(out, processes, process, address):
    os.environ.setdefault("NPROC", "32")
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if processes > 1:  # Before anything is computed, and a row optimizer tries its transformation.
        jax.distributed.initialize(address, processes, process)
    assert jax.device_count() == 8
    assert jax.local_device_count() == 8 // processes
    rows = jcl.row_optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)))
    results = [result for layout in LAYOUTS for result in train(rows, *layout)]
    if process == 0:
        np.savez(out, *results)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
