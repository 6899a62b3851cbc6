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
assert "jax_centerloss" not in sys.modules
folder = sys.argv[1]
arrays = np.load(f"{folder}/arguments.npz")
arguments = [arrays[f"arr_{i}"] for i in range(len(arrays))]
for name in sys.argv[2:]:
    exported = jax.export.deserialize(open(f"{folder}/{name}.bin", "rb").read())
    assert exported.platforms == ("cpu", "cuda", "tpu")
    for n in (1, 33):
        given = [*arguments[:-3], *(np.resize(a, (n, *a.shape[1:])) for a in arguments[-3:])]
        np.savez(f"{folder}/{name}-{n}.npz", *jax.tree.leaves(exported.call(*given)))
assert "jax_centerloss" not in sys.modules
"""


def state_of(leaves, centers):
    """The optimizer's state of its leaves: an exported program takes arrays."""
    return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(ROWS.init, centers)), leaves)


@pytest.fixture(autouse=True)
def as_optax_needs_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def arguments(rng):
    centers = rng.normal(size=(C, D)).astype(np.float32)
    labels = rng.integers(-1, C, N).astype(np.int32)
    labels[:4] = 7
    state = [np.asarray(leaf) for leaf in jax.tree.leaves(ROWS.init(centers))]
    return centers, state, rng.normal(size=(N, D)).astype(np.float32), labels, rng.random(N) < 0.8


def shape(array, *size):
    return jax.ShapeDtypeStruct(size or array.shape, array.dtype)


def exported(function, *shapes):
    return jax.export.export(jax.jit(function), platforms=PLATFORMS)(*shapes)


def assert_equal(got, want, message):
    chex.assert_trees_all_equal_dtypes(got, want, custom_message=message)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6, custom_message=message)


@pytest.mark.slow
def test_a_fresh_process_gets_the_same_numbers(tmp_path, arguments):
    centers, state, x, labels, where = arguments
    (n,) = jax.export.symbolic_shape("n")
    given = shape(centers), *map(shape, state), shape(x, n, D), shape(labels, n), shape(where, n)
    for name, function in FUNCTIONS.items():

        def flat(c, *rest, function=function):
            return function(c, list(rest[:-3]), *rest[-3:])

        (tmp_path / f"{name}.bin").write_bytes(exported(flat, *given).serialize())
    np.savez(tmp_path / "arguments.npz", centers, *state, x, labels, where)
    command = [sys.executable, "-c", RUN, str(tmp_path), *FUNCTIONS]
    subprocess.run(command, check=True, timeout=240)
    for name, function in FUNCTIONS.items():
        for n in (1, 33):
            with np.load(tmp_path / f"{name}-{n}.npz") as file:
                got = [file[f"arr_{i}"] for i in range(len(file.files))]
            batch = (np.resize(a, (n, *a.shape[1:])) for a in arguments[2:])
            want = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(function)(*arguments[:2], *batch))]
            assert_equal(got, want, f"{name} of {n}")


def test_a_symbolic_number_of_classes(arguments):
    centers, _, x, labels, _ = arguments
    (k,) = jax.export.symbolic_shape("k")
    program = exported(jcl.update_centers, shape(centers, k, D), shape(x), shape(labels))
    np.testing.assert_allclose(
        program.call(centers, x, labels), jcl.update_centers(centers, x, labels), rtol=1e-5
    )


def test_a_symbolic_number_of_features(arguments):
    centers, _, x, labels, _ = arguments
    (d,) = jax.export.symbolic_shape("d")
    program = exported(jcl.center_loss, shape(centers, len(centers), d), shape(x, len(x), d), shape(labels))
    for used in (2, D):
        batch = centers[:, :used], x[:, :used], labels
        np.testing.assert_allclose(program.call(*batch), jcl.center_loss(*batch), rtol=1e-6)
    program = exported(jcl.nearest_center, shape(centers, len(centers), d), shape(x, len(x), d))
    np.testing.assert_array_equal(program.call(centers, x), jcl.nearest_center(centers, x))


@pytest.mark.usefixtures("for_its_platform")
def test_only_a_cpus_program_has_loops():
    # One in which classes are searched for, and one over blocks of sums.
    n, d = 2400, 512
    shapes = [jax.ShapeDtypeStruct((5000, d), jnp.float32), jax.ShapeDtypeStruct((n, d), jnp.float32)]
    shapes.append(jax.ShapeDtypeStruct((n,), jnp.int32))
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
    x, centers = jnp.asarray(x, kinds[0]), jnp.asarray(centers, kinds[1])
    for name in ("gradient", "paper", "rows"):
        function = partial(FUNCTIONS[name], centers, state)
        program = exported(function, shape(x), shape(labels), shape(where))
        chex.assert_trees_all_close(
            program.call(x, labels, where), jax.jit(function)(x, labels, where), rtol=1e-2
        )
