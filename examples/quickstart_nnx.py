"""Center loss in Flax NNX, on digits: `python examples/quickstart_nnx.py` draws ten compact clusters."""

import argparse
from pathlib import Path

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jax_centerloss

EPOCHS, BATCH_SIZE = 60, 64
LAM = optax.linear_schedule(0.0, 0.01, transition_steps=200)  # The weight of the center loss, warmed up.


class Model(nnx.Module):
    def __init__(self, rngs):
        hidden = (nnx.Linear(64, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 128, rngs=rngs), nnx.relu)
        self.features = nnx.Sequential(*hidden, nnx.Linear(128, 2, rngs=rngs))
        self.head = nnx.Linear(2, 10, use_bias=False, rngs=rngs)
        self.center_loss = jax_centerloss.nnx.CenterLoss(10, 2, rngs=rngs)


@nnx.jit(donate_argnums=(0, 1))
def train_step(model, optimizer, images, labels):
    lam = LAM(optax.tree_utils.tree_get(optimizer.opt_state, "center_step")[...])

    def loss_fn(model):
        x = model.features(images)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(model.head(x), labels).mean()
        return cross_entropy + lam * model.center_loss(x, labels)

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    picture = parser.parse_args(argv).out / "quickstart_nnx.png"
    pixels, digits = load_digits(return_X_y=True)
    images, test_images, labels, test_labels = train_test_split(pixels / 16, digits, random_state=0)

    model, batches, shuffle = Model(nnx.Rngs(0)), len(images) // BATCH_SIZE, np.random.default_rng(0)
    tx = optax.sgd(optax.cosine_decay_schedule(0.1, EPOCHS * batches), momentum=0.9)
    # The centers have an optimizer of their own: with weight=LAM its rate is 0.5, whatever LAM is.
    tx = jax_centerloss.with_center_optimizer(tx, centers=optax.sgd(0.5), weight=LAM)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in (bar := tqdm(range(EPOCHS), unit="epoch")):
        for batch in shuffle.permutation(len(images))[: batches * BATCH_SIZE].reshape(batches, -1):
            loss = train_step(model, optimizer, images[batch], labels[batch])
        bar.set_postfix(loss=f"{loss:.3f}")

    x = model.features(test_images)
    print(f"test accuracy: {(model.head(x).argmax(-1) == test_labels).mean():.1%}")
    metrics = jax_centerloss.center_metrics(model.center_loss, x, test_labels)
    print(", ".join(f"{name}: {value:.2f}" for name, value in metrics.items()))
    picture.parent.mkdir(parents=True, exist_ok=True)
    jax_centerloss.plot(model.center_loss, x, test_labels).figure.savefig(picture)
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()
