"""Settings that every test runs under: eight virtual CPU devices, no implicit promotion of any kind."""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Virtual devices share the threads of the CPU, by default one for each of them. A device that waits for the
# others holds one, and those it waits for may find none left.
os.environ.setdefault("NPROC", "32")

import jax
import numpy as np
import pytest

jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# The examples are scripts, which import what they share from their own folder.
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def as_users_run_it():
    # optax's schedules promote int to float.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
