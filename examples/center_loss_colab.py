# ---
# jupyter:
#   colab:
#     provenance: []
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Tutorial
#
# You train a small network on handwritten digits, with softmax alone and with center loss, and judge what center loss
# did. It takes ten minutes to read and about one to run, on a CPU, with scikit-learn and matplotlib installed. Your
# numbers will differ a little. [Open it in
# Colab](https://colab.research.google.com/github/jax-centerloss/jax-centerloss/blob/main/examples/center_loss_colab.ipynb)
# to change it as you go.
#
# [Center loss](https://doi.org/10.1007/978-3-319-46478-7_31) keeps one vector for each class, its *center*, and pulls
# the features of a sample towards the center of its class. It is added to the cross-entropy:
# `loss = cross_entropy + λ * center_loss`.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jax_centerloss") is None:
    # --no-deps: the jax, flax and optax that are installed stay as they are.
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
    subprocess.run([*pip, "git+https://github.com/jax-centerloss/jax-centerloss"], check=True)
    importlib.invalidate_caches()

import flax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jax_centerloss

print(f"jax {jax.__version__}, flax {flax.__version__}")

# %% [markdown]
# ## Data
#
# Scikit-learn brings 1,797 pictures of digits, 8 × 8 pixels each. A quarter is kept for the test. Labels are integers
# from 0 to C - 1.

# %%
pixels, digits = load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = train_test_split(
    np.float32(pixels / 16), np.int32(digits), test_size=0.25, stratify=digits, random_state=0
)
print(train_x.shape, test_x.shape)

# %% [markdown]
# ## Network
#
# *Features* are what goes into the last layer. Here they are two, so that they can be drawn. `CenterLoss` holds the ten
# centers. With `centers_as="state"` they are no parameters: they have no gradient, the optimizer does not see them, and
# a rule moves them.


# %%
class Model(nnx.Module):
    def __init__(self, rngs):
        self.hidden1 = nnx.Linear(64, 128, rngs=rngs)
        self.hidden2 = nnx.Linear(128, 128, rngs=rngs)
        self.embed = nnx.Linear(128, 2, rngs=rngs)
        self.head = nnx.Linear(2, 10, use_bias=False, rngs=rngs)
        self.center_loss = jax_centerloss.nnx.CenterLoss(10, 2, centers_as="state", rngs=rngs)

    def features(self, images):
        x = nnx.relu(self.hidden1(images))
        x = nnx.relu(self.hidden2(x))
        return self.embed(x)


# %% [markdown]
# ## Training step
#
# The features go into the center loss, not the logits. After the optimizer's step, `update_centers` moves the centers
# of the classes in the batch towards their samples. Its rate α does not depend on λ, so that centers follow their
# classes at λ = 0, too, and the runs can be compared. `donate_argnums` and `after=loss` let JAX write the centers in
# place. (As parameters, with an optimizer of their own, they would rest at λ = 0.) `norm` is the weight of the control, a
# penalty on the norm of the features, with which center loss is compared below.


# %%
@nnx.jit(donate_argnums=(0, 1))
def train_step(model, optimizer, images, labels, lam, alpha, norm):
    def loss_fn(model):
        x = model.features(images)
        loss = optax.softmax_cross_entropy_with_integer_labels(model.head(x), labels).mean()
        loss += lam * model.center_loss(x, labels)
        loss += norm * jnp.mean(jnp.sum(x**2, axis=-1))
        return loss, x

    (loss, x), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    model.center_loss.update_centers(x, labels, alpha=alpha, after=loss)
    return loss


@nnx.jit
def predict(model, images):
    x = model.features(images)
    return x, model.head(x).argmax(-1)


# %% [markdown]
# ## Training
#
# λ is *warmed up*: it rises from 0 over the first twelve epochs. Features and centers start far apart, and a strong
# pull from the first step on can make the features collapse or the loss NaN. After each epoch `center_metrics` measures
# the test set. `previous` is a copy of the centers from before the epoch.

# %%
EPOCHS, WARM_UP, BATCH = 60, 12, 64
BATCHES = len(train_y) // BATCH


def train(lam, alpha=0.5, norm=0.0):
    model = Model(nnx.Rngs(0))
    tx = optax.sgd(optax.cosine_decay_schedule(0.1, EPOCHS * BATCHES), momentum=0.9)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    shuffle, history = np.random.default_rng(0), []
    for epoch in range(EPOCHS):
        warm = min(1.0, epoch / WARM_UP)
        previous = jnp.copy(model.center_loss.centers[...])
        losses = []
        for batch in shuffle.permutation(len(train_y))[: BATCHES * BATCH].reshape(BATCHES, -1):
            weights = warm * lam, alpha, warm * norm
            loss = train_step(model, optimizer, train_x[batch], train_y[batch], *weights)
            losses.append(loss)
        x, _ = predict(model, test_x)
        metrics = jax_centerloss.center_metrics(model.center_loss, x, test_y, previous=previous)
        history.append({"loss": np.mean(losses), **metrics})
    return model, history


runs = {f"λ = {lam:g}": train(lam) for lam in (0.0, 0.01, 0.1)}
for name, (_, history) in runs.items():
    first, last = history[0]["loss"], history[-1]["loss"]
    print(f"{name:8}  first loss {first:.2f}, last loss {last:.3f}")

# %% [markdown]
# First look at the curves. The loss of each run has to fall; losses of different λ are different sums, and cannot be
# compared. `ratio` can: it is the mean distance to the center of the own class, over the mean distance to the nearest
# other center. The lower it is, the more compact are the classes.

# %% mystnb={"image": {"alt": "Loss and ratio by epoch for three values of λ: the higher λ, the lower the ratio"}}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for name, (_, history) in runs.items():
    left.plot([epoch["loss"] for epoch in history], label=name)
    right.plot([epoch["ratio"] for epoch in history], label=name)
left.set(title="loss", xlabel="epoch", yscale="log")
right.set(title="ratio", xlabel="epoch", ylim=0)
right.legend()
plt.show()

# %% [markdown]
# ## The picture
#
# `plot` draws the features of the test set, a color for each class, and the centers as crosses. Each plane has its own
# scale: at λ = 0 features lie up to 70 from the middle, at λ = 0.1 up to 9. `ratio` does not depend on the scale.

# %% mystnb={"image": {"alt": "The features of ten digits: long petals at λ = 0, ten compact clusters at λ = 0.1"}}
figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
for ax, (name, (model, history)) in zip(axes, runs.items(), strict=True):
    jax_centerloss.plot(model.center_loss, predict(model, test_x)[0], test_y, ax=ax)
    ax.set(title=f"{name}: ratio {history[-1]['ratio']:.2f}", xlabel="", ylabel="")
    handles = ax.get_legend().legend_handles
    ax.get_legend().remove()
figure.legend(handles=handles, title="digit", loc="outside right")
plt.show()

# %% [markdown]
# ## Health numbers
#
# `own_distance` is how far a sample is from the center of its class, and `gap` how much farther the nearest other center
# is. Two more runs belong beside them. The *control* has no center loss: a penalty on the norm of the features shrinks all
# classes towards 0. In the last run the centers are frozen (α = 0), to show what that looks like.

# %%
runs["control, norm 0.01"] = train(lam=0.0, norm=0.01)
runs["λ = 0.1, frozen"] = train(lam=0.1, alpha=0.0)

keys = "own_distance", "gap", "ratio", "moved"
print(f"{'':18}  own_distance    gap  ratio  moved  accuracy  nearest center")
for name, (model, history) in runs.items():
    own, gap, ratio, moved = (history[-1][key] for key in keys)
    x, found = predict(model, test_x)
    accuracy = jnp.mean(found == test_y)
    nearest = jnp.mean(jax_centerloss.nearest_center(model.center_loss, x) == test_y)
    distances = f"{own:14.2f}{gap:7.2f}{ratio:7.2f}{moved:7.2f}"
    print(f"{name:18}{distances}{accuracy:10.1%}{nearest:16.1%}")

# %% [markdown]
# ## Judge the run
#
# - **`ratio`** judges, beside the ratio that λ = 0 gives: it fell from 0.45 to 0.26 and 0.20.
# - **`own_distance` below `gap`** holds for softmax alone, too, and proves nothing. If it does not hold, as in the last
#   row, something is wrong.
# - **`moved`** is how far the centers went in the last epoch. It falls as training settles; 0 means that nothing moves
#   them.
# - **Accuracy** is that of the softmax layer. One picture is 0.2 %, so that a percent or two between single runs is
#   chance. *Nearest center* classifies by distance alone, and rose from 89 % to 97 %: center loss can help where a
#   distance decides, as in verification, or in finding what belongs to no class.
# - **The control**, at a weight of 0.01, is level with center loss at λ = 0.01. Run it on your data before you settle on
#   center loss.
#   [Results](https://jax-centerloss.github.io/jax-centerloss/results.html) has other tasks, over several seeds.
#
# ## What to change next
#
# - Use your data and network, with λ = 0.01, warmed up, and λ = 0 beside it. Then [choose λ and
#   α](https://jax-centerloss.github.io/jax-centerloss/choosing.html).
# - Let an optimizer move the centers, or the rows of a batch:
#   [Ways to move centers](https://jax-centerloss.github.io/jax-centerloss/moving_centers.html). From some ten thousand
#   classes on, see [Many classes](https://jax-centerloss.github.io/jax-centerloss/many_classes.html).
# - Train in Flax Linen, with plain functions, or on padded sequences:
#   [Getting started](https://jax-centerloss.github.io/jax-centerloss/getting_started.html).
# - Bring a script or a checkpoint (`from_torch`):
#   [Coming from PyTorch](https://jax-centerloss.github.io/jax-centerloss/coming_from.html).
# - [Evaluate, save and deploy](https://jax-centerloss.github.io/jax-centerloss/deploy.html): no center loss is needed
#   for inference.
# - If your numbers look otherwise, find the symptom in
#   [Troubleshooting](https://jax-centerloss.github.io/jax-centerloss/troubleshooting.html).
