"""The two examples to copy from: short, they learn, and centers go where the clusters are."""

import re

import pytest
import quickstart_linen
import quickstart_nnx

QUICKSTARTS = pytest.mark.parametrize(
    "quickstart", [quickstart_nnx, quickstart_linen], ids=lambda module: module.__name__
)
pytestmark = pytest.mark.usefixtures("as_users_run_it")


def run(quickstart, monkeypatch, capsys, out, epochs):
    """The numbers that a run of so many epochs prints, and its picture, which it names."""
    monkeypatch.setattr(quickstart, "EPOCHS", epochs)
    quickstart.main(["--out", str(out)])
    *said, picture = capsys.readouterr().out.splitlines()
    assert picture == f"picture: {out / quickstart.__name__}.png"
    assert (out / f"{quickstart.__name__}.png").read_bytes().startswith(b"\x89PNG")
    return {name: float(value) for name, value in re.findall(r"(\w+): (-?[\d.]+)", "\n".join(said))}


@pytest.mark.slow
@QUICKSTARTS
def test_learns_and_compacts(quickstart, monkeypatch, capsys, tmp_path):
    early = run(quickstart, monkeypatch, capsys, tmp_path / "early", 1)
    late = run(quickstart, monkeypatch, capsys, tmp_path / "new" / "late", 15)
    assert late["accuracy"] > max(early["accuracy"], 90)
    assert late["classes_seen"] == 10
    # Softmax alone: centers follow the features, which they hardly pull.
    monkeypatch.setattr(quickstart, "LAM", lambda step: 1e-9)
    alone = run(quickstart, monkeypatch, capsys, tmp_path / "alone", 15)
    assert late["ratio"] < 0.4 < min(early["ratio"], alone["ratio"])


@QUICKSTARTS
def test_is_short_and_stands_alone(quickstart):
    with open(quickstart.__file__, encoding="utf-8") as file:
        text = file.read()
    assert text.count("\n") <= 70
    assert not re.search(r"^(from|import) _", text, re.MULTILINE)
