"""Stochastic rounding: right on average, and the same bits for the same key."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from placements import PLACEMENTS, put

import jax_centerloss as jcl
from jax_centerloss._rows import rounding

HALF = ["bfloat16", "float16"]
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def seed_of(key):
    return rounding.seed_of(key, np.zeros(0, np.float16))


def wide(a):
    return np.float64(np.asarray(a, np.float32))


def cases(dtype):
    """float32 numbers up to the largest of `dtype`: between, at and next to those of `dtype`."""
    info = jnp.finfo(dtype)
    largest, unit = float(info.max), float(info.eps)
    normal, least = float(info.smallest_normal), float(info.smallest_subnormal)
    between = [1 + f * unit for f in (0.01, 0.25, 0.5, 0.75, 0.99)] + [0.1, 1 / 3, 2 - unit / 3, 1e-3, 777.7]
    at = [0.0, 1.0, 1 + unit, 2.0, normal, least, 3 * least, largest]
    next_to = [np.nextafter(np.float32(a), np.float32(b)) for a in (1, 1 + unit, 2) for b in (0, 3)]
    small = [0.3 * least, 1.5 * least, 7.9 * least, 0.4 * normal, normal - 0.3 * least, 1.001 * normal]
    large = [largest * (1 - unit / 3), largest * (1 - unit / 4)]
    values = np.float32([*between, *at, *next_to, *small, *large])
    return np.concatenate([values, -values])


def neighbours(exact, dtype):
    """The numbers of `dtype` next to each one, below and above; the number itself where it is one."""
    nearest = np.asarray(exact).astype(dtype)
    with np.errstate(all="ignore"):  # Of the largest number, the next is infinite.
        low, high = (np.nextafter(nearest, np.asarray(end, dtype)) for end in (-np.inf, np.inf))
    return (
        wide(np.where(wide(nearest) <= exact, nearest, low)),
        wide(np.where(wide(nearest) >= exact, nearest, high)),
    )


def assert_mean(rounded, exact, errors=4.0):
    """The mean over the first axis is `exact`, within so many standard errors of rounding by chance.

    One of the roundings more is allowed, which alone is many errors where the chance is small, and what
    float32 loses of numbers up to 2 in the step itself.
    """
    low, high = neighbours(exact, rounded.dtype)
    distance = high - low
    chance = (exact - low) / np.where(distance, distance, 1)
    error = distance * np.sqrt(chance * (1 - chance) / len(rounded))
    off = np.abs(wide(rounded).mean(0) - exact)
    late = off > errors * error + distance / len(rounded) + 1.2e-7 * (np.abs(exact) > 1e-4)
    assert not np.any(late), (exact[late], off[late], error[late])


@pytest.mark.parametrize("dtype", HALF)
def test_the_mean_over_keys_is_the_exact_number(dtype):
    values = cases(dtype)

    @jax.jit
    @jax.vmap
    def rounded(key):
        return rounding.round_rows(values[None], jnp.array([3]), dtype, seed_of(key))[0]

    got = rounded(jax.random.split(KEY, 100_000))
    assert got.dtype == dtype
    assert_mean(got, np.float64(values))
    # Each is one of its two neighbours, and only the number itself where that is one of `dtype`.
    low, high = neighbours(np.float64(values), dtype)
    assert np.all((wide(got) == low) | (wide(got) == high))


@pytest.mark.parametrize("dtype", HALF)
def test_the_largest_number_does_not_become_infinite_but_what_overflows_does(dtype):
    info = jnp.finfo(dtype)
    largest = float(info.max)
    unit = largest * float(info.eps) / (2 - float(info.eps))
    values = [largest, largest + 0.4 * unit, largest + 0.99 * unit, np.inf, -np.inf, np.nan]
    if dtype == "float16":  # float32 has no numbers above the largest of bfloat16.
        values += [largest + unit, 4 * largest]
    rows = np.float32([values, np.negative(values)])
    seeds = jax.vmap(seed_of)(jax.random.split(KEY, 1000))
    got = jax.jit(jax.vmap(lambda s: rounding.round_rows(rows, jnp.arange(2), dtype, s)))(seeds)
    want = [[largest] * 3 + [np.inf, -np.inf, np.nan] + [np.inf] * (len(values) - 6)]
    np.testing.assert_array_equal(wide(got), np.broadcast_to([*want, *np.negative(want)], got.shape))


def test_bits_are_uniform_and_independent():
    # The upper 16 bits of words, over seeds, classes, places in a row, and tables, near ones and far ones.
    seeds = jax.vmap(seed_of)(jax.random.split(KEY, 400))
    classes = jnp.concatenate([jnp.arange(40), 10**9 + jnp.arange(40)])
    words = jax.jit(jax.vmap(lambda s: rounding._random_words(s, classes, 32)))
    u = np.stack([np.float64(words(seeds + np.uint32(table)) >> 16) / 2**16 - 0.5 for table in (0, 1)])
    number = u.size  # 2 tables, 400 seeds, 80 classes, 32 places: 2,048,000.
    assert abs(u.mean()) < 4 * np.sqrt(1 / 12 / number)
    counts = np.histogram(u, bins=256, range=(-0.5, 0.5))[0]
    chi2 = np.sum((counts - number / 256) ** 2) / (number / 256)
    assert abs(chi2 - 255) < 4 * np.sqrt(2 * 255)
    for axis in range(u.ndim):
        for shift in (1, 2, 3) if axis else (1,):
            # The mean of the products of independent numbers of variance 1/12.
            correlation = 12 * np.mean(u * np.roll(u, shift, axis))
            assert abs(correlation) < 4.5 / np.sqrt(number / (2 if not axis else 1)), (axis, shift)


# Steps whose sums are exact in float32, on any platform and in any order.
def problem(rng, classes=40, n=64, d=8, dtype="bfloat16"):
    centers = jnp.asarray(rng.integers(-8, 9, (classes, d)) / 4, dtype)
    x = (rng.integers(-64, 65, (n, d)) / 64).astype(np.float32)
    labels = rng.integers(-1, classes // 2, n).astype(np.int32)
    return centers, x, labels


ROWS = jcl.row_optimizer(optax.sgd(0.0625))


def by_rows(centers, x, labels, key):
    return ROWS.update(centers, ROWS.init(centers), x, labels, rule="paper", rounding_key=key)[0]


def by_rule(centers, x, labels, key, **options):
    return jcl.update_centers(centers, x, labels, alpha=0.0625, rounding_key=key, **options)


def by_nnx(centers, x, labels, key):
    module = jcl.nnx.CenterLoss(
        *centers.shape, centers_as="state", param_dtype=centers.dtype, rngs=nnx.Rngs(0)
    )
    module.centers = centers
    module.update_centers(x, labels, alpha=0.0625, rounding_key=key)
    return jax.tree.leaves(nnx.state(module))[0]


def by_linen(centers, x, labels, key):
    module = jcl.linen.CenterLoss(*centers.shape, alpha=0.0625, centers_as="state", param_dtype=centers.dtype)
    rngs = {} if key is None else {"rounding": key}
    _, moved = module.apply({"centers": {"centers": centers}}, x, labels, rngs=rngs, mutable=["centers"])
    return moved["centers"]["centers"]


WAYS = {"rule": by_rule, "rows": by_rows, "nnx": by_nnx, "linen": by_linen}


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", HALF)
def test_the_mean_step_is_the_exact_one(rng, dtype):
    centers, x, labels = problem(rng, dtype=dtype)
    options = {
        "paper": {},
        "gradient": {"rule": "gradient", "where": np.arange(64) % 3 > 0},
        "mean": {"rule": "mean", "weights": np.float32(np.arange(64) % 4)},
    }

    @jax.jit
    @jax.vmap
    def steps(key):
        by_rules = {name: by_rule(centers, x, labels, key, **given) for name, given in options.items()}
        return by_rules | {"linen": by_linen(centers, x, labels, key)}

    many = steps(jax.random.split(KEY, 4000))
    untouched = np.setdiff1d(np.arange(len(centers)), labels)
    for name, got in many.items():
        exact = by_rule(centers.astype(jnp.float32), x, labels, None, **options.get(name, {}))
        # 20 classes of 8 numbers: of so many, one is off by four standard errors in a hundred tests.
        assert_mean(got, np.float64(exact), errors=4.5)
        np.testing.assert_array_equal(
            wide(got[:, untouched]), np.broadcast_to(wide(centers[untouched]), (4000, len(untouched), 8))
        )


@pytest.mark.parametrize("dtype", ["float32", *HALF])
def test_a_key_gives_the_same_bits_in_every_way_and_order_and_none_rounds_to_nearest(rng, dtype):
    centers, x, labels = problem(rng, dtype=dtype)
    order = rng.permutation(len(labels))

    @jax.jit
    def run(centers, x, labels, key):
        plain = {name: way(centers, x, labels, None) for name, way in WAYS.items()}
        keyed = {name: way(centers, x, labels, key) for name, way in WAYS.items()}
        same = {
            "another order": by_rule(centers, x[order], labels[order], key),
            "a raw key": by_rule(centers, x, labels, jax.random.PRNGKey(0)),
        }
        return plain, keyed, same, by_rule(centers, x, labels, jax.random.key(1))

    plain, keyed, same, other = run(centers, x, labels, KEY)
    nearest = by_rule(centers.astype(jnp.float32), x, labels, None).astype(dtype)
    for name, moved in keyed.items():
        np.testing.assert_array_equal(wide(plain[name]), wide(nearest), name)
        assert moved.dtype == dtype
        assert np.array_equal(wide(moved), wide(nearest)) == (dtype == "float32"), name
    del keyed["linen"]  # Linen folds the path of the module into the key of a stream.
    want = wide(by_rule(centers, x, labels, KEY))  # Outside of jit.
    for name, moved in (keyed | same).items():
        np.testing.assert_array_equal(wide(moved), want, name)
    assert np.array_equal(wide(other), want) == (dtype == "float32")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_the_mean_step_of_other_kinds_of_keys(rng, kind):
    centers, x, labels = problem(rng)
    exact = by_rule(centers.astype(jnp.float32), x, labels, None)
    keys = jax.random.split(jax.random.key(0, impl=kind), 2000)
    many = jax.lax.map(lambda key: by_rule(centers, x, labels, key), keys)
    assert_mean(many, np.float64(exact), errors=4.5)


def test_blocks_of_classes_have_the_bits_of_their_classes(rng):
    # 512 slots of 512 numbers are more than one block on a CPU; 64 are not.
    centers, x, labels = problem(rng, classes=2000, n=512, d=512)
    labels[:] = rng.permutation(2000)[:512]

    @jax.jit
    def moved(x, labels):
        return [way(centers, x, labels, KEY) for way in (by_rule, by_rows)]

    some = labels[64:128]  # In other slots than in the whole batch.
    for whole, few in zip(moved(x, labels), moved(x[64:128], some), strict=True):
        np.testing.assert_array_equal(wide(whole)[some], wide(few)[some])


@pytest.mark.few(2)
@pytest.mark.parametrize("placement", [PLACEMENTS[1], PLACEMENTS[3], PLACEMENTS[5], PLACEMENTS[7]], ids=str)
def test_on_a_mesh_the_bits_are_those_of_one_device(rng, placement):
    centers, x, labels = problem(rng)
    want = wide(by_rule(centers, x, labels, KEY))
    with placement.entered():
        given = put(placement, {"table": centers, "x": x, "labels": labels})
        results = jax.jit(lambda *given: [way(*given, KEY) for way in (by_rule, by_rows)])(*given)
    for moved in results:
        for shard in moved.addressable_shards:  # Replicas are the same, too.
            np.testing.assert_array_equal(wide(shard.data), want[shard.index])


def test_inside_shard_map_replicated_centers_stay_the_same_everywhere(rng):
    centers, x, labels = problem(rng)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    specs = P(), P("d"), P("d"), P()
    spread = jax.shard_map(partial(by_rule, axis_name="d"), mesh=mesh, in_specs=specs, out_specs=P())
    given = zip((centers, x, labels, KEY), specs, strict=True)
    moved = jax.jit(spread)(*(jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in given))
    want = wide(by_rule(centers, x, labels, KEY))
    for shard in moved.addressable_shards:
        np.testing.assert_array_equal(wide(shard.data), want)


@pytest.mark.parametrize("dtype", HALF)
def test_centers_arrive_where_rounding_to_nearest_stops(dtype):
    # 400 centers on their way from 1 to 1.7 by 1/32 of what is left, as in tests/test_half_precision.py.
    classes, steps = 100, 600
    labels, x = jnp.arange(classes), jnp.full((classes, 4), 1.7)

    def step(centers, key):
        return by_rule(centers, x, labels, key), centers.astype(jnp.float32)

    @jax.jit
    def run(keys):
        start = jnp.ones((classes, 4), dtype)
        nearest = jax.lax.fori_loop(0, steps, lambda _, c: by_rule(c, x, labels, None), start)
        return jax.lax.scan(step, start, keys)[1], nearest

    path, nearest = run(jax.random.split(KEY, steps))
    path = np.float64(path)
    exact = 1.7 - 0.7 * (31 / 32) ** np.arange(steps)
    # A rounding deviates by at most half the distance of neighbouring numbers, and each step takes 1/32 of
    # the deviation back: in the long run a center deviates by 2.02 distances. The mean is of 400 of them.
    spacing = float(jnp.finfo(dtype).eps)
    deviation = 0.5 * spacing / np.sqrt(1 - (31 / 32) ** 2)
    assert np.max(np.abs(path.mean((1, 2)) - exact)) < 5 * deviation / np.sqrt(400)
    assert abs(path[-1].mean() - 1.7) < 0.01
    assert 1.7 - float(nearest.mean()) == pytest.approx(16 * spacing, rel=0.1)


def test_a_step_is_differentiated_as_its_mean(rng):
    centers, x, labels = problem(rng)

    @jax.jit
    def slopes(x):
        def total(x, centers, key):
            return jnp.sum(by_rule(centers, x, labels, key).astype(jnp.float32) ** 2)

        return jax.grad(total)(x, centers, KEY), jax.grad(total)(x, centers.astype(jnp.float32), None)

    rounded, exact = slopes(x)
    np.testing.assert_allclose(rounded, exact, rtol=0.02, atol=1e-3)
    assert np.any(exact)


def test_the_state_of_a_row_optimizer_in_half_the_memory():
    classes, d, steps = 64, 32, 400
    labels, noise = jnp.arange(classes), jax.random.normal(jax.random.key(1), (steps, classes, d))

    @jax.jit
    def train(keys):
        """Adam by rows on gradients of noise, and then on gradients near zero, in float32 and in half."""

        def step(held, given):
            i, noise, key = given
            target = jnp.where(i < steps // 2, noise, 0.01 * noise)
            return [
                rows.update(
                    *one, jax.lax.stop_gradient(one[0]) + target, labels, rule="paper", rounding_key=key
                )
                for rows, one in zip(optimizers, held, strict=True)
            ], None

        optimizers = [jcl.row_optimizer(optax.adam(1e-2), state_dtype=kind) for kind in (None, jnp.bfloat16)]
        centers = jnp.zeros((classes, d))
        start = [(centers, rows.init(centers)) for rows in optimizers]
        return jax.lax.scan(step, start, (jnp.arange(steps), noise, keys))[0]

    (want, (exact, *_)), (got, (held, *_)) = train(jax.random.split(KEY, steps))
    assert {a.dtype.name for a in jax.tree.leaves((held.mu, held.nu))} == {"bfloat16"}
    # The second moment fell by the factor 0.999**200 = 0.82 in the last 200 steps, each by less than half of
    # the distance of neighbouring numbers of bfloat16, 2**-9.
    np.testing.assert_allclose(wide(held.nu["centers"]).mean(), wide(exact.nu["centers"]).mean(), rtol=0.005)
    assert np.sqrt(np.mean((wide(got) - wide(want)) ** 2)) < 0.05 * np.std(want)


def test_a_state_in_half_precision_is_donated_and_needs_a_key(rng):
    centers, x, labels = problem(rng)
    rows = jcl.row_optimizer(optax.adam(0.1), state_dtype=jnp.bfloat16)
    state = rows.init(centers)
    with pytest.raises(ValueError, match="a state in bfloat16 needs a rounding_key"):
        rows.update(centers, state, x, labels)
    step = jax.jit(rows.update, donate_argnums=(0, 1))
    moved, new = step(jnp.copy(centers), state, x, labels, rounding_key=KEY)
    is_touched = np.isin(np.arange(len(centers)), labels)
    assert np.all(np.any(wide(moved) != wide(centers), 1) == is_touched)
    assert not np.any(wide(new[0].mu["centers"])[~is_touched])


def test_a_state_of_another_dtype_is_refused(rng):
    # A checkpoint of before, or of after, somebody asked for half the memory.
    centers, x, labels = problem(rng)
    half, full = (jcl.row_optimizer(optax.adam(0.1), state_dtype=d) for d in (jnp.bfloat16, None))
    words = "state holds {} where this optimizer keeps {}: create the row optimizer with the `state_dtype`"
    with pytest.raises(ValueError, match=words.format("bfloat16", "float32")):
        full.update(centers, half.init(centers), x, labels)
    with pytest.raises(ValueError, match=words.format("float32", "bfloat16")):
        half.update(centers, full.init(centers), x, labels, rounding_key=KEY)
    mixed = jcl.row_optimizer(optax.adam(0.1, mu_dtype=jnp.bfloat16))
    _, state = mixed.update(centers, mixed.init(centers), x, labels)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim} == {"bfloat16", "float32"}


@pytest.mark.parametrize("dtype", [jnp.float16, "float8_e5m2", jnp.int8, "bf16"])
def test_other_dtypes_of_a_state_are_refused(dtype):
    words = "state_dtype must be None or one of bfloat16, float32, float64, got"
    with pytest.raises(ValueError, match=words):
        jcl.row_optimizer(optax.adam(0.1), state_dtype=dtype)


SPLIT = jax.random.split(KEY, 3)
BAD_KEYS = {
    "a number": (7, TypeError, r"must be a PRNG key, got int32 of shape \(\)\. Pass a new key in"),
    "a string": ("key", TypeError, "rounding_key must be a PRNG key, got str"),
    "the function": (jax.random.key, TypeError, "rounding_key must be a PRNG key, got the function key"),
    "floats": (np.zeros(2, np.float32), TypeError, r"must be a PRNG key, got float32 of shape \(2,\)"),
    "three words": (np.zeros(3, np.uint32), TypeError, r"must be a PRNG key, got uint32 of shape \(3,\)"),
    "many keys": (SPLIT, ValueError, r"must be one key, got keys of shape \(3,\)"),
    "raw keys": (jax.random.key_data(SPLIT), ValueError, r"one key, got keys of shape \(3, 2\)"),
}


@pytest.mark.parametrize(("key", "error", "words"), BAD_KEYS.values(), ids=BAD_KEYS)
def test_what_is_no_key_is_refused(rng, key, error, words):
    for dtype in ("bfloat16", "float32"):
        for way in (by_rule, by_rows, by_nnx):
            with pytest.raises(error, match=words):
                way(*problem(rng, dtype=dtype), key)


def test_an_empty_batch_with_a_key_moves_nothing():
    centers, x, labels = jnp.ones((4, 2), jnp.bfloat16), jnp.zeros((0, 2)), jnp.zeros(0, jnp.int32)
    moved = jcl.update_centers(centers, x, labels, rounding_key=jax.random.key(0))
    np.testing.assert_array_equal(moved, centers)
