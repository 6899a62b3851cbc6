"""Omniglot's drawings, for the examples that use them."""

import argparse
import io
import lzma
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _common import download, number
from PIL import Image, UnidentifiedImageError

LARGEST = 2**20  # Bytes of a drawing's file; the real ones have some 200.
SOURCE = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
MD5 = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
# What zipfile and Pillow raise over bytes that are not what they should be.
BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    Image.DecompressionBombError,
    ValueError,
    OSError,
    RuntimeError,
)


@dataclass
class Drawings:
    images: np.ndarray  # (n, side, side) uint8, ink 255
    labels: np.ndarray  # (n,) int32, one number a character
    alphabets: np.ndarray  # (n,) int32
    writers: np.ndarray  # (n,) int32, from 1 on; 0 where the file is not named ..._NN.png

    def part(self, chosen: np.ndarray) -> "Drawings":
        """The chosen drawings, their characters numbered anew from 0."""
        _, labels = np.unique(self.labels[chosen], return_inverse=True)
        return Drawings(
            self.images[chosen], labels.astype(np.int32), self.alphabets[chosen], self.writers[chosen]
        )


def load(data: Path | None, name: str, side: int) -> Drawings:
    """The drawings in `name*.zip` in the folder `data`, or in the published archive if that is `None`.

    They are made `side` pixels wide and high.
    """
    if data is None:
        path = download(f"{SOURCE}{name}.zip", f"md5:{MD5[name]}")
    else:
        found = sorted(data.glob(f"{name}*.zip"))
        if not found:
            raise SystemExit(f"There is no {name}*.zip in {data}.")
        path = found[0]
    images, characters, writers = [], [], []
    try:
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.namelist()):
                if not member.endswith(".png"):
                    continue
                _, alphabet, character, file = member.split("/")
                if archive.getinfo(member).file_size > LARGEST:
                    raise ValueError(f"{member} is larger than a drawing")
                try:
                    picture = Image.open(io.BytesIO(archive.read(member))).convert("L")
                except (UnidentifiedImageError, SyntaxError):  # Not known from its start, or broken later.
                    raise ValueError(f"{member} is no picture") from None
                images.append(255 - np.asarray(picture.resize((side, side), Image.Resampling.BOX)))
                characters.append((alphabet, character))
                writer = Path(file).stem.rpartition("_")[2]
                writers.append(int(writer) if writer.isdecimal() else 0)
    except BROKEN as error:
        reason = str(error) or "a member is cut off"  # An EOFError says nothing.
        raise SystemExit(f"{path} is not an archive of alphabet/character/drawing.png: {reason}") from None
    if not images:
        raise SystemExit(f"{path} holds no drawings (.png).")
    _, labels = np.unique([f"{a}/{c}" for a, c in characters], return_inverse=True)
    _, alphabets = np.unique([a for a, _ in characters], return_inverse=True)
    numbers = (a.astype(np.int32) for a in (labels, alphabets, np.asarray(writers)))
    return Drawings(np.stack(images), *numbers)


def add_data_and_grid(parser: argparse.ArgumentParser, grid: list[float]) -> None:
    """The flags for the drawings, and for a choice of λ, by default from `grid`."""
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        help="folder with images_background*.zip and images_evaluation*.zip; else downloaded",
    )
    add(
        "--select",
        type=number(int, 0),
        default=0,
        metavar="SEEDS",
        help="choose λ of every arm first, with so many seeds",
    )
    add("--grid", type=number(float, 0), nargs="+", default=grid, help="λ to choose from")
    add("--only-select", action="store_true", help="stop when λ is chosen")


def check_selection(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.only_select and not args.select:
        parser.error("argument --only-select: needs --select")
