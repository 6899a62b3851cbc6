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


def by_optax(loss_of, chain=None, divided=True):
    """As parameters, beside a model of one number; the loss comes times λ."""

    def move(centers, x, labels, state):
        own = optax.sgd(RATE) if chain is None else chain
        tx = jcl.with_center_optimizer(optax.sgd(1.0), own, weight=peers.LAM if divided else None)
        params = {"centers": centers, "model": jnp.ones(())}
        grads = jax.grad(lambda p: peers.LAM * loss_of(p["centers"], x, labels))(params)
        updates, state = tx.update(grads, tx.init(params) if state is None else state, params)
        return optax.apply_updates(params, updates)["centers"], state

    return move


def one_adam(centers, x, labels, state):
    tx = optax.adam(RATE)
    params = {"centers": centers, "model": jnp.ones(())}
    grads = jax.grad(lambda p: peers.LAM * jcl.center_loss(p["centers"], x, labels))(params)
    updates, state = tx.update(grads, tx.init(params) if state is None else state, params)
    return optax.apply_updates(params, updates)["centers"], state


def solver(centers, x, labels, state):
    """Caffe's, at one rate."""
    space = defined(CAFFE.replace(CAFFE_RATE, f"rate = lambda step: {RATE}"))
    state = space["solver"].init(centers) if state is None else state
    return space["every_row"](centers, state, x, labels)


def named_by_the_logits(centers, x, labels):
    logits = jnp.asarray(peers.logits(np.asarray(x), len(centers)))
    return jcl.center_loss(jax.lax.stop_gradient(centers), x, jnp.argmax(logits, -1))


def cosine_by_rule(centers, x, labels, state):
    return unit(jcl.update_centers(unit(centers), unit(x), labels, alpha=RATE, rule="mean")), state


CAFFE_RATE = next(line for line in CAFFE.splitlines() if line.startswith("rate = "))
RECIPES = {
    "paper": (half(jnp.sum), by_rule("paper")),
    "caffe": (half(), solver),
    "pytorch-metric-learning": (half(jnp.sum), by_rule("paper")),
    "facenet": (
        lambda c, x, labels: jcl.center_loss(c, x, labels, clip=None) / x.shape[-1],
        lambda c, x, labels, state: by_rule("gradient", scale=len(labels) / 2)(c, x, labels, state),
    ),
    "module": (jcl.center_loss, by_rule("gradient")),
    "module, by optax": (jcl.center_loss, by_optax(jcl.center_loss)),
    "module, its script": (
        jcl.center_loss,
        by_optax(jcl.center_loss, optax.chain(optax.scale(1 / peers.LAM), optax.sgd(RATE)), divided=False),
    ),
    "module, λ left in": (jcl.center_loss, by_optax(jcl.center_loss, divided=False)),
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
        lambda c, x, labels: mean_per_class(c, x, labels) / len(labels),
        lambda c, x, labels, state: by_rule("mean", scale=peers.LAM / len(labels))(c, x, labels, state),
    ),
    "mxnet, by optax": (
        lambda c, x, labels: mean_per_class(c, x, labels) / len(labels),
        by_optax(lambda c, x, labels: mean_per_class(c, x, labels) / len(labels), divided=False),
    ),
    "pytorch-ood": (pytorch_ood, by_optax(pytorch_ood)),
    "PaddleOCR": (named_by_the_logits, by_optax(named_by_the_logits)),
    "euclidean": (euclidean, by_optax(euclidean)),
    "one Adam": (jcl.center_loss, one_adam),
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
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_takes_the_same_steps(name, source):
    loss_of, move = RECIPES[name]
    want_losses, want_centers = expected(name, source)
    with ref.enable_x64():
        centers, state, losses, tables = jnp.asarray(peers.draws()[0][0]), None, [], []
        for _, x, labels in peers.draws():
            x, labels = jnp.asarray(x), jnp.asarray(labels)
            losses.append(loss_of(centers, x, labels))
            centers, state = move(centers, x, labels, state)
            tables.append(centers)
        np.testing.assert_allclose(losses, want_losses, rtol=1e-10)
        np.testing.assert_allclose(tables, want_centers, rtol=1e-10, atol=1e-12)


def caffe_runs(steps, classes_of):
    """Caffe's centers and ours, of both forms, step by step: 0.5 is the rate, and 0.05 from step 10 on.

    `classes_of(step)` says which of the four classes are in the batch.
    """
    random, space = np.random.default_rng(0), defined(CAFFE)
    centers, velocity = random.standard_normal((4, 2)), None
    dense = rows = jnp.asarray(centers)
    dense_state, rows_state = space["solver"].init(dense), space["rows"].init(rows)
    found = []
    for step in range(steps):
        labels = random.permutation(np.resize(classes_of(step), 12))
        x = centers[labels] + random.standard_normal((12, 2))
        _, centers, velocity = peers.caffe(centers, x, labels, 0.5 if step < 10 else 0.05, velocity)
        dense, dense_state = space["every_row"](dense, dense_state, jnp.asarray(x), jnp.asarray(labels))
        rows, rows_state = space["touched_rows"](rows, rows_state, jnp.asarray(x), jnp.asarray(labels))
        found.append(np.stack([centers, dense, rows]))
    return np.stack(found)


def some(step):
    return [[0, 1], [1, 2, 3], [0, 3]][step % 3]


def test_caffes_solver_to_the_letter_where_the_rate_changes_and_classes_are_absent():
    with ref.enable_x64():
        caffe, dense, _ = np.moveaxis(caffe_runs(20, some), 1, 0)
        np.testing.assert_allclose(dense, caffe, rtol=1e-10, atol=1e-12)


def test_caffes_solver_by_rows_is_equal_while_every_class_is_in_the_batch():
    with ref.enable_x64():
        caffe, dense, rows = np.moveaxis(caffe_runs(20, lambda step: [0, 1, 2, 3]), 1, 0)
        np.testing.assert_allclose(dense, caffe, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(rows, caffe, rtol=1e-10, atol=1e-12)


def test_caffes_solver_by_rows_rests_where_a_class_is_absent():
    with ref.enable_x64():
        _, dense, rows = np.moveaxis(caffe_runs(20, some), 1, 0)
        for step in range(3, 20):
            absent = np.setdiff1d(np.arange(4), some(step))
            np.testing.assert_array_equal(rows[step, absent], rows[step - 1, absent])
            assert np.abs(dense[step, absent] - dense[step - 1, absent]).max(axis=1).min() > 1e-4


def test_the_rate_outside_the_momentum_is_another_solver_once_it_changes():
    outside = "solver = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(rate, 0.9))\nrows = "
    text = re.sub(r"solver = .*?\nrows = ", outside, CAFFE, flags=re.DOTALL)
    random = np.random.default_rng(0)
    start, labels = random.standard_normal((4, 2)), np.arange(12) % 4
    with ref.enable_x64():
        pairs = [
            (space := defined(code), jnp.asarray(start), space["solver"].init(start))
            for code in (CAFFE, text)
        ]
        for step in range(11):
            x = jnp.asarray(random.standard_normal((12, 2)))
            pairs = [(space, *space["every_row"](c, state, x, labels)) for space, c, state in pairs]
            (_, right, _), (_, wrong, _) = pairs
            if step < 10:
                np.testing.assert_allclose(wrong, right, rtol=1e-10, atol=1e-12)
        assert np.abs(wrong - right).max() > 0.01


@pytest.mark.parametrize(
    ("alfa", "samples", "runs_off"),
    [(0.5, 3, False), (0.5, 5, True), (0.95, 39, False), (0.95, 41, True)],
)
def test_facenets_centers_run_off_where_too_many_samples_pull(alfa, samples, runs_off):
    random = np.random.default_rng(0)
    x, labels = random.standard_normal((samples, 2)), np.zeros(samples, int)
    start, factor = random.standard_normal((1, 2)), abs(1 - (1 - alfa) * samples)
    assert (factor > 1) == runs_off == ((1 - alfa) * samples > 2)
    theirs = start
    with ref.enable_x64():
        ours = tame = jnp.asarray(start)
        for step in range(1, 21):
            theirs = peers.facenet(theirs, x, labels, 1 - alfa, None).centers
            ours = jcl.update_centers(ours, x, labels, alpha=(1 - alfa) * samples / 2, rule="gradient")
            tame = jcl.update_centers(tame, x, labels, alpha=1.0)
            away = np.linalg.norm(np.asarray(ours) - x.mean(axis=0))
            assert away == pytest.approx(factor**step * np.linalg.norm(start - x.mean(axis=0)), rel=1e-8)
        np.testing.assert_allclose(ours, theirs, rtol=1e-8)
        np.testing.assert_allclose(tame[0], x.mean(axis=0), atol=1e-6)


def test_pytorch_oods_radius_bounds_the_squared_distance_and_at_0_is_the_module_over_c():
    centers, x, labels = peers.draws()[0]
    squared = np.sum((x - centers[labels]) ** 2, axis=1)
    assert 0 < np.sum(squared < peers.RADIUS) < len(x)
    with ref.enable_x64():
        pulls = jax.grad(pytorch_ood, argnums=1)(jnp.asarray(centers), jnp.asarray(x), labels)
        np.testing.assert_array_equal(np.any(pulls != 0, axis=1), squared > peers.RADIUS)
        bare = told["up_to_a_radius"](centers, x, labels, 0.0)
        assert bare == pytest.approx(float(jcl.center_loss(centers, x, labels)) / 6, rel=1e-10)


def test_losses_at_the_very_center_have_a_gradient():
    centers = jnp.eye(3)
    for loss_of in (euclidean, cosine, mean_per_class, pytorch_ood):
        loss, grads = jax.value_and_grad(loss_of, argnums=(0, 1))(centers, centers, jnp.arange(3))
        assert loss < 1e-5
        assert max(jnp.abs(grad).max() for grad in grads) < 1e-6


def test_the_logits_name_the_classes_of_a_sequence():
    features, logits = jnp.ones((2, 3, 4)), jax.nn.one_hot(jnp.array([[0, 1, 1], [4, 2, 0]]), 5)
    centers = jnp.arange(20.0).reshape(5, 4)
    loss = jcl.center_loss(jax.lax.stop_gradient(centers), features, jnp.argmax(logits, -1))
    own = centers[jnp.array([0, 1, 1, 4, 2, 0])]
    assert float(loss) == pytest.approx(float(jnp.mean(jnp.sum((own - 1) ** 2, axis=1))), rel=1e-6)


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
    assert {name.removesuffix(", by optax") for name in RECIPES} | {"caffe, by rows"} == set(NAMES.values())


def run_row(how, loss_of, names, x):
    """Centers after the code of a cell: that of a rule, or of an optimizer of the whole tree."""
    if how == "not at all: they are loaded":
        return names["centers"]
    code = how.replace("as parameters", "`with_center_optimizer(tx, optax.sgd(lr), weight=lam)`")
    code = re.search(r"`(.+)`", code)[1]
    moved = eval(code.replace("...", "centers, x, labels"), names)
    if not isinstance(moved, optax.GradientTransformation):
        return moved
    params = {"centers": names["centers"], "model": jnp.ones(())}
    grads = jax.grad(lambda p: peers.LAM * loss_of(p["centers"], x))(params)
    updates, _ = moved.update(grads, moved.init(params), params)
    return optax.apply_updates(params, updates)["centers"]


@pytest.mark.parametrize("row", rows_in_the_page(), ids=lambda row: NAMES.get(row[0], row[0]))
def test_the_code_of_a_row_takes_the_first_step(row):
    who, loss, moves, _ = row
    want_losses, want_centers = expected(NAMES[who].removesuffix(", by rows"), ref.SOURCES[0])
    (centers, x, labels), *_ = peers.draws()
    with ref.enable_x64():
        names = {
            **told,
            "update_centers": jcl.update_centers,
            "with_center_optimizer": jcl.with_center_optimizer,
            "up_to_a_radius": lambda *batch: told["up_to_a_radius"](*batch, peers.RADIUS),
            "optax": optax,
            "jax": jax,
            "jnp": jnp,
            "tx": optax.sgd(1.0),
            **dict.fromkeys(("lr", "alpha"), RATE),
            "alfa": 1 - RATE,
            "lam": peers.LAM,
            "n": len(x),
            "D": x.shape[-1],
            "labels": labels,
            "logits": peers.logits(x, len(centers)),
            "x": jnp.asarray(x),
            "centers": jnp.asarray(centers),
        }
        code = loss.strip("`").replace("...", "centers, x, labels")

        def loss_of(centers, x):
            return eval(code, names | {"centers": centers, "x": x})

        np.testing.assert_allclose(loss_of(names["centers"], names["x"]), want_losses[0], rtol=1e-10)
        if "caffes-solver" in moves:  # Their steps are compared above.
            return
        for how in moves.split(", or "):
            moved = run_row(how, loss_of, names, names["x"])
            np.testing.assert_allclose(moved, want_centers[0], rtol=1e-10, atol=1e-12)


def by_caffes_rows(centers, x, labels, state):
    space = defined(CAFFE.replace(CAFFE_RATE, f"rate = lambda step: {RATE}"))
    return space["touched_rows"](centers, space["rows"].init(centers), x, labels)


def test_steps_in_the_page():
    steps = {who: re.match(r"[\d.]+|–", step)[0] for who, _, _, step in rows_in_the_page()}
    with ref.enable_x64():
        for title, name in NAMES.items():
            if steps[title] == "–":
                assert name.startswith("cosine")
                continue
            move = by_caffes_rows if name == "caffe, by rows" else RECIPES[name][1]
            centers, x = jnp.zeros((2, 2)), jnp.zeros((128, 2)).at[0, 0].set(1.0)
            moved, _ = move(centers, x, jnp.append(0, jnp.ones(127, int)), None)
            unit_of = {"module, λ left in": peers.LAM, "mxnet": peers.LAM, "pytorch-ood": 1 / 2}
            assert f"{float(moved[0, 0]) / unit_of.get(name, 1.0):.2g}" == f"{float(steps[title]):.2g}"
            peer = name.removesuffix(", by rows").removesuffix(", its script")
            if peer in peers.NUMPY or "live" in ref.SOURCES:
                assert float(moved[0, 0]) == pytest.approx(peers.lonely_step(peer), rel=1e-10)
