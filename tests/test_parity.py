"""The loss and both its gradients are the PyTorch module's: as stored, and live where torch is installed."""

import os

import chex
import numpy as np
import pytest
import reference as ref
from reference import Draw, Result

GOLDEN = ref.golden("case")
CASES = sorted({name.split("/")[0] for name in GOLDEN})
# At least two features: of one, a chance meeting within 1e-3 would cancel in the float32 reference.
SHAPES = [(1, 1, 4), (5, 3, 2), (32, 10, 2), (64, 100, 16), (128, 20, 64)]
# In units of eps times the reference's own scale of rounding (`rounding_scale`): each side makes a handful of
# roundings, and its sums over features and samples a few more.
ROUNDINGS = 8


def stored(case: str) -> tuple[Draw, Result]:
    return tuple(kind(*(GOLDEN[f"{case}/{key}"] for key in kind._fields)) for kind in (Draw, Result))


def assert_close(got: Result, want: Result, draw: Draw, precision: str, message: str) -> None:
    """Equal within the rounding of `precision`, on the reference's scale for this draw."""
    chex.assert_trees_all_equal_shapes(got, want, custom_message=message)
    scale = ref.rounding_scale(*draw)

    def scaled(result: Result) -> Result:
        return Result(*(np.float64(part) / unit for part, unit in zip(result, scale, strict=True)))

    tolerance = ROUNDINGS * float(np.finfo(precision).eps)
    chex.assert_trees_all_close(scaled(got), scaled(want), rtol=0, atol=tolerance, custom_message=message)


def test_torch_is_there_where_it_is_required():
    if os.environ.get("CENTERLOSS_REQUIRE_TORCH") == "1":
        assert "live" in ref.SOURCES, "CENTERLOSS_REQUIRE_TORCH=1, but torch cannot be imported"


def test_golden_file_covers_both_precisions():
    dtypes = [stored(case)[0].x.dtype for case in CASES]
    assert dtypes.count(np.float32) > 15
    assert dtypes.count(np.float64) > 15


@pytest.mark.few(24)
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("source", ref.SOURCES)
@pytest.mark.parametrize("case", CASES)
def test_edge_and_random_cases(case, source, precision):
    draw, want = stored(case)
    if source == "live":
        want = ref.reference(*draw)
    got = ref.library(draw.astype(precision))
    assert {part.dtype for part in got} == {np.dtype(precision)}
    # No more can be asked for than the coarser side has: "float32" sorts first.
    assert_close(got, want, draw, min(precision, draw.x.dtype.name), case)


@pytest.mark.parametrize("case", CASES)
def test_closed_form_is_the_reference(case):
    """The float64 closed form, which judges accuracy elsewhere, is itself held to the PyTorch module."""
    draw, want = stored(case)
    got = Result(*map(np.asarray, ref.oracle(*draw)))
    assert_close(got, want, draw, draw.x.dtype.name, case)


@pytest.mark.few(4)
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(("num", "classes", "dim"), SHAPES)
def test_fresh_input(num, classes, dim, precision):
    """Input never seen before: against torch or, where it is absent, the closed form that is held to it."""
    seed = int.from_bytes(os.urandom(4))
    rng = np.random.default_rng(seed)
    against = ref.reference if "live" in ref.SOURCES else ref.oracle
    for scale in (0.1, 1.0, 30.0):
        draw = Draw(
            scale * rng.standard_normal((classes, dim)),
            scale * rng.standard_normal((num, dim)),
            rng.integers(0, classes, num).astype(np.int32),
        ).astype(precision)
        got, want = ref.library(draw), Result(*map(np.asarray, against(*draw)))
        assert {part.dtype for part in got} == {np.dtype(precision)}
        assert_close(got, want, draw, precision, f"seed {seed}, scale {scale}")
