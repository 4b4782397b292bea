"""What one reads of the examples: the table, the scripts' first lines, notebooks without what they showed somebody."""

import ast
import json
import re

import pytest

from .conftest import EXAMPLES

SCRIPTS, NOTEBOOKS = sorted(EXAMPLES.glob("*.py")), sorted(EXAMPLES.glob("*.ipynb"))


def test_the_table_has_every_example_and_no_other():
    named = re.findall(r"^\| \[([\w.]+)\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert [name for name, _ in named] == [place for _, place in named]
    assert sorted(name for name, _ in named) == [path.name for path in sorted(SCRIPTS + NOTEBOOKS)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_says_how_it_is_run_and_is_one_that_can_be_copied(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert f"python examples/{path.name}" in ast.get_docstring(tree)
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not {name.split(".")[0] for name in imported} & {"tools", "tests", "benchmarks", "examples"}
    assert len(text.splitlines()) <= 80


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_without_outputs(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
