"""Everything that is done with centers, in float64 NumPy and one sample after the other, with error bounds.

It shares no code with the library. A bound counts the roundings on the way to a result: each of them is off
by at most `unit` of what it rounds, whatever the order of the sums.
"""

from typing import NamedTuple

import numpy as np


class Bounded(NamedTuple):
    """A result and how far from it one may be that is computed with rounding."""

    value: np.ndarray
    bound: np.ndarray


class Precision(NamedTuple):
    """One rounding of what is computed in, and of what a result is stored in, with its smallest number."""

    unit: float
    stored: float = 0.0
    tiny: float = 0.0

    @classmethod
    def of(cls, compute: type, storage: type | None = None) -> "Precision":
        from ml_dtypes import finfo

        unit = float(finfo(compute).eps) / 2
        if storage is None or storage == compute:
            return cls(unit)
        return cls(unit, float(finfo(storage).eps) / 2, float(finfo(storage).smallest_subnormal))

    def bounded(self, value: np.ndarray, roundings: int, terms: np.ndarray) -> Bounded:
        """`terms` are rounded so often, and the sum of them is stored once."""
        k = roundings * self.unit
        # What underflows on the way is off by 1e-37 at most.
        return Bounded(value, k / (1 - k) * np.abs(terms) + self.stored * np.abs(value) + self.tiny + 1e-37)


class Batch(NamedTuple):
    """Centers `(C, D)` and samples `(N, D)`, of which those with a label from 0 and `where` are used.

    A sample counts `weights` times, once where there are none, and one of weight 0 is not used.
    """

    centers: np.ndarray
    x: np.ndarray
    labels: np.ndarray
    where: np.ndarray
    weights: np.ndarray | None = None

    @property
    def times(self) -> np.ndarray:
        return np.ones(len(self.x)) if self.weights is None else np.float64(self.weights)

    @property
    def used(self) -> np.ndarray:
        return np.flatnonzero((self.labels >= 0) & self.where & (self.times != 0))

    @property
    def number(self) -> float:
        return self.times[self.used].sum() or 1.0

    @property
    def roundings(self) -> int:
        """Of a weight, of a product with one and of the sum of all of them."""
        return 0 if self.weights is None else len(self.used) + 3

    def pairs(self) -> list[tuple[int, int, np.ndarray]]:
        """Sample, class and difference, of each used sample."""
        x, centers = np.float64(self.x), np.float64(self.centers)
        return [(i, self.labels[i], x[i] - centers[self.labels[i]]) for i in self.used]


def inside(distance: float, clip: tuple[float, float] | None) -> bool:
    return clip is None or clip[0] <= distance <= clip[1]


def loss(batch: Batch, reduce: str | None, clip: tuple[float, float] | None, precision: Precision) -> Bounded:
    """Per sample, or their sum or mean: nothing is negative, so the bound is relative."""
    each = np.zeros(len(batch.x))
    for i, _, difference in batch.pairs():
        each[i] = np.sum(difference**2)
        if clip is not None:
            each[i] = np.clip(each[i], *clip) + (len(batch.centers) - 1) * np.clip(0, *clip)
        each[i] *= batch.times[i]
    value = each if reduce is None else each.sum() / (1 if reduce == "sum" else batch.number)
    roundings = batch.x.shape[1] + 6 + (reduce is not None) * len(each) + batch.roundings
    return precision.bounded(value, roundings, value)


def gradient_by_weights(batch: Batch, clip: tuple[float, float] | None, precision: Precision) -> Bounded:
    """Of the mean loss: how far a sample's own loss is from the mean. Only of samples that are used."""
    alone = batch._replace(weights=None)
    each, mean = loss(alone, None, clip, precision).value, loss(batch, "mean", clip, precision).value
    used = np.isin(np.arange(len(each)), batch.used)
    value = np.where(used, each - mean, 0) / batch.number
    terms = np.where(used, each + mean, 0) / batch.number
    return precision.bounded(value, batch.x.shape[1] + len(each) + 10 + batch.roundings, terms)


def gradients(
    batch: Batch, clip: tuple[float, float] | None, for_x: Precision, for_centers: Precision
) -> tuple[Bounded, Bounded]:
    """Of the mean loss: by the features and by the centers."""
    by_x, by_centers = np.zeros(batch.x.shape), np.zeros(batch.centers.shape)
    terms, most = np.zeros_like(by_centers), 0
    for i, j, difference in batch.pairs():
        if inside(np.sum(difference**2), clip):
            by_x[i] = 2 * batch.times[i] * difference / batch.number
            by_centers[j] -= by_x[i]
            terms[j] += np.abs(by_x[i])
            most += 1
    more = batch.roundings
    return for_x.bounded(by_x, 5 + more, by_x), for_centers.bounded(by_centers, 5 + most + more, terms)


def directions(batch: Batch, rule: str, clip: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """By which a rate of one moves each center, and the sum of the sizes of its terms."""
    total, sizes, counts = (
        np.zeros(batch.centers.shape),
        np.zeros(batch.centers.shape),
        np.zeros(len(batch.centers)),
    )
    for i, j, difference in batch.pairs():
        counts[j] += batch.times[i]
        if rule != "gradient" or inside(np.sum(difference**2), clip):
            total[j] += batch.times[i] * difference
            sizes[j] += np.abs(batch.times[i] * difference)
    scale = {
        "paper": 1 / (1 + counts),
        "gradient": np.full(len(counts), 2 / batch.number),
        "mean": 1 / np.where(counts == 0, 1, counts),
    }[rule][:, None]
    return scale * total, scale * sizes


def moved(batch: Batch, rule: str, alpha: float, clip: tuple[float, float], precision: Precision) -> Bounded:
    """Centers after a step: rows of classes that are not in the batch may not differ at all."""
    step, sizes = directions(batch, rule, clip)
    value = np.float64(batch.centers) + alpha * step
    roundings = len(batch.used) + 8 + batch.roundings
    bounded = precision.bounded(value, roundings, alpha * sizes + np.abs(value))
    touched = np.isin(np.arange(len(value)), batch.labels[batch.used])
    return Bounded(value, np.where(touched[:, None], bounded.bound, 0))
