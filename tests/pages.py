"""The pages of the documentation: their texts, their blocks, and what these define."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def text_of(page):
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def fences(text, kinds):
    """Each block of these kinds, with its kind."""
    return re.findall(rf"^```({kinds})\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def python_of(page):
    """The page's blocks of Python."""
    return [text for _, text in fences(text_of(page), "python")]


def block_of(page, words):
    """The only block of Python of a page that has the words."""
    (block,) = (text for text in python_of(page) if words in text)
    return block


def defined(code, name="a block of a page"):
    """What the code defines, run alone."""
    space = {}
    exec(compile(code, name, "exec"), space)
    return space
