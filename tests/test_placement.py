"""Centers and batches wherever they lie: the numbers of one device, and no more travels than the batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from placements import PLACEMENTS, Placement, collectives, put, shapes

import jax_centerloss as jcl

C, D, N = 2000, 16, 64
ADAM = jcl.row_optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)))


def dense(c, s, x, y, w):
    """A step of gradient descent on the whole table, with the loss and the gradient of the features."""
    loss, (gradient, gradient_x) = jax.value_and_grad(jcl.center_loss, (0, 1))(c, x, y, where=w)
    return c - 0.5 * gradient, loss, gradient_x


# Of the centers, a state by rows, features, labels and a mask.
FUNCTIONS = {
    "dense": dense,
    "paper": lambda c, s, x, y, w: jcl.update_centers(c, x, y, where=w),
    "adam": lambda c, s, x, y, w: ADAM.update(c, s, x, y, where=w),
    "distances": lambda c, s, x, y, w: jcl.distance_map(c, x),
    "nearest": lambda c, s, x, y, w: jcl.nearest_center(c, x),
    "metrics": lambda c, s, x, y, w: jcl.center_metrics(c, x, y, where=w, previous=c - 1.0),
}


def everything(*given):
    return {name: function(*given) for name, function in FUNCTIONS.items()}


# What moves centers, and which of the arguments it is given to write in place.
STEPS = {"dense": (0,), "paper": (0,), "adam": (0, 1)}


@pytest.fixture(autouse=True, scope="module")
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs it.
        yield


def arguments():
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(C, D)).astype(np.float32)
    # Over the devices unevenly: class 3 on all, class 7 on the first only, classes of all shards.
    labels = rng.integers(0, C, N).astype(np.int32)
    labels[:4], labels[::8], labels[5::16] = 7, 3, -1
    x = (centers[np.maximum(labels, 0)] + rng.normal(size=(N, D))).astype(np.float32)
    where = np.arange(N) % 11 != 0
    return {"table": centers, "table state": ADAM.init(centers), "x": x, "labels": labels, "where": where}


@pytest.fixture(scope="module")
def single():
    """What the functions return on one device."""
    return jax.jit(everything)(*arguments().values())


def assert_equal(result, single):
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def assert_stays(result, placement, before):
    """Centers and state lie where they did, and their type says so too."""
    tables = [leaf for leaf in jax.tree.leaves(result) if leaf.shape == (C, D)]
    assert tables
    for leaf in tables:
        assert leaf.sharding.is_equivalent_to(placement.of("table", 2), 2)
        assert jax.typeof(leaf).sharding == before.sharding


TWO_AXES = [p for p in PLACEMENTS if p.classes == "classes" and p.samples == "data" and not p.context]


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("name", "placement"),
    [(name, placement) for name in FUNCTIONS for placement in PLACEMENTS],
    ids=str,
)
def test_equals_one_device_and_travel_does_not_grow_with_the_classes(placement, name, single, request):
    given = put(placement, arguments())
    before = jax.typeof(given[0])
    with placement.entered():
        step = jax.jit(FUNCTIONS[name], donate_argnums=STEPS.get(name, ()))
        small, large = (step.lower(*shapes(placement, arguments(), c)).compile() for c in (C, 1_000_000))
        result = small(*given)
    assert_equal(result, single[name])
    if name in STEPS:
        assert_stays(result, placement, before)
    assert collectives(small.as_text()) == collectives(large.as_text())
    if name in ("paper", "adam"):
        temporaries = small.memory_analysis().temp_size_in_bytes
        assert temporaries == large.memory_analysis().temp_size_in_bytes
        if request.config.getoption("platform") != "gpu":  # A CPU's compiler does not fuse what a GPU's does.
            assert temporaries <= 6 * N * D * 4 + 64 * 1024


@pytest.mark.few(1)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("placement", TWO_AXES, ids=str)
def test_blocks_of_many_samples_travel_once(placement, axis):
    rng = np.random.default_rng(0)
    where = NamedSharding(placement.mesh, P(*(placement.samples if i == axis else None for i in range(2))))
    centers = rng.normal(size=(C, 3)).astype(np.float32)
    (table,) = put(placement, {"table": centers})

    def draw(samples):
        return rng.normal(size=(4, samples, 3)).astype(np.float32), rng.integers(0, C, (4, samples))

    @jax.jit
    def both(centers, x, labels):
        return jcl.nearest_center(centers, x), jcl.center_metrics(centers, x, labels)

    batch, small = draw(2048), draw(64)
    with placement.entered():
        placed, few_placed = jax.device_put((batch, small), where)
        many, few = (both.lower(table, *given).compile() for given in (placed, few_placed))
        result = many(table, *placed)
    assert_equal(result, both(centers, *batch))
    of_many, of_few = (sum(size for _, size in collectives(p.as_text()).elements()) for p in (many, few))
    assert of_many <= 2048 / 64 * of_few


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("placement", TWO_AXES, ids=str)
def test_outside_of_jit(placement, name, single):
    given = put(placement, arguments())
    before = jax.typeof(given[0])
    # Outside of jit, JAX takes no gradient of any function on Explicit axes without their mesh.
    with jax.set_mesh(placement.mesh) if name == "dense" else placement.entered():
        result = FUNCTIONS[name](*given)
    assert_equal(result, single[name])
    if name in STEPS:
        assert_stays(result, placement, before)


@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("placed", [("table", "table state"), ("x", "labels", "where")], ids=str)
@pytest.mark.parametrize("placement", TWO_AXES, ids=str)
def test_the_rest_from_the_host(placement, placed, jit, single):
    given = arguments()
    given |= zip(placed, put(placement, {name: given[name] for name in placed}), strict=True)
    # Outside of jit, JAX takes no gradient of any function on Explicit axes without their mesh.
    for name in ("adam", "metrics", *(["dense"] if jit or placement.kind == "Auto" else [])):
        function = jax.jit(FUNCTIONS[name]) if jit else FUNCTIONS[name]
        assert_equal(function(*given.values()), single[name])


THREE_AXES = ("a", "b", "c")
ODD = {
    # Specs of the table, the features, the labels and the mask, with features (8, 8, D).
    "labels and mask unlike x": (P("b"), P("a"), P("c"), P("b")),
    "no label where x is": (P("b"), P("a"), P(), P("a")),
    "two dimensions of the batch": (P("b"), P("a", "c"), P("c", "a"), P("a", "c")),
    "features split": (P("b", "a"), P("c", None, "a"), P("c"), P("c")),
    "classes over two axes": (P(("c", "a")), P(("a", "b")), P("b"), P()),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds", [("Explicit",) * 3, ("Auto", "Explicit", "Explicit"), ("Auto",) * 3], ids=str
)
@pytest.mark.parametrize("odd", ODD)
def test_odd_placements_of_a_sequence(odd, kinds, single):
    mesh = jax.make_mesh((2, 2, 2), THREE_AXES, axis_types=tuple(getattr(AxisType, kind) for kind in kinds))
    table, *batch = (NamedSharding(mesh, spec) for spec in ODD[odd])
    given = arguments()
    centers, state = jax.tree.map(
        lambda leaf: jax.device_put(leaf, table if leaf.ndim else NamedSharding(mesh, P())),
        (jnp.asarray(given["table"]), given["table state"]),
    )
    split = (
        jax.device_put(given[name].reshape(8, 8, *given[name].shape[1:]), sharding)
        for name, sharding in zip(("x", "labels", "where"), batch, strict=True)
    )
    got, want = (jax.tree.leaves(r) for r in (jax.jit(everything)(centers, state, *split), single))
    assert_equal([np.asarray(a).reshape(b.shape) for a, b in zip(got, want, strict=True)], want)


def test_a_mesh_of_both_kinds_moves_no_table():
    mesh = jax.make_mesh((2, 4), ("data", "classes"), axis_types=(AxisType.Auto, AxisType.Explicit))

    def moved(classes):
        given = shapes(
            Placement("Auto", (2, 4), ("data", "classes"), "classes", "data"), arguments(), classes
        )
        given = jax.tree.map(
            lambda a: a.update(sharding=a.sharding and NamedSharding(mesh, a.sharding.spec)), given
        )
        steps = jax.jit(lambda *given: [FUNCTIONS[name](*given) for name in STEPS])
        return collectives(steps.lower(*given).compile().as_text())

    assert moved(C) == moved(1_000_000)


@pytest.mark.parametrize("placement", TWO_AXES, ids=str)
def test_a_single_sample(placement):
    given = arguments()
    x, label = given["x"][1], given["labels"][1]
    (table,) = put(placement, {"table": given["table"]})

    @jax.jit
    def both(*given):
        return jax.value_and_grad(jcl.center_loss)(*given), jcl.update_centers(*given)

    (loss, gradient), moved = both(table, x, label)
    difference = x - given["table"][label]
    np.testing.assert_allclose(loss, np.sum(difference**2), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(gradient)[label], -2 * difference, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(moved)[label], given["table"][label] + 0.25 * difference, rtol=1e-5)


@pytest.mark.usefixtures("for_its_platform")
def test_a_single_device_needs_no_whole_batch(monkeypatch):
    def program(devices):
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        given = arguments()
        jax.clear_caches()
        return jax.jit(jcl.update_centers).lower(given["table"], given["x"], given["labels"]).as_text()

    assert "optimization_barrier" in program(8)
    assert "optimization_barrier" not in program(1)


def test_collectives_are_found():
    placement = Placement("Auto", (8,), ("d",), "d", "d")
    across = NamedSharding(placement.mesh, P(None, "d"))
    turned = jax.jit(lambda a: a * 1.0, out_shardings=across)
    text = turned.lower(*shapes(placement, {"table": np.zeros((8, 64), np.float32)}, 800)).compile().as_text()
    assert sum(size for _, size in collectives(text).elements()) == 800 * 64 * 4 / 8

    def looped(a):
        def body(i, a):
            return jax.lax.cond(a[0] > i, lambda a: jax.lax.psum(a, "d"), lambda a: 2 * a, a)

        return jax.lax.fori_loop(0, 9, body, a)

    mapped = jax.jit(jax.shard_map(looped, mesh=placement.mesh, in_specs=P(), out_specs=P(), check_vma=False))
    with pytest.raises(AssertionError, match="in a loop"):
        collectives(mapped.lower(jax.ShapeDtypeStruct((64,), np.float32)).compile().as_text())


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_inside_shard_map(kind, single):
    placement = Placement(kind, (8,), ("d",), None, "d")
    whole, batch, axis = P(), P("d"), {"axis_name": "d"}

    def inside(c, s, x, y, w):
        return {
            "paper": jcl.update_centers(c, x, y, where=w, **axis),
            "adam": ADAM.update(c, s, x, y, where=w, **axis),
            "metrics": jcl.center_metrics(c, x, y, where=w, previous=c - 1.0, **axis),
            "distances": jcl.distance_map(c, x),
            "nearest": jcl.nearest_center(c, x),
        }

    out = {"paper": whole, "adam": whole, "metrics": whole, "distances": batch, "nearest": batch}
    specs = whole, whole, batch, batch, batch
    mapped = jax.jit(jax.shard_map(inside, mesh=placement.mesh, in_specs=specs, out_specs=out))
    small, large = (mapped.lower(*shapes(placement, arguments(), c)).compile() for c in (C, 1_000_000))
    result = small(*put(placement, arguments()))
    for name in out:
        assert_equal(result[name], single[name])
    assert collectives(small.as_text()) == collectives(large.as_text())


@pytest.mark.slow
@pytest.mark.parametrize("placement", TWO_AXES, ids=str)
def test_one_program_serves_a_ragged_batch(placement):
    given = arguments()
    traced = []

    def step(name, *arrays):
        traced.append(name)
        return FUNCTIONS[name](*arrays)

    steps = {name: jax.jit(partial(step, name)) for name in ("paper", "adam", "metrics")}
    for number in (N, N - 7, 3):
        filled = {name: np.zeros_like(given[name]) for name in ("x", "labels", "where")}
        filled["x"][:] = np.nan
        for name, array in filled.items():
            array[:number] = given[name][:number]
        for name, step in steps.items():
            ragged = [given["table"], given["table state"], *(given[key][:number] for key in filled)]
            assert_equal(step(*put(placement, given | filled)), FUNCTIONS[name](*ragged))
    assert traced == list(steps)


@pytest.mark.parametrize("placement", TWO_AXES, ids=str)
def test_class_means(placement):
    given = arguments()
    labels = np.arange(N) % 3
    want = given["table"].copy()
    want[:3] = [given["x"][labels == j].mean(0) for j in range(3)]
    table, x, labels = put(placement, {"table": given["table"], "x": given["x"], "labels": labels})
    with pytest.warns(
        UserWarning, match="1997 of 2000 classes were never seen and keep their centers: 3, 4, 5"
    ):
        means = jcl.init_from_features(table, [(x, labels)] * 2)
    assert_stays(means, placement, jax.typeof(table))
    np.testing.assert_allclose(means, want, rtol=1e-6, atol=1e-6)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_work_per_device_stays_when_classes_and_devices_grow_together(kind):
    costs = []
    for devices in (2, 4, 8):
        placement = Placement(kind, (devices,), ("d",), "d", "d")
        given = shapes(placement, arguments(), 10_000 * devices)
        step = jax.jit(FUNCTIONS["adam"], donate_argnums=STEPS["adam"])
        costs.append(step.lower(*given).compile().cost_analysis())
    for key in ("flops", "bytes accessed"):
        work = [cost[key] for cost in costs]
        assert max(work) <= 1.05 * min(work)


def test_few_features_that_are_split(rng):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    centers, x = rng.normal(size=(5, 4)), rng.normal(size=(8, 4))
    labels = np.arange(8) % 5
    split = jax.device_put(x.astype(np.float32), NamedSharding(mesh, P("a", "b")))
    loss, gradient = jax.jit(jax.value_and_grad(jcl.center_loss, 1))(
        centers.astype(np.float32), split, labels
    )
    difference = x - centers[labels]
    np.testing.assert_allclose(loss, np.mean(np.sum(difference**2, 1)), rtol=1e-5)
    np.testing.assert_allclose(gradient, 2 * difference / 8, rtol=1e-4, atol=1e-6)


def test_features_stay_while_their_nearest_centers_are_found_where_the_classes_lie():
    mesh = jax.make_mesh((2, 4), ("data", "classes"), axis_types=(AxisType.Explicit,) * 2)
    table, x = (
        jax.ShapeDtypeStruct((size, 128), jnp.float32, sharding=NamedSharding(mesh, P(axis, None)))
        for size, axis in ((C, "classes"), (512, "data"))
    )
    with jax.set_mesh(mesh):
        program = jax.jit(jcl.nearest_center).lower(table, x).compile()
    travels = sum(size for _, size in collectives(program.as_text()).elements())
    assert travels < 512 * 128 * 4 / 8  # An eighth of the features.
