"""Programs exported for every platform, and run by a process that knows nothing of this library."""

import subprocess
import sys
from functools import partial

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_centerloss as jcl

pytestmark = pytest.mark.usefixtures("as_jax_promotes")  # optax's bias correction needs it.

C, D, N = 3000, 4, 16
PLATFORMS = ("cpu", "cuda", "tpu")
ROWS = jcl.row_optimizer(optax.adam(0.1))

# Of the centers, their optimizer's state, features, labels and a mask.
FUNCTIONS = {
    "loss": lambda c, s, x, y, w: jcl.center_loss(c, x, y, where=w),
    "gradient": lambda c, s, x, y, w: jax.grad(jcl.center_loss, (0, 1))(c, x, y, where=w),
    "paper": lambda c, s, x, y, w: jcl.update_centers(c, x, y, where=w),
    "gradient rule": lambda c, s, x, y, w: jcl.update_centers(c, x, y, where=w, rule="gradient"),
    "rows": lambda c, s, x, y, w: jax.tree.leaves(ROWS.update(c, state_of(s, c), x, y, where=w)),
    "distances": lambda c, s, x, y, w: jcl.distance_map(c, x),
    "nearest": lambda c, s, x, y, w: jcl.nearest_center(c, x),
    "metrics": lambda c, s, x, y, w: jcl.center_metrics(c, x, y, where=w),
}

RUN = """
import sys
import jax, jax.export, numpy as np
folder = sys.argv[1]
arrays = np.load(f"{folder}/arguments.npz")
arguments = [arrays[f"arr_{i}"] for i in range(len(arrays))]
exported = jax.export.deserialize(open(f"{folder}/program.bin", "rb").read())
assert exported.platforms == ("cpu", "cuda", "tpu")
for n in (1, 33):
    given = [*arguments[:-3], *(np.resize(a, (n, *a.shape[1:])) for a in arguments[-3:])]
    np.savez(f"{folder}/{n}.npz", *jax.tree.leaves(exported.call(*given)))
assert "jax_centerloss" not in sys.modules
"""


def state_of(leaves, centers):
    """The optimizer's state of its leaves: an exported program takes arrays."""
    return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(ROWS.init, centers)), leaves)


@pytest.fixture
def arguments(rng):
    centers = rng.normal(size=(C, D)).astype(np.float32)
    labels = rng.integers(-1, C, N).astype(np.int32)
    labels[:4] = 7
    state = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(ROWS.init)(centers))]
    return centers, state, rng.normal(size=(N, D)).astype(np.float32), labels, rng.random(N) < 0.8


def shape(array, *size):
    return jax.ShapeDtypeStruct(size or array.shape, array.dtype)


def exported(function, *shapes):
    return jax.export.export(jax.jit(function), platforms=PLATFORMS)(*shapes)


def all_of(names, centers, *rest):
    """The results of these functions by name, of the arguments as an exported program takes them: flat."""
    *state, x, labels, where = rest
    return {name: FUNCTIONS[name](centers, state, x, labels, where) for name in names}


@pytest.mark.slow
def test_a_fresh_process_gets_the_same_numbers(tmp_path, arguments):
    centers, state, *batch = arguments
    (n,) = jax.export.symbolic_shape("n")
    given = shape(centers), *map(shape, state), *(shape(a, n, *a.shape[1:]) for a in batch)
    function = partial(all_of, FUNCTIONS)
    (tmp_path / "program.bin").write_bytes(exported(function, *given).serialize())
    np.savez(tmp_path / "arguments.npz", centers, *state, *batch)
    subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], check=True, timeout=240)
    for n in (1, 33):
        want = jax.jit(function)(centers, *state, *(np.resize(a, (n, *a.shape[1:])) for a in batch))
        with np.load(tmp_path / f"{n}.npz") as file:
            got = jax.tree.unflatten(jax.tree.structure(want), [file[name] for name in file.files])
        chex.assert_trees_all_equal_dtypes(got, want)
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6, custom_message=f"of {n}")


def test_a_symbolic_number_of_classes(arguments):
    centers, _, x, labels, _ = arguments
    (k,) = jax.export.symbolic_shape("k")
    program = exported(jcl.update_centers, shape(centers, k, D), shape(x), shape(labels))
    want = jax.jit(jcl.update_centers)(centers, x, labels)
    np.testing.assert_allclose(program.call(centers, x, labels), want, rtol=1e-5)


def test_a_symbolic_number_of_features(arguments):
    centers, _, x, labels, _ = arguments
    (d,) = jax.export.symbolic_shape("d")

    def function(centers, x, labels):
        return jcl.center_loss(centers, x, labels), jcl.nearest_center(centers, x)

    program = exported(function, shape(centers, C, d), shape(x, N, d), shape(labels))
    for used in (2, D):
        batch = centers[:, :used], x[:, :used], labels
        (loss, nearest), want = program.call(*batch), jax.jit(function)(*batch)
        np.testing.assert_allclose(loss, want[0], rtol=1e-6)
        np.testing.assert_array_equal(nearest, want[1])


@pytest.mark.usefixtures("for_its_platform")
def test_only_a_cpus_program_has_loops():
    # One in which classes are searched for, and one over blocks of sums.
    n, d = 2400, 512
    sizes = ((5000, d), np.float32), ((n, d), np.float32), ((n,), np.int32)
    shapes = [jax.ShapeDtypeStruct(*size) for size in sizes]
    rows = jcl.row_optimizer(optax.sgd(0.1))

    def step(centers, x, labels):
        return rows.update(centers, rows.init(centers), x, labels)

    loops = {
        platform: jax.export.export(jax.jit(step), platforms=[platform])(*shapes)
        .mlir_module()
        .count("stablehlo.while")
        for platform in PLATFORMS
    }
    assert loops == {"cpu": 2, "cuda": 0, "tpu": 0}


@pytest.mark.few(1)
@pytest.mark.parametrize("kinds", [("bfloat16", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16")])
def test_half_precision_is_exported(arguments, kinds):
    centers, state, x, labels, where = arguments
    x, centers = x.astype(jnp.dtype(kinds[0])), centers.astype(jnp.dtype(kinds[1]))
    function = partial(all_of, ("gradient", "paper", "rows"), centers, *state)
    program = exported(function, shape(x), shape(labels), shape(where))
    got, want = program.call(x, labels, where), jax.jit(function)(x, labels, where)
    chex.assert_trees_all_close(got, want, rtol=1e-2)
