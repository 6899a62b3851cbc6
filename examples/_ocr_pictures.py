"""Pictures of what examples/ocr.py reads."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from _common import Plane, draw_planes, new_figure
from _lines import GLYPH, Reading, Text, spoken, truth
from rapidfuzz.distance import Levenshtein
from sklearn.decomposition import PCA

PITCH = GLYPH + 2  # Pixels from one character to the next where a picture shows what was read.


def draw_confused(path: Path, text: Text, before: Reading, arms: Mapping[str, Reading]) -> bool:
    """Features of the two characters that were confused most before the arms parted, then and at the end.

    Returns whether there are any.
    """
    stands = spoken(before, text.test)
    pairs = zip(stands[stands > 0].tolist(), before.labels[stands > 0].tolist(), strict=True)
    mistaken = Counter(tuple(sorted(pair)) for pair in pairs if pair[0] != pair[1])
    if not mistaken:
        return False
    pair = mistaken.most_common(1)[0][0]
    planes = []
    for title, reading in {"before": before, **arms}.items():
        labels = spoken(reading, text.test)
        chosen = np.isin(labels, pair)
        if chosen.sum() < 2:  # Neither is read any more.
            continue
        kinds = np.searchsorted(pair, labels[chosen])
        points = PCA(2, random_state=0).fit_transform(reading.features[chosen])
        means = [points[kinds == j].mean(0) if np.any(kinds == j) else points.mean(0) for j in (0, 1)]
        planes.append(Plane(title, np.stack(means), points, kinds))
    if not planes:
        return False
    heading = f"Frames of the two characters confused most, {pair[0]} and {pair[1]}, on their main directions"
    draw_planes(path, heading, planes, [f"character {c}" for c in pair])
    return True


def written(text: Text, got: list[int], line: list[int], length: int) -> tuple[np.ndarray, int]:
    """A picture of what was read, wrong characters in red, and how many are missing."""
    edits = Levenshtein.editops(got, line)
    wrong = {op.src_pos for op in edits if op.tag != "insert"}
    canvas = np.full((GLYPH, PITCH * length, 3), 255, np.uint8)
    for k, character in enumerate(got[:length]):
        paper = 255 - text.glyphs.images[text.glyphs.of_character[character - 1][0]]
        part = canvas[:, PITCH * k : PITCH * k + GLYPH]
        part[:] = paper[..., None]
        if k in wrong:
            part[..., 0] = 255
    return canvas, sum(op.tag == "insert" for op in edits)


def draw_lines(path: Path, text: Text, arms: Mapping[str, Reading]) -> None:
    """Six lines that not every arm reads rightly: each as it was drawn, the truth, and what each arm read."""
    hard = np.flatnonzero(~np.all([reading.right for reading in arms.values()], axis=0))[:6]
    rows, columns = 2 + len(arms), 3
    blocks = max(1, -(-len(hard) // columns))
    length = max((len(truth(text.test.labels[i])) for i in hard), default=1)
    figure = new_figure(9, 0.58 * rows * blocks + 0.4)
    grid = figure.subplots(rows * blocks, columns, squeeze=False)
    for axis in grid.flat:
        axis.axis("off")
    for place, i in enumerate(hard):
        image, right, *below = grid[place // columns * rows :, place % columns]
        line = truth(text.test.labels[i])
        image.imshow(255 - text.test.images[i, :, : PITCH * length], cmap="gray", vmin=0, vmax=255)
        image.set_anchor("W")
        right.imshow(written(text, line, line, length)[0])
        right.set_title("what stands there", fontsize=8, loc="left", pad=1)
        for axis, (title, reading) in zip(below, arms.items(), strict=False):
            canvas, missing = written(text, reading.texts[i], line, length)
            axis.imshow(canvas)
            note = f" ({missing} missing)" if missing else ""
            axis.set_title(f"{title}{note}", fontsize=8, loc="left", pad=1)
    figure.suptitle("Test lines, and the characters that each arm read in them; red: wrong")
    figure.savefig(path, dpi=110)
