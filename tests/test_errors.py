"""Bad input: the type and the words of each error, eager and under jit."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import jax_centerloss as jcl

TABLE = np.zeros((4, 3), np.float32)
X = np.zeros((5, 3), np.float32)
Y = np.zeros(5, np.int32)
BATCH_FUNCTIONS = [jcl.center_loss, jcl.update_centers]

CASES = {
    "centers of rank 1": ((TABLE[0], X, Y), {}, ValueError, r"centers must have shape \(C, D\).*\(3,\)"),
    "zero classes": ((TABLE[:0], X, Y), {}, ValueError, r"at least one class and one feature, got \(0, 3\)"),
    "no features": ((TABLE[:, :0], X[:, :0], Y), {}, ValueError, r"one feature, got \(4, 0\)"),
    "integer centers": (
        (TABLE.astype(np.int32), X, Y),
        {},
        TypeError,
        "centers must be floating point, got int32",
    ),
    "two tables": (({"a": TABLE, "b": TABLE}, X, Y), {}, ValueError, "exactly one array.*2 leaves"),
    "no table": (({}, X, Y), {}, ValueError, "exactly one array.*0 leaves"),
    "feature size": ((TABLE, X[:, :2], Y), {}, ValueError, r"D = 3.*got shape \(5, 2\)"),
    "scalar features": ((TABLE, np.float32(1), Y), {}, ValueError, r"x must have shape \(\.\.\., D\)"),
    "integer features": (
        (TABLE, X.astype(np.int32), Y),
        {},
        TypeError,
        r"x must be floating point, got int32.*astype",
    ),
    "float labels": ((TABLE, X, Y.astype(np.float32)), {}, TypeError, "labels must be integers, got float32"),
    "boolean labels": ((TABLE, X, Y.astype(bool)), {}, TypeError, "labels must be integers, got bool"),
    "leading dimensions": (
        (TABLE, X, Y[:4]),
        {},
        ValueError,
        r"labels \(4,\) and x \(5, 3\): expected labels \(5,\)",
    ),
    "rank of labels": ((TABLE, X, Y[:, None]), {}, ValueError, r"labels \(5, 1\) and x \(5, 3\)"),
    "float where": (
        (TABLE, X, Y),
        {"where": np.ones(5, np.float32)},
        TypeError,
        "where must be boolean, got float32",
    ),
    "shape of where": (
        (TABLE, X, Y),
        {"where": np.ones(4, bool)},
        ValueError,
        r"shape of labels \(5,\), got \(4,\)",
    ),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("function", BATCH_FUNCTIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_batches(function, case, jit):
    args, options, error, words = case
    call = jax.jit(function) if jit else function
    with pytest.raises(error, match=words):
        call(*args, **options)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (jcl.update_centers, {"rule": "adam"}, "rule must be one of 'paper', 'gradient', 'mean', got 'adam'"),
        (jcl.center_loss, {"reduce_fn": jnp.max}, r"jnp\.mean, jnp\.sum or None"),
        (jcl.center_loss, {"reduce_fn": "mean"}, r"jnp\.mean, jnp\.sum or None"),
        (jcl.center_loss, {"clip": (1.0, 0.0)}, "low <= high"),
        (jcl.center_loss, {"clip": 1.0}, "pair of floats"),
    ],
)
def test_options(function, options, words, jit):
    def call(c, x, y):
        return function(c, x, y, **options)

    with pytest.raises(ValueError, match=words):
        (jax.jit(call) if jit else call)(TABLE, X, Y)


@pytest.mark.parametrize("function", [jcl.distance_map, jcl.nearest_center])
def test_maps(function):
    with pytest.raises(ValueError, match="D = 3"):
        function(TABLE, X[:, :2])
    with pytest.raises(TypeError, match="floating point"):
        function(TABLE, X.astype(np.int32))


def test_the_leaves_of_another_tree_are_named():
    with pytest.raises(ValueError, match=r"got 2 leaves: \['a'\], \['b'\]\. Pass"):
        jcl.center_loss({"a": TABLE, "b": TABLE}, X, Y)
    with pytest.raises(ValueError, match=r"got 0 leaves: none\. Pass"):
        jcl.center_loss({}, X, Y)
    with pytest.raises(ValueError, match=r"got 9 leaves: \[0\], .*, \[7\], \.\.\.\. Pass"):
        jcl.center_loss([TABLE] * 9, X, Y)


def test_a_module_that_holds_no_array_is_named():
    with pytest.raises(TypeError, match=r"got CenterLoss\. .* A Linen module holds none"):
        jcl.center_loss(jcl.linen.CenterLoss(4, 3), X, Y)


@pytest.mark.parametrize("function", BATCH_FUNCTIONS)
def test_a_known_label_without_a_class_is_named(function):
    labels = np.array([0, 1, 7, 2, 0])
    for bad in (labels, jnp.asarray(labels), labels.tolist()):
        with pytest.raises(ValueError, match=r"label 7 is out of range for 4 classes: labels go from 0 to 3"):
            function(TABLE, X, bad)
    # Padding with a large label is fine where the mask leaves it out.
    function(TABLE, X, labels, where=labels < 4)


def spread(function):
    """The function inside shard_map, its batch over two devices."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    whole, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")

    def body(centers, x, labels):
        return function(centers, x, labels, axis_name="data")

    return jax.shard_map(body, mesh=mesh, in_specs=(whole, split, split), out_specs=whole)


def each(function):
    """The function over a leading axis of length-one batches."""
    return lambda centers, x, labels: jax.vmap(function, (None, 0, 0))(centers, x[:, None], labels[:, None])


def checked(function):
    """The function, with a look at its batch before."""

    @functools.wraps(function)
    def call(centers, x, labels, **options):
        jcl.check_batch(centers, x, labels)
        return function(centers, x, labels, **options)

    return call


WRAPS = pytest.mark.parametrize("wrap", [lambda function: function, jax.checkpoint, each, spread])


@pytest.mark.few(3)
@pytest.mark.parametrize("function", BATCH_FUNCTIONS)
@WRAPS
def test_checkify_names_the_label(function, wrap):
    check = checkify.checkify(jax.jit(wrap(checked(function))))
    x = jnp.zeros((4, 3))
    with pytest.raises(checkify.JaxRuntimeError, match="label 9 is out of range for 4 classes"):
        check(TABLE, x, jnp.array([0, 9, 1, -1]))[0].throw()
    check(TABLE, x, jnp.array([0, 3, 1, -1]))[0].throw()


@pytest.mark.few(4)
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@WRAPS
def test_checkify_names_a_feature_that_is_no_number(wrap, bad):
    check = checkify.checkify(jax.jit(wrap(checked(jcl.center_loss))))
    x, labels = jnp.zeros((4, 3)).at[1, 2].set(float(bad)), jnp.array([0, 2, 1, -1])
    with pytest.raises(checkify.JaxRuntimeError, match=rf"a feature of a used sample, of class 2, is {bad}"):
        check(TABLE, x, labels)[0].throw()
    check(TABLE, x, jnp.array([0, -1, 1, -1]))[0].throw()  # Not of one that is ignored.
    check(TABLE, jnp.zeros((4, 3)), labels)[0].throw()


FAULTS = {
    "label": ({"labels": np.array([0, 7, 1])}, "label 7 is out of range for 4 classes"),
    "nan feature": (
        {"x": np.array([[0, 0, 0], [0, np.nan, 0], [0, 0, 0]], np.float32)},
        "of class 2, is nan",
    ),
    "infinite feature": (
        {"x": np.array([[0, 0, 0], [-np.inf, 0, 0], [0] * 3], np.float32)},
        "of class 2, is -inf",
    ),
    "weight": ({"weights": np.array([1.0, -2.5, 0.0], np.float32)}, "-2.5"),
    "nan weight": ({"weights": np.array([1.0, np.nan, 0.0], np.float32)}, "weight of .* of class 2, is nan"),
    "center": (
        {"params": np.array([[0] * 3, [0] * 3, [0, np.inf, 0], [np.nan] * 3], np.float32)},
        "class 2.*inf",
    ),
}
SOUND = {
    "params": TABLE,
    "x": X[:3],
    "labels": np.array([0, 2, 1]),
    "where": np.ones(3, bool),
    "weights": np.ones(3, np.float32),
}


@pytest.mark.parametrize(("fault", "words"), FAULTS.values(), ids=FAULTS)
def test_check_batch_names_what_is_wrong(fault, words):
    batch = SOUND | fault
    with pytest.raises(ValueError, match=words):
        jcl.check_batch(**batch)
    error, _ = checkify.checkify(jax.jit(jcl.check_batch))(**batch)
    assert re.search(words, error.get())
    jax.jit(jcl.check_batch)(**batch)  # Nothing, where no one looks.
    unused = batch | {"where": np.array([True, False, True])}
    for function in (
        jcl.check_batch,
        lambda **k: checkify.checkify(jax.jit(jcl.check_batch))(**k)[0].throw(),
    ):
        assert function(**SOUND) is None
        assert function(**unused) is None
        assert function(**batch | {"weights": np.array([1.0, 0.0, 1.0], np.float32)}) is None


def test_check_batch_of_nothing_and_under_debug_nans():
    jcl.check_batch(TABLE, X[:0], Y[:0], weights=np.ones(0))
    x = jnp.asarray(X).at[1, 2].set(jnp.nan)
    both = jnp.asarray(X).at[1, 0].set(jnp.inf).at[1, 2].set(-jnp.inf)
    with jax.debug_nans(True), pytest.raises(ValueError, match="of class 0, is nan"):
        jcl.check_batch(TABLE, x, Y)
    with pytest.raises(ValueError, match="of class 0, is inf"):
        jcl.check_batch(TABLE, both, Y)


def test_checkify_shows_a_label_and_a_value_of_one_class_also_of_features_that_are_closed_over():
    x, labels = jnp.zeros((3, 3)).at[0, 1].set(jnp.inf).at[1, 2].set(-jnp.inf), jnp.array([1, 3, 0])
    error, _ = checkify.checkify(jax.jit(lambda c: jcl.check_batch(c, x, labels)))(TABLE)
    assert "of class 3, is -inf" in error.get()
    error, _ = checkify.checkify(lambda c: jcl.check_batch(c, x, labels))(TABLE)
    assert "of class 3, is -inf" in error.get()


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_checkify_names_what_one_of_several_devices_holds(kind, bad):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x, labels = jnp.zeros((16, 3)).at[3, 2].set(float(bad)), jnp.arange(16) % 4
    check = checkify.checkify(jax.jit(jcl.check_batch))
    error, _ = check(TABLE, *jax.device_put((x, labels), split))
    assert f"of class 3, is {bad} " in error.get()
    error, _ = check(TABLE, *jax.device_put((x, labels * 5), split))
    assert "label 15 is out of range" in error.get()


def test_checkify_of_gradients_metrics_and_scans():
    x, labels = jnp.zeros((2, 3)).at[1, 2].set(jnp.nan), jnp.array([0, 2])

    def scanned(centers, x, labels):
        step = jax.value_and_grad(checked(jcl.center_loss))
        return jax.lax.scan(lambda _, batch: (_, step(centers, *batch)), None, (x[:, None], labels[:, None]))

    for function in (
        jax.grad(checked(jcl.center_loss), (0, 1)),
        jax.hessian(checked(jcl.center_loss)),
        checked(jcl.center_metrics),
        scanned,
    ):
        error, _ = checkify.checkify(jax.jit(function))(TABLE, x, labels)
        assert "of class 2, is nan" in error.get()
        error, _ = checkify.checkify(jax.jit(function))(TABLE, jnp.zeros((2, 3)), labels)
        assert error.get() is None


@pytest.mark.parametrize("function", BATCH_FUNCTIONS)
def test_no_function_but_check_batch_leaves_an_effect(function):
    # A program with an effect would leave JAX's fast dispatch: 0.1 ms a call.
    assert not jax.make_jaxpr(function)(TABLE, X, Y).effects
    assert jax.make_jaxpr(checked(function))(TABLE, X, Y).effects


@pytest.mark.parametrize("sizes", [(0, 2), (2, 0), (-1, 2)])
def test_sizes(sizes):
    from flax import nnx

    with pytest.raises(ValueError, match="must be at least 1"):
        jcl.init_centers(jax.random.key(0), *sizes)
    with pytest.raises(ValueError, match="must be at least 1"):
        jcl.nnx.CenterLoss(*sizes, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="must be at least 1"):
        jcl.linen.CenterLoss(*sizes).init(jax.random.key(0), X, Y)
    with pytest.raises(TypeError, match=r"dtype must be floating point, got int32\. Centers are floating"):
        jcl.init_centers(jax.random.key(0), 2, 2, dtype=jnp.int32)
    with pytest.raises(TypeError, match="dtype must be floating point, got int32"):
        jcl.nnx.CenterLoss(2, 2, param_dtype=jnp.int32, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="dtype must be floating point, got int32"):
        jcl.linen.CenterLoss(2, 2, param_dtype=jnp.int32).init(jax.random.key(0), X, Y)


def test_import_is_light():
    code = (
        "import sys, jax_centerloss; print(sorted({'flax', 'optax', 'torch', 'matplotlib'} & {*sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        _ = jcl.nothing
    with pytest.raises(AttributeError, match=r"nnx\.CenterLoss and linen\.CenterLoss"):
        _ = jcl.CenterLoss
    assert {"center_loss", "nnx", "from_torch"} <= set(dir(jcl))


CONSTRUCTORS = """
import jax, optax
import jax_centerloss as jcl
jcl.linen.CenterLoss(10, 2)
jcl.linen.CenterLoss(10, 2, centers_as="state", rule="mean", alpha=0.25, param_dtype="bfloat16")
jcl.with_center_optimizer(optax.adam(1e-3))
jcl.with_center_optimizer(optax.adam(1e-3), optax.sgd(0.5), weight=0.1)
jcl.with_center_optimizer(optax.adam(1e-3), weight=optax.linear_schedule(0.0, 0.1, 10))
try:
    jax.numpy.zeros(2)
except RuntimeError as error:
    print("no backend" if "Unable to initialize backend" in str(error) else error)
"""


def test_constructors_do_not_start_a_backend():
    # There is no such backend, so that whatever starts one fails, as the last line shows.
    env = os.environ | {"JAX_PLATFORMS": "none_such"}
    out = subprocess.run([sys.executable, "-c", CONSTRUCTORS], capture_output=True, text=True, env=env)
    assert out.stdout == "no backend\n", out.stdout + out.stderr
