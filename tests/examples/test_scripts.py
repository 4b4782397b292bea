"""The scripts, with few steps: what they print and write, and that what they show has an effect."""

import re

import numpy as np
import pytest
from PIL import Image, ImageSequence
from safetensors import safe_open

from cogvx_fast.fun import CogVideoXFunInpaintPipeline
from cogvx_fast.turbo.files import ScheduleFile
from tests import toy
from tests.serving.process import Server

pytestmark = pytest.mark.slow


def frames(path):
    """Of an animated WebP, `(frames, height, width, 3)` from 0 to 255."""
    with Image.open(path) as image:
        return np.stack([np.asarray(frame.convert("RGB"), dtype=float) for frame in ImageSequence.Iterator(image)])


def picture(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with random weights, of the kinds that do not come with the package."""

    def made(cls, variant, **overrides):
        parts = toy.pipeline(variant).components
        parts["transformer"] = toy.transformer(variant, max_text_seq_length=226, **overrides)
        cls = cls or type(toy.pipeline(variant))
        cls(**parts).save_pretrained(tmp_path / "checkpoint")
        return tmp_path / "checkpoint"

    return made


def test_text(example):
    said = example("text", "a blue star moves up on a gray background", "--steps", 2, "--out", "folder/star.webp")
    made = frames("folder/star.webp")
    count, height, width, _ = made.shape
    assert f"wrote folder/star.webp: {count} frames of {width}x{height}" in said and "engine: exact" in said
    example("text", "--steps", 2, "--out", "other.webp")
    assert np.abs(made - frames("other.webp")).mean() > 5, "of another sentence"


def test_image(example, checkpoint):
    model = checkpoint(None, "5b-i2v")
    made = []
    for seed in (1, 2):
        given = picture(f"{seed}.png", seed)
        said = example("image", given, "a cat", "--model", model, "--steps", 2, "--out", f"{seed}.webp")
        assert f"wrote {seed}.webp: 9 frames of 32x32" in said
        made.append(frames(f"{seed}.webp"))
    assert np.abs(made[0] - made[1]).mean() > 1, "of another picture"


def test_last_frame(example):
    said = example("last_frame", "--steps", 10, "--out", "made.webp")
    made = frames("made.webp")
    assert "wrote made.webp: 17 frames of 128x128" in said
    red = np.clip(made[..., 0] - made[..., 2], 0, None)  # the disc, which goes from 0.35 of the width to 0.65
    places = (red * (np.arange(128) + 0.5)).sum((1, 2)) / red.sum((1, 2)) / 128
    assert abs(places[0] - 0.35) < 0.06 and abs(places[-1] - 0.65) < 0.06, places


def test_last_frame_of_another_checkpoint(example, checkpoint):
    model = checkpoint(CogVideoXFunInpaintPipeline, "5b", in_channels=33)
    first, made = picture("first.png", 0), []
    options = ("--model", model, "--height", 32, "--width", 48, "--steps", 2)
    for seed in (1, 2):
        last = picture(f"{seed}.png", seed)
        said = example("last_frame", first, last, "a cat", *options, "--out", f"{seed}.webp")
        assert f"wrote {seed}.webp: 9 frames of 48x32" in said
        made.append(frames(f"{seed}.webp"))
    assert np.abs(made[0] - made[1]).mean() > 1, "to another picture"


def test_video(example):
    said = example("video", "--steps", 4, "--strength", 0.5, "--before", "before.webp", "--out", "after.webp")
    before, after = frames("before.webp"), frames("after.webp")
    assert "wrote before.webp and after.webp" in said and before.shape == after.shape
    assert 1 < np.abs(before - after).mean() < 60, "it is another video, with something of the first one in it"


def test_lora(example):
    said = example("lora", "--train-steps", 24, "--steps", 5, "--adapter", "adapter", "--out", "night.webp")
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", said)]
    assert len(losses) == 24 and np.mean(losses[-2:]) < 0.5 * np.mean(losses[:2]), losses
    without, with_it = (int(value) for value in re.findall(r"brightness is (\d+) of 255", said))
    assert with_it < without / 2, "what was learned, saved and loaded again is darker"
    with safe_open("adapter/pytorch_lora_weights.safetensors", "pt") as file:
        assert file.keys() and all("lora_" in name for name in file.keys())  # noqa: SIM118
    assert len(frames("night.webp")) > 1


def test_server_client(example, tmp_path):
    server = Server(tmp_path / "server")
    try:
        said = example("server_client", "--url", f"{server.address}/v1", "--steps", 2, "--out", "out/made.mp4")
    finally:
        server.end()
    assert "completed, 100%" in said and "wrote out/made.mp4" in said
    assert (tmp_path / "out" / "made.mp4").read_bytes()[4:8] == b"ftyp"


def test_own_schedule(example):
    said = example("own_schedule", "--steps", 10, "--schedule", "mine.json", "--out", "mine.webp")
    found = ScheduleFile.read("mine.json").schedules
    assert f"{found[5].strip} 5 of 10 computed; distance: {found[5].distance}" in said
    assert found[5].distance.clips == 1 and f"{found[5].strip} 5 of 10 computed; calibrated" in said
    assert len(frames("mine.webp")) > 1


def test_memory_limit(example):
    said = example("memory_limit", "--limits", "1GiB", "1MiB", "--steps", 2)
    assert "1GiB: 1.00 GiB for the model's own size: transformer as it is, text encoder as it is" in said
    smallest = re.search(r"1MiB: refused: .*the smallest possible is .*?\((\d+) bytes\)", said)[1]
    said = example("memory_limit", "--limits", smallest, "--steps", 2, "--out", "small.webp")
    assert re.search(f"\n{smallest}: .*transformer \\w+8", said) and "wrote small.webp" in said
    assert len(frames("small.webp")) > 1
