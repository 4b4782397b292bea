import contextlib
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from cogvx_fast import video


def moving_square(num_frames=9, height=48, width=64):
    """A red square moving right over a gradient: uint8 `[num_frames, height, width, 3]`."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames[..., 2] = np.linspace(60, 220, width).astype(np.uint8)
    frames[..., 1] = np.linspace(0, 120, height).astype(np.uint8)[:, None]
    for index in range(num_frames):
        frames[index, 10:30, 4 + 3 * index : 24 + 3 * index] = (220, 30, 40)
    return frames


def noise(num_frames=8, size=64):
    return np.random.default_rng(0).integers(0, 256, (num_frames, size, size, 3), dtype=np.uint8)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def decode_mp4(path):
    """The frames, and what the stream says of itself (read now: it is invalid once the file is closed)."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        context = stream.codec_context
        colour = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        return frames, {
            "rate": stream.average_rate,
            "codec": context.name,
            "pixels": context.pix_fmt,
            "colour": tuple(int(value) for value in colour),
        }


def decode_animation(path):
    with Image.open(path) as image:
        frames, durations = [], []
        for index in range(image.n_frames):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
        return np.stack(frames), durations, image.info.get("loop")


@contextlib.contextmanager
def largest_file(num_bytes):
    """Writing beyond `num_bytes` of a file fails, as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_mp4_keeps_frames_colours_and_rate(tmp_path):
    frames = moving_square()
    path = video.write_video([Image.fromarray(frame) for frame in frames], tmp_path / "out.mp4", fps=8)
    decoded, stream = decode_mp4(path)
    assert decoded.shape == frames.shape
    # Chroma at half resolution blurs the outline of the square, which limits this;
    assert psnr(decoded, frames) > 28
    # inside it and on the background colours must come out as they were (another matrix is 10 and more off).
    assert np.abs(decoded[0, 14:26, 8:20].astype(int) - (220, 30, 40)).max() <= 6
    assert np.abs(decoded[0, 40:, 2:].astype(int) - frames[0, 40:, 2:]).max() <= 6
    assert stream == {"rate": 8, "codec": "h264", "pixels": "yuv420p", "colour": (1, 1, 1, 1)}, "1 is BT.709, limited"


def test_mp4_has_its_index_in_front(tmp_path):
    path = video.write_video(moving_square(), tmp_path / "out.mp4", fps=8)
    content = path.read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


def test_mp4_pads_odd_sizes_to_even_ones(tmp_path):
    frames = moving_square(height=47, width=63)
    decoded, _ = decode_mp4(video.write_video(frames, tmp_path / "out.mp4"))
    assert decoded.shape == (9, 48, 64, 3)
    assert psnr(decoded[:, :47, :63], frames) > 28
    assert psnr(decoded[:, 47, :63], frames[:, 46]) > 25, "the added row repeats the last one"


def test_repeatable_mp4_leaves_out_what_reads_other_memory(tmp_path):
    frames = moving_square()
    plain = video.write_video(frames, tmp_path / "plain.mp4").read_bytes()
    repeatable = [video.write_video(frames, tmp_path / "out.mp4", repeatable=True).read_bytes() for _ in range(5)]
    assert len(set(repeatable)) == 1
    assert b"mbtree=0" in repeatable[0] and b"mbtree=1" in plain, "x264 says so in the file"
    assert psnr(decode_mp4(tmp_path / "out.mp4")[0], frames) > 28


def test_gif_keeps_frames_colours_and_time(tmp_path):
    frames = moving_square()
    decoded, durations, loop = decode_animation(video.write_video(frames, tmp_path / "out.gif", fps=8))
    assert decoded.shape == frames.shape
    assert psnr(decoded, frames) > 28
    # 125 ms is no whole number of the format's 10 ms: the error must not add up.
    assert set(durations) == {120, 130}
    assert abs(sum(durations) - 9 * 125) <= 5
    assert loop == 0


def test_webp_keeps_frames_colours_and_time(tmp_path):
    frames = moving_square()
    decoded, durations, loop = decode_animation(video.write_video(frames, tmp_path / "out.webp", fps=30))
    assert decoded.shape == frames.shape
    assert psnr(decoded, frames) > 28
    assert sum(durations) == 300
    assert loop == 0


def test_folder_holds_the_frames_without_loss(tmp_path):
    frames = moving_square()
    path = video.write_video(frames, tmp_path / "deep" / "frames")
    names = [f"frame-{number:04d}.png" for number in range(1, 10)]
    assert sorted(os.listdir(path)) == names
    assert np.array_equal(np.stack([np.asarray(Image.open(path / name)) for name in names]), frames)


@pytest.mark.parametrize("name", ["out.mp4", "out.gif", "out.webp", "frames"])
def test_an_iterator_is_written_like_a_list(tmp_path, name):
    images = video.as_images(moving_square())
    paths = [video.write_video(frames, tmp_path / kind / name) for kind, frames in (("a", images), ("b", iter(images)))]
    files = [sorted(path.iterdir()) if path.is_dir() else [path] for path in paths]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


@pytest.mark.parametrize(
    ("frames", "message"),
    [([], "no frames"), ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], r"differ in size: .*\(8, 9\)")],
)
def test_an_iterator_that_is_no_video_leaves_nothing(tmp_path, frames, message):
    for name in ("out.mp4", "out.gif", "frames"):
        with pytest.raises(ValueError, match=message):
            video.write_video(iter(frames), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["images", "float array", "uint8 tensor", "bf16 tensor"])
def test_all_kinds_of_videos_give_the_same_images(kind):
    frames = moving_square(num_frames=2)
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
    given = {
        "images": [Image.fromarray(frame) for frame in frames],
        "float array": frames / 255,
        "uint8 tensor": tensor,
        "bf16 tensor": (tensor / 255).bfloat16(),
    }[kind]
    got = np.stack([np.asarray(image) for image in video.as_images(given)])
    assert np.abs(got.astype(int) - frames).max() <= (1 if kind == "bf16 tensor" else 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no frames"),
        (np.zeros((2, 8, 8), np.uint8), r"\(2, 8, 8\)"),
        (torch.zeros(2, 8, 8, 3), r"\(2, 8, 3, 8\)"),
        (np.full((1, 8, 8, 3), np.nan), "not finite"),
        (np.zeros((1, 8, 8, 3), np.int64), "int64"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 16))], "differ in size"),
    ],
)
def test_what_is_no_video_is_refused(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        video.write_video(given, tmp_path / "out.gif")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["out.mp4", "OUT.MP4", "out.gif", "out.webp", "frames", "new/folder/out.mp4"])
def test_good_places_pass_and_nothing_is_made(name, tmp_path):
    video.check_output(tmp_path / name, fps=8)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["out.avi", "out.png", "out.mp4.bak", "v1.2"])
def test_unknown_suffixes_are_named_with_those_allowed(name, tmp_path):
    with pytest.raises(ValueError, match=rf"{name}.*allowed are \.mp4, \.gif and \.webp"):
        video.check_output(tmp_path / name)


@pytest.mark.parametrize(("name", "fps"), [("out.mp4", 0), ("out.mp4", 121), ("out.gif", 51), ("out.webp", 51)])
def test_rates_out_of_range_are_refused(name, fps, tmp_path):
    with pytest.raises(ValueError, match=f"{fps} frames per second: must be 1 to"):
        video.check_output(tmp_path / name, fps)


@pytest.mark.parametrize("name", ["", ".", "/", "..", "new/..", ".mp4", "new/.GIF", ".png"])
def test_a_path_without_a_name_is_refused(name):
    with pytest.raises(ValueError, match="ends in no name; name a file, or a new folder"):
        video.check_output(name)


def test_places_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    for name, reason in {
        "file/out.mp4": "not a folder",
        "file": "is a file",
        "folder.mp4": "is a folder",
        "full": "something in it",
        "x" * 300 + ".mp4": "cannot be written",
        "/proc/none/out.mp4": "cannot be written",
    }.items():
        with pytest.raises(ValueError, match=reason):
            video.check_output(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("to-folder", "is a link to 'folder'; frames go to a new or empty folder: name that"),
        ("to-nothing", "is a link to 'nothing'"),
        ("to-nothing/out.mp4", "to-nothing' is not a folder"),
        ("to-nothing/frames", "to-nothing' is not a folder"),
        ("to-itself", "is a link"),
        (".", "ends in no name"),
        ("folder/..", "ends in no name"),
    ],
)
def test_places_that_only_the_last_step_would_refuse_are_refused_first(name, reason, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    for link, target in (("to-folder", "folder"), ("to-nothing", "nothing"), ("to-itself", "to-itself")):
        (tmp_path / link).symlink_to(target)
    monkeypatch.chdir(tmp_path / "folder" if name == "." else tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=reason):
        video.check_output(name)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("name", ["to-file.mp4", "to-nothing.mp4", "to-itself.mp4", "linked/out.mp4", "linked/frames"])
def test_links_that_can_be_replaced_or_gone_through_are_taken(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    for link, target in (("to-file", "file"), ("to-nothing", "nothing"), ("to-itself", "to-itself.mp4")):
        (tmp_path / f"{link}.mp4").symlink_to(target)
    (tmp_path / "linked").symlink_to("folder")
    video.check_output(tmp_path / name)
    path = video.write_video(moving_square(num_frames=2), tmp_path / name)
    assert not path.is_symlink() and (tmp_path / "file").read_text() == "old"
    assert len(os.listdir(path)) == 2 if path.is_dir() else len(decode_mp4(path)[0]) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written"):
        video.check_output(tmp_path / "out.mp4")


@pytest.mark.parametrize("name", ["out.mp4", "out.gif", "out.webp", "frames", "new/folder/out.mp4", "new/frames"])
def test_a_full_disk_leaves_nothing(name, tmp_path):
    with largest_file(3000), pytest.raises(OSError) as caught:
        video.write_video(noise(), tmp_path / name)
    assert caught.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_file_as_it_was(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"old")
    with largest_file(3000), pytest.raises(OSError):
        video.write_video(noise(), path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.mp4"]
    video.write_video(moving_square(), path)
    assert len(decode_mp4(path)[0]) == 9


@pytest.mark.parametrize("name", ["out.mp4", "out.gif", "out.webp", "frames"])
def test_an_interrupt_leaves_nothing(name, tmp_path, monkeypatch):
    seen = []

    def interrupt(*_):
        seen.extend(os.listdir(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        video.write_video(moving_square(), tmp_path / name)
    assert len(seen) == 1 and seen[0].endswith(".partial"), "the file was complete under its temporary name"
    assert os.listdir(tmp_path) == []


def test_contact_sheet_shows_every_video(tmp_path):
    red, green = (np.tile(np.uint8(colour), (9, 32, 32, 1)) for colour in ((200, 0, 0), (0, 200, 0)))
    path = video.contact_sheet([red, green], ["red", "green"], tmp_path / "sheet.png", columns=4)
    sheet = np.asarray(Image.open(path)).astype(int)
    # 4 frames of 32 pixels, each six times as large
    for colour in ((200, 0, 0), (0, 200, 0)):
        assert (sheet == colour).all(-1).sum() == 4 * 192 * 192
    assert (sheet == (200, 0, 0)).all(-1).any(1).argmax() < (sheet == (0, 200, 0)).all(-1).any(1).argmax()
    assert (sheet.sum(-1) < 100).any(), "the captions are dark on white"


def test_contact_sheet_reduces_large_frames_and_takes_the_first_and_last(tmp_path):
    frames = np.zeros((9, 300, 600, 3), np.uint8)
    frames[0], frames[-1] = (255, 0, 0), (0, 0, 255)
    path = video.contact_sheet([frames], ["long words " * 60], tmp_path / "sheet.png", columns=2)
    sheet = np.asarray(Image.open(path))
    assert (sheet == (255, 0, 0)).all(-1).sum() == (sheet == (0, 0, 255)).all(-1).sum() == 96 * 192


def test_contact_sheet_errors_leave_nothing(tmp_path):
    frames = noise(2)
    with pytest.raises(ValueError, match="1 videos with 2 captions"):
        video.contact_sheet([frames], ["a", "b"], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match=r"sheet\.jpg.*\.png"):
        video.contact_sheet([frames], ["a"], tmp_path / "sheet.jpg")
    with largest_file(3000), pytest.raises(OSError):
        video.contact_sheet([frames], ["a"], tmp_path / "sheet.png")
    assert os.listdir(tmp_path) == []


def test_writing_video_needs_no_torch():
    code = "import sys, cogvx_fast.video; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
