"""The tutorial: notebook and text form say the same, and its outputs are those of a run. CI executes it."""

import base64
import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "examples" / "center_loss_colab.ipynb"
# .ci/run and the workflow of the tests execute the notebook before they come here.
EXECUTED = [Path(path) for path in [os.environ.get("CENTERLOSS_EXECUTED")] if path]


def code_cells(path):
    return [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]


def printed(path):
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def form(text):
    """What was printed, without its numbers and the width of its columns."""
    return re.sub(r" +", " ", re.sub(r"-?\d+(\.\d+)*", "#", text))


def check_numbers(text):
    """What the tutorial says of its table of health holds for the numbers that a run printed."""
    header, *lines = text[text.index("own_distance") :].splitlines()
    assert header.split() == ["own_distance", "gap", "ratio", "moved", "accuracy", "nearest", "center"]
    names = tuple(line[:18].strip() for line in lines)
    rows = [[float(number.strip("%")) for number in line[18:].split()] for line in lines]
    own, gap, ratio, moved, accuracy, nearest = zip(*rows, strict=True)
    assert names == ("λ = 0", "λ = 0.01", "λ = 0.1", "control, norm 0.01", "λ = 0.1, frozen")
    assert ratio[0] > 1.2 * ratio[1] > 1.2 * ratio[2]
    assert ratio[0] > 1.2 * ratio[3]
    for i in range(4):  # Softmax alone passes, too.
        assert own[i] < gap[i]
        assert moved[i] > 0.05 * own[i]
    assert own[4] > gap[4]
    assert moved[4] == 0
    assert min(accuracy[:4]) > 90
    assert nearest[0] + 3 < nearest[2]
    assert nearest[0] < nearest[3]


def test_notebook_is_its_text_form():
    notebook, text = (jupytext.read(STORED.with_suffix(suffix)) for suffix in (".ipynb", ".py"))
    assert [(cell.cell_type, cell.source, cell.metadata.get("mystnb")) for cell in notebook.cells] == [
        (cell.cell_type, cell.source, cell.metadata.get("mystnb")) for cell in text.cells
    ], "run `python docs/make_notebook.py`"


def test_the_site_shows_the_same_notebook():
    assert (ROOT / "docs" / "tutorial.ipynb").read_bytes() == STORED.read_bytes()


@pytest.mark.parametrize("path", [STORED, *EXECUTED], ids=lambda path: path.parent.name)
def test_outputs_are_those_of_a_run(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    pictures = []
    for output in (output for cell in cells for output in cell.outputs):
        if output.output_type == "stream":
            assert output.name == "stdout", output.text
            assert len(output.text) < 1000
        else:
            assert output.output_type == "display_data", output
            pictures.append(base64.b64decode(output.data["image/png"]))
    assert len(pictures) == 2
    check_numbers(printed(path))
    assert form(printed(path)) == form(printed(STORED))


def test_outputs_are_small_and_of_no_machine():
    text = STORED.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|Users|usr)/", re.sub(r"https?://\S+", "", text))
    assert '"iopub' not in text  # Times of execution.
    assert len(text) < 80_000


@pytest.mark.slow
def test_runs_as_a_script_without_ipython(tmp_path):
    (tmp_path / "IPython.py").write_text("raise ImportError('the extra [examples] does not bring IPython')")
    settings = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "MPLBACKEND": "agg",
        "PYTHONIOENCODING": "utf-8",
        "PYTHONPATH": str(tmp_path),
        "XLA_FLAGS": "",
    }
    done = subprocess.run(
        [sys.executable, str(STORED.with_suffix(".py"))],
        env={**os.environ, **settings},
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert form(done.stdout) == form(printed(STORED))
    check_numbers(done.stdout)
