"""A batch by class: every platform's way, on whatever is at hand."""

import jax
import numpy as np
import pytest

from jax_centerloss._rows.groups import NO_CLASS, group


# Numbers of samples and classes on both sides of every choice of a method in `groups`.
@pytest.mark.parametrize(
    ("n", "c"), [(7, 3), (8, 8), (8, 50), (64, 100), (128, 128), (60, 129), (300, 40_000), (2_100, 5_000)]
)
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_each_class_once_with_the_sum_of_its_samples(platform, n, c, rng):
    labels, used = rng.integers(0, c, n).astype(np.int32), rng.random(n) < 0.8
    labels[: n // 2] = labels[n - n // 2 :]  # Many stand there twice, and some more often.
    values = rng.normal(size=(n, 3)).astype(np.float32)

    labels = np.where(used, labels, NO_CLASS)

    @jax.jit
    def by_class(labels, values):
        batch = group(labels, c, platform)
        return batch.classes, batch.sum(values)

    classes, sums = map(np.asarray, by_class(labels, values))
    # A GPU writes without atomics, which is right only where no row stands twice.
    named = classes[classes < c]
    assert len(np.unique(named)) == len(named)
    assert set(labels[used]) <= set(named)
    want = np.zeros((c, 3))
    np.add.at(want, labels[used], values[used].astype(np.float64))
    np.testing.assert_allclose(sums[classes < c], want[named], atol=1e-5)
