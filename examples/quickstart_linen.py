"""Center loss in Flax Linen, on digits: `python examples/quickstart_linen.py` draws ten compact clusters."""

import argparse
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jax_centerloss

EPOCHS, BATCH_SIZE = 60, 64
LAM = optax.linear_schedule(0.0, 0.01, transition_steps=200)  # The weight of the center loss, warmed up.


class Model(nn.Module):
    @nn.compact
    def __call__(self, images, labels):  # Where there are no labels, pass -1.
        x = nn.Dense(2)(nn.relu(nn.Dense(128)(nn.relu(nn.Dense(128)(images)))))
        center_loss = jax_centerloss.linen.CenterLoss(10, 2, name="center_loss")(x, labels)
        return x, nn.Dense(10, use_bias=False)(x), center_loss


@partial(jax.jit, donate_argnums=0)
def train_step(state, images, labels):
    lam = LAM(optax.tree_utils.tree_get(state.opt_state, "center_step"))

    def loss_fn(params):
        _, logits, center_loss = state.apply_fn({"params": params}, images, labels)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return cross_entropy + lam * center_loss

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    picture = parser.parse_args(argv).out / "quickstart_linen.png"
    pixels, digits = load_digits(return_X_y=True)
    images, test_images, labels, test_labels = train_test_split(pixels / 16, digits, random_state=0)

    model, batches, shuffle = Model(), len(images) // BATCH_SIZE, np.random.default_rng(0)
    params = model.init(jax.random.key(0), images[:1], labels[:1])["params"]
    tx = optax.sgd(optax.cosine_decay_schedule(0.1, EPOCHS * batches), momentum=0.9)
    tx = jax_centerloss.with_center_optimizer(tx, centers=optax.sgd(0.5), weight=LAM)  # 0.5, whatever LAM is.
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    for _ in (bar := tqdm(range(EPOCHS), unit="epoch")):
        for batch in shuffle.permutation(len(images))[: batches * BATCH_SIZE].reshape(batches, -1):
            state, loss = train_step(state, images[batch], labels[batch])
        bar.set_postfix(loss=f"{loss:.3f}")

    x, logits, _ = model.apply({"params": state.params}, test_images, test_labels)
    print(f"test accuracy: {(logits.argmax(-1) == test_labels).mean():.1%}")
    metrics = jax_centerloss.center_metrics(state.params["center_loss"], x, test_labels)
    print(", ".join(f"{name}: {value:.2f}" for name, value in metrics.items()))
    picture.parent.mkdir(parents=True, exist_ok=True)
    jax_centerloss.plot(state.params["center_loss"], x, test_labels).figure.savefig(picture)
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()
