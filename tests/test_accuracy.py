"""In float32 the library is never less accurate than the PyTorch module, and right where that one cancels.

Both are judged by the float64 closed form on the same float32-rounded input.
"""

import functools
import os

import numpy as np
import pytest
import reference as ref
from reference import NORMS_AND_SPREADS, Draw, Result

EPS = float(np.finfo(np.float32).eps)
ULPS = 4  # What is granted where both are right to rounding.


@functools.cache
def draws(source: str) -> tuple[list[tuple[Draw, Result]], str]:
    """Draws with the reference's results: one stored, or ten fresh, for each norm and spread."""
    if source == "golden":
        golden = ref.golden("spread")
        return [
            tuple(kind(*(golden[key][i] for key in kind._fields)) for kind in (Draw, Result))
            for i in range(len(NORMS_AND_SPREADS))
        ], "golden"
    seed = int.from_bytes(os.urandom(4))
    rng = np.random.default_rng(seed)
    fresh = [
        ref.spread_draw(rng, norm, spread, num=48, classes=6, dim=32)
        for _ in range(10)
        for norm, spread in NORMS_AND_SPREADS
    ]
    return [(draw, ref.reference(*draw)) for draw in fresh], f"seed {seed}"


def largest_error(got: np.ndarray, true: np.ndarray) -> float:
    return float(np.max(np.abs(np.asarray(got, np.float64) - true)))


@pytest.mark.parametrize("source", ref.SOURCES)
def test_never_less_accurate_than_the_reference(source):
    pairs, message = draws(source)
    for number, (draw, theirs) in enumerate(pairs):
        ours, true = ref.library(draw), ref.oracle(*draw)
        norm, spread = NORMS_AND_SPREADS[number % len(NORMS_AND_SPREADS)]
        for part in Result._fields:
            exact = getattr(true, part)
            granted = largest_error(getattr(theirs, part), exact) + ULPS * EPS * np.max(np.abs(exact))
            error = largest_error(getattr(ours, part), exact)
            place = f"{part} at norm {norm}, spread {spread} ({message})"
            assert error <= granted, f"{place}: {error} > {granted}"


@pytest.mark.parametrize("source", ref.SOURCES)
def test_right_where_the_reference_cancels(source, capsys):
    pairs, message = draws(source)
    rows = []
    for (norm, spread), (draw, theirs) in zip(NORMS_AND_SPREADS, pairs, strict=False):
        if norm < 100 or spread > 0.1:
            continue
        true = ref.oracle(*draw).loss
        ours = largest_error(ref.library(draw).loss, true) / true
        reference = largest_error(theirs.loss, true) / true
        rows.append((norm, spread, true, ours, reference))
    with capsys.disabled():
        print(f"\n\n{source}\n| norm | spread | true loss | library rel. error | reference rel. error |")
        print("|---:|---:|---:|---:|---:|")
        for norm, spread, *numbers in rows:
            print(f"| {norm:g} | {spread:g} | " + " | ".join(f"{number:.2g}" for number in numbers) + " |")
    assert len(rows) == 4
    for norm, spread, _, ours, reference in rows:
        assert ours < 1e-6, message
        if (norm, spread) == (1000.0, 0.01):
            assert reference > 1, message
