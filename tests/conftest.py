"""Settings that every test runs under: eight virtual CPU devices, no implicit promotion of any kind."""

import collections
import contextlib
import os
import random
import sys
from pathlib import Path

import environment  # noqa: F401  Before JAX, which reads what it sets.
import jax
import numpy as np
import pytest
from hypothesis import settings

from jax_centerloss._rows import placement

# Compilation makes some examples slow. The examples are the same in every run; --hypothesis-profile=fresh
# looks for others.
settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.register_profile("fresh", deadline=None, print_blob=True, max_examples=100)
settings.load_profile("same")

jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# A GPU multiplies float32 matrices in fewer digits by default. The library asks for all of them itself; the
# networks and oracles of tests do not.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser):
    parser.addoption(
        "--platform",
        choices=["cpu", "gpu", "tpu"],
        help="run what this platform's programs do, on whatever is at hand: their numbers have to be right",
    )


CHOSEN = placement.call_for_platform


def pytest_configure(config):
    platform = config.getoption("platform")
    if platform is not None:
        placement.call_for_platform = lambda function, *arrays: function(*arrays, platform=platform)


# Files that notice most changes of what computes: tests/mutants.py says how many.
QUICK = {
    "test_apply_gradients",
    "test_errors",
    "test_groups",
    "test_loss",
    "test_means",
    "test_metrics",
    "test_modules",
    "test_optim",
    "test_parity",
    "test_rounding",
    "test_rows",
    "test_update",
    "test_weights",
}


def pytest_ignore_collect(collection_path, config):
    """Leaves out files of which `-m quick` runs nothing, so that they are not imported."""
    has_none = collection_path.suffix == ".py" and collection_path.stem not in QUICK
    return True if config.option.markexpr == "quick" and has_none else None


@pytest.hookimpl(tryfirst=True)  # Before pytest selects by marks.
def pytest_collection_modifyitems(items):
    """Of a test that is marked `few(n)`, all cases but n are slow: they give breadth, and CI runs them."""
    cases = collections.defaultdict(list)
    for item in items:
        few = item.get_closest_marker("few")
        if few is not None and item.get_closest_marker("slow") is None:
            cases[item.function, few.args[0]].append(item)
    for (function, number), same in cases.items():
        same.sort(key=lambda item: item.nodeid)  # The same cases, in whatever order they were collected.
        random.Random(function.__name__).shuffle(same)
        for item in same[number:]:
            item.add_marker("slow")
    for item in items:
        if item.path.stem in QUICK and item.get_closest_marker("slow") is None:
            item.add_marker("quick")


@contextlib.contextmanager
def skipped_without_a_mesh():
    """On a single GPU a test that makes a mesh is skipped, with the reason in the report."""
    try:
        yield
    except ValueError as error:
        if (
            jax.default_backend() != "cpu"
            and jax.device_count() < 8
            and "must be >= the product of mesh_shape" in str(error)
        ):
            pytest.skip(f"needs eight devices, here is {jax.device_count()}")
        raise


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    with skipped_without_a_mesh():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup():
    with skipped_without_a_mesh():
        return (yield)


@pytest.fixture
def for_its_platform(monkeypatch):
    """What a program does on the platform that it is compiled for, whatever `--platform` says."""
    monkeypatch.setattr(placement, "call_for_platform", CHOSEN)


# The examples are scripts, which import what they share from their own folder.
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


@pytest.fixture(autouse=True)
def close_figures():
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def as_jax_promotes():
    """JAX's own promotion of types and ranks, not the suite's strict one: optax's schedules need it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def as_users_run_it(as_jax_promotes):
    # Convolutions take their time without optimizations.
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")
