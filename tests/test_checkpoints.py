"""Orbax checkpoints of sharded centers: on other meshes, after a kill, and torn ones."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import checkpointing as ckpt
import jax
import numpy as np
import pytest

UNFINISHED = "*.orbax-checkpoint-tmp"


@pytest.fixture(autouse=True, scope="module")
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs it.
        yield


def trained(tree, first, last):
    for number in range(first, last + 1):
        tree = ckpt.step(tree, number)
    return tree


def assert_lies(tree, mesh):
    for leaf in jax.tree.leaves(tree):
        assert leaf.sharding.is_equivalent_to(ckpt.placement(mesh, leaf), leaf.ndim)
        assert leaf.sharding.mesh.axis_types == mesh.axis_types
        part = (ckpt.C // mesh.size, ckpt.D) if leaf.ndim else ()
        assert [shard.data.shape for shard in leaf.addressable_shards] == [part] * mesh.size


@pytest.fixture(scope="module", params=["Auto", "Explicit"])
def saved(request, tmp_path_factory):
    """A checkpoint of step 4 on four devices, its numbers, and those of step 7."""
    directory = tmp_path_factory.mktemp("checkpoints")
    tree = trained(ckpt.fresh(ckpt.mesh_of(4, request.param)), 1, 4)
    with ckpt.manager(directory) as checkpoints:
        assert ckpt.save(checkpoints, 4, tree)
    numbers = jax.tree.map(np.array, tree)
    return request.param, directory, numbers, jax.tree.map(np.array, trained(tree, 5, 7))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [8, 2, 1])
def test_another_mesh_has_the_same_values_and_goes_on(saved, devices):
    kind, directory, numbers, later = saved
    mesh = ckpt.mesh_of(devices, kind)
    with ckpt.manager(directory) as checkpoints:
        tree = ckpt.restore(checkpoints, checkpoints.latest_step(), mesh)
    jax.tree.map(np.testing.assert_array_equal, tree, numbers)
    assert_lies(tree, mesh)
    tree = trained(tree, 5, 7)
    assert_lies(tree, mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), tree, later)


@contextlib.contextmanager
def launched(*arguments):
    command = [sys.executable, ckpt.__file__, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        limit = threading.Timer(240, process.kill)  # Else a test would wait for ever for one that hangs.
        limit.start()
        try:
            yield process
        finally:
            limit.cancel()
            process.kill()


def stop_in_a_save(process, directory):
    """Stops it at a moment at which the folder of a step is unfinished."""
    while True:
        process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        if list(directory.glob(UNFINISHED)):
            return
        process.send_signal(signal.SIGCONT)
        time.sleep(0.001)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(tmp_path):
    seed = int.from_bytes(os.urandom(4), "big")
    rng = np.random.default_rng(seed)
    told, story = 0, f"seed {seed}"
    for asynchronous, in_a_save in ((1, False), (1, True), (0, True)):
        kill_after = told + int(rng.integers(5, 15))
        with launched("train", tmp_path, asynchronous, kill_after + 1000, 1) as process:
            start = int(process.stdout.readline())
            # No more is lost than a save that was not done, and the steps before the next one.
            assert told - 2 * ckpt.INTERVAL <= start <= told, story
            next(line for line in process.stdout if int(line) == kill_after)
            if in_a_save:
                stop_in_a_save(process, tmp_path)
            else:
                time.sleep(rng.uniform(0, 0.05))  # Into any part of a step or a save.
            process.kill()
            told = max([kill_after, *map(int, process.stdout.read().split())])
        assert process.returncode == -signal.SIGKILL, story
        assert list(tmp_path.glob(UNFINISHED)) or not in_a_save, story
        story += f", from {start} to {told} with {asynchronous=}, {in_a_save=}"
    last = told + 5 + (told + 5) % ckpt.INTERVAL
    with launched("train", tmp_path, 1, last, 0) as process:
        process.communicate()
    assert process.returncode == 0, story
    mesh = ckpt.mesh_of(4)
    with ckpt.manager(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == last, story
        resumed = ckpt.restore(checkpoints, last, mesh)
    uninterrupted = trained(ckpt.fresh(mesh), 1, last)
    assert ckpt.content(resumed) == ckpt.content(uninterrupted), story


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def arrays(step):
    """The file that holds most of the arrays."""
    return max((step / "default/ocdbt.process_0/d").iterdir(), key=lambda file: file.stat().st_size)


# What is done to the newest step, and what its restore says then.
TORN = {
    "arrays cut": (lambda step: cut(arrays(step)), "Exception: Encountered error while reading array"),
    "arrays gone": (lambda step: arrays(step).unlink(), "Exception: Encountered error while reading array"),
    "index cut": (lambda step: cut(step / "default/manifest.ocdbt"), "ValueError: DATA_LOSS: .*manifest"),
    "index gone": (lambda step: (step / "default/manifest.ocdbt").unlink(), "ValueError: NOT_FOUND: "),
    "tree cut": (lambda step: cut(step / "default/_METADATA"), "JSONDecodeError: .*line 1 column"),
    "tree gone": (lambda step: (step / "default/_METADATA").unlink(), "ValueError: .*(structure|Expected t)"),
    "item gone": (lambda step: shutil.rmtree(step / "default"), "KeyError: .*Item .*default.* was not found"),
    "all gone": (lambda step: (shutil.rmtree(step), step.mkdir()), "KeyError: .*Item .*default.* was not"),
    "folder gone": (shutil.rmtree, "FileNotFoundError: Checkpoint at .*/4 not found"),
    "unfinished": (lambda step: step.rename(f"{step}{UNFINISHED[1:]}"), "FileNotFoundError: .*/4 not found"),
}
TEARS = {"cut": cut, "emptied": lambda file: os.truncate(file, 0), "gone": Path.unlink}


@pytest.fixture(scope="module")
def torn(tmp_path_factory):
    """The contents of steps 2 and 4, and what a process finds that restores them, the newest one torn."""
    sound = tmp_path_factory.mktemp("sound")
    tree, contents = ckpt.fresh(ckpt.mesh_of(4)), {}
    with ckpt.manager(sound) as checkpoints:
        for number in (2, 4):
            tree = trained(tree, number - 1, number)
            contents[number] = ckpt.content(tree)
            ckpt.save(checkpoints, number, tree)
    damages = {name: damage for name, (damage, _) in TORN.items()}
    for file in (file.relative_to(sound / "4") for file in (sound / "4").rglob("*") if file.is_file()):
        for how, tear in TEARS.items():
            damages[f"{file} {how}"] = lambda step, file=file, tear=tear: tear(step / file)
    jobs = {"sound": (str(sound), [(4, 2 * ckpt.C), (4, ckpt.C // 2), (4, ckpt.C)])}
    for name, damage in damages.items():
        directory = shutil.copytree(sound, tmp_path_factory.mktemp("torn") / "run")
        damage(directory / "4")
        jobs[name] = (str(directory), [(4, ckpt.C), (2, ckpt.C)])
    # A process of its own: Orbax leaves the other reads behind when one fails, and they fail any time later.
    with launched("restore", json.dumps(jobs)) as process:
        return contents, json.loads(process.communicate()[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", TORN)
def test_a_torn_step_raises_and_the_one_before_it_loads(torn, name):
    contents, found = torn
    steps, newest, previous = found[name]
    assert steps == ([2] if name in ("folder gone", "unfinished") else [2, 4])
    assert re.match(TORN[name][1], newest)
    assert previous == contents[2]


@pytest.mark.slow
def test_no_file_that_is_torn_brings_other_numbers(torn):
    # Only of files cut, emptied or gone: Orbax keeps no sum of the arrays, and bits that flip go unnoticed.
    contents, found = torn
    swept = found.keys() - TORN.keys() - {"sound"}
    assert len(swept) > 30
    for name in swept:
        steps, newest, previous = found[name]
        assert (steps, previous) == ([2, 4], contents[2]), name
        assert newest == contents[4] or re.match(r"\w+: ", newest), name


@pytest.mark.slow
def test_another_number_of_classes_raises(torn):
    contents, found = torn
    _, more, fewer, same = found["sound"]
    for classes, outcome in ((800, more), (200, fewer)):
        assert outcome.startswith(f"ValueError: Requested shape: ({classes}, 16) is not compatible with")
    assert same == contents[4]
