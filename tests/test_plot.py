"""The picture: what is drawn is read back from the Matplotlib objects."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.collections import PathCollection
from matplotlib.quiver import Quiver

import jax_centerloss as jcl


def dots(ax):
    """Offsets and colors of what was drawn: first the samples, then the centers."""
    drawn = [c for c in ax.collections if isinstance(c, PathCollection) and len(c.get_offsets())]
    return [(np.asarray(c.get_offsets()), c.get_facecolors()) for c in drawn]


CENTERS = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [9.0, 9.0]], np.float32)
X = np.array([[0.0, 1.0], [3.0, 1.0], [1.0, 3.0], [3.0, -1.0]], np.float32)
LABELS = np.array([0, 1, 2, 1], np.int32)


def test_samples_and_centers_are_where_they_are():
    ax = jcl.plot(CENTERS, X, LABELS)
    samples, centers = dots(ax)
    np.testing.assert_array_equal(samples[0], X)
    np.testing.assert_array_equal(centers[0], CENTERS[:3])  # The last class has no sample.
    np.testing.assert_array_equal(samples[1][:3], centers[1])
    np.testing.assert_array_equal(samples[1][3], centers[1][1])
    assert len(np.unique(centers[1], axis=0)) == 3
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["0", "1", "2"]
    for handle, color in zip(ax.get_legend().legend_handles, centers[1], strict=True):
        np.testing.assert_array_equal(handle.get_facecolors()[0], color)
    assert ax.get_aspect() == 1.0
    ax.figure.canvas.draw()  # It can be drawn.


@pytest.mark.parametrize("density", [False, True])
def test_ignored_samples_are_left_out(density):
    labels = np.array([0, 1, -1, 1])
    x = X.copy()
    x[1] = np.nan, 50.0
    ax = jcl.plot(CENTERS, x, labels, where=np.array([True, True, True, False]), density=density)
    *samples, centers = dots(ax)
    np.testing.assert_array_equal(centers[0], CENTERS[:1])
    if density:
        assert np.count_nonzero(ax.images[0].get_array()[..., 3]) == 1
    else:
        np.testing.assert_array_equal(samples[0][0], X[:1])


def test_arrows_lead_from_the_former_centers():
    former = CENTERS + np.float32([[-1, 2], [0, 0], [4, 1], [1, 1]])
    ax = jcl.plot({"centers": jnp.asarray(CENTERS)}, X, LABELS, previous={"centers": former})
    (arrows,) = [c for c in ax.collections if isinstance(c, Quiver)]
    np.testing.assert_allclose(arrows.XY, former[:3])
    np.testing.assert_allclose(np.stack([arrows.U, arrows.V], -1), CENTERS[:3] - former[:3])
    assert (arrows.angles, arrows.scale, arrows.scale_units) == ("xy", 1, "xy")
    (low, high) = ax.viewLim.min, ax.viewLim.max
    assert np.all(low <= former[:3].min(0))
    assert np.all(high >= former[:3].max(0))


def test_density_is_a_mean_of_colors_and_a_count():
    # Three places far apart: 99 of class 0; one of class 1; one each of classes 0 and 1.
    places = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], np.float32)
    x = np.concatenate([np.repeat(places[:1], 99, 0), places[1:2], places[2:], places[2:]])
    labels = np.array([0] * 99 + [1, 0, 1])
    ax = jcl.plot(CENTERS, x, labels, density=True)
    ((_, (first, second)),) = dots(ax)  # No dots but the two centers.
    image = ax.images[0]
    left, right, bottom, top = image.get_extent()
    pixels = np.asarray(image.get_array())
    size = pixels.shape[0]
    column = ((places[:, 0] - left) / (right - left) * size).astype(int)
    row = ((places[:, 1] - bottom) / (top - bottom) * size).astype(int)
    found = pixels[row, column]
    np.testing.assert_allclose(found[:, :3], [first[:3], second[:3], (first[:3] + second[:3]) / 2])
    assert found[0, 3] == 1.0 > found[2, 3] > found[1, 3] > 0.15
    assert np.count_nonzero(pixels[..., 3]) == 3
    assert image.origin == "lower"


def test_many_samples_become_a_density():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(20_001, 2)), rng.integers(0, 4, 20_001)
    assert len(jcl.plot(CENTERS, x[1:], labels[1:]).images) == 0
    assert len(jcl.plot(CENTERS, x, labels).images) == 1
    assert len(jcl.plot(CENTERS, x, labels, density=False).images) == 0


@pytest.mark.parametrize(("classes", "named"), [(10, 10), (20, 20), (21, 0), (5000, 0)])
def test_each_class_has_a_color_and_few_have_names(classes, named):
    rng = np.random.default_rng(0)
    labels = np.arange(classes)
    ax = jcl.plot(rng.normal(size=(classes, 2)), rng.normal(size=(classes, 2)), labels)
    colors = dots(ax)[1][1]
    assert len(np.unique(colors[:100], axis=0)) == min(classes, 100)
    assert (len(ax.get_legend().get_texts()) if named else ax.get_legend()) == (named or None)


def test_few_classes_of_many_are_told_apart():
    rng = np.random.default_rng(0)
    labels = np.array([7, 300_000, 999_999, 7])
    ax = jcl.plot(np.zeros((1_000_000, 2), np.float32), rng.normal(size=(4, 2)), labels)
    samples, centers = dots(ax)
    assert len(np.unique(centers[1], axis=0)) == 3
    np.testing.assert_array_equal(samples[1], centers[1][[0, 1, 2, 0]])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["7", "300000", "999999"]


def test_draws_on_given_axes_sequences_and_half_precision():
    figure, (first, second) = plt.subplots(1, 2)
    x = jnp.asarray(X, jnp.bfloat16).reshape(2, 2, 2)
    assert jcl.plot(CENTERS, x, LABELS.reshape(2, 2), ax=second) is second
    assert not first.collections
    np.testing.assert_array_equal(dots(second)[0][0], X)
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_sharded_centers_are_drawn(kind):
    axis = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((4,), ("classes",), axis_types=(axis,), devices=jax.devices()[:4])
    table = jax.device_put(
        CENTERS, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("classes", None))
    )
    ax = jcl.plot(table, X, LABELS, previous=jnp.copy(table))
    np.testing.assert_array_equal(dots(ax)[1][0], CENTERS[:3])


def test_features_as_large_as_float32_goes():
    x = np.array([[3e38, 0], [-3e38, 0], [0, 3e38]], np.float32)
    for density in (False, True):
        jcl.plot(CENTERS, x, LABELS[:3], density=density).figure.canvas.draw()


def test_no_samples_draw_an_empty_plane():
    for density in (False, True):
        ax = jcl.plot(CENTERS, X, np.full(4, -1), previous=CENTERS.copy(), density=density)
        assert dots(ax) == []
        ax.figure.canvas.draw()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros((4, 3)), np.zeros((5, 3)), np.zeros(5, int)), ValueError, "two dimensions, got 3.*PCA"),
        ((CENTERS, X, LABELS.astype(float)), TypeError, "labels must be integers"),
        ((CENTERS, X, LABELS + 3), ValueError, "label 4 is out of range for 4 classes"),
        ((CENTERS, X[:3], LABELS), ValueError, "leading dimensions"),
        ((CENTERS, X, LABELS, CENTERS[:2]), ValueError, "previous"),
    ],
    ids=["three dimensions", "labels of floats", "label out of range", "too few samples", "former centers"],
)
def test_refuses(arguments, error, message):
    centers, x, labels, *previous = arguments
    with pytest.raises(error, match=message):
        jcl.plot(centers, x, labels, **dict(zip(["previous"], previous, strict=False)))
    assert not plt.get_fignums()


def test_under_jit_it_says_what_jax_says():
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(lambda x: jcl.plot(CENTERS, x, LABELS) and x)(X)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"jax-centerloss\[plot\]"):
        jcl.plot(CENTERS, X, LABELS)
