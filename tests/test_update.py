"""Moving centers by rule, against steps worked out by hand or in a float64 loop over the classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_centerloss as jcl
from jax_centerloss._rows import groups


def by_hand(centers, x, labels, used, alpha, rule):
    moved = centers.astype(np.float64).copy()
    for j in range(len(centers)):
        mine = used & (labels == j)
        pull = (centers[j].astype(np.float64) - x[mine]).sum(0)
        step = pull / (1 + mine.sum()) if rule == "paper" else 2 * pull / max(used.sum(), 1)
        moved[j] -= alpha * step
    return moved


@pytest.mark.parametrize(("rule", "moved"), [("paper", 0.25), ("gradient", 0.5 * 2 / 128)])
def test_one_sample_at_unit_offset_among_128(rule, moved):
    centers = np.zeros((128, 1), np.float32)
    x = np.zeros((128, 1), np.float32)
    x[0] = 1
    after = jcl.update_centers(centers, x, np.arange(128), alpha=0.5, rule=rule)
    np.testing.assert_allclose(after[0], [moved], rtol=1e-6)
    assert not np.any(after[1:])


@pytest.mark.parametrize(
    ("rule", "expected"),
    # Class 0 holds samples at 2 and 4, class 1 at 8, class 2 none; the fourth sample is masked.
    [
        ("paper", [0.5 * 6 / 3, 10 - 0.5 * 2 / 2, 20]),
        ("gradient", [0.5 * 2 * 6 / 3, 10 - 0.5 * 2 * 2 / 3, 20]),
    ],
)
def test_duplicates_and_masks_by_hand(rule, expected):
    centers = np.array([[0.0], [10.0], [20.0]], np.float32)
    x = np.array([[2.0], [4.0], [8.0], [100.0]], np.float32)
    labels = np.array([0, 0, 1, 0])
    by_where = jcl.update_centers(centers, x, labels, rule=rule, where=np.array([True, True, True, False]))
    by_sign = jcl.update_centers(centers, x, np.array([0, 0, 1, -3]), rule=rule)
    np.testing.assert_allclose(by_where[:, 0], expected, rtol=1e-6)
    np.testing.assert_array_equal(by_where, by_sign)


@pytest.mark.parametrize("rule", ["paper", "gradient"])
@pytest.mark.parametrize("jit", [False, True])
def test_random_batches(rng, rule, jit):
    centers = rng.normal(size=(20, 4)).astype(np.float32)
    x = rng.normal(size=(6, 5, 4)).astype(np.float32)
    labels = rng.integers(-2, 18, (6, 5))
    where = rng.random((6, 5)) < 0.8

    def update(c, x, y, w):
        return jcl.update_centers({"centers": c}, x, y, alpha=0.3, rule=rule, where=w)["centers"]

    moved = (jax.jit(update) if jit else update)(centers, x, labels, where)
    used = (where & (labels >= 0)).reshape(-1)
    expected = by_hand(centers, x.reshape(-1, 4), labels.reshape(-1), used, 0.3, rule)
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)
    untouched = ~np.isin(np.arange(20), labels.reshape(-1)[used])
    np.testing.assert_array_equal(moved[untouched], centers[untouched])


def test_gradient_rule_is_gradient_descent_also_where_the_clamp_cuts(rng):
    centers = rng.normal(size=(4, 3)).astype(np.float32)
    x = rng.normal(size=(8, 3)).astype(np.float32)
    labels = np.arange(8) % 4
    x[0] = 1e7  # Beyond 1e12: no gradient.
    x[1] = centers[1]  # Below 1e-12: none either.
    step = jax.grad(jcl.center_loss)(centers, x, labels)
    moved = jcl.update_centers(centers, x, labels, alpha=0.7, rule="gradient")
    np.testing.assert_allclose(moved, centers - 0.7 * step, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [1e-9, 1e8])
def test_the_papers_rule_knows_no_clamp(offset):
    moved = jcl.update_centers(np.zeros((1, 1), np.float32), np.full((1, 1), offset, np.float32), [0])
    np.testing.assert_allclose(moved, [[0.25 * offset]], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
def test_labels_too_narrow_for_the_number_of_classes(rng, dtype):
    centers = rng.normal(size=(40_000, 2)).astype(np.float32)
    x, labels, where = np.ones((5, 2), np.float32), np.array([7, 9, 7, 100, 9], dtype), np.arange(5) < 4
    moved = np.asarray(jcl.update_centers(centers, x, labels, where=where))
    np.testing.assert_allclose(moved, by_hand(centers, x, labels, where, 0.5, "paper"), rtol=1e-6)
    assert np.flatnonzero((moved != centers).any(1)).tolist() == [7, 9, 100]


def test_a_label_without_a_class_is_left_out_under_jit(rng):
    centers = rng.normal(size=(4, 3)).astype(np.float32)
    x = rng.normal(size=(5, 3)).astype(np.float32)
    for rule in ("paper", "gradient"):
        moved = jax.jit(lambda y, rule=rule: jcl.update_centers(centers, x, y, rule=rule))(
            jnp.array([0, 4, 1, 99, 1])
        )
        kept = jcl.update_centers(centers, x[[0, 2, 4]], np.array([0, 1, 1]), rule=rule)
        np.testing.assert_allclose(moved, kept, rtol=1e-6)


def test_bfloat16_centers_are_summed_in_float32():
    # 1000 pulls of 1 each: bfloat16 counts and sums would stop at 256.
    centers = jnp.zeros((1, 1), jnp.bfloat16)
    moved = jcl.update_centers(centers, jnp.ones((1000, 1)), jnp.zeros(1000, jnp.int32), alpha=1.0)
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_allclose(moved.astype(jnp.float32), [[1.0]], rtol=2**-8)


def test_tree_structure_stays(rng):
    params = {"head": {"centers": rng.normal(size=(4, 3)).astype(np.float32)}}
    x, labels = rng.normal(size=(8, 3)).astype(np.float32), np.arange(8) % 4
    moved = jcl.update_centers(params, x, labels)
    assert jax.tree.structure(moved) == jax.tree.structure(params)


def test_facenets_code_by_hand(rng):
    # diff = (1 - alfa) * (centers[labels] - x); scatter_sub(centers, labels, diff)
    alfa, n = 0.95, 40
    centers = rng.normal(size=(6, 3)).astype(np.float32)
    x, labels = rng.normal(size=(n, 3)).astype(np.float32), rng.integers(0, 6, n)
    want = centers.astype(np.float64)
    np.subtract.at(want, labels, (1 - alfa) * (centers[labels].astype(np.float64) - x))
    moved = jcl.update_centers(centers, x, labels, alpha=(1 - alfa) * n / 2, rule="gradient")
    np.testing.assert_allclose(moved, want, rtol=1e-5, atol=1e-6)


@pytest.mark.few(8)
@pytest.mark.parametrize("stride", [1, 17, 31, 33, 2**16, 2**20, 65537, 1000003])
@pytest.mark.parametrize("n", [30, 31, 63])
def test_labels_that_a_hash_table_dislikes(rng, stride, n):
    # Few samples, many classes, names in step with the size of the table: 31 or 33 places, say.
    classes = 2**24
    labels = (np.arange(n) // 2 * stride) % classes
    x = rng.normal(size=(n, 1)).astype(np.float32)
    moved = jax.jit(jcl.update_centers)(np.zeros((classes, 1), np.float16), x, labels)
    names = np.unique(labels)
    assert np.count_nonzero(moved) == len(names)
    small = by_hand(
        np.zeros((len(names), 1)), x, np.searchsorted(names, labels), np.ones(n, bool), 0.5, "paper"
    )
    np.testing.assert_allclose(moved[names], small, rtol=1e-2)


@pytest.mark.parametrize("shape", [(700, 1000), (5000, 512)])
def test_more_rows_than_one_block_of_sums_holds(rng, shape):
    classes, dim = shape
    centers = rng.normal(size=shape).astype(np.float32)
    labels = rng.integers(-1, classes, 2500)
    x = rng.normal(size=(2500, dim)).astype(np.float32)
    for rule in ("paper", "gradient"):
        moved = jcl.update_centers(centers, x, labels, rule=rule)
        np.testing.assert_allclose(
            moved, by_hand(centers, x, labels, labels >= 0, 0.5, rule), rtol=1e-4, atol=1e-5
        )
        untouched = ~np.isin(np.arange(classes), labels)
        np.testing.assert_array_equal(moved[untouched], centers[untouched])


@pytest.mark.few(6)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", ["paper", "gradient"])
@pytest.mark.parametrize("classes", [5, 500])
def test_what_is_no_number_shows_in_its_own_class_only(rng, rule, bad, classes):
    centers = rng.normal(size=(classes, 3)).astype(np.float32)
    x, labels = rng.normal(size=(20, 3)).astype(np.float32), rng.integers(0, 5, 20)
    x[3, 1] = bad
    labels[4] = labels[3]
    moved = np.asarray(jcl.update_centers(centers, x, labels, rule=rule))
    assert np.all(np.isnan(moved[labels[3]]))
    assert np.all(np.isfinite(np.delete(moved, labels[3], axis=0)))
    masked = jcl.update_centers(centers, x, labels, rule=rule, where=np.arange(20) != 3)
    assert np.all(np.isfinite(masked))


def test_many_small_pulls_on_a_far_center_are_not_lost_one_by_one():
    # Each pull is below half a unit in the last place of the center; their sum is not.
    centers, x = np.full((1, 1), 1e4, np.float32), np.full((8000, 1), 1e4 + 2, np.float32)
    moved = jcl.update_centers(centers, x, np.zeros(8000, int), alpha=0.5)
    np.testing.assert_allclose(moved, 1e4 + 0.5 * 2 * 8000 / 8001, rtol=1e-7)


def test_empty_batch_moves_nothing(rng):
    centers = rng.normal(size=(4, 3)).astype(np.float32)
    for rule in ("paper", "gradient"):
        moved = jcl.update_centers(centers, np.zeros((0, 3), np.float32), np.zeros(0, int), rule=rule)
        np.testing.assert_array_equal(moved, centers)


def test_after_keeps_the_write_in_place_beside_another_read():
    c, d, n = 50_000, 16, 32

    def step(centers, x, labels, other):
        # The other read is another batch's: without `after` XLA may order it behind the write, on a copy.
        loss = jcl.center_loss(centers, x, labels) + jnp.sum(centers.at[other].get(mode="clip"))
        return jcl.update_centers(centers, x, labels, after=loss), loss

    shape = jax.ShapeDtypeStruct
    compiled = (
        jax.jit(step, donate_argnums=0)
        .lower(shape((c, d), "float32"), shape((n, d), "float32"), shape((n,), "int32"), shape((n,), "int32"))
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= c * d * 4
    assert memory.temp_size_in_bytes < c * d * 4 / 2
    moved, _ = jax.jit(step)(jnp.zeros((c, d)), jnp.ones((n, d)), jnp.arange(n), jnp.arange(n))
    np.testing.assert_allclose(moved[:n], 0.25, rtol=1e-6)


def test_no_stride_of_the_labels_makes_the_search_long(monkeypatch):
    # With an even size, 2**20 apart, each round would settle one class.
    rounds = []

    def counted(condition, body, state):
        while condition(state):
            rounds.append(1)
            state = body(state)
        return state

    monkeypatch.setattr(jax.lax, "while_loop", counted)
    for n in (255, 256):
        rounds.clear()
        labels = jnp.arange(n, dtype=jnp.int32) * 2**20 % 2**26 + jnp.arange(n, dtype=jnp.int32) // 64
        last = groups._last_by_hashing(labels)
        np.testing.assert_array_equal(labels[last], labels)
        assert 1 <= len(rounds) < 12


@pytest.mark.parametrize("classes", [6, 3000])
@pytest.mark.usefixtures("for_its_platform")
def test_only_a_cpu_searches_in_a_loop_and_only_many_classes(classes):
    shapes = (
        jax.ShapeDtypeStruct(s, t)
        for s, t in (((classes, 2), "float32"), ((8, 2), "float32"), ((8,), "int32"))
    )
    traced = jax.jit(jcl.update_centers).trace(*shapes)
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.while" in text) == (platform == "cpu" and classes == 3000)


def test_more_classes_than_indices_are_refused():
    shape = jax.ShapeDtypeStruct
    table, x, labels = shape((2**31 - 2, 1), jnp.float16), shape((6, 1), jnp.float16), shape((6,), jnp.int32)
    with pytest.raises(ValueError, match=r"at most 2\*\*31, got 2,147,483,652"):
        jax.eval_shape(jcl.update_centers, table, x, labels)


def test_an_array_of_rates_is_refused():
    for size in (2, 3):
        with pytest.raises(ValueError, match=rf"alpha must be a number.*got shape \({size},\)"):
            jcl.update_centers(np.zeros((3, 2)), np.zeros((2, 2)), [0, 1], alpha=np.ones(size))
