"""What is built from the checkout contains what it should, and works away from it."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def package_files():
    """The files of the two packages as the repository has them."""
    roots = (ROOT / "cogvx_fast", ROOT / "kernels" / "cogvx_kernels")
    files = [(root.parent, path) for root in roots for path in root.rglob("*") if path.is_file()]
    return {
        path.relative_to(parent).as_posix()
        for parent, path in files
        if "__pycache__" not in path.parts and path.suffix != ".partial"
    }


def test_wheel_contains_the_packages_and_nothing_else(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == package_files()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "cogvx_fast/assets/demo/model_index.json" in inside


def test_sdist_can_be_built_from_and_carries_no_tests(built):
    """The wheel is built from it: that is complete if the sdist is."""
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "LICENSE", "README.md", "constraints.txt"} <= names
    assert {"CHANGELOG.md", "CITATION.cff"} <= names
    assert "kernels/cogvx_kernels/ops.py" in names and "cogvx_fast/assets/demo/model_index.json" in names
    assert not [name for name in names if name.split("/")[0] in ("tests", "tools", "benchmarks", ".ci")]


def test_sdist_has_the_pages_and_examples_that_the_readme_leads_to(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    links = re.findall(r"\]\(((?:docs|examples)/[^)#]+)|src=\"([^\"]+)\"", (ROOT / "README.md").read_text())
    linked = {page or picture for page, picture in links}
    assert len(linked) > 5 and {place for place in linked if (ROOT / place).is_file()} <= names
    examples = {f"examples/{path.name}" for path in (ROOT / "examples").iterdir() if path.is_file()}
    assert "examples/text.py" in examples and examples <= names


def test_wheel_is_of_a_size_that_one_installs(built):
    assert built[0].stat().st_size < 60e6


def test_the_version_is_the_same_wherever_it_is_said(built):
    said = {
        "pyproject.toml": r'^version = "(.+)"',
        "cogvx_fast/__init__.py": r'^__version__ = "(.+)"',
        "CITATION.cff": r"^version: (.+)",
        "CHANGELOG.md": r"^## (\S+)",
        "deploy/space/README.md": r"cogvx_fast-(\d[^-]*)-py3-none-any\.whl",
    }
    found = {name: re.search(said[name], (ROOT / name).read_text(), re.MULTILINE)[1] for name in said}
    assert set(found.values()) == {built[0].name.split("-")[1]}, found


def test_wheel_works_away_from_the_checkout(built, tmp_path):
    zipfile.ZipFile(built[0]).extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import cogvx_fast, cogvx_kernels.ops, json, pathlib\n"
        "assert cogvx_fast.__file__.startswith(sys.argv[1]), cogvx_fast.__file__\n"
        "index = pathlib.Path(cogvx_fast.demo_checkpoint()) / 'model_index.json'\n"
        "print(json.loads(index.read_text())['_class_name'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "CogVideoXPipeline"


def test_wheel_names_the_command_and_the_extras(built):
    archive = zipfile.ZipFile(built[0])
    folder = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    assert "cogvx-fast = cogvx_fast.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()
    metadata = archive.read(f"{folder}/METADATA").decode()
    for extra in ("dev", "bench", "serve", "ray", "flash", "xformers", "plots", "enhance"):
        assert f"Provides-Extra: {extra}" in metadata
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert len(needed) > 5 and not [line for line in needed if re.search("pytest|ruff|mypy", line)]
