"""Writes `golden.npz`: what the PyTorch module returns, for tests that run without torch.

Run as `python tests/make_golden.py`; needs torch. Seeds are fixed, and inputs are stored next to results.
"""

import dataclasses

import numpy as np
import peers
import reference as ref
from reference import Draw

# (N, C, D)
SHAPES = [(1, 1, 1), (1, 5, 3), (7, 1, 4), (4, 3, 2), (16, 10, 2), (33, 7, 16), (8, 50, 5), (64, 4, 8)]


def random_cases() -> dict[str, Draw]:
    cases = {}
    for seed, (num, classes, dim) in enumerate(SHAPES):
        for bits in (32, 64):
            rng = np.random.default_rng([seed, bits])
            draw = Draw(
                rng.standard_normal((classes, dim)),
                3 * rng.standard_normal((num, dim)),
                rng.integers(0, classes, num).astype(np.int32),
            )
            cases[f"n{num}_c{classes}_d{dim}_float{bits}"] = draw.astype(f"float{bits}")
    return cases


def edge_cases() -> dict[str, Draw]:
    """Cases at the ends of the clamp, and others that are special.

    The reference's expansion cancels: at a center away from the origin what is left of a distance of 1e-12 is
    rounding, and so is the side of the clamp that it falls on. The ends are therefore probed around a
    center at the origin with one coordinate, where the expansion is one exact square, and each in a
    case of its own, as a mean would drown the small ends in the large ones.
    """
    zero = np.zeros((3, 4))

    def along_axis(length: float) -> Draw:
        x = np.zeros((2, 4))
        x[0, 1], x[1, 3] = length, -length
        return Draw(zero, x, np.array([0, 2], np.int32))

    lengths = {
        "below_low": 0.99e-6,
        "above_low": 1.01e-6,
        "below_high": 0.99e6,
        "at_high": 1e6,
        "above_high": 1.01e6,
        "far_above_high": 1e8,
    }
    both = {name: along_axis(length) for name, length in lengths.items()}
    both["at_its_center_origin"] = along_axis(0.0)
    # Small integers: the expansion is exact, 14 + 14 - 28.
    both["at_its_center_integers"] = Draw(
        np.array([[1.0, 2, 3], [-3, 1, 2]]), np.array([[1.0, 2, 3], [-3, 1, 2]]), np.array([0, 1], np.int32)
    )
    rng = np.random.default_rng(100)
    both["one_class_many_times"] = Draw(
        rng.standard_normal((6, 3)), rng.standard_normal((12, 3)), np.full(12, 4, np.int32)
    )
    both["large_norms"] = Draw(
        1e4 * rng.standard_normal((4, 8)),
        1e4 * rng.standard_normal((9, 8)),
        rng.integers(0, 4, 9).astype(np.int32),
    )
    both["one_coordinate_of_each_end"] = Draw(
        zero, np.diag([0.99e-6, 1.01e-6, 0.99e6, 1.01e6]), np.array([0, 1, 2, 1], np.int32)
    )
    cases = {f"{name}_float{bits}": d.astype(f"float{bits}") for name, d in both.items() for bits in (32, 64)}
    # At its center, away from the origin and not on integers: in float32 the reference returns rounding
    # (1e-7 in place of 1e-12, and a gradient); in float64 what is left is below the clamp.
    table = rng.standard_normal((5, 7))
    labels = np.array([3, 0, 3, 1], np.int32)
    cases["at_its_center_float64"] = Draw(table, table[labels], labels)
    return cases


def main() -> None:
    arrays = {"torch_version": np.array(str(ref.torch.__version__))}
    for name, draw in (random_cases() | edge_cases()).items():
        parts = draw._asdict() | ref.reference(*draw)._asdict()
        arrays |= {f"case/{name}/{key}": value for key, value in parts.items()}
    draws = [
        ref.spread_draw(np.random.default_rng([200, seed]), norm, spread, num=16, classes=4, dim=8)
        for seed, (norm, spread) in enumerate(ref.NORMS_AND_SPREADS)
    ]
    results = [ref.reference(*draw) for draw in draws]
    for kind, rows in [(Draw, draws), (ref.Result, results)]:
        arrays |= {
            f"spread/{key}": np.stack(column)
            for key, column in zip(kind._fields, zip(*rows, strict=True), strict=True)
        }
    training = ref.make_training(np.random.default_rng(300))
    losses, centers = ref.train_in_torch(training, np.float64)
    arrays |= {f"training/{key}": value for key, value in dataclasses.asdict(training).items()}
    arrays |= {"trained/losses": losses, "trained/centers": centers}
    for name in peers.TORCH:
        arrays |= dict(
            zip((f"recipes/{name}/losses", f"recipes/{name}/centers"), peers.run(name), strict=True)
        )
    np.savez_compressed(ref.GOLDEN, **arrays)
    print(
        f"torch {ref.torch.__version__}: {len(arrays)} arrays, {ref.GOLDEN.stat().st_size} bytes, joint loss "
        f"{losses[0]:.3f} to {losses[-1]:.3f}"
    )


if __name__ == "__main__":
    main()
