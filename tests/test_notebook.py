"""The notebook and its text form say the same, and no outputs are kept. CI executes it."""

from pathlib import Path

import jupytext

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
