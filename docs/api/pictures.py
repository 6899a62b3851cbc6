"""Draws the pictures of the API pages: `python docs/api/pictures.py`, with scikit-learn and Matplotlib."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

import jax_centerloss

OUT = Path(__file__).resolve().parents[1] / "_static"


def features(weights, images):
    return jax.nn.relu(images @ weights["hidden"] + weights["bias"]) @ weights["out"]


def draw_plot():
    """Features of digits early and late in one training, and how far the centers moved in one epoch."""
    digits = load_digits()
    images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
    keys = jax.random.split(jax.random.key(0), 3)
    weights = {
        "hidden": 0.2 * jax.random.normal(keys[0], (64, 128)),
        "bias": jnp.zeros(128),
        "out": 0.1 * jax.random.normal(keys[1], (128, 2)),
        "head": 0.5 * jax.random.normal(keys[2], (2, 10)),
    }
    centers, tx = jnp.zeros((10, 2)), optax.adam(3e-3)
    state = tx.init(weights)

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(weights, state, centers, images, labels):
        def loss_fn(weights):
            x = features(weights, images)
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels(
                x @ weights["head"], labels
            ).mean()
            return cross_entropy + 0.03 * jax_centerloss.center_loss(centers, x, labels), x

        (loss, x), grads = jax.value_and_grad(loss_fn, has_aux=True)(weights)
        updates, state = tx.update(grads, state, weights)
        centers = jax_centerloss.update_centers(centers, x, labels, after=loss)
        return optax.apply_updates(weights, updates), state, centers

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    order = np.random.default_rng(0)
    for epoch in range(1, 61):
        previous = jnp.copy(centers)
        for batch in np.array_split(order.permutation(len(labels)), 28):
            weights, state, centers = step(weights, state, centers, images[batch], labels[batch])
        if epoch in (5, 60):
            ax = axes[0 if epoch == 5 else 1]
            jax_centerloss.plot(centers, features(weights, images), labels, previous=previous, ax=ax)
            ax.set_title(f"epoch {epoch}")
    axes[0].get_legend().remove()
    legend = axes[1].get_legend()
    legend.set_loc("upper left")
    legend.set_bbox_to_anchor((1.0, 1.0))
    figure.savefig(OUT / "plot.png", dpi=140)


def draw_metrics():
    """What the numbers of `center_metrics` are lengths of."""
    random = np.random.default_rng(3)
    own, other, before = np.array([0.0, 0.0]), np.array([3.2, 0.6]), np.array([-0.75, -1.0])
    figure, ax = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    for center, color, name in (
        (own, "tab:blue", "own center"),
        (other, "tab:orange", "nearest other center"),
    ):
        cloud = center + 0.35 * random.standard_normal((40, 2))
        ax.scatter(*cloud.T, s=12, color=color, alpha=0.35, linewidths=0)
        ax.scatter(*center, s=140, color=color, marker="X", edgecolors="black", zorder=3)
        ax.annotate(name, center, (0, 12), textcoords="offset points", ha="center", weight="bold")
    sample = np.array([0.75, -0.75])
    ax.scatter(*sample, s=60, color="tab:blue", edgecolors="black", zorder=3)
    ax.annotate("a sample", sample, (0, -16), textcoords="offset points", ha="center")
    for end, name, shift in ((own, "a", (-10, -6)), (other, "b", (4, -12))):
        ax.plot(*zip(sample, end, strict=True), color="black", linewidth=1)
        ax.annotate(name, (sample + end) / 2, shift, textcoords="offset points", style="italic", size=13)
    ax.annotate("", own, before, arrowprops={"arrowstyle": "->", "linestyle": "--", "shrinkB": 6})
    ax.annotate("m", (own + before) / 2, (-14, 2), textcoords="offset points", style="italic", size=13)
    ax.annotate("the same center in previous", before, (0, -13), textcoords="offset points", ha="center")
    ax.set_aspect("equal")
    ax.set_ylim(-1.3, 1.5)
    ax.axis("off")
    figure.savefig(OUT / "center_metrics.svg")


if __name__ == "__main__":
    plt.switch_backend("agg")
    plt.rcParams["svg.hashsalt"] = "center_metrics"  # The same file in every run.
    OUT.mkdir(exist_ok=True)
    draw_plot()
    draw_metrics()
