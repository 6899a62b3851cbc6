"""The recipes of docs/recipes.md: the knobs with which this library does what others do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import pytest
import reference as ref
from pages import defined, python_of, text_of

import jax_centerloss as jcl

RATE = 0.5
LOSSES, CAFFE = python_of("recipes")
CAFFE_RATE = next(line for line in CAFFE.splitlines() if line.startswith("rate = "))


@pytest.fixture(autouse=True)
def as_a_user():
    """JAX's own settings, not the suite's strict ones: optax's schedules and Adam need them."""
    with jax.numpy_dtype_promotion("standard"):
        yield


told = defined(LOSSES)
unit, cosine, euclidean, mean_per_class = (
    told[name] for name in ("unit", "cosine", "euclidean", "mean_per_class")
)


def half(reduce_fn=jnp.mean):
    return lambda c, x, labels: 0.5 * jcl.center_loss(c, x, labels, reduce_fn=reduce_fn, clip=None)


def by_rule(rule, scale=1.0):
    def move(centers, x, labels, state):
        return jcl.update_centers(centers, x, labels, alpha=scale * RATE, rule=rule), state

    return move


def pytorch_ood(centers, x, labels):
    return told["up_to_a_radius"](centers, x, labels, peers.RADIUS)


def by_optax(loss_of, own=None, weight=peers.LAM):
    """As parameters, beside a model of one number; the loss comes times λ, which `weight` divides out."""
    tx = jcl.with_center_optimizer(optax.sgd(1.0), own or optax.sgd(RATE), weight=weight)
    return by_one_optimizer(loss_of, tx)


def by_one_optimizer(loss_of, tx):
    def move(centers, x, labels, state):
        params = {"centers": centers, "model": jnp.ones(())}
        grads = jax.grad(lambda p: peers.LAM * loss_of(p["centers"], x, labels))(params)
        updates, state = tx.update(grads, tx.init(params) if state is None else state, params)
        return optax.apply_updates(params, updates)["centers"], state

    return move


def by_caffes(step, tx):
    """Caffe's solver, in one of its two forms, at one rate."""
    space = defined(CAFFE.replace(CAFFE_RATE, f"rate = lambda step: {RATE}"))
    step, tx = space[step], space[tx]
    return lambda c, x, labels, state: step(c, tx.init(c) if state is None else state, x, labels)


def mxnet(c, x, labels):
    return mean_per_class(c, x, labels) / len(labels)


def named_by_the_logits(centers, x, labels):
    named = jnp.argmax(peers.logits(x, len(centers)), -1)
    return jcl.center_loss(jax.lax.stop_gradient(centers), x, named)


def cosine_by_rule(centers, x, labels, state):
    return unit(jcl.update_centers(unit(centers), unit(x), labels, alpha=RATE, rule="mean")), state


RECIPES = {
    "paper": (half(jnp.sum), by_rule("paper")),
    "caffe": (half(), by_caffes("every_row", "solver")),
    "caffe, by rows": (half(), by_caffes("touched_rows", "rows")),
    "pytorch-metric-learning": (half(jnp.sum), by_rule("paper")),
    "facenet": (
        lambda c, x, labels: jcl.center_loss(c, x, labels, clip=None) / x.shape[-1],
        lambda c, x, labels, state: by_rule("gradient", scale=len(labels) / 2)(c, x, labels, state),
    ),
    "module": (jcl.center_loss, by_rule("gradient")),
    "module, by optax": (jcl.center_loss, by_optax(jcl.center_loss)),
    "module, its script": (
        jcl.center_loss,
        by_optax(jcl.center_loss, optax.chain(optax.scale(1 / peers.LAM), optax.sgd(RATE)), weight=None),
    ),
    "module, λ left in": (jcl.center_loss, by_optax(jcl.center_loss, weight=None)),
    "own backward, sum": (half(jnp.sum), by_rule("paper")),
    "own backward, mean": (
        half(),
        lambda c, x, labels, state: by_rule("paper", scale=1 / len(labels))(c, x, labels, state),
    ),
    "autograd": (half(), by_rule("gradient", scale=0.5)),
    "autograd, by optax": (half(), by_optax(half())),
    "mean per class": (mean_per_class, by_rule("mean")),
    "mean per class, by optax": (mean_per_class, by_optax(mean_per_class)),
    "mxnet": (
        mxnet,
        lambda c, x, labels, state: by_rule("mean", scale=peers.LAM / len(labels))(c, x, labels, state),
    ),
    "mxnet, by optax": (mxnet, by_optax(mxnet, weight=None)),
    "pytorch-ood": (pytorch_ood, by_optax(pytorch_ood)),
    "PaddleOCR": (named_by_the_logits, by_optax(named_by_the_logits)),
    "euclidean": (euclidean, by_optax(euclidean)),
    "one Adam": (jcl.center_loss, by_one_optimizer(jcl.center_loss, optax.adam(RATE))),
    "cosine": (cosine, by_optax(cosine)),
    "cosine, by rule": (cosine, cosine_by_rule),
}


def expected(name, source):
    name = name.removesuffix(", by optax").removesuffix(", its script")
    if name in peers.NUMPY or source == "live":
        return peers.run(name)
    golden = ref.golden(f"recipes/{name}")
    return golden["losses"], golden["centers"]


@pytest.mark.few(8)
@pytest.mark.parametrize("source", ref.SOURCES)
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "caffe, by rows"])
def test_recipe_takes_the_same_steps(name, source):
    loss_of, move = RECIPES[name]
    want_losses, want_centers = expected(name, source)
    step = jax.jit(lambda c, x, labels, state: (loss_of(c, x, labels), *move(c, x, labels, state)))
    with ref.enable_x64():
        centers, state = peers.draws()[0][0], None
        for (_, x, labels), *want in zip(peers.draws(), want_losses, want_centers, strict=True):
            loss, centers, state = step(centers, x, labels, state)
            np.testing.assert_allclose(loss, want[0], rtol=1e-10)
            np.testing.assert_allclose(centers, want[1], rtol=1e-10, atol=1e-12)


def caffe_runs(steps, classes_of):
    """Caffe's centers and ours, of both forms, step by step: 0.5 is the rate, and 0.05 from step 10 on.

    `classes_of(step)` says which of the four classes are in the batch.
    """
    random, space = np.random.default_rng(0), defined(CAFFE)
    every_row, touched_rows = (jax.jit(space[name]) for name in ("every_row", "touched_rows"))
    dense = rows = centers = random.standard_normal((4, 2))
    dense_state, rows_state, velocity = space["solver"].init(dense), space["rows"].init(rows), None
    found = []
    for step in range(steps):
        labels = random.permutation(np.resize(classes_of(step), 12))
        x = centers[labels] + random.standard_normal((12, 2))
        _, centers, velocity = peers.caffe(centers, x, labels, 0.5 if step < 10 else 0.05, velocity)
        dense, dense_state = every_row(dense, dense_state, x, labels)
        rows, rows_state = touched_rows(rows, rows_state, x, labels)
        found.append([centers, dense, rows])
    return np.moveaxis(found, 1, 0)


def test_caffes_solver_to_the_letter_where_the_rate_changes_and_rows_rest_where_a_class_is_absent():
    some = [[0, 1], [1, 2, 3], [0, 3]]
    with ref.enable_x64():
        caffe, dense, rows = caffe_runs(20, lambda step: some[step % 3])
    np.testing.assert_allclose(dense, caffe, rtol=1e-10, atol=1e-12)
    for step in range(3, 20):
        absent = np.setdiff1d(np.arange(4), some[step % 3])
        np.testing.assert_array_equal(rows[step, absent], rows[step - 1, absent])
        assert np.abs(dense[step, absent] - dense[step - 1, absent]).max(axis=1).min() > 1e-4


def test_caffes_solver_by_rows_is_equal_while_every_class_is_in_the_batch():
    with ref.enable_x64():
        caffe, dense, rows = caffe_runs(20, lambda step: [0, 1, 2, 3])
    np.testing.assert_allclose(dense, caffe, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(rows, caffe, rtol=1e-10, atol=1e-12)


def test_the_rate_outside_the_momentum_is_another_solver_once_it_changes():
    outside = "solver = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(rate, 0.9))\nrows = "
    random, tables = np.random.default_rng(0), []
    start, xs, labels = random.standard_normal((4, 2)), random.standard_normal((11, 12, 2)), np.arange(12) % 4
    with ref.enable_x64():
        for code in (CAFFE, re.sub(r"solver = .*?\nrows = ", outside, CAFFE, flags=re.DOTALL)):
            space = defined(code)
            step, centers, state, found = jax.jit(space["every_row"]), start, space["solver"].init(start), []
            for x in xs:
                centers, state = step(centers, state, x, labels)
                found.append(centers)
            tables.append(np.stack(found))
    right, wrong = tables
    np.testing.assert_allclose(wrong[:10], right[:10], rtol=1e-10, atol=1e-12)
    assert np.abs(wrong[10] - right[10]).max() > 0.01


@pytest.mark.parametrize(
    ("alfa", "samples", "runs_off"),
    [(0.5, 3, False), (0.5, 5, True), (0.95, 39, False), (0.95, 41, True)],
)
def test_facenets_centers_run_off_where_too_many_samples_pull(alfa, samples, runs_off):
    random = np.random.default_rng(0)
    x, labels = random.standard_normal((samples, 2)), np.zeros(samples, int)
    start, factor = random.standard_normal((1, 2)), abs(1 - (1 - alfa) * samples)
    assert (factor > 1) == runs_off == ((1 - alfa) * samples > 2)
    theirs = ours = tame = start

    @jax.jit
    def step(ours, tame):
        alpha = (1 - alfa) * samples / 2
        ours = jcl.update_centers(ours, x, labels, alpha=alpha, rule="gradient")
        return ours, jcl.update_centers(tame, x, labels, alpha=1.0)

    with ref.enable_x64():
        for i in range(1, 21):
            theirs = peers.facenet(theirs, x, labels, 1 - alfa, None).centers
            ours, tame = step(ours, tame)
            away = np.linalg.norm(np.asarray(ours) - x.mean(axis=0))
            assert away == pytest.approx(factor**i * np.linalg.norm(start - x.mean(axis=0)), rel=1e-8)
    np.testing.assert_allclose(ours, theirs, rtol=1e-8)
    np.testing.assert_allclose(tame[0], x.mean(axis=0), atol=1e-6)


def test_pytorch_oods_radius_bounds_the_squared_distance_and_at_0_is_the_module_over_c():
    centers, x, labels = peers.draws()[0]
    squared = np.sum((x - centers[labels]) ** 2, axis=1)
    assert 0 < np.sum(squared < peers.RADIUS) < len(x)
    with ref.enable_x64():
        pulls = jax.jit(jax.grad(pytorch_ood, argnums=1))(centers, x, labels)
        bare = told["up_to_a_radius"](centers, x, labels, 0.0)
        want = float(jcl.center_loss(centers, x, labels)) / 6
    np.testing.assert_array_equal(np.any(np.asarray(pulls) != 0, axis=1), squared > peers.RADIUS)
    assert bare == pytest.approx(want, rel=1e-10)


def test_losses_at_the_very_center_have_a_gradient():
    losses = euclidean, cosine, mean_per_class, pytorch_ood
    centers, labels = np.eye(3, dtype=np.float32), np.arange(3)
    graded = jax.jit(lambda *batch: [jax.value_and_grad(loss, argnums=(0, 1))(*batch) for loss in losses])
    for loss, grads in graded(centers, centers, labels):
        assert loss < 1e-5
        assert max(np.abs(grad).max() for grad in grads) < 1e-6


def test_on_the_sphere_a_center_grows_as_a_parameter_and_keeps_its_length_by_rule():
    def lengths(tables):
        return np.linalg.norm(tables, axis=-1)

    start = lengths(peers.draws()[0][0])
    grown = np.vstack([start, lengths(peers.run("cosine")[1])])
    assert np.all(np.diff(grown, axis=0) >= -1e-12)
    np.testing.assert_allclose(lengths(peers.run("cosine, by rule")[1]), 1.0, rtol=1e-12)


NAMES = {
    "the paper": "paper",
    "its Caffe layer": "caffe",
    "its Caffe layer, by rows": "caffe, by rows",
    "the PyTorch module": "module",
    "the PyTorch module, its script to the letter, λ > 0": "module, its script",
    "the PyTorch module, λ left in": "module, λ left in",
    "the PyTorch version with its own backward pass": "own backward, mean",
    "own backward pass, `size_average=False`": "own backward, sum",
    "pytorch-metric-learning 3": "pytorch-metric-learning",
    "FaceNet's TensorFlow code": "facenet",
    "½ and plain autograd": "autograd",
    "the mean per class": "mean per class",
    "MXNet's example": "mxnet",
    "pytorch-ood": "pytorch-ood",
    "PaddleOCR": "PaddleOCR",
    "Euclidean, not squared": "euclidean",
    "one Adam for everything, λ left in": "one Adam",
    "cosine": "cosine",
    "cosine, by rule": "cosine, by rule",
}


def rows_in_the_page():
    """The table's cells by the name of their row: the loss, how centers move, the step of a lone sample."""
    table = text_of("recipes").split("step of a lone sample")[1].split("\n\n")[0]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]
    return [(re.sub(r"\[(.+?)\]\(.+?\)", r"\1", who), *cells) for who, *cells in rows]


def test_each_row_has_a_name_of_its_own_and_is_tested():
    assert [who for who, *_ in rows_in_the_page()] == list(NAMES)
    assert {name.removesuffix(", by optax") for name in RECIPES} == set(NAMES.values())


def run_row(how, loss_of, names):
    """Centers after the code of a cell: that of a rule, or of an optimizer of the whole tree."""
    if how == "not at all: they are loaded":
        return names["centers"]
    code = how.replace("as parameters", "`with_center_optimizer(tx, optax.sgd(lr), weight=lam)`")
    code = re.search(r"`(.+)`", code)[1]
    moved = eval(code.replace("...", "centers, x, labels"), names)
    if isinstance(moved, optax.GradientTransformation):
        move = by_one_optimizer(loss_of, moved)
        moved, _ = move(names["centers"], names["x"], names["labels"], None)
    return moved


@pytest.mark.parametrize("row", rows_in_the_page(), ids=lambda row: NAMES.get(row[0], row[0]))
def test_the_code_of_a_row_takes_the_first_step(row):
    who, loss, moves, _ = row
    want_losses, want_centers = expected(NAMES[who].removesuffix(", by rows"), ref.SOURCES[0])
    names = {
        **told,
        "update_centers": jcl.update_centers,
        "with_center_optimizer": jcl.with_center_optimizer,
        "up_to_a_radius": pytorch_ood,
        "optax": optax,
        "jax": jax,
        "jnp": jnp,
        "tx": optax.sgd(1.0),
        **dict.fromkeys(("lr", "alpha"), RATE),
        "alfa": 1 - RATE,
        "lam": peers.LAM,
    }
    # The steps of the solver, whose code is a block of its own, are compared above.
    ways = [] if "caffes-solver" in moves else moves.split(", or ")

    @jax.jit
    def first_step(centers, x, labels):
        (n, d), logits = x.shape, peers.logits(x, len(centers))
        code = loss.strip("`").replace("...", "centers, x, labels")
        of_batch = names | {"n": n, "D": d, "logits": logits}

        def loss_of(centers, x, labels):
            return eval(code, of_batch | {"centers": centers, "x": x, "labels": labels})

        of_batch |= {"centers": centers, "x": x, "labels": labels}
        return loss_of(centers, x, labels), [run_row(how, loss_of, of_batch) for how in ways]

    with ref.enable_x64():
        found, tables = first_step(*peers.draws()[0])
    np.testing.assert_allclose(found, want_losses[0], rtol=1e-10)
    for moved in tables:
        np.testing.assert_allclose(moved, want_centers[0], rtol=1e-10, atol=1e-12)


def test_steps_in_the_page():
    steps = {NAMES[who]: re.match(r"[\d.]+|–", step)[0] for who, _, _, step in rows_in_the_page()}
    assert {name for name, step in steps.items() if step == "–"} == {"cosine", "cosine, by rule"}
    steps = {name: float(step) for name, step in steps.items() if step != "–"}
    labels, x = np.append(0, np.ones(127, int)), np.zeros((128, 2))
    x[0, 0] = 1.0
    with ref.enable_x64():
        moved = jax.jit(lambda *batch: {name: RECIPES[name][1](*batch, None)[0][0, 0] for name in steps})(
            np.zeros((2, 2)), x, labels
        )
    unit_of = {"module, λ left in": peers.LAM, "mxnet": peers.LAM, "pytorch-ood": 1 / 2}
    for name, step in steps.items():
        assert f"{float(moved[name]) / unit_of.get(name, 1.0):.2g}" == f"{step:.2g}"
        peer = name.removesuffix(", by rows").removesuffix(", its script")
        if peer in peers.NUMPY or "live" in ref.SOURCES:
            assert float(moved[name]) == pytest.approx(peers.lonely_step(peer), rel=1e-10)
