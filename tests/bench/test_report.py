"""The page, the pictures and the README's section, made from rows."""

import pytest
from PIL import Image

from cogvx_fast import files
from cogvx_fast.bench.report import BEGIN, END, NOTHING, readme_section, report, rewritten, serving_section, write_plots
from cogvx_fast.bench.results import latest, read

from .conftest import PROVENANCE, refused, row

ROWS = [
    row("diffusers", 1.0, engine=None, first_call_seconds=1.0),
    row("ours", 0.5, error=0.002, first_call_seconds=3.0, extras={"session_one_off_seconds": 0.0125}),
    row("arithmetic", 0.4, gate="none", error=None, own_error=None, budget=None),
    refused("wrong"),
]


def test_a_picture_for_each_series(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [*ROWS, row("ours", 0.1, stage="text"), row(run="b", dtype="float32")]
    written = write_plots(rows, tmp_path / "new")
    assert [path.name for path in written] == [f"{series.slug}.png" for series in latest(rows)]
    assert sorted((tmp_path / "new").iterdir()) == sorted(written)
    for path in written:
        with Image.open(path) as image:
            colors = image.convert("RGB").getcolors(1_000_000)
            assert image.format == "PNG" and image.width > 500 and len(colors) > 10


def test_a_picture_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (target,) = write_plots([row()], tmp_path)
    before = target.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_plots([row(), refused()], tmp_path)
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]


def test_page_says_where_the_numbers_come_from():
    text = report(ROWS, "benchmarks")
    for expected in (
        "## dit-2b, bfloat16",
        "Some CPU (R); 2 threads; 3 of 30 layers; batch 2, 9 frames of 240x352 (1,216 tokens); torch 2.13.0",
        "commit 0123456789; 2026-01-02. `cogvx-fast bench run dit-2b --dtype bfloat16`",
        "![dit-2b, bfloat16](benchmarks/dit-2b-bfloat16-some-cpu-r.png)",
        "- **dit-step, ours**: one step; attention: on: sdpa; session_one_off_seconds 0.0125",
    ):
        assert expected in text
    dirty = PROVENANCE.__class__(**{**PROVENANCE.__dict__, "git_dirty": True})
    assert "commit 0123456789 with changes" in report([row(provenance=dirty)], "benchmarks")


def test_without_rows_it_says_so():
    assert NOTHING in report([], "docs") and readme_section([], "page.md") == NOTHING


def test_the_readme_has_its_parts_in_order():
    section = readme_section(ROWS, "docs/all.md")
    assert section.startswith("| what | size |") and "arithmetic" not in section
    assert section.splitlines()[-1].startswith("From [all rows](docs/all.md)")


def test_the_readme_is_rewritten_between_its_markers_only(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Name\n\n{BEGIN}\nold\n{END}\n\nThe end.\n")
    text, new = rewritten(readme, "section")
    assert text == readme.read_text()
    assert new == f"# Name\n\n{BEGIN}\nsection\n{END}\n\nThe end.\n"
    readme.write_text(new)
    assert rewritten(readme, "section") == (new, new)


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_markers_that_are_missing_are_asked_for(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match=r"README\.md needs one line <!-- bench:begin -->"):
        rewritten(tmp_path / "README.md", "new")


def test_the_committed_documents_are_those_of_the_committed_rows(request):
    root = request.config.rootpath
    rows = read(root / "benchmarks" / "results")
    text, new = rewritten(root / "README.md", readme_section(rows, "docs/benchmarks.md"))
    assert text == new, "run: cogvx-fast bench report"
    assert report(rows, "benchmarks") == (root / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    text, new = rewritten(root / "docs" / "serving.md", serving_section(rows, "benchmarks"))
    assert text == new, "run: cogvx-fast bench report"
