"""The paper's picture: two-dimensional features, their centers, and how the centers moved."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from jax_centerloss import _batch, _checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MANY = 20_000  # Points above which dots hide each other, and take long to draw.
_BINS = 200
_NAMED = 20  # Classes that the legend names, at most: as many colors as can be told apart.


def plot(
    params: Any,
    x: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    previous: Any = None,
    density: bool | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws features of two dimensions, colored by class, with the centers of their classes.

    It shows what center loss does: with softmax alone, classes are long petals around the origin; the larger
    the weight of the center loss, the more they shrink to clusters around their centers. Arrows from
    `previous` show whether centers move. Both axes have one scale, since the loss is a distance.

    The legend names up to 20 classes; `ax.get_legend().remove()` takes it away again.
    Features of more dimensions have to be projected first, centers along with them: with scikit-learn,
    `pca = PCA(2).fit(x)`, then `plot(pca.transform(centers), pca.transform(x), labels)`.

    Args:
      params: a pytree with one leaf, the `(C, 2)` centers.
      x: features `(..., 2)`, floating point. Features that are not finite are left out.
      labels: integer classes `(...)`. Samples whose label is negative are left out.
      where: boolean `(...)`, the samples to draw; all by default.
      previous: earlier centers, in the form of `params`: an arrow leads from each to where it is now.
      density: whether to draw, instead of a dot for each sample, how many there are at each place: the more,
        the less transparent, in the mean of their classes' colors. By default above 20,000 samples.
      ax: the Matplotlib axes to draw on, those of a new figure by default.

    Returns:
      The axes. `ax.figure.savefig("features.png")` saves the picture.

    Raises:
      ImportError: without Matplotlib, which the extra `jax-centerloss[plot]` brings.
      ValueError: on features that are not two-dimensional or a shape that does not fit.
      TypeError: on a dtype that does not fit, as in `center_loss`.

    Example:
      >>> import jax.numpy as jnp, jax_centerloss
      >>> centers = jnp.array([[0.0, 0.0], [3.0, 0.0]])
      >>> x, labels = jnp.array([[0.0, 1.0], [3.0, 1.0], [3.0, -1.0]]), jnp.array([0, 1, 1])
      >>> ax = jax_centerloss.plot(centers, x, labels, previous=centers - 1.0)
      >>> ax.get_legend().get_title().get_text()
      'class'

    Reference:
      Wen, Zhang, Li, Qiao, *A Discriminative Feature Learning Approach for Deep Face Recognition*, ECCV 2016,
      figures 2 and 3.
    """
    centers = _checks.table(params)
    if centers.shape[1] != 2:
        raise ValueError(
            f"plot draws features of two dimensions, got {centers.shape[1]}. Project features and centers "
            "first, for example with sklearn.decomposition.PCA(2)."
        )
    then = None if previous is None else np.asarray(_checks.previous(params, previous, centers), np.float64)
    x, labels, used, _ = _batch.batch(x, labels, where, None, centers)
    # NumPy from here on: a picture is made on the host, wherever the arrays lie.
    table, points = np.asarray(centers, np.float64), np.asarray(x, np.float64).reshape(-1, 2)
    drawn = np.asarray(used).ravel() & np.isfinite(points).all(-1)
    points, classes = points[drawn], np.asarray(labels).ravel()[drawn]
    seen = np.unique(classes)
    # A class has one color in all pictures of a table, if its classes are few; else one among those drawn.
    colored = np.arange(len(table)) if len(table) <= _NAMED else seen

    ax = _new_axes() if ax is None else ax
    colors = _colors(len(colored))
    if len(points) > _MANY if density is None else density:
        _draw_density(ax, points, colors[np.searchsorted(colored, classes)])
    else:
        size = float(np.clip(16 * 1000 / max(len(points), 1), 2, 16))
        ax.scatter(
            points[:, 0], points[:, 1], s=size, c=colors[np.searchsorted(colored, classes)], linewidths=0
        )
    now, own = table[seen], colors[np.searchsorted(colored, seen)]
    if then is not None:
        start = then[seen]
        ax.quiver(*start.T, *(now - start).T, angles="xy", scale_units="xy", scale=1, width=0.005, zorder=3)
        ax.update_datalim(start)
    ax.scatter(now[:, 0], now[:, 1], s=80, c=own, marker="X", edgecolors="black", zorder=4)
    ax.set(xlabel="feature 1", ylabel="feature 2")
    ax.set_aspect("equal", adjustable="datalim")
    ax.autoscale_view()
    if 0 < len(seen) <= _NAMED:
        handles = [
            ax.scatter([], [], s=30, color=color, label=str(j)) for j, color in zip(seen, own, strict=True)
        ]
        ax.legend(handles=handles, title="class", fontsize="small")
    return ax


def _new_axes() -> "Axes":
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError('plot needs Matplotlib: `pip install "jax-centerloss[plot]"`.') from error
    return pyplot.subplots(layout="constrained")[1]


def _colors(count: int) -> np.ndarray:
    """So many colors, `(count, 4)`: those made to be told apart while they last, then hues."""
    from matplotlib import colormaps

    if count <= _NAMED:
        return np.asarray(colormaps["tab10" if count <= 10 else "tab20"](np.arange(count)))
    # Neighbors get hues far apart: steps of the golden ratio don't come back soon.
    return np.asarray(colormaps["hsv"](np.arange(count) * 0.618034 % 1))


def _draw_density(ax: "Axes", points: np.ndarray, colors: np.ndarray) -> None:
    """An image of the mean color at each place. Its cost does not depend on the number of classes."""
    if not len(points):
        return
    low, high = points.min(0), points.max(0)
    middle, reach = (low + high) / 2, max(0.52 * float((high - low).max()), 1e-6)
    left, bottom = (middle - reach).tolist()
    right, top = (middle + reach).tolist()
    # Square places: both axes have one scale.
    column, row = np.clip((points - (left, bottom)) / (2 * reach) * _BINS, 0, _BINS - 1).astype(int).T
    image = np.zeros((_BINS, _BINS, 4))
    np.add.at(image, (row, column), np.append(colors[:, :3], np.ones((len(points), 1)), axis=1))
    count = image[..., 3]
    image[..., :3] /= np.maximum(count, 1)[..., None]
    # By the logarithm, or the tips of petals vanish beside their crowded middle.
    image[..., 3] = np.where(count > 0, 0.15 + 0.85 * np.log1p(count) / np.log1p(count.max()), 0)
    ax.imshow(image, extent=(left, right, bottom, top), origin="lower", interpolation="nearest")
