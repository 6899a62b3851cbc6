"""Lines of handwritten characters, composed of Omniglot's drawings."""

from dataclasses import dataclass

import numpy as np
from _omniglot import Drawings
from PIL import Image
from rapidfuzz.distance import Levenshtein

HEIGHT, GLYPH = 24, 20  # Pixels of a line, and of a character in it.
FRAME = 4  # Columns of pixels that make a frame: what the network's strides come to.
PAPER = 2  # Columns left free before the first character and after the last.


@dataclass
class Glyphs:
    """Characters to compose lines of, without the columns that hold no ink."""

    images: np.ndarray  # (n, GLYPH, GLYPH) uint8, ink 255, each moved to the left
    widths: np.ndarray  # (n,), the columns with ink
    of_character: list[np.ndarray]  # Of each character the numbers of its images.


@dataclass
class Lines:
    images: np.ndarray  # (n, HEIGHT, width) uint8
    frames: np.ndarray  # (n,) int32, how many there are before the padding
    labels: np.ndarray  # (n, length) int32, characters from 1 on, 0 after the last; CTC's blank is 0 as well.


def make_glyphs(data: Drawings, chosen: np.ndarray, variants: int, seed: int) -> Glyphs:
    """The chosen drawings of each character, and of each so many variants: turned, sheared and scaled."""
    random = np.random.default_rng(seed)
    images, widths, labels = [], [], []
    for image, label in zip(data.images[chosen], data.labels[chosen], strict=True):
        for variant in range(variants):
            drawn = _varied(image, random) if variant else image
            small = np.asarray(Image.fromarray(drawn).resize((GLYPH, GLYPH), Image.Resampling.BOX))
            ink = np.flatnonzero(small.max(0) > 32)
            first, last = (ink[0], ink[-1]) if ink.size else (0, GLYPH // 2)
            glyph = np.zeros((GLYPH, GLYPH), np.uint8)
            glyph[:, : last - first + 1] = small[:, first : last + 1]
            images.append(glyph)
            widths.append(last - first + 1)
            labels.append(label)
    labels = np.asarray(labels)
    of_character = [np.flatnonzero(labels == c) for c in range(data.labels.max() + 1)]
    return Glyphs(np.stack(images), np.asarray(widths), of_character)


def _varied(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    angle, shear, scale = random.normal(0, (0.12, 0.15, 0.08))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inverse = turn @ np.array([[1, shear], [0, 1]]) * np.exp(scale)
    middle = (len(image) - 1) / 2
    offset = middle - inverse @ (middle, middle)
    matrix = np.column_stack([inverse, offset]).ravel()
    picture = Image.fromarray(image)
    return np.asarray(
        picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    )


def compose(glyphs: Glyphs, count: int, length: int, width: int, random: np.random.Generator) -> Lines:
    """`count` lines of 1 to `length` characters, in images `width` wide.

    Characters stand apart or overlap by a column, up to four pixels higher or lower. The line is tilted, and
    has noise of its own. What no longer fits is left out.
    """
    images = np.zeros((count, HEIGHT, width), np.float32)
    labels, ends = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
    for i, number in enumerate(random.integers(1, length + 1, count)):
        at = PAPER
        for j, character in enumerate(random.integers(0, len(glyphs.of_character), number)):
            glyph = random.choice(glyphs.of_character[character])
            start, wide = at + (random.integers(-1, 4) if j else 0), glyphs.widths[glyph]
            if start + wide + PAPER > width:
                break
            top = random.integers(0, HEIGHT - GLYPH + 1)
            place = images[i, top : top + GLYPH, start : start + wide]
            np.maximum(place, glyphs.images[glyph, :, :wide], out=place)
            labels[i, j], at = character + 1, start + wide
        ends[i] = at + PAPER
    frames = np.maximum(-(-ends // FRAME), 2 * np.count_nonzero(labels, axis=1) - 1)
    images = _tilted(images, random)
    ink, grain = random.uniform(0.6, 1, (count, 1, 1)), random.uniform(0, 20, (count, 1, 1))
    images = ink * images + grain * np.abs(random.normal(size=images.shape))
    past = np.arange(width) >= FRAME * frames[:, None]
    images[np.broadcast_to(past[:, None], images.shape)] = 0
    return Lines(images.clip(0, 255).astype(np.uint8), frames.astype(np.int32), labels)


def _tilted(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Each line's columns moved up or down along a slope of up to three pixels on the whole width."""
    count, height, width = images.shape
    slope = random.uniform(-3, 3, (count, 1))
    moved = np.rint(slope * np.linspace(-0.5, 0.5, width)).astype(int)
    rows = (np.arange(height)[None, :, None] + moved[:, None]).clip(0, height - 1)
    return np.take_along_axis(images, rows, axis=1)


@dataclass
class Text:
    """Characters by the writers for training, and lines by them and by the others."""

    glyphs: Glyphs
    train: Lines  # For class means.
    test: Lines

    @property
    def characters(self) -> int:
        return len(self.glyphs.of_character)


def text_of(labels: np.ndarray) -> list[int]:
    """CTC's reading of a line's frames: repeats count once, blanks not at all."""
    first = np.append(True, labels[1:] != labels[:-1])
    return labels[first & (labels != 0)].tolist()


def truth(labels: np.ndarray) -> list[int]:
    return labels[labels > 0].tolist()


@dataclass
class Reading:
    """What a network makes of lines."""

    features: np.ndarray  # (lines, frames, feat_dim)
    labels: np.ndarray  # (lines, frames), -1 in the padding
    texts: list[list[int]]
    right: np.ndarray  # (lines,), whether the text is that of the line


def spoken(reading: Reading, test: Lines) -> np.ndarray:
    """`(lines, frames)`: the true character for each frame in which one is read, as texts align; else -1."""
    found = np.full(reading.labels.shape, -1)
    for i, (labels, text) in enumerate(zip(reading.labels, reading.texts, strict=True)):
        line = truth(test.labels[i])
        stands = np.full(len(text) + 1, -1)
        for op in Levenshtein.opcodes(text, line):
            if op.tag in ("equal", "replace"):
                stands[op.src_start : op.src_end] = line[op.dest_start : op.dest_end]
        first = np.append(True, labels[1:] != labels[:-1]) & (labels > 0)
        found[i] = np.where(labels > 0, stands[np.cumsum(first) - 1], -1)
    return found


def missed(reading: Reading, lines: Lines, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """`(classes,)` each: how often a character is not read where it stands, and how often it stands."""
    lost, stands = (np.zeros(classes, int) for _ in range(2))
    for text, labels in zip(reading.texts, lines.labels, strict=True):
        line = truth(labels)
        np.add.at(stands, line, 1)
        wrong = [op.dest_pos for op in Levenshtein.editops(text, line) if op.tag != "delete"]
        np.add.at(lost, np.asarray(line)[wrong], 1)
    return lost, stands
