"""The whole training step, as compiled: tables are written in place, and nothing grows with the classes."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_centerloss as jcl

pytestmark = pytest.mark.usefixtures("for_its_platform")

N, D = 256, 32
SIZES = [100, 10_000_000]


def loss_and_gradient(centers, x, labels, **options):
    return jax.value_and_grad(lambda x: jcl.center_loss(centers, x, labels, **options))(x)


def by_rule(rule, after):
    def step(centers, state, x, labels):
        loss, gradient = loss_and_gradient(centers, x, labels)
        moved = jcl.update_centers(centers, x, labels, rule=rule, after=loss if after else None)
        return moved, state, loss, gradient

    return step, lambda centers: ()


def by_rows(tx):
    rows = jcl.row_optimizer(tx)

    def step(centers, state, x, labels):
        loss, gradient = loss_and_gradient(centers, x, labels)
        centers, state = rows.update(centers, state, x, labels, after=loss)
        return centers, state, loss, gradient

    return step, rows.init


STEPS = {
    "paper": by_rule("paper", after=True),
    "gradient": by_rule("gradient", after=True),
    "paper without after": by_rule("paper", after=False),
    "gradient without after": by_rule("gradient", after=False),
    "momentum": by_rows(optax.sgd(0.1, momentum=0.9)),
    "adam": by_rows(optax.adam(0.1)),
    "adamw": by_rows(optax.adamw(0.1)),
    # Its new state is the last gradient, whatever the old one was.
    "optimistic gradient descent": by_rows(optax.optimistic_gradient_descent(0.1)),
}


def compiled(step, init, classes, *more, n=N, d=D):
    # On a mesh of one device: with more at hand and no mesh in sight, the labels are first made whole.
    mesh = jax.make_mesh((1,), ("one",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    one = NamedSharding(mesh, P())
    shape = partial(jax.ShapeDtypeStruct, sharding=one)
    centers = shape((classes, d), jnp.float32)
    state = jax.tree.map(lambda a: shape(a.shape, a.dtype), jax.eval_shape(init, centers))
    return (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(centers, state, shape((n, d), jnp.float32), shape((n,), jnp.int32), *more)
        .compile()
    )


def assert_in_place(program, classes, tables, n=N, d=D, other=0):
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= tables * classes * d * 4
    assert memory.temp_size_in_bytes <= 6 * n * d * 4 + 64 * 1024 + other
    text = program.as_text()
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text).group(1)
    assert len(re.findall(r"\}: \(\d+", aliases)) >= tables
    # No instruction copies something as long as the table, be it in one dimension.
    if classes > 2 * n:
        assert not re.findall(rf"= \w+\[{classes}\b[^=]*\bcopy\(", text)
        assert not re.findall(rf"= \w+\[{classes}\][^=]*", text)


@pytest.mark.few(6)
@pytest.mark.parametrize("classes", SIZES)
@pytest.mark.parametrize("name", STEPS)
def test_step_is_in_place_at_any_number_of_classes(name, classes):
    step, init = STEPS[name]
    with jax.numpy_dtype_promotion("standard"):
        tables = 1 + sum(leaf.ndim == 2 for leaf in jax.tree.leaves(jax.eval_shape(init, jnp.zeros((2, 2)))))
        assert_in_place(compiled(step, init, classes), classes, tables)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("name", "n", "d"),
    # Not Adam with two features: its six (N, D) arrays leave room for two integers a sample, and JAX 0.7
    # takes a third.
    [("adam", 8192, 128), ("adam", 128, 512)]
    + [(name, *shape) for name in ("paper", "gradient") for shape in ((8192, 2), (8192, 128), (128, 512))],
)
def test_temporaries_of_other_shapes(name, n, d):
    step, init = STEPS[name]
    with jax.numpy_dtype_promotion("standard"):
        memory = compiled(step, init, 100_000, n=n, d=d).memory_analysis()
    spare = (
        64 if jax.__version_info__ >= (0, 8) else 80
    )  # The scheduler of JAX 0.7 takes 9 KiB more at D = 2.
    assert memory.temp_size_in_bytes <= 6 * n * d * 4 + spare * 1024


def test_the_table_is_read_once():
    # The loss, its gradient and the update work on one and the same gather of rows.
    for name in ("paper", "gradient"):
        program = compiled(*STEPS[name], 100_000)
        assert len(re.findall(rf"= f32\[{N},(?:1,)?{D}\]\S* gather\(", program.as_text())) == 1


def test_a_float16_table_is_in_place():
    def step(centers, x, labels):
        loss, gradient = loss_and_gradient(centers, x, labels)
        return jcl.update_centers(centers, x, labels, after=loss), loss, gradient

    shape, classes = jax.ShapeDtypeStruct, 100_000
    args = shape((classes, D), jnp.float16), shape((N, D), jnp.float16), shape((N,), jnp.int32)
    memory = jax.jit(step, donate_argnums=0).lower(*args).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= classes * D * 2
    assert memory.temp_size_in_bytes <= 6 * N * D * 4 + 64 * 1024


OTHER_READS = {
    "another batch": lambda c, x, y, z: jnp.sum(c.at[z].get(mode="clip")),
    "micro-batches": lambda c, x, y, z: sum(jcl.center_loss(c, x[i::2], y[i::2]) for i in range(2)),
    "a mask in one call only": lambda c, x, y, z: jcl.center_loss(c, x, y, where=z > 3),
    "sequences": lambda c, x, y, z: jcl.center_loss(c, x.reshape(2, -1, D), y.reshape(2, -1)),
    "the nearest centers": lambda c, x, y, z: jnp.mean(jcl.nearest_center(c, x[:9]) == y[:9]),
    "a few rows": lambda c, x, y, z: jnp.sum((c[:7] - x[:7]) ** 2),
}


@pytest.mark.few(4)
@pytest.mark.parametrize("rule", ["paper", "gradient"])
@pytest.mark.parametrize("read", OTHER_READS.values(), ids=OTHER_READS)
def test_after_keeps_the_write_in_place_beside_another_read(read, rule):
    classes = 100_000

    def step(centers, state, x, labels, other):
        loss = read(centers, x, labels, other)
        return jcl.update_centers(centers, x, labels, rule=rule, after=loss), state, loss

    program = compiled(step, lambda c: (), classes, jax.ShapeDtypeStruct((N,), jnp.int32))
    # What is read besides has temporaries of its own; the table has 12 MB.
    assert_in_place(program, classes, 1, other=2**18)


def test_steps_by_row_cost_no_new_program():
    rows = jcl.row_optimizer(optax.sgd(0.1, momentum=0.9))
    traced = []

    @jax.jit
    def step(centers, state, x, labels):
        traced.append(1)
        return rows.update(centers, state, x, labels)

    centers = jnp.zeros((500, 3))
    state = rows.init(centers)
    for i in range(4):
        centers, state = step(centers, state, jnp.full((8, 3), i, jnp.float32), jnp.arange(8) * i)
    assert len(traced) == 1


def test_nearest_center_streams_a_million_classes():
    shape = jax.ShapeDtypeStruct
    n, c, d = 1024, 1_000_000, 128
    program = (
        jax.jit(jcl.nearest_center).lower(shape((c, d), jnp.float32), shape((n, d), jnp.float32)).compile()
    )
    # A block of distances and the features: far from N x C, which would be 4 GB, and from the table, 512 MB.
    # A GPU's matrix product has a workspace of its own.
    most = 16 if jax.default_backend() == "cpu" else 64
    assert program.memory_analysis().temp_size_in_bytes < most * 2**20


class Net(nnx.Module):
    def __init__(self, classes, rngs):
        self.features = nnx.Linear(8, D, rngs=rngs)
        self.head = nnx.Linear(D, 10, rngs=rngs)
        self.center_loss = jcl.nnx.CenterLoss(classes, D, centers_as="state", rngs=rngs)


def test_an_nnx_training_step_is_in_place():
    classes = 50_000
    tx = optax.sgd(0.1)
    shapes = nnx.eval_shape(lambda: (m := Net(classes, nnx.Rngs(0)), nnx.Optimizer(m, tx, wrt=nnx.Param)))
    graphdef, state = nnx.split(shapes)

    def step(state, images, labels):
        model, optimizer = nnx.merge(graphdef, state)

        def loss_fn(model):
            x = model.features(images)
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels(model.head(x), labels % 10).mean()
            return cross_entropy + 0.1 * model.center_loss(x, labels), x

        (loss, x), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads)
        model.center_loss.update_centers(x, labels, after=loss)
        return nnx.state((model, optimizer)), loss

    shape = jax.ShapeDtypeStruct
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        program = (
            jax.jit(step, donate_argnums=0)
            .lower(state, shape((N, 8), jnp.float32), shape((N,), jnp.int32))
            .compile()
        )
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= classes * D * 4
    assert memory.temp_size_in_bytes < classes * D * 4 / 4
    assert f"f32[{classes},{D}]" in program.as_text()
    np.testing.assert_equal(
        re.findall(rf"= f32\[{classes},{D}\][^=]* (?:copy|broadcast)\(", program.as_text()), []
    )
