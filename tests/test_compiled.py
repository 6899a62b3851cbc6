"""What a GPU's program is made of, without a GPU."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import jax_centerloss as jcl
from jax_centerloss._checks import RULES

pytestmark = pytest.mark.usefixtures("for_its_platform")

N, D = 64, 16
ROWS = jcl.row_optimizer(optax.adam(0.1))
ROOT = Path(__file__).parents[1]


def by_rule(rule):
    def step(centers, x, labels):
        loss, gradient = jax.value_and_grad(jcl.center_loss, 1)(centers, x, labels)
        return jcl.update_centers(centers, x, labels, rule=rule, after=loss), loss, gradient

    return step


def by_rows(centers, x, labels):
    return ROWS.update(centers, ROWS.init(centers), x, labels)


STEPS = {rule: by_rule(rule) for rule in RULES}
STEPS |= {"rows": by_rows, "dense": jax.grad(jcl.center_loss, (0, 1))}


def sums_by_repeated_indices(function, classes, platform):
    """Scatters of floats that add, and that are not told that no index stands twice."""
    shape = jax.ShapeDtypeStruct
    batch = shape((N, D), jnp.float32), shape((N,), jnp.int32)
    traced = jax.jit(function).trace(shape((classes, D), jnp.float32), *batch)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    scatters = re.findall(r'"stablehlo.scatter"(.*?)\}\) : \((.*?)\n', text, re.DOTALL)
    return [
        body
        for body, types in scatters
        if "stablehlo.add" in body and "xf32" in types and "unique_indices = true" not in body
    ]


@pytest.mark.parametrize("classes", [10, 200, 1_000_000])
@pytest.mark.parametrize("name", STEPS)
def test_a_gpu_adds_no_floats_in_an_order_of_its_own(name, classes):
    with jax.numpy_dtype_promotion("standard"):
        assert not sums_by_repeated_indices(STEPS[name], classes, "cuda")
        assert sums_by_repeated_indices(STEPS[name], classes, "cpu")  # So they are seen where they are.


@pytest.mark.slow
def test_the_compilers_targets():
    command = [sys.executable, ROOT / "benchmarks" / "compiled.py", "--quick", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No compiler is installed" in done.stderr:
        pytest.skip("neither the compiler of CUDA nor that of TPU is installed: see benchmarks/compiled.py")
    assert done.returncode == 0, done.stdout + done.stderr
