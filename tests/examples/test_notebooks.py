"""The notebooks, all cells of them in order, in a kernel of their own."""

import json
import re

import nbclient
import nbformat
import pytest

from .conftest import EXAMPLES

pytestmark = pytest.mark.slow


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Runs one with fewer steps, and gives its cells with what they put out."""
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))

    def run(name, steps):
        book = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
        changed = 0
        for cell in book.cells:
            cell.source, number = re.subn(r"^STEPS = \d+", f"STEPS = {steps}", cell.source, flags=re.MULTILINE)
            changed += number
        assert changed == 1
        nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
        return book.cells

    return run


def outputs(cells):
    return [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]


def printed(cells):
    return "".join(output.text for output in outputs(cells) if output.get("name") == "stdout")


def pictures(cells):
    return [kind for output in outputs(cells) for kind in output.get("data", {}) if kind.startswith("image/")]


def test_first_steps(notebook):
    cells = notebook("first_steps", 3)
    assert pictures(cells) == ["image/gif", "image/png"]
    assert "engine: exact" in printed(cells)
    difference = float(re.search(r"largest difference of a pixel: ([\d.]+) of 1", printed(cells))[1])
    assert difference < 1 / 255  # in the dtype that it names, float32


def test_engines(notebook):
    cells = notebook("engines", 12)
    assert pictures(cells) == ["image/png"]
    distances = {name.strip(): float(db) for name, db in re.findall(r"^(.+?) +([\d.]+) dB$", printed(cells), re.M)}
    assert list(distances) == ["balanced, weights in 8 bits", "turbo, half of the steps", "turbo, a third of the steps"]
    assert all(10 < distance < 100 for distance in distances.values()), json.dumps(distances)
    assert "6 of 12" in printed(cells) and "4 of 12" in printed(cells)
