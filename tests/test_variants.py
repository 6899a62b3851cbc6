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
    """Centers, features and labels, of which one is masked, and not all classes are there."""
    labels = rng.integers(0, CLASSES - 1, SAMPLES)
    labels[3] = -1
    return rng.normal(size=(CLASSES, FEATURES)), rng.normal(size=(SAMPLES, FEATURES)), labels


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
    return np.maximum(0.5 * own(centers, x, labels) + 2.0 - others, 0)


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
    "triplet_center_loss": ({"margin": 2.0}, used_only(triplet)),
    "island_loss": ({"lam1": 0.3}, island),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def slopes(function, array):
    """The derivative of a NumPy function by each number of an array, by central differences."""
    steps = 1e-6 * np.eye(array.size).reshape(array.size, *array.shape)
    return np.reshape([(function(array + h) - function(array - h)) / 2e-6 for h in steps], array.shape)


@pytest.mark.few(3)
@every_variant
def test_value_and_gradients_are_those_of_the_formula(page, draw, name):
    flags, formula = VARIANTS[name]
    centers, x, labels = draw
    with ref.enable_x64():
        loss_of = jax.jit(jax.value_and_grad(partial(page[name], **flags), argnums=(0, 1)))
        loss, (by_centers, by_x) = loss_of(*map(jnp.asarray, draw))
        np.testing.assert_allclose(loss, formula(*draw), rtol=1e-12)
        expected = slopes(lambda c: formula(c, x, labels), centers)
        np.testing.assert_allclose(by_centers, expected, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(
            by_x, slopes(lambda v: formula(centers, v, labels), x), rtol=1e-6, atol=1e-8
        )


@pytest.mark.few(5)
@every_variant
@pytest.mark.parametrize("content", [np.nan, np.inf, 1e30])
def test_what_a_masked_sample_holds_changes_nothing(page, draw, name, content):
    centers, x, labels = (jnp.asarray(a, a.dtype.kind + "4") for a in draw)
    loss_of = jax.value_and_grad(partial(page[name], **VARIANTS[name][0]), argnums=(0, 1))
    found = loss_of(centers, x.at[3].set(content), labels)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(loss_of(centers, x, labels)), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(found[1][1][3], 0)


@pytest.mark.few(2)
@every_variant
def test_at_the_center_and_without_samples_gradients_are_finite(page, name):
    centers, labels = jnp.eye(CLASSES), jnp.arange(CLASSES)
    loss_of = jax.value_and_grad(partial(page[name], **VARIANTS[name][0]), argnums=(0, 1))
    for used in (labels, jnp.full_like(labels, -1)):
        loss, grads = loss_of(centers, centers, used)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, grads)))
        if name in ("cosine_loss", "radius_loss", "contrastive_center_loss"):
            assert loss == pytest.approx(0, abs=1e-6)
            assert max(np.abs(grad).max() for grad in grads) < 1e-6


@pytest.mark.few(2)
@pytest.mark.parametrize("name", [*VARIANTS, "oltr_loss"])
def test_classes_that_fill_up_a_table_with_nan_change_nothing(page, draw, name):
    centers, x, labels = (jnp.asarray(a, a.dtype.kind + "4") for a in draw)
    flags = {"margin": 100.0} if name == "oltr_loss" else VARIANTS[name][0]
    loss_of = jax.value_and_grad(partial(page[name], **flags), argnums=(0, 1))
    loss, (by_centers, by_x) = loss_of(jnp.pad(centers, ((0, 3), (0, 0)), constant_values=jnp.nan), x, labels)
    expected, grads = loss_of(centers, x, labels)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(by_centers[:CLASSES], grads[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(by_centers[CLASSES:], 0)
    # A center that is NaN, though it is one of a class, shows.
    assert np.isnan(loss_of(centers.at[labels[0]].set(jnp.nan), x, labels)[0])
    np.testing.assert_allclose(by_x, grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.few(3)
@every_variant
@pytest.mark.parametrize(
    ("kind", "classes", "dtype"),
    [("Explicit", "d", jnp.float32), ("Explicit", None, jnp.bfloat16), ("Auto", "d", jnp.bfloat16)],
)
def test_on_a_mesh_and_in_half_precision(page, rng, name, kind, classes, dtype):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(getattr(AxisType, kind),))
    labels = rng.integers(0, 16, 24)
    labels[3] = -1
    centers, x = (jnp.asarray(rng.normal(size=(n, FEATURES)), dtype) for n in (16, 24))
    loss_of = jax.value_and_grad(partial(page[name], **VARIANTS[name][0]), argnums=(0, 1))
    expected = loss_of(*(jnp.asarray(a, jnp.float32) for a in (centers, x)), jnp.asarray(labels))
    given = (
        jax.device_put(centers, NamedSharding(mesh, P(classes, None))),
        jax.device_put(x, NamedSharding(mesh, P("d", None))),
        jax.device_put(labels, NamedSharding(mesh, P("d"))),
    )
    with jax.set_mesh(mesh):
        found = jax.jit(loss_of)(*given)
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

    def cross_entropies(columns, x):
        lengths = np.linalg.norm(x, axis=-1)[:, None] * np.linalg.norm(columns, axis=-1)
        angles = np.arccos(np.clip(x @ columns.T / lengths, -1 + 1e-6, 1 - 1e-6))
        angles[labels >= 0, labels[labels >= 0]] += margin
        e = np.exp(scale * np.cos(angles))
        return np.where(labels >= 0, np.log(e.sum(-1)) - scale * np.cos(angles)[np.arange(24), labels], 0.0)

    def loss_of(columns, x, labels):
        logits = page["arcface_logits"](columns, x, labels, margin, scale)
        # The classes of a sample on one device: JAX refuses a choice among split ones.
        logits = jnp.reshape(logits, logits.shape, out_sharding=jax.typeof(x).sharding)
        own = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return jnp.sum(jnp.where(labels >= 0, own, 0.0))

    masked = np.where(np.arange(24)[:, None] == 3, np.nan, x)
    given = [jnp.asarray(columns, jnp.float32), jnp.asarray(masked, jnp.float32), jnp.asarray(labels)]
    graded = jax.jit(jax.value_and_grad(loss_of, argnums=(0, 1)))
    if kind == "one device":
        loss, grads = graded(*given)
    else:
        mesh = jax.make_mesh((8,), ("d",), axis_types=(getattr(AxisType, kind),))
        places = P("d", None), P("d", None), P("d")
        with jax.set_mesh(mesh):
            given = [jax.device_put(a, NamedSharding(mesh, p)) for a, p in zip(given, places, strict=True)]
            loss, grads = graded(*given)
    grads = [np.asarray(grad) for grad in grads]
    np.testing.assert_allclose(loss, cross_entropies(columns, x).sum(), rtol=1e-4)
    smooth = ~np.isin(np.arange(24), [3, 5, 6])
    by_columns = slopes(lambda c: cross_entropies(c, x).sum(), columns)
    by_x = slopes(lambda v: cross_entropies(columns, v).sum(), x)
    np.testing.assert_allclose(grads[1][smooth], by_x[smooth], rtol=2e-3, atol=2e-3)
    assert all(np.isfinite(grad).all() for grad in grads)
    np.testing.assert_array_equal(grads[1][3], 0)
    others = ~np.isin(np.arange(16), labels[[5, 6]])
    np.testing.assert_allclose(grads[0][others], by_columns[others], rtol=2e-3, atol=2e-3)


def test_a_zero_vector_has_no_direction_and_a_finite_gradient(page):
    centers, x = jnp.eye(2), jnp.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(page["unit"](x), [[0, 0], [0.6, 0.8]], rtol=1e-6)
    grads = jax.grad(page["cosine_loss"], argnums=(0, 1))(centers, x, jnp.array([0, 1]))
    assert all(np.isfinite(grad).all() for grad in grads)


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


@pytest.mark.parametrize("shared", [True, False], ids=["one t", "a t for each sample"])
def test_mixup_is_two_weighted_losses(page, draw, rng, shared):
    centers, x, labels = draw
    others = np.where(labels >= 0, rng.permutation(np.maximum(labels, 0)), -1)
    t = 0.3 if shared else rng.uniform(size=SAMPLES)
    used = labels >= 0
    of_each = t * own(centers, x, labels) + (1 - t) * own(centers, x, others)
    expected = centers.copy()
    weights = np.broadcast_to(t, SAMPLES)
    for j in range(CLASSES):
        w = weights * (labels == j) + (1 - weights) * (others == j)
        expected[j] -= 0.5 * np.sum(w[:, None] * (centers[j] - x), axis=0) / (1 + w.sum())
    with ref.enable_x64():
        found = page["mixup_loss"](centers, x, labels, others, t)
        moved = page["mixup_update"](centers, x, labels, others, t)
    np.testing.assert_allclose(found, of_each[used].mean(), rtol=1e-10)
    np.testing.assert_allclose(moved, expected, rtol=1e-12)


def test_radius_of_zero_is_center_loss_and_a_large_one_pulls_nothing(page, draw):
    draw = tuple(map(jnp.asarray, draw))
    near = page["radius_loss"](*draw, radius=1e-6)
    assert near == pytest.approx(float(jcl.center_loss(*draw)), rel=1e-5)
    loss, grads = jax.value_and_grad(page["radius_loss"], argnums=(0, 1))(*draw, radius=100.0)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


def test_outlier_score_is_the_distance_to_the_nearest_center(page, draw):
    centers, x, _ = draw
    with ref.enable_x64():
        np.testing.assert_allclose(page["outlier_score"](centers, x), squared(centers, x).min(-1), rtol=1e-12)
    assert page["outlier_score"](jnp.eye(2), jnp.array([[jnp.nan, 0.0]])).tolist() == [0.0]


def test_prototypes_are_class_means_and_pass_gradients_on(page, draw, rng):
    _, support, labels = draw
    query, query_labels = rng.normal(size=(4, FEATURES)), np.array([0, 2, -1, 1])
    labels = np.where(labels >= 0, np.arange(SAMPLES) % CLASSES, -1)

    def formula(support, query):
        means = np.stack([support[labels == j].mean(0) for j in range(CLASSES)])
        used = query_labels >= 0
        e = np.exp(-squared(means, query[used]))
        return np.mean(-np.log(e[np.arange(used.sum()), query_labels[used]] / e.sum(-1)))

    with ref.enable_x64():
        loss, grads = jax.value_and_grad(page["prototypical_loss"], argnums=(0, 2))(
            jnp.asarray(support), labels, jnp.asarray(query), jnp.asarray(query_labels), CLASSES
        )
        _, (by_support, by_query) = jax.value_and_grad(page["prototypical_loss"], argnums=(0, 2))(
            jnp.asarray(support).at[3].set(jnp.nan),
            labels,
            jnp.asarray(query).at[2].set(jnp.nan),
            jnp.asarray(query_labels),
            CLASSES,
        )
    np.testing.assert_allclose(loss, formula(support, query), rtol=1e-12)
    expected = slopes(lambda v: formula(v, query), support), slopes(lambda v: formula(support, v), query)
    for found in (grads, (by_support, by_query)):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def adam_step(tx, params, opt_state, x, labels):
    def loss_of(params):
        logits = (x @ params["head"])[:, : int(labels.max()) + 1]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return cross_entropy + 0.1 * jcl.center_loss(params["centers"], x, labels, clip=None)

    updates, opt_state = tx.update(jax.grad(loss_of)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


@pytest.mark.slow
def test_a_grown_training_goes_on_as_if_it_had_not_grown(page, draw, rng):
    centers, x, _ = draw
    x, labels = jnp.asarray(x), np.arange(SAMPLES) % CLASSES
    tx = optax.adam(0.1)
    params = {"head": jnp.asarray(rng.normal(size=(FEATURES, CLASSES))), "centers": jnp.asarray(centers)}
    wider = jax.tree.map(jnp.asarray, {"head": np.ones((FEATURES, 7)), "centers": np.ones((7, FEATURES))})
    opt_state = tx.init(params)
    for _ in range(3):
        params, opt_state = adam_step(tx, params, opt_state, x, labels)
    grown_params, grown_state = page["grown"](params, wider), page["grown"](opt_state, tx.init(wider))
    assert (grown_params["head"][:, CLASSES:] == 1).all()
    assert (grown_params["centers"][CLASSES:] == 1).all()
    filled_up = {"centers": params["centers"].at[-1].set(jnp.nan)}
    for new in (wider["centers"], wider["centers"][:CLASSES]):
        assert (page["grown"](filled_up, {"centers": new})["centers"][CLASSES - 1 :] == 1).all()
    for _ in range(3):
        params, opt_state = adam_step(tx, params, opt_state, x, labels)
        grown_params, grown_state = adam_step(tx, grown_params, grown_state, x, labels)
    np.testing.assert_allclose(grown_params["head"][:, :CLASSES], params["head"], rtol=1e-6)
    np.testing.assert_allclose(grown_params["centers"][:CLASSES], params["centers"], rtol=1e-6)
    assert grown_state[0].count == 6


class Growing(nnx.Module):
    def __init__(self, num_classes, rngs):
        self.head = nnx.Linear(3, num_classes, rngs=rngs)
        self.center_loss = jcl.nnx.CenterLoss(num_classes, 3, rngs=rngs)


def with_optimizer(model):
    tx = jcl.with_center_optimizer(optax.adam(1e-3), optax.sgd(0.5))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def test_a_grown_nnx_model_has_the_old_numbers_in_front(page):
    before, after = with_optimizer(Growing(5, nnx.Rngs(0))), with_optimizer(Growing(7, nnx.Rngs(1)))
    said = "nnx.update(after, grown(nnx.state(before), nnx.state(after)))"
    assert said in pages.text_of("variants")
    exec(said, {"nnx": nnx, "before": before, "after": after, "grown": page["grown"]})
    (old, _), (new, optimizer) = before, after
    found, drawn = new.center_loss.centers[...], Growing(7, nnx.Rngs(1)).center_loss.centers[...]
    np.testing.assert_array_equal(found[:5], old.center_loss.centers[...])
    np.testing.assert_array_equal(found[5:], drawn[5:])
    np.testing.assert_array_equal(new.head.kernel[...][:, :5], old.head.kernel[...])
    grads = nnx.grad(lambda model: model.center_loss(jnp.ones((2, 3)), jnp.array([0, 6])))(new)
    optimizer.update(new, grads)
    assert not np.array_equal(new.center_loss.centers[...][6], drawn[6])


def test_fixed_centers_pull_and_are_not_pulled(page, draw):
    by_centers, by_x = jax.grad(page["fixed_loss"], argnums=(0, 1))(*map(jnp.asarray, draw))
    assert (by_centers == 0).all()
    np.testing.assert_array_equal(by_x, jax.grad(jcl.center_loss, argnums=1)(*map(jnp.asarray, draw)))
    params = {"centers": jnp.asarray(draw[0]), "w": jnp.ones(2)}
    tx = jcl.with_center_optimizer(optax.sgd(1.0), centers=optax.set_to_zero())
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert (updates["centers"] == 0).all()
    assert (updates["w"] == -1).all()


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


@pytest.mark.few(4)
@pytest.mark.parametrize("apart", [1.0, 5.0], ids=["near", "apart"])
@pytest.mark.parametrize("name", AUTHORS)
def test_a_training_takes_the_authors_steps(page, rng, name, apart):
    count = 1 if name == "single_center" else CLASSES
    ours = theirs = apart * rng.normal(size=(count, FEATURES))
    if name == "ws_dan":
        ours = theirs = np.zeros_like(ours)
    layer = their_layer = rng.normal(size=(4, FEATURES))
    for _ in range(5):
        z, labels = rng.normal(size=(SAMPLES, 4)), labels_of(name, rng)
        want_loss, want_by_x, theirs = getattr(peers, name)(theirs, z @ their_layer, labels, 0.4)
        with ref.enable_x64():
            step = jax.jit(partial(AUTHORS[name], page))
            loss, by_x, ours = step(jnp.asarray(ours), jnp.asarray(z @ layer), jnp.asarray(labels), 0.4)
        layer, their_layer = layer - 0.1 * z.T @ np.asarray(by_x), their_layer - 0.1 * z.T @ want_by_x
        np.testing.assert_allclose(loss, want_loss, rtol=1e-9)
        np.testing.assert_allclose(layer, their_layer, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", AUTHORS)
def test_an_authors_step_leaves_masked_samples_out_and_works_in_bfloat16(page, rng, name):
    centers = jnp.asarray(rng.normal(size=(1 if name == "single_center" else CLASSES, FEATURES)), jnp.float32)
    x, labels = rng.normal(size=(SAMPLES, FEATURES)), labels_of(name, rng)
    masked = labels.max(axis=-1) < 0 if labels.ndim == 2 else labels < 0
    assert masked.any()
    x[masked] = np.nan
    step = partial(AUTHORS[name], page)
    full = step(centers, jnp.asarray(x, jnp.float32), jnp.asarray(labels), 0.4)
    half = step(centers, jnp.asarray(x, jnp.bfloat16), jnp.asarray(labels), 0.4)
    assert [a.dtype for a in half] == [jnp.float32, jnp.bfloat16, jnp.float32]
    for a, b in zip(half, full, strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0.05, atol=0.05)
    assert (full[1][masked] == 0).all()


def test_weights_of_features_have_the_gradient_of_the_formula(page, draw, rng):
    centers, x, labels = draw
    weights = rng.uniform(size=x.shape)
    used = labels >= 0

    def formula(weights):
        return np.sum((weights * (x - centers[labels]) ** 2)[used]) / 2 / used.sum()

    with ref.enable_x64():
        by_weights = jax.grad(page["dacl_loss"], argnums=3)(*map(jnp.asarray, (*draw, weights)))
    np.testing.assert_allclose(by_weights, slopes(formula, weights), rtol=1e-6, atol=1e-8)


def test_micro_batches_take_the_step_of_the_batch(page, rng):
    parts, labels = rng.normal(size=(4, 6, FEATURES)), rng.integers(-1, CLASSES, (4, 6))
    centers = want = rng.normal(size=(CLASSES, FEATURES))
    parts[labels < 0] = np.nan
    with ref.enable_x64():
        ours = jnp.asarray(centers)
        for _ in range(3):
            parts = parts + 0.1
            used = labels >= 0
            want = want - 0.5 * peers.eq4(want, parts[used], labels[used])
            carried = jnp.zeros((CLASSES, FEATURES)), jnp.zeros(CLASSES)
            carried, kept = jax.lax.scan(
                lambda carried, part: (page["add_micro_batch"](carried, *part), part),
                carried,
                (jnp.asarray(parts), jnp.asarray(labels)),
            )
            moved = jcl.update_centers(ours, *kept)
            ours = jax.jit(page["update_by_sums"])(ours, carried)
            np.testing.assert_allclose(ours, want, rtol=1e-12)
            np.testing.assert_allclose(moved, want, rtol=1e-12)
    sums, counts = page["add_micro_batch"](
        (jnp.zeros((CLASSES, FEATURES)), jnp.zeros(CLASSES)),
        jnp.ones((3, FEATURES), jnp.bfloat16),
        np.zeros(3, int),
    )
    assert sums.dtype == jnp.float32
    assert counts[0] == sums[0, 0] == 3


WIDTH, DIM, STEPS = 64, 16, 150


def digits_without(left_out, lam, pixels, digits, test_pixels):
    """Scores of test digits by distance and by softmax, after training without one class."""
    labels = jnp.where(digits == left_out, -1, digits)
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = [(64, WIDTH), (WIDTH, WIDTH), (WIDTH, DIM), (DIM, 10)]
    weights = [
        jax.random.normal(key, size) * (2 / size[0]) ** 0.5 for key, size in zip(keys, sizes, strict=True)
    ]
    tx = optax.adam(3e-3)

    def features(weights, x):
        return jax.nn.relu(jax.nn.relu(x @ weights[0]) @ weights[1]) @ weights[2]

    def loss_of(weights, centers):
        x = features(weights, pixels)
        logits = jnp.where(jnp.arange(10) == left_out, -jnp.inf, x @ weights[3])
        log_p = jax.nn.log_softmax(logits)[jnp.arange(len(labels)), jnp.maximum(labels, 0)]
        cross_entropy = -jnp.mean(log_p, where=labels >= 0)
        return cross_entropy + lam * jcl.center_loss(centers, x, labels), x

    def step(carry, _):
        weights, centers, opt_state = carry
        grads, x = jax.grad(loss_of, has_aux=True)(weights, centers)
        updates, opt_state = tx.update(grads, opt_state)
        centers = jcl.update_centers(centers, x, labels, rule="mean")
        return (optax.apply_updates(weights, updates), centers, opt_state), None

    start = (weights, jnp.zeros((10, DIM)), tx.init(weights))
    (weights, centers, _), _ = jax.lax.scan(step, start, length=STEPS)
    x = features(weights, test_pixels)
    logits = jnp.where(jnp.arange(10) == left_out, -jnp.inf, x @ weights[3])
    known = jnp.where(jnp.arange(10)[:, None] == left_out, jnp.inf, centers)  # Never the nearest.
    return x, known, -jnp.max(jax.nn.softmax(logits), axis=-1)


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_run_it")
def test_a_digit_that_was_left_out_is_found_by_its_distance(page):
    images, labels = load_digits(return_X_y=True)
    train, test, y_train, y_test = train_test_split(
        np.float32(images / 16), labels, test_size=0.5, random_state=0
    )
    run = jax.jit(jax.vmap(digits_without, in_axes=(0, None, None, None, None)))
    areas = {}
    for lam in (0.0, 0.1):
        x, centers, by_softmax = run(jnp.arange(10), lam, train, y_train, test)
        by_distance = jax.vmap(page["outlier_score"])(centers, x)
        for name, scores in (("distance", by_distance), ("softmax", by_softmax)):
            areas[lam, name] = [roc_auc_score(y_test == j, scores[j]) for j in range(10)]
            print(f"λ = {lam}, by {name}: {np.mean(areas[lam, name]):.3f}, least {min(areas[lam, name]):.2f}")
    assert np.mean(areas[0.1, "distance"]) > 0.9
    assert np.mean(areas[0.1, "distance"]) > np.mean(areas[0.0, "distance"])
