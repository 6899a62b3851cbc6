"""A training of sharded centers that saves, and goes on from its newest checkpoint; also run as a script."""

import hashlib
import json
import os
import sys
import threading
from functools import partial

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_centerloss as jcl

# For the script what conftest.py has for the tests: threads enough for all virtual devices.
os.environ.setdefault("NPROC", "32")
jax.config.update("jax_cpu_enable_async_dispatch", False)

# A shard of the table on four devices is longer than what Orbax puts into its index instead of a data file.
C, D, N = 400, 16, 64
INTERVAL = 2
ROWS = jcl.row_optimizer(optax.adam(0.1))


def mesh_of(devices, kind="Auto"):
    return jax.make_mesh(
        (devices,), ("classes",), axis_types=(getattr(AxisType, kind),), devices=jax.devices()[:devices]
    )


def placement(mesh, leaf):
    return NamedSharding(mesh, P("classes", None) if leaf.ndim else P())


def fresh(mesh, classes=C):
    """Centers that move by rows, with their state, and a second table that moves by the paper's rule."""
    by_class = NamedSharding(mesh, P("classes", None))
    params, others = (
        jcl.init_centers(jax.random.key(seed), classes, D, out_sharding=by_class) for seed in range(2)
    )
    return {"params": params, "state": ROWS.init(params), "others": others}


def shapes(mesh, classes=C):
    """What to restore: shapes and where they shall lie, of which nothing is allocated."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement(mesh, leaf)),
        jax.eval_shape(partial(fresh, mesh, classes)),
    )


@partial(jax.jit, donate_argnums=0)
def step(tree, number):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(2), number))
    x, labels = jax.random.normal(keys[0], (N, D)), jax.random.randint(keys[1], (N,), 0, C)
    loss = jcl.center_loss(tree["params"], x, labels)
    params, state = ROWS.update(tree["params"], tree["state"], x, labels, after=loss)
    return {"params": params, "state": state, "others": jcl.update_centers(tree["others"], x, labels)}


def manager(directory, asynchronous=True):
    options = ocp.CheckpointManagerOptions(
        save_decision_policy=ocp.checkpoint_managers.FixedIntervalPolicy(INTERVAL),
        preservation_policy=ocp.checkpoint_managers.LatestN(3),
        enable_async_checkpointing=asynchronous,
    )
    # Without the handler the first step that is read decides what all hold, and a torn one decides wrongly.
    return ocp.CheckpointManager(directory, options=options, item_handlers=ocp.StandardCheckpointHandler())


def save(checkpoints, number, tree):
    return checkpoints.save(number, args=ocp.args.StandardSave(tree))


def restore(checkpoints, number, mesh, classes=C):
    return checkpoints.restore(number, args=ocp.args.StandardRestore(shapes(mesh, classes)))


def content(tree):
    """A digest of all bytes, to compare trees of two processes."""
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))).hexdigest()


def train(directory, asynchronous, last, stay):
    """Trains from the newest checkpoint to step `last`, tells of each step, and may `stay` to be killed."""
    mesh = mesh_of(4)
    with manager(directory, asynchronous) as checkpoints:
        newest = checkpoints.latest_step()
        tree = fresh(mesh) if newest is None else restore(checkpoints, newest, mesh)
        print(newest or 0, flush=True)
        for number in range((newest or 0) + 1, last + 1):
            tree = step(tree, number)
            print(number, flush=True)
            save(checkpoints, number, tree)
        if stay:
            threading.Event().wait()


def outcomes(directory, wanted):
    """The steps that there are, and what restoring each of `wanted` brings: its content or an error."""
    with manager(directory) as checkpoints:
        found = [checkpoints.all_steps()]
        for number, classes in wanted:
            try:
                found.append(content(restore(checkpoints, number, mesh_of(4), classes)))
            except Exception as error:  # Whatever Orbax raises: the test asks for its type and words.
                found.append(f"{type(error).__name__}: {error}")
    return found


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        jobs = json.loads(sys.argv[2])
        print(json.dumps({name: outcomes(directory, wanted) for name, (directory, wanted) in jobs.items()}))
