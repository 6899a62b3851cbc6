"""Every page's Python runs, block after block, as a reader would run it."""

import re
from pathlib import Path

import jax
import pytest

ELSEWHERE = {"accelerators"}  # tests/test_layout.py runs it, and looks at what comes out.
PAGES = sorted(p for p in (Path(__file__).parents[1] / "docs").glob("*.md") if p.stem not in ELSEWHERE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page, capsys):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    space = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, page.name, "exec"), space)
    # What a page prints stands behind the call that prints it.
    said = re.findall(r"^print\(.*\)  # (.*)$", "\n".join(blocks), flags=re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == said
