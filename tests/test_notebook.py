"""The notebook and its text form say the same, and no outputs are kept. CI executes it."""

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_notebook_is_its_text_form():
    notebook, text = (jupytext.read(EXAMPLES / f"center_loss_colab.{kind}") for kind in ("ipynb", "py"))
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in text.cells
    ], "run `jupytext --to ipynb --update examples/center_loss_colab.py`"
    assert len(notebook.cells) > 10


def test_no_outputs_are_kept():
    for cell in jupytext.read(EXAMPLES / "center_loss_colab.ipynb").cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.slow
def test_runs_as_a_script_without_ipython(tmp_path):
    (tmp_path / "IPython.py").write_text("raise ImportError('the extra [examples] does not bring IPython')")
    settings = {
        "CENTERLOSS_QUICK": "1",
        "PYTHONPATH": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "XLA_FLAGS": "",
    }
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "center_loss_colab.py")],
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", **settings},
        cwd=tmp_path,  # Where no examples are: it takes those it lies among.
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pictures = {path.relative_to(path.parents[1]).as_posix() for path in tmp_path.rglob("digits.png")}
    assert pictures == {"by_rule/digits.png", "by_optax/digits.png"}
    assert len([*tmp_path.rglob("moves.png")]) == 1
    assert not (tmp_path / "jax-centerloss").exists()  # Nothing was cloned.
