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
# # Center loss in JAX
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jax-centerloss/jax-centerloss/blob/main/examples/center_loss_colab.ipynb)
#
# Center loss ([Wen et al., ECCV 2016](https://doi.org/10.1007/978-3-319-46478-7_31)) pulls each feature vector
# towards the center of its class: `loss = cross_entropy + lam * center_loss`. This notebook draws the paper's
# picture on scikit-learn's digits, moves centers in both ways, takes centers over from PyTorch, and asks, with a
# control, what the moving centers add. It takes some three minutes, on a CPU too.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jax_centerloss") is None:
    # --no-deps: the preinstalled jax, flax and optax stay as they are.
    package = "git+https://github.com/jax-centerloss/jax-centerloss"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", package], check=True)
    importlib.invalidate_caches()

import jax
import jax.numpy as jnp
import numpy as np

import jax_centerloss

print(f"JAX {jax.__version__} runs on {jax.devices()[0].device_kind} ({jax.default_backend()}).")

# %% [markdown]
# The [examples](https://github.com/jax-centerloss/jax-centerloss/tree/main/examples) come from this clone, if
# there is one. Each has a `main` that takes its flags: `digits.main(["--help"])` lists them.

# %%
import os
import tempfile
from pathlib import Path

places = [Path(sys.path[0]), Path("."), Path("examples"), Path("jax-centerloss/examples")]
if not any((place / "digits.py").exists() for place in places):
    repository = "https://github.com/jax-centerloss/jax-centerloss"
    subprocess.run(["git", "clone", "-q", "--depth", "1", repository], check=True)
sys.path.insert(0, str(next(place for place in places if (place / "digits.py").exists()).resolve()))

digits = importlib.import_module("digits")
out = tempfile.mkdtemp()
short = os.environ.get("CENTERLOSS_QUICK") == "1"
quick = ["--quick"] if short else []

# %% [markdown]
# ## The picture
#
# A network with two features, with softmax alone and with center loss. Centers move by the paper's own rule.

# %%
from PIL import Image

by_rule = digits.main(["--out", f"{out}/by_rule", *quick])
Image.open(by_rule["picture"])

# %% [markdown]
# ## The other way to move centers
#
# As parameters of the model, by a chain of optax that is their own: `jax_centerloss.with_center_optimizer`.

# %%
by_optax = digits.main(["--out", f"{out}/by_optax", "--centers", "optax", *quick])
Image.open(by_optax["picture"])

# %% [markdown]
# ## Do they move?
#
# Centers that don't move are what goes wrong most often. `center_metrics` tells, and `plot` shows it: an arrow
# leads from where each center was to where it is. Here there is no network at all: the features are the digits on
# their first two main directions, and the centers walk from where they were drawn towards the digits' means.

# %%
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

data = load_digits()
x = jnp.asarray(PCA(2, random_state=0).fit_transform(data.data), jnp.float32)
labels = jnp.asarray(data.target, jnp.int32)

move = jax.jit(jax_centerloss.update_centers, donate_argnums=0)
start = jax_centerloss.init_centers(jax.random.key(0), num_classes=10, feat_dim=2)
params = jax.tree.map(jnp.copy, start)  # What is donated is gone afterwards; `start` stays.
for _ in range(3):
    params = move(params, x, labels, alpha=0.5)
    metrics = jax_centerloss.center_metrics(params, x, labels, previous=start)
    print({name: round(float(value), 2) for name, value in metrics.items()})
ax = jax_centerloss.plot(params, x, labels, previous=start)
ax.figure.savefig(Path(out) / "moves.png")  # A notebook shows it below, as the pictures above.
print(f"The way of the centers: {out}/moves.png")

# %% [markdown]
# ## Centers from PyTorch
#
# `from_torch` takes a state dict or a file, and the loss is the number that the PyTorch module returns.

# %%
if importlib.util.find_spec("torch") is None:
    print("PyTorch is not installed here; a mapping of arrays does as well.")
    source = {"center_loss.centers": np.random.default_rng(0).normal(size=(10, 2)).astype(np.float32)}
    table = source["center_loss.centers"]
else:
    import torch

    torch.save({"center_loss.centers": torch.randn(10, 2)}, Path(out) / "model.pt")
    source = Path(out) / "model.pt"
    table = torch.load(source)["center_loss.centers"].numpy()

params = jax_centerloss.from_torch(source, key="center_loss.centers")
# What the module computes: all distances, those of other classes masked to 0, then clamped.
distances = ((np.asarray(x)[:, None] - table) ** 2).sum(-1) * (np.asarray(labels)[:, None] == np.arange(10))
print("by the module's formula:", np.clip(distances, 1e-12, 1e12).sum() / len(x))
print("here:                   ", jax_centerloss.center_loss(params, x, labels))

# %% [markdown]
# ## What do the moving centers add?
#
# A sceptic's question: is it the centers that help, or just that features are pulled in? So there is a third arm,
# whose centers stay near zero. All three train on the digits 0 to 6 and then verify pairs of the digits 7 to 9,
# which they never saw. A single seed on three digits only shows how it is asked; `omniglot.py` asks it with 1,623
# characters, and the answer stands in the
# [page of results](https://github.com/jax-centerloss/jax-centerloss/blob/main/docs/results.md#omniglot).

# %%
omniglot = importlib.import_module("omniglot")

images = np.pad(np.kron(data.images * 15.9375, np.ones((3, 3))), ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
unused = np.zeros(len(images), np.int32)  # Digits have no alphabets, and their writers are not known.
everything = omniglot.Drawings(images, data.target.astype(np.int32), unused, unused)
seen, unseen = everything.part(data.target < 7), everything.part(data.target >= 7)
args = omniglot.parse_args(
    ["--epochs", "2" if short else "12", "--warmup", "1", "--lr", "0.03", "--out", out]
)
pairs = omniglot.pairs(unseen, 10_000)
with omniglot.progress(3 * args.epochs, "epoch") as bar:
    for arm, lam in {"softmax": 0.0, "center": 0.03, "frozen": 0.01}.items():
        model, found = omniglot.train(args, seen, arm, lam, 0, bar)
        omniglot.check_finite(found["losses"], arm)
        rates = omniglot.verify(omniglot.embed(model, unseen.images), pairs)["all"]
        bar.write(f"{omniglot.ARMS[arm]:26} EER {rates['eer']:.3f}  TAR at FAR 1 % {rates['tar1']:.3f}")
