import pytest

from cogvx_fast.bench import rows as result_rows
from cogvx_fast.bench.comparison import Group
from cogvx_fast.bench.report import (
    BEGIN,
    END,
    NOTHING,
    readme_matches,
    readme_section,
    report,
    rewrite_readme,
    seconds,
    table,
    with_section,
)
from cogvx_fast.bench.summary import summary

from .conftest import PROVENANCE, refused, row

ROWS = [
    row("diffusers", 1.0, engine=None, first_call_seconds=1.0),
    row("ours", 0.5, error=0.002, first_call_seconds=3.0, extras={"session_one_off_seconds": 0.0125}),
    row("arithmetic", 0.4, gate="none", error=None, own_error=None, budget=None),
    refused("wrong"),
]


def test_table():
    assert table(Group(tuple(ROWS))).splitlines() == [
        "| stage | contender | time | x diffusers | x arithmetic | first call | pays after | peak memory "
        "| error (x diffusers' own) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| dit-step | diffusers | 1.00 s (900 ms to 1.10 s) | 1.00x | 2.50x | 1.00 s |  | 123.0 MB | 0.004 (1.00x) |",
        "| dit-step | ours | 500 ms (450 ms to 550 ms) | 2.00x | 1.25x | 3.00 s | 5 calls | 123.0 MB | 0.002 (0.50x) |",
        "| dit-step | arithmetic | 400 ms (360 ms to 440 ms) |  |  | 800 ms |  | 123.0 MB |  |",
        "| dit-step | wrong | refused: error 2 is above the budget of 1 |  |  |  |  |  | 2 (500.00x) |",
    ]


def test_ablation():
    additions = [row("diffusers", 1.0, series="ablation"), row("+ a", 0.8, series="ablation", expected_gain=1.3)]
    lines = table(Group(tuple(additions))).splitlines()
    assert lines[0].startswith("| stage | contender | time | x the row before | expected |")
    assert "| 1.25x | 1.300x |" in lines[3]


def test_the_readme_has_a_line_for_what_both_ran():
    clip = [row("diffusers", 2.0, stage="vae-decode", own_error=None), refused("ours", stage="vae-decode")]
    section = readme_section(ROWS + clip, "plots", "docs/all.md")
    lines, what = section.splitlines(), "9x240x352 | Some CPU (R) | bfloat16"
    assert lines[2] == f"| dit-step, dit-2b | {what} | 1.00 s | 500 ms | 2.00x | 123.0 MB | 123.0 MB | 0.50x |"
    assert lines[3] == f"| vae-decode, dit-2b | {what} | 2.00 s | refused |  | 123.0 MB |  | 500.00x |"
    assert lines[4] == ""
    assert "[all rows](docs/all.md)" in section and "arithmetic" not in section
    assert summary([Group((row("diffusers", 1.0),))]) == ""


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
    assert "commit 0123456789 with changes" in report([row(provenance=dirty)])


def test_without_rows_it_says_so():
    assert NOTHING in report([]) and readme_section([], "docs", "page.md") == NOTHING


def test_readme_is_rewritten_between_its_markers_only(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Name\n\n{BEGIN}\nold\n{END}\n\nThe end.\n")
    section = readme_section(ROWS, "docs/benchmarks", "docs/benchmarks.md")
    assert not readme_matches(readme, section)
    assert rewrite_readme(readme, section) is True
    assert readme.read_text() == f"# Name\n\n{BEGIN}\n{section}\n{END}\n\nThe end.\n"
    assert readme_matches(readme, section) and rewrite_readme(readme, section) is False
    assert not readme_matches(
        readme, readme_section([row("diffusers", 1.0), row("ours", 0.6)], "docs/benchmarks", "docs/benchmarks.md")
    )
    assert list(tmp_path.iterdir()) == [readme]


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_markers_that_are_missing_are_asked_for(text, tmp_path):
    with pytest.raises(ValueError, match="needs one line <!-- bench:begin -->"):
        with_section(text, "new")
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match=r"README\.md needs one line"):
        rewrite_readme(tmp_path / "README.md", "new")
    assert (tmp_path / "README.md").read_text() == text


def test_the_readme_matches_the_rows(request):
    root = request.config.rootpath
    if BEGIN not in (root / "README.md").read_text(encoding="utf-8"):
        pytest.skip("the README has no section for results yet")
    section = readme_section(result_rows.read(root / "benchmarks" / "results"), "docs/benchmarks", "docs/benchmarks.md")
    assert readme_matches(root / "README.md", section), "run: cogvx-fast bench report"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (83.456, "83.5 s"),
        (1.0, "1.00 s"),
        (0.5, "500 ms"),
        (0.00321, "3.21 ms"),
        (4.2e-6, "4.20 µs"),
        (1234.5, "1,234 s"),
    ],
)
def test_seconds(value, text):
    assert seconds(value) == text
