"""The pages: what they link to is there, the site has all of them, and what they name exists."""

import pkgutil
import re
from pathlib import Path

import pytest
import typer
import yaml
from cogvx_kernels import ops

import cogvx_fast
from cogvx_fast.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [
    ROOT / "benchmarks" / "README.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "deploy").rglob("*.md")),
    *(ROOT / "tools").rglob("*.md"),
]
_LINK = re.compile(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")


def anchors(text):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text, missing = page.read_text(encoding="utf-8"), []
    for found in _LINK.finditer(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        target = found[1] or found[2]
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(place.read_text())):
            missing.append(target)
    assert not missing, f"nothing is there: {missing}"


def entries(nav):
    for entry in nav:
        for below in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [below] if isinstance(below, str) else entries(below)


def test_the_site_has_every_page_once():
    nav = list(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert len(set(nav)) == len(nav)
    assert pages - set(nav) == set(), "these are in no menu of mkdocs.yml"
    # What is not in docs/ comes from its place in the repository: tools/docs_site.py.
    assert [name for name in nav if name not in pages and not (ROOT / name).is_file()] == []


def test_the_reference_has_every_public_name():
    named = set(re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE))
    functions = {name for name in ops.__all__ if callable(getattr(ops, name))}
    assert functions and {f"cogvx_kernels.ops.{name}" for name in functions} <= named
    assert {f"cogvx_fast.{name}" for name in cogvx_fast.__all__} <= named
    for name in named:
        assert pkgutil.resolve_name(name) is not None


def commands(group, names=()):
    yield names, {option for parameter in group.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*names, name))


OPTIONS = dict(commands(typer.main.get_command(app)))
# Pages whose every option is one of this command; others name those of pip and make, too.
OF_USE = ("tasks", "engines", "memory", "attention", "autoencoder", "lora", "troubleshooting", "first-and-last-frame")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_of_the_command_are_there(page):
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    lines = re.findall(r"(?:^|`|\| )cogvx-fast ([^`\n#|]*)", text, re.MULTILINE)
    for line in lines:
        names = ()
        for word in line.split():
            if (*names, word) not in OPTIONS:
                break
            names = (*names, word)
        assert names or not re.match(r"[a-z]", line), f"no such command: cogvx-fast {line}"
        given = {option.split("=")[0] for option in re.findall(r"(?<!\S)--[a-z][\w-]*", line)}
        assert given <= OPTIONS[names] | {"--help"}, f"cogvx-fast {line}"
    if page.stem in OF_USE:
        every = set().union(*OPTIONS.values())
        assert set(re.findall(r"`(--[a-z][\w-]*)", text)) <= every
