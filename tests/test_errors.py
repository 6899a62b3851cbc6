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
from flax import nnx
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_centerloss as jcl

TABLE = np.zeros((4, 3), np.float32)
X = np.zeros((5, 3), np.float32)
Y = np.zeros(5, np.int32)
BATCH_FUNCTIONS = [jcl.center_loss, jcl.update_centers]

# What is passed in place of a sound argument.
CASES = {
    "centers of rank 1": ({"params": TABLE[0]}, ValueError, r"centers must have shape \(C, D\).*\(3,\)"),
    "zero classes": ({"params": TABLE[:0]}, ValueError, r"at least one class and one feature, got \(0, 3\)"),
    "no features": ({"params": TABLE[:, :0], "x": X[:, :0]}, ValueError, r"one feature, got \(4, 0\)"),
    "integer centers": (
        {"params": TABLE.astype(np.int32)},
        TypeError,
        "centers must be floating .* got int32",
    ),
    "no table": ({"params": {}}, ValueError, r"exactly one array.*got 0 leaves: none\. Pass"),
    "two tables": (
        {"params": {"a": TABLE, "b": TABLE}},
        ValueError,
        r"exactly one array.*got 2 leaves: \['a'\], \['b'\]\. Pass",
    ),
    "nine tables": ({"params": [TABLE] * 9}, ValueError, r"got 9 leaves: \[0\], .*, \[7\], \.\.\.\. Pass"),
    "feature size": ({"x": X[:, :2]}, ValueError, r"D = 3.*got shape \(5, 2\)"),
    "scalar features": ({"x": np.float32(1)}, ValueError, r"x must have shape \(\.\.\., D\)"),
    "integer features": ({"x": X.astype(np.int32)}, TypeError, r"x must be floating .* got int32.*astype"),
    "float labels": ({"labels": Y.astype(np.float32)}, TypeError, "labels must be integers, got float32"),
    "boolean labels": ({"labels": Y.astype(bool)}, TypeError, "labels must be integers, got bool"),
    "number of labels": (
        {"labels": Y[:4]},
        ValueError,
        r"labels \(4,\) and x \(5, 3\): expected labels \(5,\)",
    ),
    "rank of labels": ({"labels": Y[:, None]}, ValueError, r"labels \(5, 1\) and x \(5, 3\)"),
    "float labels of a sequence": (
        {"x": X[None], "labels": Y[None].astype(np.float32)},
        TypeError,
        "labels must be integers, got float32. Cast them",
    ),
    "a column of a sequence's labels": (
        {"x": X[None], "labels": Y[None, :, None]},
        ValueError,
        r"A column of labels is `labels\[\.\.\., 0\]`",
    ),
    "centers as features": ({"x": {"centers": TABLE}}, TypeError, r"the order is \(params, x\)"),
    "float where": (
        {"where": np.ones(5, np.float32)},
        TypeError,
        "where must be boolean, got float32.*weights go into `weights`",
    ),
    "shape of where": ({"where": np.ones(4, bool)}, ValueError, r"shape of labels \(5,\), got \(4,\)"),
}


@pytest.mark.parametrize(("changes", "error", "words"), CASES.values(), ids=CASES)
def test_batches(changes, error, words):
    for function in (*BATCH_FUNCTIONS, *map(jax.jit, BATCH_FUNCTIONS)):
        with pytest.raises(error, match=words):
            function(**{"params": TABLE, "x": X, "labels": Y} | changes)


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
def test_options(function, options, words):
    call = functools.partial(function, **options)
    for either in (call, jax.jit(call)):
        with pytest.raises(ValueError, match=words):
            either(TABLE, X, Y)


@pytest.mark.parametrize("function", [jcl.distance_map, jcl.nearest_center])
def test_maps(function):
    with pytest.raises(ValueError, match="D = 3"):
        function(TABLE, X[:, :2])
    with pytest.raises(TypeError, match="floating point"):
        function(TABLE, X.astype(np.int32))


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
    body = functools.partial(function, axis_name="data")
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


def error_of(function):
    """A function of a batch that returns what checkify finds in the function under jit, or None."""
    compiled = jax.jit(checkify.checkify(jax.jit(function)))
    return lambda *args, **options: compiled(*args, **options)[0].get()


@pytest.mark.few(4)
@pytest.mark.parametrize("function", BATCH_FUNCTIONS)
@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.checkpoint, each, spread], ids=["", "remat", "vmap", "mesh"]
)
def test_checkify_names_a_label_and_a_feature(function, wrap):
    found = error_of(wrap(checked(function)))
    x, labels = np.zeros((4, 3), np.float32), np.array([0, 2, 1, -1])
    assert found(TABLE, x, labels) is None
    assert "label 9 is out of range for 4 classes" in found(TABLE, x, np.array([0, 9, 1, -1]))
    for bad in ("nan", "inf", "-inf"):
        x[1, 2] = float(bad)
        assert f"a feature of a used sample, of class 2, is {bad}" in found(TABLE, x, labels)
        assert found(TABLE, x, np.array([0, -1, 1, -1])) is None  # Not of one that is ignored.


FAULTS = {
    "label": ({"labels": np.array([0, 7, 1])}, "label 7 is out of range for 4 classes"),
    "nan feature": ({"x": np.float32([[0] * 3, [0, np.nan, 0], [0] * 3])}, "of class 2, is nan"),
    "infinite feature": ({"x": np.float32([[0] * 3, [-np.inf, 0, 0], [0] * 3])}, "of class 2, is -inf"),
    "weight": ({"weights": np.float32([1, -2.5, 0])}, "-2.5"),
    "nan weight": ({"weights": np.float32([1, np.nan, 0])}, "weight of .* of class 2, is nan"),
    "center": ({"params": np.float32([[0] * 3, [0] * 3, [0, np.inf, 0], [np.nan] * 3])}, "class 2.*inf"),
}
SOUND = {
    "params": TABLE,
    "x": X[:3],
    "labels": np.array([0, 2, 1]),
    "where": np.ones(3, bool),
    "weights": np.float32([0.5, 1, 2]),
}
found_in_a_batch = error_of(jcl.check_batch)
unseen_in_a_batch = jax.jit(jcl.check_batch)


@pytest.mark.parametrize(("fault", "words"), FAULTS.values(), ids=FAULTS)
def test_check_batch_names_what_is_wrong(fault, words):
    batch = SOUND | fault
    with pytest.raises(ValueError, match=words):
        jcl.check_batch(**batch)
    assert re.search(words, found_in_a_batch(**batch))
    unseen_in_a_batch(**batch)  # Nothing, where no one looks.
    masked, weightless = {"where": np.array([True, False, True])}, {"weights": np.float32([1, 0, 1])}
    for unused in (SOUND, batch | masked, batch | weightless):
        assert jcl.check_batch(**unused) is None
        assert found_in_a_batch(**unused) is None


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sharding_that_does_not_fit_is_refused(kind):
    mesh = jax.make_mesh((2, 4), ("data", "classes"), axis_types=(kind, kind))
    by_class = P(("data", "classes"), None)
    init = functools.partial(jcl.init_centers, jax.random.key(0))
    on_mesh = functools.partial(NamedSharding, mesh)
    three = P("classes", None, "data")
    refused = {
        r"num_classes=1001 is not divisible by the 8 shards.*Round it up to 1008\. The": (
            1001,
            8,
            on_mesh(by_class),
        ),
        r"feat_dim=7 is not divisible by the 2 shards.*Round it up to 8\.$": (
            64,
            7,
            on_mesh(P(None, "data")),
        ),
        r"num_classes=7 is not divisible by the 2 shards": (7, 8, on_mesh(P("data"))),
        r"needs a mesh: make the centers under `jax.set_mesh": (64, 8, by_class),
        r"\('classes', None, 'data'\) has 3 entries, .* two dimensions": (64, 8, on_mesh(three)),
    }
    for words, (classes, dim, out_sharding) in refused.items():
        with pytest.raises(ValueError, match=words):
            init(classes, dim, out_sharding=out_sharding)
    assert init(64, 8, out_sharding=on_mesh(P("classes")))["centers"].shape == (64, 8)  # One entry will do.
    words = r"out_sharding must be a .*PartitionSpec or NamedSharding, or .*Format, got 'classes'"
    with pytest.raises(TypeError, match=words):
        init(64, 8, out_sharding="classes")
    words = r"names \['rows'\], but the mesh has axes \['data', 'classes'\]"
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=words):
        init(64, 8, out_sharding=P("rows", None))


def test_check_batch_of_nothing_and_under_debug_nans():
    jcl.check_batch(TABLE, X[:0], Y[:0], weights=np.ones(0))
    x = jnp.asarray(X).at[1, 2].set(jnp.nan)
    both = jnp.asarray(X).at[1, 0].set(jnp.inf).at[1, 2].set(-jnp.inf)
    with jax.debug_nans(True), pytest.raises(ValueError, match="of class 0, is nan"):
        jcl.check_batch(TABLE, x, Y)
    with pytest.raises(ValueError, match="of class 0, is inf"):
        jcl.check_batch(TABLE, both, Y)


def test_checkify_shows_a_label_and_a_value_of_one_class_also_of_features_that_are_closed_over():
    x, labels = np.float32([[0, np.inf, 0], [0, 0, -np.inf], [0, 0, 0]]), np.array([1, 3, 0])
    for jit in (lambda function: function, jax.jit):
        error, _ = checkify.checkify(jit(lambda c: jcl.check_batch(c, jnp.asarray(x), labels)))(TABLE)
        assert "of class 3, is -inf" in error.get()


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_checkify_names_what_one_of_several_devices_holds(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x, labels = np.zeros((16, 3), np.float32), np.arange(16) % 4
    for bad in ("nan", "inf", "-inf"):
        x[3, 2] = float(bad)
        assert f"of class 3, is {bad} " in found_in_a_batch(TABLE, *jax.device_put((x, labels), split))
    assert "label 15 is out of range" in found_in_a_batch(TABLE, *jax.device_put((x, labels * 5), split))


def scanned(centers, x, labels):
    step = jax.value_and_grad(checked(jcl.center_loss))
    return jax.lax.scan(lambda _, batch: (_, step(centers, *batch)), None, (x[:, None], labels[:, None]))


@pytest.mark.parametrize(
    "function",
    [
        jax.grad(checked(jcl.center_loss), (0, 1)),
        jax.hessian(checked(jcl.center_loss)),
        checked(jcl.center_metrics),
        scanned,
    ],
    ids=["gradient", "hessian", "metrics", "scan"],
)
def test_checkify_of_what_is_made_of_a_loss(function):
    found, labels = error_of(function), np.array([0, 2])
    assert "of class 2, is nan" in found(TABLE, np.float32([[0, 0, 0], [0, 0, np.nan]]), labels)
    assert found(TABLE, X[:2], labels) is None


@pytest.mark.parametrize("function", BATCH_FUNCTIONS)
def test_no_function_but_check_batch_leaves_an_effect(function):
    # A program with an effect would leave JAX's fast dispatch: 0.1 ms a call.
    assert not jax.make_jaxpr(function)(TABLE, X, Y).effects
    assert jax.make_jaxpr(checked(function))(TABLE, X, Y).effects


def test_sizes_and_types_of_centers():
    makers = (
        lambda *sizes, dtype: jcl.init_centers(jax.random.key(0), *sizes, dtype=dtype),
        lambda *sizes, dtype: jcl.nnx.CenterLoss(*sizes, param_dtype=dtype, rngs=nnx.Rngs(0)),
        lambda *sizes, dtype: jcl.linen.CenterLoss(*sizes, param_dtype=dtype),
    )
    for make in makers:
        for sizes in ((0, 2), (2, 0), (-1, 2)):
            with pytest.raises(ValueError, match="must be at least 1"):
                make(*sizes, dtype=jnp.float32)
        with pytest.raises(
            TypeError, match=r"dtype must be floating point, got int32\. Centers are floating"
        ):
            make(2, 2, dtype=jnp.int32)


def test_what_the_package_does_not_have_is_named():
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        _ = jcl.nothing
    with pytest.raises(AttributeError, match=r"nnx\.CenterLoss and linen\.CenterLoss"):
        _ = jcl.CenterLoss
    assert {"center_loss", "nnx", "from_torch"} <= set(dir(jcl))


IMPORT_AND_CONSTRUCTORS = """
import sys
import jax_centerloss as jcl
print(sorted({'flax', 'optax', 'torch', 'matplotlib'} & {*sys.modules}))
import jax, optax
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


def test_the_import_is_light_and_constructors_do_not_start_a_backend():
    # There is no such backend, so that whatever starts one fails, as the last line shows.
    env = os.environ | {"JAX_PLATFORMS": "none_such"}
    command = [sys.executable, "-c", IMPORT_AND_CONSTRUCTORS]
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    assert out.stdout == "[]\nno backend\n", out.stdout + out.stderr
