"""How others compute the loss and move centers, written from what they publish, one sample after another.

Each is `step(centers, x, labels, rate, state) -> (loss, centers, state)` in float64, `state` being `None` at
first. Those in torch exist where torch does; elsewhere `golden.npz` holds what they returned.
"""

from typing import Any, NamedTuple

import numpy as np
import reference as ref

LAM = 0.003  # The PyTorch module's weight of the loss, where it is not divided out.
MOMENTUM, DECAY = 0.9, 0.01  # Of the solver around the Caffe layer.
RADIUS = 0.5  # Of pytorch-ood's center loss: a bound of the squared distance.


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


def squares(centers: np.ndarray, x: np.ndarray, labels: Any) -> float:
    return sum(float(np.sum((x[i] - centers[labels[i]]) ** 2)) for i in range(len(x)))


def paper(centers: np.ndarray, x: np.ndarray, labels: np.ndarray, rate: float, state: Any) -> Step:
    """Equation 2, half the sum over the batch; centers follow equation 4 with rate alpha."""
    return Step(squares(centers, x, labels) / 2, centers - rate * eq4(centers, x, labels), state)


def caffe(centers: np.ndarray, x: np.ndarray, labels: np.ndarray, rate: float, state: Any) -> Step:
    """The paper's Caffe layer: half the mean, and equation 4 as the gradient of Caffe's SGD.

    Caffe multiplies each gradient by the rate of its step, and the momentum keeps the product.
    """
    velocity = np.zeros_like(centers) if state is None else state
    velocity = MOMENTUM * velocity + rate * (eq4(centers, x, labels) + DECAY * centers)
    return Step(squares(centers, x, labels) / 2 / len(x), centers - velocity, velocity)


def facenet(centers: np.ndarray, x: np.ndarray, labels: np.ndarray, rate: float, state: Any) -> Step:
    """FaceNet's TensorFlow code: the mean over samples and features; each sample pulls by rate = 1 - alfa."""
    moved = centers.copy()
    for i in range(len(x)):
        moved[labels[i]] -= rate * (centers[labels[i]] - x[i])
    return Step(squares(centers, x, labels) / x.size, moved, state)


def autograd(centers: np.ndarray, x: np.ndarray, labels: np.ndarray, rate: float, state: Any) -> Step:
    """Half the mean, and its derivative for the centers too."""
    moved = centers.copy()
    for i in range(len(x)):
        moved[labels[i]] -= rate / len(x) * (centers[labels[i]] - x[i])
    return Step(squares(centers, x, labels) / 2 / len(x), moved, state)


def pytorch_ood(centers: np.ndarray, x: np.ndarray, labels: np.ndarray, rate: float, state: Any) -> Step:
    """The mean over samples and classes of what a squared distance has above a radius, 1e-12 at least."""
    loss, moved = 0.0, centers.copy()
    for i in range(len(x)):
        for j in range(len(centers)):
            above = float(np.sum((x[i] - centers[j]) ** 2)) - RADIUS if labels[i] == j else 0.0
            loss += max(above, 1e-12) / len(x) / len(centers)
            if above > 1e-12:
                moved[j] -= rate * 2 * (centers[j] - x[i]) / len(x) / len(centers)
    return Step(loss, moved, state)


def logits(x: np.ndarray, classes: int) -> np.ndarray:
    """Of some trained classifier."""
    return x @ np.random.default_rng(401).standard_normal((x.shape[-1], classes))


def paddle_ocr(centers: np.ndarray, x: np.ndarray, labels: np.ndarray, rate: float, state: Any) -> Step:
    """The module's loss to the center of the class that the model itself names; no center ever moves."""
    named = [int(np.argmax(row)) for row in logits(x, len(centers))]
    rest = 1e-12 * (len(centers) - 1)
    return Step(squares(centers, x, named) / len(x) + rest, centers, state)


def mean_per_class(centers: np.ndarray, x: np.ndarray, labels: np.ndarray, rate: float, state: Any) -> Step:
    """Half the sum over the classes of their mean squared distances; centers follow its derivative."""
    loss, moved = 0.0, centers.copy()
    for j in set(labels.tolist()):
        mine = x[labels == j]
        loss += np.mean([np.sum((one - centers[j]) ** 2) for one in mine]) / 2
        moved[j] -= rate * (centers[j] - np.mean(mine, axis=0))
    return Step(loss, moved, state)


def mxnet(centers: np.ndarray, x: np.ndarray, labels: np.ndarray, rate: float, state: Any) -> Step:
    """The example in MXNet: the mean per class, whose trainer divides by N again, with λ left in."""
    loss, moved, _ = mean_per_class(centers, x, labels, rate * LAM / len(x), state)
    return Step(loss / len(x), moved, state)


def unit(v: np.ndarray) -> np.ndarray:
    return v / np.sqrt(np.sum(v**2, axis=-1, keepdims=True))


def cosine(centers: np.ndarray, x: np.ndarray, labels: np.ndarray, rate: float, state: Any) -> Step:
    """The mean of one minus the cosine of feature and center, and its derivative for the centers."""
    loss, moved = 0.0, centers.copy()
    for i in range(len(x)):
        own, feature = unit(centers[labels[i]]), unit(x[i])
        similarity = float(own @ feature)
        loss += (1 - similarity) / len(x)
        length = np.linalg.norm(centers[labels[i]])
        moved[labels[i]] += rate / len(x) * (feature - similarity * own) / length
    return Step(loss, moved, state)


def cosine_by_rule(centers: np.ndarray, x: np.ndarray, labels: np.ndarray, rate: float, state: Any) -> Step:
    """The same loss; a center goes `rate` of the way to its class's mean direction and back to length one."""
    moved = unit(centers)
    for j in set(labels.tolist()):
        moved[j] = (1 - rate) * moved[j] + rate * np.mean(unit(x[labels == j]), axis=0)
    return Step(cosine(centers, x, labels, rate, state).loss, unit(moved), state)


def euclidean(centers: np.ndarray, x: np.ndarray, labels: np.ndarray, rate: float, state: Any) -> Step:
    """The mean distance, not squared, and its derivative for the centers."""
    loss, moved = 0.0, centers.copy()
    for i in range(len(x)):
        difference = centers[labels[i]] - x[i]
        distance = np.linalg.norm(difference)
        loss += distance / len(x)
        if distance > 0:
            moved[labels[i]] -= rate / len(x) * difference / distance
    return Step(loss, moved, state)


def one_adam(centers: np.ndarray, x: np.ndarray, labels: np.ndarray, rate: float, state: Any) -> Step:
    """The mean, and Adam with its usual constants on its derivative times λ, for all rows."""
    steps, first, second = (0, np.zeros_like(centers), np.zeros_like(centers)) if state is None else state
    gradient = np.zeros_like(centers)
    for i in range(len(x)):
        gradient[labels[i]] += LAM * 2 / len(x) * (centers[labels[i]] - x[i])
    steps, first, second = steps + 1, 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
    moved = centers - rate * first / (1 - 0.9**steps) / (np.sqrt(second / (1 - 0.999**steps)) + 1e-8)
    return Step(squares(centers, x, labels) / len(x), moved, (steps, first, second))


def metric_learning(centers: np.ndarray, x: np.ndarray, labels: np.ndarray, rate: float, state: Any) -> Step:
    """pytorch-metric-learning 3: equation 2, and `update_centers` for each class that is in the batch."""
    loss, moved = 0.0, centers.copy()
    for i in range(len(x)):
        loss += 0.5 * float(np.dot(x[i] - centers[labels[i]], x[i] - centers[labels[i]]))
    for j in set(labels.tolist()):
        mine = labels == j
        moved[j] -= rate * (mine.sum() * centers[j] - x[mine].sum(axis=0)) / (1 + mine.sum())
    return Step(loss, moved, state)


NUMPY = {
    "paper": paper,
    "pytorch-metric-learning": metric_learning,
    "caffe": caffe,
    "facenet": facenet,
    "autograd": autograd,
    "pytorch-ood": pytorch_ood,
    "PaddleOCR": paddle_ocr,
    "mean per class": mean_per_class,
    "mxnet": mxnet,
    "cosine": cosine,
    "cosine, by rule": cosine_by_rule,
    "euclidean": euclidean,
    "one Adam": one_adam,
}
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


# The variants of docs/variants.md: `step(centers, x, labels, rate) -> (loss, its gradient by x, centers)`. A
# negative label is left out.


def each(labels: np.ndarray) -> list[tuple[int, int]]:
    return [(i, int(label)) for i, label in enumerate(labels) if label >= 0]


def unit_or_zero(v: np.ndarray) -> np.ndarray:
    return v / max(float(np.linalg.norm(v)), 1e-12)


def ws_dan(centers, x, labels, rate):
    """WS-DAN in PyTorch: the mean distance to unit centers; the last sample of a class wins."""
    loss, by_x, moved = 0.0, np.zeros_like(x), centers.copy()
    for i, y in each(labels):
        difference = x[i] - unit_or_zero(centers[y])
        loss += difference @ difference / len(each(labels))
        by_x[i] = 2 * difference / len(each(labels))
        moved[y] = centers[y] + rate * difference
    return loss, by_x, moved


BRANCH = np.random.default_rng(402).standard_normal((3, 3))  # It makes DACL's weights of three features.


def dacl(centers, x, labels, rate):
    """Half the weighted mean; equation 4 with the weights in its numerator, neither N nor λ in it."""
    weights, n = 1 / (1 + np.exp(-x @ BRANCH)), len(each(labels))
    loss, by_x = 0.0, np.zeros_like(x)
    pulls, counts = np.zeros_like(centers), np.ones(len(centers))
    for i, y in each(labels):
        loss += np.sum(weights[i] * (x[i] - centers[y]) ** 2) / 2 / n
        by_x[i] = weights[i] * (x[i] - centers[y]) / n
        pulls[y] += weights[i] * (centers[y] - x[i])
        counts[y] += 1
    return loss, by_x, centers - rate * pulls / counts[:, None]


def three_c_net(centers, x, labels, rate):
    """The mean over pairs of a sample and a label of it, over the number of pairs, without λ for centers.

    `labels` is `(N, L)`, and all labels of a sample share its features.
    """
    chosen = [(i, y) for i, row in enumerate(labels) for _, y in each(row)]
    loss, by_x, moved = 0.0, np.zeros_like(x), centers.copy()
    for i, y in chosen:
        difference = x[i] - centers[y]
        loss += max(difference @ difference, 1e-12) / len(chosen) ** 2
        by_x[i] += 2 * difference / len(chosen) ** 2
        moved[y] += rate * 2 * difference / len(chosen) ** 2
    return loss, by_x, moved


def two_views(centers, x, labels, rate):
    """The module's loss and equation 4 for two views of each sample: x itself, and half of it."""
    views, twice = np.concatenate([x, x / 2]), np.concatenate([labels, labels])
    used = twice >= 0
    by_views = np.zeros_like(views)
    by_views[used] = 2 * (views[used] - centers[twice[used]]) / used.sum()
    loss = squares(centers, views[used], twice[used]) / used.sum()
    moved = centers - rate * eq4(centers, views[used], twice[used])
    return loss, by_views[: len(x)] + by_views[len(x) :] / 2, moved


def single_center(centers, x, labels, rate):
    """Li et al. 2021: mean distances of natural (0) and manipulated (1) faces to one center, a parameter."""
    kinds = [[i for i, y in each(labels) if y == kind] for kind in (0, 1)]
    distances = np.linalg.norm(x - centers[0], axis=-1)
    natural, manipulated = (float(np.mean(distances[kind])) if kind else 0.0 for kind in kinds)
    hinge = natural - manipulated + 0.3 * np.sqrt(x.shape[-1])
    by_x = np.zeros_like(x)
    for kind, factor in zip(kinds, (1 + (hinge > 0), -1 * (hinge > 0)), strict=True):
        for i in kind:
            by_x[i] = factor * (x[i] - centers[0]) / distances[i] / len(kind)
    return natural + max(hinge, 0.0), by_x, centers + rate * by_x.sum(axis=0)


def oltr(centers, x, labels, rate):
    """OLTR: attraction, by which centers move without λ, and a hinge on the mean of the other distances."""
    used, count = each(labels), len(centers)
    attract = sum(np.sum((x[i] - centers[y]) ** 2) for i, y in used) / 2 / len(used)
    others = [(i, j) for i, y in used for j in range(count) if j != y]
    hinge = 10.0 - sum(np.sum((x[i] - centers[j]) ** 2) for i, j in others) / (len(used) * count)
    by_x, repelled = np.zeros_like(x), np.zeros_like(centers)
    for i, y in used:
        by_x[i] = (x[i] - centers[y]) / len(used)
    for i, j in others if hinge > 0 else []:
        push = 0.01 * 2 * (x[i] - centers[j]) / (len(used) * count)
        by_x[i] -= push
        repelled[j] += push
    mine = labels >= 0
    step = eq4(centers, x[mine], labels[mine]) / len(used) + LAM * repelled
    return attract + 0.01 * max(hinge, 0.0), by_x, centers - rate * step


def hetero_center(centers, x, labels, rate):
    """Zhu et al. 2020: squared distances of the means of two kinds, here the first and the second half of x.

    With the margin of the author's code. There are no centers to move.
    """
    loss, by_x, half = 0.0, np.zeros_like(x), len(x) // 2
    for j in set(labels[:half].tolist()) & set(labels[half:].tolist()) - {-1}:
        first = [i for i in range(half) if labels[i] == j]
        second = [i for i in range(half, len(x)) if labels[i] == j]
        difference = x[first].mean(axis=0) - x[second].mean(axis=0)
        if difference @ difference > 0.1:
            loss += difference @ difference - 0.1
            by_x[first] += 2 * difference / len(first)
            by_x[second] -= 2 * difference / len(second)
    return loss, by_x, centers
