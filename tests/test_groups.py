"""A batch by class: every platform's way, on whatever is at hand."""

import jax
import numpy as np
import pytest

from jax_centerloss import _groups


# Numbers of samples and classes on both sides of every choice of a method in `_groups`.
@pytest.mark.parametrize(
    ("n", "c"), [(7, 3), (8, 8), (8, 50), (64, 100), (128, 128), (60, 129), (300, 40_000), (2_100, 5_000)]
)
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_each_class_once_with_the_sum_of_its_samples(platform, n, c, rng):
    labels, used = rng.integers(0, c, n).astype(np.int32), rng.random(n) < 0.8
    labels[: n // 2] = labels[n - n // 2 :]  # Many stand there twice, and some more often.
    values = rng.normal(size=(n, 3)).astype(np.float32)

    @jax.jit
    def by_class(labels, used, values):
        if platform == "gpu":
            classes, sum_by_class = _groups.group_on_gpu(labels, used, c)
            return classes, sum_by_class(values)
        slots = _groups.assign_slots_on(labels, used, c, platform)
        return slots.classes, slots.sum(values)

    classes, sums = map(np.asarray, by_class(labels, used, values))
    # A GPU writes without atomics, which is right only where no row stands twice.
    named = classes[classes < c]
    assert len(np.unique(named)) == len(named)
    assert set(labels[used]) <= set(named)
    want = np.zeros((c, 3))
    np.add.at(want, labels[used], values[used].astype(np.float64))
    np.testing.assert_allclose(sums[classes < c], want[named], atol=1e-5)
