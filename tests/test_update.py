"""Moving centers by rule, against steps worked out by hand or in a float64 loop over the classes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_centerloss as jcl
from jax_centerloss._rows import groups

RULES = ("paper", "gradient")


@partial(jax.jit, static_argnames="alpha")
def by_both_rules(centers, x, labels, where=None, alpha=0.5):
    return [jcl.update_centers(centers, x, labels, alpha=alpha, rule=r, where=where) for r in RULES]


def by_hand(centers, x, labels, used, alpha, rule):
    moved = centers.astype(np.float64).copy()
    for j in range(len(centers)):
        mine = used & (labels == j)
        pull = (centers[j].astype(np.float64) - x[mine]).sum(0)
        step = pull / (1 + mine.sum()) if rule == "paper" else 2 * pull / max(used.sum(), 1)
        moved[j] -= alpha * step
    return moved


def test_duplicates_and_masks_by_hand():
    centers = np.array([[0.0], [10.0], [20.0]], np.float32)
    x = np.array([[2.0], [4.0], [8.0], [100.0]], np.float32)
    by_where = by_both_rules(centers, x, np.array([0, 0, 1, 0]), np.arange(4) < 3)
    by_sign = by_both_rules(centers, x, np.array([0, 0, 1, -3]), np.ones(4, bool))
    np.testing.assert_array_equal(by_where, by_sign)
    # Class 0 holds samples at 2 and 4, class 1 at 8, class 2 none; the fourth sample is masked.
    paper, gradient = np.asarray(by_where)[..., 0]
    np.testing.assert_allclose(paper, [0.5 * 6 / 3, 10 - 0.5 * 2 / 2, 20], rtol=1e-6)
    np.testing.assert_allclose(gradient, [0.5 * 2 * 6 / 3, 10 - 0.5 * 2 * 2 / 3, 20], rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_random_batches(rng, jit):
    centers = rng.normal(size=(20, 4)).astype(np.float32)
    x = rng.normal(size=(6, 5, 4)).astype(np.float32)
    labels = rng.integers(-2, 18, (6, 5))
    where = rng.random((6, 5)) < 0.8
    tree = {"head": {"centers": centers}}
    update = by_both_rules if jit else by_both_rules.__wrapped__
    used = (where & (labels >= 0)).reshape(-1)
    untouched = ~np.isin(np.arange(20), labels.reshape(-1)[used])
    for rule, moved in zip(RULES, update(tree, x, labels, where, alpha=0.3), strict=True):
        assert jax.tree.structure(moved) == jax.tree.structure(tree)
        moved = np.asarray(moved["head"]["centers"])
        expected = by_hand(centers, x.reshape(-1, 4), labels.reshape(-1), used, 0.3, rule)
        np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(moved[untouched], centers[untouched])


def test_gradient_rule_is_gradient_descent_also_where_the_clamp_cuts(rng):
    centers = rng.normal(size=(4, 3)).astype(np.float32)
    x = rng.normal(size=(8, 3)).astype(np.float32)
    labels = np.arange(8) % 4
    x[0] = 1e7  # Beyond 1e12: no gradient.
    x[1] = centers[1]  # Below 1e-12: none either.

    @jax.jit
    def run(centers):
        moved = jcl.update_centers(centers, x, labels, alpha=0.7, rule="gradient")
        return moved, jax.grad(jcl.center_loss)(centers, x, labels)

    moved, step = map(np.asarray, run(centers))
    np.testing.assert_allclose(moved, centers - 0.7 * step, rtol=1e-5, atol=1e-6)


def test_the_papers_rule_knows_no_clamp():
    for offset in (1e-9, 1e8):
        moved, _ = by_both_rules(np.zeros((1, 1), np.float32), np.full((1, 1), offset, np.float32), [0])
        np.testing.assert_allclose(moved, [[0.25 * offset]], rtol=1e-6)


def test_labels_too_narrow_for_the_number_of_classes(rng):
    centers = rng.normal(size=(40_000, 2)).astype(np.float32)
    x, where = np.ones((5, 2), np.float32), np.arange(5) < 4
    labels = [7, 9, 7, 100, 9]
    dtypes = np.uint8, np.int8, np.uint16, np.int16

    @jax.jit
    def run(centers):
        return [jcl.update_centers(centers, x, np.array(labels, dtype), where=where) for dtype in dtypes]

    want = by_hand(centers, x, np.array(labels), where, 0.5, "paper")
    for moved in map(np.asarray, run(centers)):
        np.testing.assert_allclose(moved, want, rtol=1e-6)
        assert np.flatnonzero((moved != centers).any(1)).tolist() == [7, 9, 100]


def test_a_label_without_a_class_is_left_out_under_jit(rng):
    centers = rng.normal(size=(4, 3)).astype(np.float32)
    x, labels = rng.normal(size=(5, 3)).astype(np.float32), np.array([0, 4, 1, 99, 1])
    moved = by_both_rules(centers, x, labels)
    kept = [by_hand(centers, x, labels, labels < 4, 0.5, rule) for rule in RULES]
    np.testing.assert_allclose(moved, kept, rtol=1e-5, atol=1e-6)


def test_bfloat16_centers_are_summed_in_float32():
    # 1000 pulls of 1 each: bfloat16 counts and sums would stop at 256.
    centers = np.zeros((1, 1), jnp.bfloat16)
    moved = jax.jit(jcl.update_centers)(centers, np.ones((1000, 1), np.float32), np.zeros(1000, int), alpha=1)
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(moved), [[1.0]], rtol=2**-8)


def test_facenets_code_by_hand(rng):
    # diff = (1 - alfa) * (centers[labels] - x); scatter_sub(centers, labels, diff)
    alfa, n = 0.95, 40
    centers = rng.normal(size=(6, 3)).astype(np.float32)
    x, labels = rng.normal(size=(n, 3)).astype(np.float32), rng.integers(0, 6, n)
    want = centers.astype(np.float64)
    np.subtract.at(want, labels, (1 - alfa) * (centers[labels].astype(np.float64) - x))
    _, moved = by_both_rules(centers, x, labels, alpha=(1 - alfa) * n / 2)
    np.testing.assert_allclose(moved, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [30, 31, 63])
def test_labels_that_a_hash_table_dislikes(rng, n):
    # Few samples, many classes, names in step with the size of the table: 31 or 33 places, say.
    classes = 2**24
    x = rng.normal(size=(n, 1)).astype(np.float32)

    @jax.jit
    def run(labels):
        moved = jcl.update_centers(jnp.zeros((classes, 1), jnp.float16), x, labels)
        return moved, jnp.count_nonzero(moved)

    for stride in (1, 17, 31, 33, 2**16, 2**20, 65537, 1000003):
        labels = (np.arange(n) // 2 * stride) % classes
        moved, number = run(labels)
        names = np.unique(labels)
        assert number == len(names)
        small = by_hand(
            np.zeros((len(names), 1)), x, np.searchsorted(names, labels), np.ones(n, bool), 0.5, "paper"
        )
        np.testing.assert_allclose(np.asarray(moved)[names], small, rtol=1e-2)


@pytest.mark.parametrize("shape", [(700, 1000), (5000, 512)])
def test_more_rows_than_one_block_of_sums_holds(rng, shape):
    classes, dim = shape
    centers = rng.normal(size=shape).astype(np.float32)
    labels = rng.integers(-1, classes, 2500)
    x = rng.normal(size=(2500, dim)).astype(np.float32)
    untouched = ~np.isin(np.arange(classes), labels)
    for rule, moved in zip(RULES, by_both_rules(centers, x, labels), strict=True):
        want = by_hand(centers, x, labels, labels >= 0, 0.5, rule)
        np.testing.assert_allclose(moved, want, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(moved)[untouched], centers[untouched])


@pytest.mark.parametrize("classes", [5, 500])
def test_what_is_no_number_shows_in_its_own_class_only(rng, classes):
    centers = rng.normal(size=(classes, 3)).astype(np.float32)
    x, labels = rng.normal(size=(20, 3)).astype(np.float32), rng.integers(0, 5, 20)
    labels[4] = labels[3]
    for bad in (np.nan, np.inf, -np.inf):
        x[3, 1] = bad
        for moved in map(np.asarray, by_both_rules(centers, x, labels, np.ones(20, bool))):
            assert np.all(np.isnan(moved[labels[3]]))
            assert np.all(np.isfinite(np.delete(moved, labels[3], axis=0)))
        assert np.all(np.isfinite(by_both_rules(centers, x, labels, np.arange(20) != 3)))


def test_many_small_pulls_on_a_far_center_are_not_lost_one_by_one():
    # Each pull is below half a unit in the last place of the center; their sum is not.
    centers, x = np.full((1, 1), 1e4, np.float32), np.full((8000, 1), 1e4 + 2, np.float32)
    moved, _ = by_both_rules(centers, x, np.zeros(8000, int))
    np.testing.assert_allclose(moved, 1e4 + 0.5 * 2 * 8000 / 8001, rtol=1e-7)


def test_empty_batch_moves_nothing(rng):
    centers = rng.normal(size=(4, 3)).astype(np.float32)
    for moved in by_both_rules(centers, np.zeros((0, 3), np.float32), np.zeros(0, int)):
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
    names = np.arange(n, dtype=np.int32)
    moved, _ = compiled(np.zeros((c, d), np.float32), np.ones((n, d), np.float32), names, names)
    np.testing.assert_allclose(np.asarray(moved)[:n], 0.25, rtol=1e-6)


def test_no_stride_of_the_labels_makes_the_search_long(monkeypatch):
    # With an even size, 2**20 apart, each round would settle one class.
    rounds, loop = [], jax.lax.while_loop

    def counted(condition, body, state):
        state, number = loop(lambda s: condition(s[0]), lambda s: (body(s[0]), s[1] + 1), (state, 0))
        rounds.append(number)
        return state

    monkeypatch.setattr(jax.lax, "while_loop", counted)
    for n in (255, 256):
        labels = np.arange(n, dtype=np.int32) * 2**20 % 2**26 + np.arange(n, dtype=np.int32) // 64
        last, number = jax.jit(lambda labels: (groups._last_by_hashing(labels), rounds.pop()))(labels)
        np.testing.assert_array_equal(labels[last], labels)
        assert not rounds
        assert 1 <= number < 12


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
