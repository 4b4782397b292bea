"""Pictures as people have them, and what becomes of them."""

import numpy as np
import pytest
from PIL import Image

from cogvx_fast.pictures import MAX_PIXELS, Fit, PictureError, fitted, read_picture, read_video
from cogvx_fast.video import write_video

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def test_it_is_turned_as_its_exif_data_say(tmp_path):
    image = Image.new("RGB", (4, 2), "red")
    image.putpixel((0, 0), BLACK)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    read = read_picture(tmp_path / "a.png")
    assert read.size == (2, 4) and read.getpixel((1, 0)) == BLACK


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_white(tmp_path, mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.convert(mode).save(tmp_path / "a.png")
    read = read_picture(tmp_path / "a.png")
    assert (read.mode, read.getpixel((0, 0)), read.getpixel((1, 0))) == ("RGB", WHITE, BLACK)


def test_cmyk_and_16_bits_are_converted(tmp_path):
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert np.abs(np.asarray(read_picture(tmp_path / "a.jpg"))[0, 0].astype(int) - RED).max() < 40
    Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16)).save(tmp_path / "b.png")
    assert read_picture(tmp_path / "b.png").getpixel((0, 0)) == (0x80,) * 3


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(PictureError, match="cannot be decoded; must be a picture"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError):
        read_picture(tmp_path / "nothing.png")
    Image.new("1", (MAX_PIXELS // 1000 + 1, 1001)).save(tmp_path / "large.png")
    with pytest.raises(PictureError, match="must be at most"):
        read_picture(tmp_path / "large.png")


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "frames"])
def test_videos_are_read_as_far_as_they_are_wanted(tmp_path, name):
    frames = [Image.new("RGB", (32, 32), (20 * number, 40, 60)) for number in range(7)]
    write_video(frames, tmp_path / name)
    read = read_video(tmp_path / name, 5)
    assert len(read) == 5
    for image, expected in zip(read, frames, strict=False):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() < 12


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_what_is_no_video_is_refused(tmp_path, name):
    (tmp_path / name).write_text("no video")
    with pytest.raises(PictureError, match="cannot be decoded"):
        read_video(tmp_path / name, 5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PictureError, match="has no pictures in it"):
        read_video(tmp_path / "empty", 5)


def test_the_three_fits():
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (10, 0, 30, 20))
    cropped = np.asarray(fitted(image, 10, 10))
    assert cropped.shape == (10, 10, 3) and (cropped[5, 4:6] == RED).all()
    assert not (cropped == WHITE).all(axis=2).any(), "the middle alone"
    padded = np.asarray(fitted(image, 20, 20, Fit.pad))
    assert (padded[0] == 0).all() and (padded[-1] == 0).all() and (padded[10, 9:11] == RED).all()
    stretched = np.asarray(fitted(image, 10, 10, Fit.stretch)).astype(int)
    assert np.abs(stretched[5, 0] - WHITE).max() < 10 and np.abs(stretched[5, 5] - RED).max() < 10
