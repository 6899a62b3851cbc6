"""docs/variants.md: its functions against NumPy in float64, and on real digits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pages
import peers
import pytest
import reference as ref
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

import jax_centerloss as jcl

pytestmark = pytest.mark.usefixtures("as_jax_promotes")

CLASSES, FEATURES, SAMPLES = 5, 3, 12
PADDED = CLASSES + 3  # Rows of NaN only fill up the table.

FIRST, *BLOCKS = pages.python_of("variants")


@pytest.fixture(scope="module")
def page():
    """What the page defines, each block after the first one and nothing else, as the page says."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = pages.defined(FIRST)
        for block in BLOCKS:
            found = pages.defined(FIRST + block) | found
    return found


@pytest.fixture
def draw(rng):
    """Centers, features, one of them near its center, and labels: one is masked, one class is not there."""
    labels = rng.integers(0, CLASSES - 1, SAMPLES)
    labels[3] = -1
    centers, x = rng.normal(size=(CLASSES, FEATURES)), rng.normal(size=(SAMPLES, FEATURES))
    x[4] = centers[labels[4]] + 0.1 * x[4]
    return centers, x, labels


def squared(centers, x):
    """`(N, C)` squared distances, by the difference."""
    return np.sum((x[:, None] - centers[None]) ** 2, axis=-1)


def own(centers, x, labels):
    return squared(centers, x)[np.arange(len(x)), labels]


def used_only(formula):
    """The formula for a mean, of the samples that are not masked."""

    def mean(centers, x, labels):
        used = labels >= 0
        return np.mean(formula(centers, x[used], labels[used]))

    return mean


def cosine(centers, x, labels):
    c = centers[labels]
    return 1 - np.sum(x * c, -1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(c, axis=-1))


def outside(centers, x, labels):
    return np.maximum(np.sqrt(own(centers, x, labels)) - 1.25, 0) ** 2


def contrastive(centers, x, labels):
    d = own(centers, x, labels)
    return 0.5 * d / (squared(centers, x).sum(-1) - d + 0.5)


def triplet(centers, x, labels):
    d = 0.5 * squared(centers, x)
    others = [np.delete(row, label).min() for row, label in zip(d, labels, strict=True)]
    return np.maximum(0.5 * own(centers, x, labels) + 0.1 - others, 0)


def island(centers, x, labels):
    used = labels >= 0
    pull = 0.5 * np.sum(own(centers, x[used], labels[used]))
    pairs = [
        np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)) + 1
        for j, a in enumerate(centers)
        for k, b in enumerate(centers)
        if j != k
    ]
    return pull + 0.3 * np.sum(pairs)


VARIANTS = {
    "cosine_loss": ({}, used_only(cosine)),
    "radius_loss": ({"radius": 1.25}, used_only(outside)),
    "contrastive_center_loss": ({"delta": 0.5}, used_only(contrastive)),
    "triplet_center_loss": ({"margin": 0.1}, used_only(triplet)),
    "island_loss": ({"lam1": 0.3}, island),
}


def slopes(function, array):
    """The derivative of a NumPy function by each number of an array, by central differences."""
    steps = 1e-6 * np.eye(array.size).reshape(array.size, *array.shape)
    return np.reshape([(function(array + h) - function(array - h)) / 2e-6 for h in steps], array.shape)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, page):
    """A variant's name, its formula, and its value and gradients: one program, of one size, in float64."""
    flags, formula = VARIANTS[request.param]
    graded = jax.jit(jax.value_and_grad(partial(page[request.param], **flags), argnums=(0, 1)))

    def in_float64(centers, x, labels):
        table = np.full((PADDED, FEATURES), np.nan)
        table[:CLASSES] = centers
        with ref.enable_x64():
            return jax.tree.map(np.asarray, graded(table, x, labels))

    return request.param, formula, in_float64


def test_value_and_gradients_are_those_of_the_formula(variant, draw):
    _, formula, graded = variant
    centers, x, labels = draw
    loss, (by_centers, by_x) = graded(*draw)
    np.testing.assert_allclose(loss, formula(*draw), rtol=1e-12)
    expected = slopes(lambda c: formula(c, x, labels), centers)
    np.testing.assert_allclose(by_centers[:CLASSES], expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(by_centers[CLASSES:], 0)
    expected = slopes(lambda v: formula(centers, v, labels), x)
    np.testing.assert_allclose(by_x, expected, rtol=1e-6, atol=1e-8)
    # A center that is NaN, though it is one of a class, shows.
    centers[labels[0]] = np.nan
    assert np.isnan(graded(*draw)[0])


def test_what_a_masked_sample_holds_changes_nothing(variant, draw):
    *_, graded = variant
    _, x, _ = draw
    expected = graded(*draw)
    for content in (np.nan, np.inf, 1e200):
        x[3] = content
        found = graded(*draw)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        np.testing.assert_array_equal(found[1][1][3], 0)


def test_at_the_center_without_samples_and_of_zero_vectors_gradients_are_finite(variant, draw):
    name, _, graded = variant
    centers, x, _ = draw
    labels = np.arange(SAMPLES) % CLASSES
    at_center, without = graded(centers, centers[labels], labels), graded(centers, x, np.full(SAMPLES, -1))
    for found in (at_center, without, graded(centers, 0 * x, labels)):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    if name in ("cosine_loss", "radius_loss", "contrastive_center_loss"):
        for found in (at_center, without):
            assert all(np.abs(leaf).max() < 1e-6 for leaf in jax.tree.leaves(found))


def on_mesh(kind, classes, *given):
    """A mesh, and centers, features and labels on it."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(getattr(AxisType, kind),))
    places = P(classes, None), P("d", None), P("d")
    return mesh, [jax.device_put(a, NamedSharding(mesh, p)) for a, p in zip(given, places, strict=True)]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("kind", "classes", "dtype"),
    [
        ("Explicit", "d", jnp.float32),  # Here JAX refuses what is not placed alike.
        pytest.param("Explicit", None, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param("Auto", "d", jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_on_a_mesh_and_in_half_precision(page, rng, name, kind, classes, dtype):
    labels = rng.integers(0, 16, 24)
    labels[3] = -1
    centers, x = (jnp.asarray(rng.normal(size=(n, FEATURES)), dtype) for n in (16, 24))
    graded = jax.jit(jax.value_and_grad(partial(page[name], **VARIANTS[name][0]), argnums=(0, 1)))
    expected = graded(centers.astype(jnp.float32), x.astype(jnp.float32), labels)
    mesh, given = on_mesh(kind, classes, centers, x, labels)
    with jax.set_mesh(mesh):
        found = graded(*given)
    rtol = 1e-4 if dtype == jnp.float32 else 0.02
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.float32(a), b, rtol=rtol, atol=rtol * np.abs(b).max())


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["one device", "Explicit", "Auto"])
def test_arcface_is_the_formula(page, rng, kind):
    labels, margin, scale = rng.integers(0, 16, 24), 0.4, 8.0
    labels[3] = -1
    columns, x = rng.normal(size=(16, FEATURES)), rng.normal(size=(24, FEATURES))
    x[5] = 3 * columns[labels[5]]  # In the direction of its class, where arccos has no derivative.
    x[6] = -columns[labels[6]]

    def formula(columns, x):
        lengths = np.linalg.norm(x, axis=-1)[:, None] * np.linalg.norm(columns, axis=-1)
        angles = np.arccos(np.clip(x @ columns.T / lengths, -1 + 1e-6, 1 - 1e-6))
        angles[labels >= 0, labels[labels >= 0]] += margin
        e = np.exp(scale * np.cos(angles))
        each = np.log(e.sum(-1)) - scale * np.cos(angles)[np.arange(24), labels]
        return each[labels >= 0].sum()

    def loss_of(columns, x, labels):
        logits = page["arcface_logits"](columns, x, labels, margin, scale)
        # The classes of a sample on one device: JAX refuses a choice among split ones.
        logits = jnp.reshape(logits, logits.shape, out_sharding=jax.typeof(x).sharding)
        own = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return jnp.sum(jnp.where(labels >= 0, own, 0.0))

    masked = np.where(np.arange(24)[:, None] == 3, np.nan, x)
    given = np.float32(columns), np.float32(masked), labels
    graded = jax.jit(jax.value_and_grad(loss_of, argnums=(0, 1)))
    if kind == "one device":
        found = graded(*given)
    else:
        mesh, given = on_mesh(kind, "d", *given)
        with jax.set_mesh(mesh):
            found = graded(*given)
    loss, (by_columns, by_x) = jax.tree.map(np.asarray, found)
    np.testing.assert_allclose(loss, formula(columns, x), rtol=1e-4)
    assert np.isfinite(by_columns).all()
    assert np.isfinite(by_x).all()
    np.testing.assert_array_equal(by_x[3], 0)
    smooth = ~np.isin(np.arange(24), [3, 5, 6])
    expected = slopes(lambda v: formula(columns, v), x)
    np.testing.assert_allclose(by_x[smooth], expected[smooth], rtol=2e-3, atol=2e-3)
    others = ~np.isin(np.arange(16), labels[[5, 6]])
    expected = slopes(lambda c: formula(c, x), columns)
    np.testing.assert_allclose(by_columns[others], expected[others], rtol=2e-3, atol=2e-3)


def test_a_zero_vector_has_no_direction(page):
    np.testing.assert_allclose(
        page["unit"](jnp.array([[0.0, 0.0], [3.0, 4.0]])), [[0, 0], [0.6, 0.8]], rtol=1e-6
    )


def test_balanced_weights_give_the_mean_of_class_means(page, draw):
    centers, x, labels = draw
    classes = np.unique(labels[labels >= 0])
    with ref.enable_x64():
        weights = page["of_samples"](page["balanced_weights"](labels, CLASSES), jnp.asarray(labels))
        found = jcl.center_loss(centers, x, labels, weights=weights, clip=None)
        moved = jcl.update_centers(centers, x, labels, weights=weights, alpha=0.5)
    of_classes = [own(centers, x[labels == j], labels[labels == j]).mean() for j in classes]
    np.testing.assert_allclose(found, np.mean(of_classes), rtol=1e-12)
    expected = centers.copy()
    share = np.sum(labels >= 0) / len(classes)  # The weights of each class sum to it.
    for j in classes:
        expected[j] -= 0.5 * share * (centers[j] - x[labels == j].mean(0)) / (1 + share)
    np.testing.assert_allclose(moved, expected, rtol=1e-12)


def test_balanced_weights_of_a_large_training_set_do_not_slow_centers(page, rng):
    of_training = np.repeat(np.arange(CLASSES), 1000)
    labels = rng.integers(0, CLASSES, 200)
    weights = page["balanced_weights"](of_training, CLASSES)[labels]
    np.testing.assert_allclose(weights, 1.0, rtol=1e-6)
    assert page["balanced_weights"]([0, 0, 0, 2], 3).tolist() == [pytest.approx(2 / 3), 2.0, 2.0]


def test_mixup_is_two_weighted_losses(page, draw, rng):
    centers, x, labels = draw
    used = labels >= 0
    others = np.where(used, rng.permutation(np.maximum(labels, 0)), -1)
    both = jax.jit(lambda *given: (page["mixup_loss"](*given), page["mixup_update"](*given)))
    for t in (0.3, rng.uniform(size=SAMPLES)):  # One for all samples, and one for each.
        with ref.enable_x64():
            found, moved = both(*draw, others, t)
        of_each = t * own(centers, x, labels) + (1 - t) * own(centers, x, others)
        np.testing.assert_allclose(found, of_each[used].mean(), rtol=1e-10)
        expected = centers.copy()
        for j in range(CLASSES):
            w = t * (labels == j) + (1 - t) * (others == j)
            expected[j] -= 0.5 * np.sum(w[:, None] * (centers[j] - x), axis=0) / (1 + w.sum())
        np.testing.assert_allclose(moved, expected, rtol=1e-12)


def test_outlier_score_is_the_distance_to_the_nearest_center(page, draw):
    centers, x, _ = draw
    expected = squared(centers, x).min(-1)
    x[3], expected[3] = np.nan, 0.0
    with ref.enable_x64():
        np.testing.assert_allclose(jax.jit(page["outlier_score"])(centers, x), expected, rtol=1e-12)


def test_prototypes_are_class_means_and_pass_gradients_on(page, draw, rng):
    _, support, labels = draw
    query, query_labels = rng.normal(size=(4, FEATURES)), np.array([0, 2, -1, 1])
    labels = np.where(labels >= 0, np.arange(SAMPLES) % CLASSES, -1)

    def formula(support, query):
        means = np.stack([support[labels == j].mean(0) for j in range(CLASSES)])
        used = query_labels >= 0
        e = np.exp(-squared(means, query[used]))
        return np.mean(-np.log(e[np.arange(used.sum()), query_labels[used]] / e.sum(-1)))

    expected = slopes(lambda v: formula(v, query), support), slopes(lambda v: formula(support, v), query)
    expected_loss = formula(support, query)
    support[3], query[2] = np.nan, np.nan  # Those that are masked.
    graded = jax.jit(jax.value_and_grad(page["prototypical_loss"], argnums=(0, 2)), static_argnums=4)
    with ref.enable_x64():
        loss, grads = graded(support, labels, query, query_labels, CLASSES)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    for found, want in zip(grads, expected, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_a_grown_training_goes_on_as_if_it_had_not_grown(page, draw, rng):
    centers, x, _ = map(jnp.asarray, draw)
    labels, tx = np.arange(SAMPLES) % CLASSES, optax.adam(0.1)

    def loss_of(params):
        logits = (x @ params["head"])[:, :CLASSES]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return cross_entropy + 0.1 * jcl.center_loss(params["centers"], x, labels, clip=None)

    @jax.jit
    def steps(params, opt_state):
        for _ in range(3):
            updates, opt_state = tx.update(jax.grad(loss_of)(params), opt_state, params)
            params = optax.apply_updates(params, updates)
        return params, opt_state

    params = {"head": jnp.asarray(rng.normal(size=(FEATURES, CLASSES))), "centers": centers}
    wider = jax.tree.map(jnp.asarray, {"head": np.ones((FEATURES, 7)), "centers": np.ones((7, FEATURES))})
    params, opt_state = steps(params, tx.init(params))
    grown_params, grown_state = page["grown"](params, wider), page["grown"](opt_state, tx.init(wider))
    assert (grown_params["head"][:, CLASSES:] == 1).all()
    assert (grown_params["centers"][CLASSES:] == 1).all()
    filled_up = {"centers": params["centers"].at[-1].set(jnp.nan)}
    for new in (wider["centers"], wider["centers"][:CLASSES]):
        assert (page["grown"](filled_up, {"centers": new})["centers"][CLASSES - 1 :] == 1).all()
    params, _ = steps(params, opt_state)
    grown_params, grown_state = steps(grown_params, grown_state)
    np.testing.assert_allclose(grown_params["head"][:, :CLASSES], params["head"], rtol=1e-6)
    np.testing.assert_allclose(grown_params["centers"][:CLASSES], params["centers"], rtol=1e-6)
    assert grown_state[0].count == 6


class Growing(nnx.Module):
    def __init__(self, num_classes, rngs):
        self.head = nnx.Linear(3, num_classes, rngs=rngs)
        self.center_loss = jcl.nnx.CenterLoss(num_classes, 3, rngs=rngs)


def test_a_grown_nnx_model_has_the_old_numbers_in_front(page):
    tx = jcl.with_center_optimizer(optax.adam(1e-3), optax.sgd(0.5))
    models = Growing(5, nnx.Rngs(0)), Growing(7, nnx.Rngs(1))
    before, after = ((model, nnx.Optimizer(model, tx, wrt=nnx.Param)) for model in models)
    said = "nnx.update(after, grown(nnx.state(before), nnx.state(after)))"
    assert said in pages.text_of("variants")
    (old, _), (new, optimizer) = before, after
    drawn = np.array(new.center_loss.centers[...])
    exec(said, {"nnx": nnx, "before": before, "after": after, "grown": page["grown"]})
    found = new.center_loss.centers[...]
    np.testing.assert_array_equal(found[:5], old.center_loss.centers[...])
    np.testing.assert_array_equal(found[5:], drawn[5:])
    np.testing.assert_array_equal(new.head.kernel[...][:, :5], old.head.kernel[...])

    @nnx.jit
    def step(model, optimizer):
        loss_of = nnx.grad(lambda model: model.center_loss(jnp.ones((2, 3)), jnp.array([0, 6])))
        optimizer.update(model, loss_of(model))

    step(new, optimizer)
    assert not np.array_equal(new.center_loss.centers[...][6], drawn[6])


def test_fixed_centers_pull_and_are_not_pulled(page, draw):
    graded = (jax.grad(loss, argnums=(0, 1)) for loss in (page["fixed_loss"], jcl.center_loss))
    (by_centers, by_x), (_, expected) = jax.jit(lambda *draw: [grad(*draw) for grad in graded])(*draw)
    assert (by_centers == 0).all()
    np.testing.assert_array_equal(by_x, expected)


# What authors publish, step by step: a linear layer makes the features, and learns with the centers.


def by_name(loss, update):
    """A step of two functions of the page; the rule needs no gradient."""

    def step(page, centers, x, labels, rate):
        loss_of = jax.value_and_grad(page[loss], argnums=1)
        return *loss_of(centers, x, labels), page[update](centers, x, labels, rate)

    return step


def as_parameters(loss_of, centers, x, rate):
    """A step of SGD on centers whose λ is divided out by the library."""
    lam, tx = peers.LAM, jcl.with_center_optimizer(optax.sgd(0.1), optax.sgd(rate), weight=peers.LAM)
    params = {"centers": centers, "model": jnp.ones(2)}
    grads = jax.grad(lambda p: lam * loss_of(p["centers"], x))(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    loss, by_x = jax.value_and_grad(loss_of, argnums=1)(centers, x)
    return loss, by_x, optax.apply_updates(params, updates)["centers"]


def dacl_step(page, centers, x, labels, rate):
    weights = jax.lax.stop_gradient(jax.nn.sigmoid(x @ peers.BRANCH.astype(x.dtype)))
    loss, by_x = jax.value_and_grad(page["dacl_loss"], argnums=1)(centers, x, labels, weights)
    return loss, by_x, page["dacl_update"](centers, x, labels, weights, rate)


def three_c_net_step(page, centers, x, labels, rate):
    is_label = jnp.any(labels[..., None] == jnp.arange(CLASSES), axis=1)

    def loss_of(centers, x):
        return page["three_c_net_loss"](centers, *page["pairs"](x, is_label, labels.shape[1]))

    return as_parameters(loss_of, centers, x, rate)


def two_views_step(page, centers, x, labels, rate):
    def loss_of(x):
        return jcl.center_loss(centers, *page["two_views"](x, x / 2, labels))

    moved = jcl.update_centers(centers, *page["two_views"](x, x / 2, labels), alpha=rate)
    return *jax.value_and_grad(loss_of)(x), moved


def single_center_step(page, centers, x, labels, rate):
    return as_parameters(lambda c, x: page["single_center_loss"](c, x, labels), centers, x, rate)


def oltr_step(page, centers, x, labels, rate):
    loss, (by_centers, by_x) = jax.value_and_grad(page["oltr_loss"], argnums=(0, 1))(centers, x, labels)
    return loss, by_x, page["oltr_update"](centers, peers.LAM * by_centers, x, labels, rate)


def hetero_center_step(page, centers, x, labels, rate):
    half = len(x) // 2

    def loss_of(x):
        return page["hetero_center_loss"](x[:half], labels[:half], x[half:], labels[half:], CLASSES, 0.1)

    return *jax.value_and_grad(loss_of)(x), centers


AUTHORS = {
    "ws_dan": by_name("ws_dan_loss", "ws_dan_update"),
    "dacl": dacl_step,
    "three_c_net": three_c_net_step,
    "two_views": two_views_step,
    "single_center": single_center_step,
    "oltr": oltr_step,
    "hetero_center": hetero_center_step,
}


def labels_of(name, rng):
    if name == "three_c_net":  # Up to two labels, not the same one twice.
        labels = np.stack([rng.permutation(CLASSES)[:2] for _ in range(SAMPLES)])
        labels[rng.uniform(size=labels.shape) < 0.3] = -1
        labels[3] = -1
        return labels
    labels = rng.integers(0, 2 if name == "single_center" else CLASSES - 1, SAMPLES)
    return np.where(np.arange(SAMPLES) == 3, -1, labels)


@pytest.mark.few(5)
@pytest.mark.parametrize("name", AUTHORS)
def test_a_training_takes_the_authors_steps(page, rng, name):
    step = jax.jit(partial(AUTHORS[name], page))
    count = 1 if name == "single_center" else CLASSES
    for apart in (1.0, 5.0):  # On both sides of the authors' margins.
        theirs = apart * rng.normal(size=(count, FEATURES))
        if name == "ws_dan":
            theirs = np.zeros_like(theirs)
        # Classes of NaN, which only fill up the table, are none of OLTR's other ones.
        ours = np.pad(theirs, ((0, 3 * (name == "oltr")), (0, 0)), constant_values=np.nan)
        layer = their_layer = rng.normal(size=(4, FEATURES))
        for _ in range(5):
            z, labels = rng.normal(size=(SAMPLES, 4)), labels_of(name, rng)
            masked = labels.reshape(SAMPLES, -1).max(axis=-1) < 0
            want_loss, want_by_x, theirs = getattr(peers, name)(theirs, z @ their_layer, labels, 0.4)
            with ref.enable_x64():
                x = np.where(masked[:, None], np.nan, z @ layer)
                loss, by_x, ours = jax.tree.map(np.asarray, step(ours, x, labels, 0.4))
            layer, their_layer = layer - 0.1 * z.T @ by_x, their_layer - 0.1 * z.T @ want_by_x
            assert (by_x[masked] == 0).all()
            np.testing.assert_allclose(loss, want_loss, rtol=1e-9)
            np.testing.assert_allclose(layer, their_layer, rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(ours[:count], theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", AUTHORS)
def test_an_authors_step_works_in_bfloat16(page, rng, name):
    centers = rng.normal(size=(1 if name == "single_center" else CLASSES, FEATURES))
    x, labels = rng.normal(size=(SAMPLES, FEATURES)), labels_of(name, rng)
    want = getattr(peers, name)(centers, x, labels, 0.4)
    half = jax.jit(partial(AUTHORS[name], page))(
        np.float32(centers), jnp.asarray(x, jnp.bfloat16), labels, 0.4
    )
    assert [a.dtype for a in half] == [jnp.float32, jnp.bfloat16, jnp.float32]
    for a, b in zip(half, want, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0.05, atol=0.05)


def test_weights_of_features_have_the_gradient_of_the_formula(page, draw, rng):
    centers, x, labels = draw
    used = labels >= 0
    expected = np.where(used[:, None], (x - centers[labels]) ** 2, 0) / 2 / used.sum()
    with ref.enable_x64():
        by_weights = jax.jit(jax.grad(page["dacl_loss"], argnums=3))(*draw, rng.uniform(size=x.shape))
    np.testing.assert_allclose(by_weights, expected, rtol=1e-12)


def test_micro_batches_take_the_step_of_the_batch(page, rng):
    parts, labels = rng.normal(size=(4, 6, FEATURES)), rng.integers(-1, CLASSES, (4, 6))
    ours = want = rng.normal(size=(CLASSES, FEATURES))
    parts[labels < 0] = np.nan
    empty = np.zeros((CLASSES, FEATURES)), np.zeros(CLASSES)

    @jax.jit
    def two_ways(centers, *given):
        carried, kept = jax.lax.scan(
            lambda sums, part: (page["add_micro_batch"](sums, *part), part), empty, given
        )
        return page["update_by_sums"](centers, carried), jcl.update_centers(centers, *kept)

    for _ in range(3):
        parts = parts + 0.1
        want = want - 0.5 * peers.eq4(want, parts[labels >= 0], labels[labels >= 0])
        with ref.enable_x64():
            ours, moved = jax.tree.map(np.asarray, two_ways(ours, parts, labels))
        np.testing.assert_allclose(ours, want, rtol=1e-12)
        np.testing.assert_allclose(moved, want, rtol=1e-12)
    x = jnp.ones((3, FEATURES), jnp.bfloat16)
    sums, counts = page["add_micro_batch"](jax.tree.map(jnp.float32, empty), x, np.zeros(3, int))
    assert sums.dtype == jnp.float32
    assert counts[0] == sums[0, 0] == 3


def digits_without(left_out, lam, pixels, digits, test_pixels):
    """Features of test digits, and the centers, after training without one class."""
    labels = jnp.where(digits == left_out, -1, digits)
    sizes = [(64, 64), (64, 64), (64, 16), (16, 10)]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    weights = [jax.random.normal(k, size) * (2 / size[0]) ** 0.5 for k, size in zip(keys, sizes, strict=True)]
    tx = optax.adam(3e-3)

    def forward(weights, x):
        x = jax.nn.relu(jax.nn.relu(x @ weights[0]) @ weights[1]) @ weights[2]
        return x, jnp.where(jnp.arange(10) == left_out, -jnp.inf, x @ weights[3])

    def loss_of(weights, centers):
        x, logits = forward(weights, pixels)
        log_p = jax.nn.log_softmax(logits)[jnp.arange(len(labels)), jnp.maximum(labels, 0)]
        return lam * jcl.center_loss(centers, x, labels) - jnp.mean(log_p, where=labels >= 0), x

    def step(carry, _):
        weights, centers, opt_state = carry
        grads, x = jax.grad(loss_of, has_aux=True)(weights, centers)
        updates, opt_state = tx.update(grads, opt_state)
        centers = jcl.update_centers(centers, x, labels, rule="mean")
        return (optax.apply_updates(weights, updates), centers, opt_state), None

    start = weights, jnp.zeros((10, 16)), tx.init(weights)
    (weights, centers, _), _ = jax.lax.scan(step, start, length=150)
    # A center at infinity is never the nearest.
    return forward(weights, test_pixels)[0], centers.at[left_out].set(jnp.inf)


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_run_it")
def test_a_digit_that_was_left_out_is_found_by_its_distance(page):
    images, labels = load_digits(return_X_y=True)
    train, test, y_train, y_test = train_test_split(
        np.float32(images / 16), labels, test_size=0.5, random_state=0
    )
    run = jax.jit(jax.vmap(digits_without, in_axes=(0, None, None, None, None)))

    def mean_area(lam):
        x, centers = run(jnp.arange(10), lam, train, y_train, test)
        scores = jax.vmap(page["outlier_score"])(centers, x)
        return np.mean([roc_auc_score(y_test == j, scores[j]) for j in range(10)])

    assert mean_area(0.1) > max(0.9, mean_area(0.0))
