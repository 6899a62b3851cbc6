"""The paper's picture: two-dimensional features, their centers, and how the centers moved."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from jax_centerloss import _batch, _checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_DOTS = 20_000  # More dots hide each other and take long to draw.
_BINS = 200  # The density image has so many pixels along each axis.
_LEGEND_CLASSES = 20  # With more classes there is no legend: their colors can't be told apart.


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

    It shows what center loss does: with softmax alone the classes are long petals around the origin, and the
    larger the weight of the center loss, the more they shrink to clusters around their centers. Arrows from
    `previous` show whether centers move. Both axes have the same scale, since the loss is a distance.

    With more than 20 classes there is no legend; `ax.get_legend().remove()` removes one. Features of more
    dimensions have to be projected first, together with the centers. With scikit-learn: `pca =
    PCA(2).fit(x)`, then `plot(pca.transform(centers), pca.transform(x), labels)`.

    Args:
      params: a pytree with one leaf, the `(C, 2)` centers.
      x: features `(..., 2)`, floating point. NaN and infinite ones are not drawn.
      labels: integer classes `(...)`. A negative label leaves its sample out. A label `>= C` raises, unless
        `where` leaves its sample out.
      where: boolean `(...)`, the samples to draw; all by default.
      previous: earlier centers, in the form of `params`: for each class that is drawn, an arrow goes from its
        earlier center to its center now.
      density: whether to draw an image of the density instead of a dot per sample, by default for more than
        20,000 samples. The opacity shows the number of samples, and the color is the mean of their colors.
      ax: the Matplotlib axes to draw on, those of a new figure by default.

    Returns:
      The axes. `ax.figure.savefig("features.png")` saves the picture.

    Raises:
      ImportError: without Matplotlib; `pip install "jax-centerloss[plot]"` installs it.
      ValueError: on features that are not two-dimensional, a shape that does not fit, a label `>= C`, or a
        `previous` that is no earlier table.
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
    centers = _checks.as_table(params)
    if centers.shape[1] != 2:
        raise ValueError(
            f"plot draws features of two dimensions, got {centers.shape[1]}. Project features and centers "
            "alike first, for example with one sklearn.decomposition.PCA(2)."
        )
    if previous is not None:
        previous = np.asarray(_checks.as_previous_table(params, previous, centers), np.float64)
    x, labels, used, _ = _batch.as_batch(x, labels, where, None, centers)
    # NumPy from here on, since a picture is drawn on the host.
    table, points = np.asarray(centers, np.float64), np.asarray(x, np.float64).reshape(-1, 2)
    drawn = np.asarray(used).ravel() & np.isfinite(points).all(-1)
    points, classes = points[drawn], np.asarray(labels).ravel()[drawn]
    seen = np.unique(classes)
    # If the table has few classes, a class has the same color in every picture.
    colored = np.arange(len(table)) if len(table) <= _LEGEND_CLASSES else seen

    ax = _new_axes() if ax is None else ax
    colors = _colors(len(colored))
    point_colors, class_colors = (colors[np.searchsorted(colored, array)] for array in (classes, seen))
    if density or (density is None and len(points) > _MOST_DOTS):
        _draw_density(ax, points, point_colors)
    else:
        size = float(np.clip(16 * 1000 / max(len(points), 1), 2, 16))
        ax.scatter(points[:, 0], points[:, 1], s=size, c=point_colors, linewidths=0)
    now = table[seen]
    if previous is not None:
        start = previous[seen]
        ax.quiver(*start.T, *(now - start).T, angles="xy", scale_units="xy", scale=1, width=0.005, zorder=3)
        ax.update_datalim(start)
    ax.scatter(now[:, 0], now[:, 1], s=80, c=class_colors, marker="X", edgecolors="black", zorder=4)
    ax.set(xlabel="feature 1", ylabel="feature 2")
    ax.set_aspect("equal", adjustable="datalim")
    ax.autoscale_view()
    if 0 < len(seen) <= _LEGEND_CLASSES:
        pairs = zip(seen, class_colors, strict=True)
        handles = [ax.scatter([], [], s=30, color=color, label=str(j)) for j, color in pairs]
        ax.legend(handles=handles, title="class", fontsize="small")
    return ax


def _new_axes() -> "Axes":
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError('plot needs Matplotlib: `pip install "jax-centerloss[plot]"`.') from error
    return pyplot.subplots(layout="constrained")[1]


def _colors(count: int) -> np.ndarray:
    """`(count, 4)` colors: Matplotlib's qualitative ones if there are enough, else hues."""
    from matplotlib import colormaps

    if count <= _LEGEND_CLASSES:
        return np.asarray(colormaps["tab10" if count <= 10 else "tab20"](np.arange(count)))
    # Steps of the golden ratio give neighbors hues that are far apart.
    return np.asarray(colormaps["hsv"](np.arange(count) * 0.618034 % 1))


def _draw_density(ax: "Axes", points: np.ndarray, colors: np.ndarray) -> None:
    """An image of mean colors, at a cost that does not depend on the number of classes."""
    if not len(points):
        return
    low, high = points.min(0), points.max(0)
    # Half of the width, and 4 percent for a margin.
    middle, half = (low + high) / 2, max(0.52 * float((high - low).max()), 1e-6)
    left, bottom = (middle - half).tolist()
    right, top = (middle + half).tolist()
    # The bins are square, since both axes have the same scale.
    column, row = np.clip((points - (left, bottom)) / (2 * half) * _BINS, 0, _BINS - 1).astype(int).T
    image = np.zeros((_BINS, _BINS, 4))
    np.add.at(image, (row, column), np.append(colors[:, :3], np.ones((len(points), 1)), axis=1))
    count = image[..., 3]
    image[..., :3] /= np.maximum(count, 1)[..., None]
    # The opacity is logarithmic in the count: on a linear scale few samples would be invisible.
    image[..., 3] = np.where(count > 0, 0.15 + 0.85 * np.log1p(count) / np.log1p(count.max()), 0)
    ax.imshow(image, extent=(left, right, bottom, top), origin="lower", interpolation="nearest")
