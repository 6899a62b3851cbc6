"""What the library is compared with: a float64 closed form, and the PyTorch module that is ported.

The closed form needs NumPy only. The module needs torch; where torch is absent, `tests/golden.npz` (written
by `make_golden.py`) holds what it returned, and `SOURCES` says which of the two a run can be held against.
"""

import contextlib
import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_centerloss import center_loss

try:
    import torch
except ImportError:
    torch = None

SOURCES = ["golden"] if torch is None else ["golden", "live"]
GOLDEN = pathlib.Path(__file__).with_name("golden.npz")
CLIP = (1e-12, 1e12)
NORMS_AND_SPREADS = [(n, s) for n in (0.1, 1.0, 10.0, 100.0, 1000.0) for s in (0.01, 0.1, 1.0, 10.0)]


class Result(NamedTuple):
    """A loss and its derivatives."""

    loss: Any
    grad_x: Any
    grad_centers: Any


class Draw(NamedTuple):
    """A table of centers and a labelled batch."""

    centers: np.ndarray
    x: np.ndarray
    labels: np.ndarray

    def astype(self, dtype: Any) -> "Draw":
        return Draw(self.centers.astype(dtype), self.x.astype(dtype), self.labels)


def oracle(
    centers: np.ndarray, x: np.ndarray, labels: np.ndarray, clip: tuple[float, float] | None = CLIP
) -> Result:
    """Mean of `clamp(|x - c|²) + (C - 1) clamp(0)` and its derivatives, in float64, by the difference."""
    centers, x = np.asarray(centers, np.float64), np.asarray(x, np.float64)
    difference = x - centers[labels]
    distance = np.sum(difference**2, axis=1)
    low, high = (-np.inf, np.inf) if clip is None else clip
    constant = 0.0 if clip is None else (len(centers) - 1) * np.clip(0.0, low, high)
    loss = np.mean(np.clip(distance, low, high)) + constant
    # The clamp passes the gradient on the closed interval.
    passes = (low <= distance) & (distance <= high)
    grad_x = 2 / len(x) * difference * passes[:, None]
    grad_centers = np.zeros_like(centers)
    np.subtract.at(grad_centers, labels, grad_x)
    return Result(loss, grad_x, grad_centers)


def rounding_scale(centers: np.ndarray, x: np.ndarray, labels: np.ndarray) -> Result:
    """The numbers whose rounding the reference's results carry, one for each sample or class.

    The expansion `|x|² + |c|² - 2 x·c` rounds at `|x|² + |c|²`, however small the distance that is left, and
    its derivative adds `2x` and `-2c` as separate terms. So one unit of its error is eps times this.
    """
    centers, x = np.asarray(centers, np.float64), np.asarray(x, np.float64)
    own = centers[labels]
    squares = np.sum(x**2 + own**2, axis=1)
    # Above the clamp only its end is left of them.
    loss = (
        np.mean(np.where(np.sum((x - own) ** 2, axis=1) > CLIP[1], CLIP[1], squares)) + len(centers) * CLIP[0]
    )
    grad_x = 2 / len(x) * np.max(np.abs(x) + np.abs(own), axis=1, keepdims=True)
    grad_centers = np.zeros((len(centers), 1))
    np.add.at(grad_centers, labels, grad_x)
    # Never zero: what has to be exactly zero, like the row of an unseen class, is held to that.
    tiny = np.finfo(np.float32).tiny
    return Result(loss, np.maximum(grad_x, tiny), np.maximum(grad_centers, tiny))


def spread_draw(
    rng: np.random.Generator, norm: float, spread: float, *, num: int, classes: int, dim: int
) -> Draw:
    """Centers of length `norm`, each feature at distance `spread` from its own; all rounded to float32."""

    def directions(rows: int) -> np.ndarray:
        v = rng.standard_normal((rows, dim))
        return v / np.linalg.norm(v, axis=1, keepdims=True)

    centers = (norm * directions(classes)).astype(np.float32)
    labels = rng.integers(0, classes, num).astype(np.int32)
    return Draw(centers, (centers[labels] + spread * directions(num)).astype(np.float32), labels)


def golden(group: str) -> dict[str, np.ndarray]:
    """The stored arrays below `group/`, by the rest of their names."""
    with np.load(GOLDEN) as file:
        return {name.removeprefix(f"{group}/"): file[name] for name in file if name.startswith(f"{group}/")}


@dataclasses.dataclass(frozen=True)
class Training:
    """A small network's data, batches and first weights: 8-32-2 with tanh, a head without bias, centers."""

    data: np.ndarray
    labels: np.ndarray
    batches: np.ndarray
    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray
    head: np.ndarray
    centers: np.ndarray


LAM, MODEL_LR, MOMENTUM, CENTER_LR = 0.1, 0.05, 0.9, 0.5


def make_training(rng: np.random.Generator, steps: int = 300) -> Training:
    """Five blobs in eight dimensions. Everything is rounded to float32, so both precisions start alike."""
    classes, dim, hidden, feat, num, batch = 5, 8, 32, 2, 160, 32

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    labels = rng.integers(0, classes, num).astype(np.int32)
    means = normal(classes, dim, scale=1.5)
    return Training(
        data=means[labels] + normal(num, dim, scale=0.5),
        labels=labels,
        batches=np.stack([rng.permutation(num)[:batch] for _ in range(steps)]).astype(np.uint8),
        w1=normal(dim, hidden, scale=dim**-0.5),
        b1=normal(hidden, scale=0.1),
        w2=normal(hidden, feat, scale=hidden**-0.5),
        b2=normal(feat, scale=0.1),
        head=normal(feat, classes, scale=feat**-0.5),
        centers=normal(classes, feat),
    )


def enable_x64() -> contextlib.AbstractContextManager[Any]:
    """64-bit JAX inside the `with`, under the name each supported JAX has for it."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64 as experimental

    return experimental()


@jax.jit
def _loss_and_gradients(centers: jax.Array, x: jax.Array, labels: jax.Array) -> Result:
    loss, (grad_centers, grad_x) = jax.value_and_grad(center_loss, argnums=(0, 1))(centers, x, labels)
    return Result(loss, grad_x, grad_centers)


def library(draw: Draw) -> Result:
    """The library's results, in the precision of the draw."""
    if draw.x.dtype == np.float32:
        return jax.device_get(_loss_and_gradients(*map(jnp.asarray, draw)))
    with enable_x64():
        return jax.device_get(_loss_and_gradients(*map(jnp.asarray, draw)))


if torch is not None:

    class CenterLoss(torch.nn.Module):
        """The PyTorch module that is ported: distances to all classes by expansion, masked, then clamped."""

        def __init__(self, num_classes: int, feat_dim: int) -> None:
            super().__init__()
            self.centers = torch.nn.Parameter(torch.randn(num_classes, feat_dim))

        def forward(self, x: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
            dist_map = x.square().sum(1)[:, None] + self.centers.square().sum(1)[None, :]
            dist_map.addmm_(x, self.centers.T, beta=1, alpha=-2)
            mask = torch.nn.functional.one_hot(labels, len(self.centers)).to(x.dtype)
            return (dist_map * mask).clamp(*CLIP).sum() / len(x)


def reference(centers: np.ndarray, x: np.ndarray, labels: np.ndarray) -> Result:
    """What the PyTorch module returns in the dtype of `x`. Needs torch."""
    module = CenterLoss(*centers.shape).to(torch.tensor(x).dtype)
    with torch.no_grad():
        module.centers.copy_(torch.tensor(centers))
    features = torch.tensor(x, requires_grad=True)
    loss = module(features, torch.tensor(labels, dtype=torch.int64))
    loss.backward()
    return Result(*(t.detach().numpy() for t in (loss, features.grad, module.centers.grad)))


def train_in_torch(training: Training, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Each step's joint loss, and the centers after it. Needs torch."""
    t = {name: torch.tensor(np.asarray(value, dtype)) for name, value in vars(training).items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first = torch.nn.Linear(*training.w1.shape)
        second = torch.nn.Linear(*training.w2.shape)
        head = torch.nn.Linear(*training.head.shape, bias=False)
        center_loss = CenterLoss(*training.centers.shape)
        model = torch.nn.ModuleList([first, second, head]).to(t["data"].dtype)
        center_loss.to(t["data"].dtype)
        with torch.no_grad():
            for parameter, value in [
                (first.weight, t["w1"].T),
                (first.bias, t["b1"]),
                (second.weight, t["w2"].T),
                (second.bias, t["b2"]),
                (head.weight, t["head"].T),
                (center_loss.centers, t["centers"]),
            ]:
                parameter.copy_(value)
        model_optimizer = torch.optim.SGD(model.parameters(), lr=MODEL_LR, momentum=MOMENTUM)
        center_optimizer = torch.optim.SGD(center_loss.parameters(), lr=CENTER_LR)
        losses, centers = [], []
        for batch in training.batches:
            rows = torch.tensor(batch, dtype=torch.int64)
            labels = t["labels"].long()[rows]
            features = second(torch.tanh(first(t["data"][rows])))
            cross_entropy = torch.nn.functional.cross_entropy(head(features), labels)
            loss = cross_entropy + LAM * center_loss(features, labels)
            model_optimizer.zero_grad()
            center_optimizer.zero_grad()
            loss.backward()
            model_optimizer.step()
            for parameter in center_loss.parameters():
                parameter.grad *= 1 / LAM
            center_optimizer.step()
            losses.append(loss.item())
            centers.append(center_loss.centers.detach().numpy().copy())
    finally:
        torch.set_num_threads(threads)
    return np.asarray(losses), np.stack(centers)
