"""`--preview FILE`: what is in it while a video is made, and that it is gone afterwards."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cogvx_fast import FastCogVideoXPipeline
from cogvx_fast.cli import preview

from .conftest import assert_usage_error

PICTURES = torch.randint(0, 255, (1, 5, 3, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("suffix", [".png", ".gif", ".webp"])
def test_pictures_are_enlarged_and_written(suffix, tmp_path):
    path = tmp_path / f"p{suffix}"
    preview.PreviewFile(path, fps=8).show(PICTURES)
    with Image.open(path) as image:
        assert image.size == (16, 12)
        if suffix == ".png":
            shown = np.asarray(image)
            assert (shown[::4, ::4] == PICTURES[0, 2].numpy()).all() and (shown[3::4, 3::4] == shown[::4, ::4]).all()
        else:
            image.load()
            assert image.n_frames == 5 and image.info["duration"] == 500
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_it_is_renewed_once_a_second_and_removed(tmp_path):
    path, clock = tmp_path / "p.png", Clock()
    file = preview.PreviewFile(path, fps=8, clock=clock)

    def written_at(seconds):
        clock.now = 100.0 + seconds
        path.unlink(missing_ok=True)
        file.show(PICTURES)
        return path.exists()

    assert [written_at(seconds) for seconds in (0, 0.9, 1, 1.5, 2.5)] == [True, False, True, False, True]
    with pytest.raises(KeyboardInterrupt), file.there():
        assert path.exists()
        raise KeyboardInterrupt
    assert not path.exists()
    with file.there():
        pass


def test_a_place_that_is_gone_is_said_once(tmp_path, capsys):
    clock = Clock()
    file = preview.PreviewFile(tmp_path / "file" / "p.png", fps=8, clock=clock)
    (tmp_path / "file").write_text("no folder")
    for _ in range(2):
        file.show(PICTURES)
        clock.now += 5
    assert capsys.readouterr().err.count("could not be written") == 1


def test_a_run_shows_what_it_makes(run, checkpoint, calls, monkeypatch):
    seen, show = [], preview.PreviewFile.show

    def look(self, pictures):
        show(self, pictures)
        seen.append((Path("p.gif").exists(), pictures.shape))

    monkeypatch.setattr(preview.PreviewFile, "show", look)
    result = run("generate", "a cat", "-o", "out.gif", "--preview", "p.gif", "--model", checkpoint, "--steps", 2)
    assert result.exit_code == 0, result.stderr
    assert seen == [(True, (1, 3, 4, 4, 3))] * 2
    assert result.files == ["out.gif"] and calls[0]["preview"] is True
    assert ", preview " in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--preview", "p.mp4"), (".png, .gif or .webp",)),
        (("--preview", ".gif"), (".png, .gif or .webp",)),
        (("-o", "same.gif", "--preview", "same.gif"), ("is in the way of 'same.gif'",)),
        (("-o", "folder", "--preview", "folder/p.gif"), ("is in the way of 'folder'",)),
        (("--sheet", "s.png", "--preview", "s.png"), ("is in the way of 's.png'",)),
    ],
)
def test_places_that_do_not_fit_are_refused(run, arguments, words, monkeypatch):
    monkeypatch.setattr(FastCogVideoXPipeline, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    assert_usage_error(run("generate", "a cat", *arguments), "--preview", *words)


def test_a_file_of_the_users_is_not_taken(run, tmp_path):
    (tmp_path / "mine.png").write_text("precious")
    assert_usage_error(run("generate", "a cat", "--preview", tmp_path / "mine.png"), "is there already")
    assert (tmp_path / "mine.png").read_text() == "precious"
