"""Makes the tutorial's notebook, with its outputs, of its text form: `python docs/make_notebook.py`.

It needs `pip install nbconvert ipykernel` and the extra [test]. If only prose has changed,
`jupytext --to ipynb --update examples/center_loss_colab.py` does.
"""

import base64
import io
from pathlib import Path

import jupytext
from nbconvert.preprocessors import ExecutePreprocessor
from PIL import Image

TEXT = Path(__file__).resolve().parents[1] / "examples" / "center_loss_colab.py"


def small(picture):
    """The PNG with 64 colors, which takes a quarter of the bytes."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.quantize(64, dither=Image.Dither.NONE).save(out := io.BytesIO(), "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


notebook = jupytext.read(TEXT)
# No times of execution, and one text for each cell.
ExecutePreprocessor(record_timing=False, coalesce_streams=True, timeout=1800).preprocess(notebook)
del notebook.metadata["language_info"]
for i, cell in enumerate(notebook.cells):
    cell.id = f"cell-{i}"
    cell.metadata.pop("lines_to_next_cell", None)
    for output in cell.get("outputs", []):
        if "data" in output and "image/png" in output.data:
            output.data["image/png"] = small(output.data["image/png"])
jupytext.write(notebook, TEXT.with_suffix(".ipynb"))
