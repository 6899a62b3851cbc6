"""How others compute the loss and move centers, written from what they publish, one sample after another.

Each is `step(centers, x, labels, rate, state) -> (loss, centers, state)` in float64, `state` being `None` at
first. Those in torch exist where torch does; elsewhere `golden.npz` holds what they returned.
"""

from typing import Any, NamedTuple

import numpy as np
import reference as ref

LAM = 0.003  # The PyTorch module's weight of the loss, where it is not divided out.
MOMENTUM, DECAY = 0.9, 0.01  # Of the solver around the Caffe layer.


class Step(NamedTuple):
    loss: Any
    centers: np.ndarray
    state: Any


def eq4(centers: np.ndarray, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The paper's equation 4: the sum of c - x over a class's samples, over one more than their number."""
    found = np.zeros_like(centers)
    for j in range(len(centers)):
        pulls = [centers[j] - x[i] for i in range(len(x)) if labels[i] == j]
        found[j] = np.sum(pulls, axis=0) / (1 + len(pulls)) if pulls else 0.0
    return found


def squares(centers: np.ndarray, x: np.ndarray, labels: np.ndarray) -> float:
    return sum(float(np.sum((x[i] - centers[labels[i]]) ** 2)) for i in range(len(x)))


def paper(centers: np.ndarray, x: np.ndarray, labels: np.ndarray, rate: float, state: Any) -> Step:
    """Equation 2, half the sum over the batch; centers follow equation 4 with rate alpha."""
    return Step(squares(centers, x, labels) / 2, centers - rate * eq4(centers, x, labels), state)


def caffe(centers: np.ndarray, x: np.ndarray, labels: np.ndarray, rate: float, state: Any) -> Step:
    """The paper's Caffe layer: half the mean, and equation 4 as the gradient of Caffe's SGD."""
    velocity = np.zeros_like(centers) if state is None else state
    velocity = MOMENTUM * velocity + rate * (eq4(centers, x, labels) + DECAY * centers)
    return Step(squares(centers, x, labels) / 2 / len(x), centers - velocity, velocity)


def facenet(centers: np.ndarray, x: np.ndarray, labels: np.ndarray, rate: float, state: Any) -> Step:
    """FaceNet's TensorFlow code: the mean over samples and features; each sample pulls by rate = 1 - alfa."""
    moved = centers.copy()
    for i in range(len(x)):
        moved[labels[i]] -= rate * (centers[labels[i]] - x[i])
    return Step(squares(centers, x, labels) / x.size, moved, state)


NUMPY = {"paper": paper, "caffe": caffe, "facenet": facenet}
TORCH = ("module", "module, λ left in", "own backward, mean", "own backward, sum")


def in_torch(name: str, centers: np.ndarray, x: np.ndarray, labels: np.ndarray, rate: float) -> Step:
    """A step of the PyTorch module with a second optimizer, or of the version with its own backward pass."""
    torch = ref.torch

    class OwnBackward(torch.autograd.Function):
        """Half the sum and equation 4, or both over the batch; the centers' ignores what comes from above."""

        @staticmethod
        def forward(context, features, table, labels):
            context.save_for_backward(features, table, labels)
            return (features - table[labels]).square().sum() / 2 / divisor

        @staticmethod
        def backward(context, above):
            features, table, labels = context.saved_tensors
            pull = table[labels] - features
            counts = torch.ones(len(table), dtype=table.dtype).index_add(
                0, labels, pull.new_ones(len(labels))
            )
            to_table = torch.zeros_like(table).index_add(0, labels, pull) / counts[:, None]
            return -above * pull / divisor, to_table / divisor, None

    divisor = len(x) if name.endswith("mean") else 1
    features, classes = torch.tensor(x), torch.tensor(labels, dtype=torch.int64)
    module = ref.CenterLoss(*centers.shape).to(torch.float64)
    with torch.no_grad():
        module.centers.copy_(torch.tensor(centers))
    optimizer = torch.optim.SGD(module.parameters(), lr=rate)
    loss = (
        OwnBackward.apply(features, module.centers, classes)
        if name.startswith("own backward")
        else module(features, classes)
    )
    (LAM * loss).backward()
    if name == "module":
        for parameter in module.parameters():
            parameter.grad *= 1 / LAM
    optimizer.step()
    return Step(loss.item(), module.centers.detach().numpy().copy(), None)


def draws() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Six batches of 16 around six centers of three features; each batch leaves some classes out."""
    random = np.random.default_rng(400)
    centers = random.standard_normal((6, 3))
    batches = []
    for step in range(6):
        labels = random.choice(np.delete(np.arange(6), [step, (step + 2) % 6]), 16)
        batches.append((centers, centers[labels] + random.standard_normal((16, 3)), labels))
    return batches


def run(name: str, rate: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Each step's loss, and the centers after it."""
    (centers, _, _), state, losses, tables = draws()[0], None, [], []
    for _, x, labels in draws():
        if name in NUMPY:
            loss, centers, state = NUMPY[name](centers, x, labels, rate, state)
        else:
            loss, centers, _ = in_torch(name, centers, x, labels, rate)
        losses.append(loss)
        tables.append(centers)
    return np.array(losses), np.stack(tables)


def lonely_step(name: str) -> float:
    """How far a center moves at rate 0.5 by one sample of 128, one unit away."""
    centers, x = np.zeros((2, 2)), np.zeros((128, 2))
    x[0, 0] = 1.0
    labels = np.append(0, np.ones(127, int))
    if name in NUMPY:
        return float(NUMPY[name](centers, x, labels, 0.5, None).centers[0, 0])
    return float(in_torch(name, centers, x, labels, 0.5).centers[0, 0])
