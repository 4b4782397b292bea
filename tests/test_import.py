"""Importing costs nothing, says nothing, and the source roots keep their directions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)


def test_import_loads_nothing_heavy():
    heavy = run(
        "import sys, cogvx_fast; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    assert heavy.stdout.strip() == "[]"


@pytest.mark.slow
def test_public_names_are_there_and_arrive_quietly():
    done = run(
        "import cogvx_fast\n"
        "for name in cogvx_fast.__all__: assert getattr(cogvx_fast, name) is not None\n"
        "assert set(cogvx_fast.__all__) <= set(dir(cogvx_fast))"
    )
    assert (done.stdout, done.stderr) == ("", "")


# As where it is not installed: nothing finds it, and importing it raises.
WITHOUT_AV = "import sys; sys.modules['av'] = None\n"


@pytest.mark.slow
def test_nothing_but_writing_mp4_needs_pyav():
    done = run(
        WITHOUT_AV + "import cogvx_fast, cogvx_fast.video\n"
        "for name in cogvx_fast.__all__: assert getattr(cogvx_fast, name) is not None\n"
        "from typer.testing import CliRunner\n"
        "from cogvx_fast.cli import app\n"
        "for order in (['doctor', '--json'], ['bench', 'list'], ['kernels', '--help'], ['bench', 'run', '--help'],\n"
        "              ['generate', 'a cat', '--output', 'cat.mp4']):\n"
        "    result = CliRunner().invoke(app, order)\n"
        "    print(order[0], result.exit_code, 'PyAV cannot be imported' in result.stdout + result.stderr)\n"
        "assert sys.modules['av'] is None"
    )
    assert done.stdout.split("\n")[:-1] == [
        *("doctor 0 True", "bench 0 False", "kernels 0 False", "bench 0 False", "generate 2 True")
    ]


@pytest.mark.slow
def test_what_bench_and_kernels_run_imports_no_pyav():
    done = run(
        WITHOUT_AV + "import importlib, pkgutil, cogvx_fast.bench, cogvx_fast.cli, cogvx_kernels\n"
        "for package in (cogvx_fast.bench, cogvx_fast.cli, cogvx_kernels):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        try: importlib.import_module(module.name)\n"
        "        except ImportError as error: print(module.name, error.name)"
    )
    assert " av" not in done.stdout


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


PACKAGE = "cogvx_fast"


def modules():
    """Each module of the package by its name, and its code."""
    for path in (ROOT / PACKAGE).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def statements(body):
    """Those that run on import, but for what type checkers alone look at."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse)
            continue
        yield node
        for inner in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, inner, []))
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body)


def own_imports(name, path, known, everywhere=False):
    """The modules of the package that `name` imports when it is imported itself, or anywhere in it."""
    tree = ast.parse(path.read_text())
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree) if everywhere else statements(tree.body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            if source not in known:
                continue
            # `from . import session` names a module; `from .plan import EnginePlan` something in one.
            submodules = [f"{source}.{alias.name}" for alias in node.names if f"{source}.{alias.name}" in known]
            yield from submodules
            if len(submodules) < len(node.names):
                yield source


def graph(everywhere=False):
    found = dict(modules())
    return {name: set(own_imports(name, path, found, everywhere)) - {name} for name, path in found.items()}


def circles(edges):
    """Modules that reach themselves, each circle once, in the order in which they import each other."""
    done, found = set(), []

    def visit(name, path):
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(edges[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in sorted(edges):
        visit(name, [])
    return found


def test_the_search_for_circles_finds_them():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c", "b"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    edges = graph()
    assert (
        "cogvx_fast.plan" in edges["cogvx_fast.resolve"]
        and "cogvx_fast.transformer.stack" in edges["cogvx_fast.transformer.model"]
    )


def test_no_module_imports_itself_by_way_of_others():
    assert circles(graph()) == []


# Who stands above the engine and may import it; it knows none of them.
ABOVE = ("__main__", "bench", "cli", "enhance", "serving")


def layer(name):
    return next((above for above in ABOVE if name.startswith(f"{PACKAGE}.{above}")), "engine")


def test_the_engine_knows_nothing_of_what_stands_above_it():
    edges = graph(everywhere=True)
    above = {(name, other) for name, others in edges.items() for other in others if layer(name) != layer(other)}
    assert above and not [pair for pair in above if layer(pair[0]) == "engine"]


def test_what_is_decided_depends_on_nothing_that_runs():
    """The plan is data, and neither it nor a state nor a session needs a model."""
    edges = graph()
    reached = {}
    for start in ("plan", "state", "config"):
        todo, seen = [f"{PACKAGE}.{start}"], set()
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += edges[name]
        reached[start] = seen
    assert reached["state"] == {f"{PACKAGE}.state"}
    for seen in reached.values():
        assert not [name for name in seen if name.startswith((f"{PACKAGE}.transformer", f"{PACKAGE}.pipelines"))]
