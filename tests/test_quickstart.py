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
    """The numbers that a run of so many epochs prints."""
    monkeypatch.setattr(quickstart, "EPOCHS", epochs)
    quickstart.main(["--out", str(out)])
    return {name: float(value) for name, value in re.findall(r"(\w+): (-?[\d.]+)", capsys.readouterr().out)}


def relative_distance(numbers):
    return numbers["own_distance"] / (numbers["own_distance"] + numbers["gap"])


@QUICKSTARTS
def test_learns_and_compacts(quickstart, monkeypatch, capsys, tmp_path):
    early = run(quickstart, monkeypatch, capsys, tmp_path / "early", 1)
    late = run(quickstart, monkeypatch, capsys, tmp_path / "new" / "late", 15)
    assert late["accuracy"] > max(early["accuracy"], 90)
    assert late["classes_seen"] == 10
    # Against the distance to the nearest other center, since all distances grow as features spread.
    assert relative_distance(late) < 0.4 < relative_distance(early)
    picture = tmp_path / "new" / "late" / f"{quickstart.__name__}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


@QUICKSTARTS
def test_is_short_and_stands_alone(quickstart):
    with open(quickstart.__file__, encoding="utf-8") as file:
        text = file.read()
    assert text.count("\n") <= 70
    assert not re.search(r"^(from|import) _", text, re.MULTILINE)
