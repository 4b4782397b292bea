"""Importing costs nothing, says nothing, and the source roots keep their directions."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)


def test_import_loads_nothing_heavy():
    heavy = run(
        "import sys, cogvx_fast; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    assert heavy.stdout.strip() == "[]"


def test_public_names_are_there_and_arrive_quietly():
    done = run(
        "import cogvx_fast\n"
        "for name in cogvx_fast.__all__: assert getattr(cogvx_fast, name) is not None\n"
        "assert set(cogvx_fast.__all__) <= set(dir(cogvx_fast))"
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_unknown_names_raise():
    done = run("import cogvx_fast\ntry: cogvx_fast.nothing\nexcept AttributeError as error: print(error)")
    assert "has no attribute 'nothing'" in done.stdout


def test_kernels_is_a_source_root_and_no_package():
    # `kernels` is also a package that diffusers and transformers look for; a folder that imports would shadow it.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "cogvx_kernels" / "__init__.py").exists()


def imported(folder):
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                yield path.relative_to(ROOT), name.split(".")[0]


def test_import_directions():
    kernels = {name for _, name in imported(ROOT / "kernels")}
    assert "torch" in kernels and not kernels & {"cogvx_fast", "diffusers", "transformers"}
    engine = set(imported(ROOT / "cogvx_fast"))
    assert engine and not [pair for pair in engine if pair[1] in ("benchmarks", "tools", "tests")]
