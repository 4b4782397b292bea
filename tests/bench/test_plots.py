import pytest
from PIL import Image

from cogvx_fast import files
from cogvx_fast.bench import plots
from cogvx_fast.bench.comparison import groups

from .conftest import refused, row

ROWS = [
    row("diffusers", 1.0),
    row("ours", 0.5),
    refused(),
    row("ours", 0.1, stage="text"),
    row(run="b", dtype="float32"),
]


def test_a_picture_for_each_group(tmp_path):
    pytest.importorskip("matplotlib")
    written = plots.write_plots(ROWS, tmp_path / "new")
    assert [path.name for path in written] == [f"{group.slug}.png" for group in groups(ROWS)]
    assert sorted((tmp_path / "new").iterdir()) == sorted(written)
    for path in written:
        with Image.open(path) as image:
            colors = image.convert("RGB").getcolors(1_000_000)
            assert image.format == "PNG" and image.width > 500 and len(colors) > 10


def test_only_red_rows_make_a_picture_too():
    pytest.importorskip("matplotlib")
    assert plots.plot(groups([refused()])[0]).startswith(b"\x89PNG")


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "folder" / "a.png"
    files.write_whole(target, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(target, b"new")
    assert target.read_bytes() == b"old" and list(target.parent.iterdir()) == [target]
