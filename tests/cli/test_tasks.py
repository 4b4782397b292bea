"""What the command makes of pictures and videos, and what it refuses."""

import dataclasses
import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageSequence

import cogvx_fast
from cogvx_fast import metadata
from cogvx_fast.cli import inputs, lora, tasks
from cogvx_fast.cli.checkpoint import Checkpoint
from cogvx_fast.cli.console import UsageError
from cogvx_fast.family import Variant
from cogvx_fast.fun import CogVideoXFunInpaintPipeline
from cogvx_fast.video import write_video
from tests import toy

FAST = ("--steps", 2, "--dtype", "float32")


def picture(seed=0, size=(toy.SIZE, toy.SIZE)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def save(kind, folder):
    """A checkpoint of a variant, or "inp": of first and last frame."""
    if kind != "inp":
        toy.pipeline(kind).save_pretrained(folder)
        return
    parts = toy.pipeline("5b").components
    parts["transformer"] = toy.transformer("5b", in_channels=33)
    CogVideoXFunInpaintPipeline(**parts).save_pretrained(folder)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder of each kind, made when it is asked for."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            save(kind, made[kind])
        return made[kind]

    return of


@pytest.fixture
def files(run):
    """A picture, and a video of 12 frames, where the command runs."""
    picture(1).save("first.png")
    picture(2).save("last.png")
    write_video([picture(seed) for seed in range(12)], "in.webp")
    write_video([picture(seed) for seed in range(9)], "frames")
    return ["first.png", "in.webp", "last.png"]


def called(monkeypatch, name):
    """What a pipeline of ours is called with."""
    calls, cls = [], getattr(cogvx_fast, name)
    call = cls.__call__

    def watched(self, *args, **kwargs):
        calls.append(kwargs)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(cls, "__call__", watched)
    return calls


def pixels_of(path):
    """Of a video of any format, as it is decoded."""
    if Path(path).is_dir():
        return frames_of(Path(path))
    if path.endswith(".mp4"):
        with av.open(path) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with Image.open(path) as image:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def frames_of(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]).astype(float)


@pytest.mark.slow
def test_without_a_model_pictures_are_for_the_second_demo(run):
    first = Image.new("RGB", (128, 128), (245, 245, 245))
    ImageDraw.Draw(first).ellipse((20, 36, 76, 92), fill=(220, 40, 40))
    first.save("first.png")
    line = ("a red circle moves right on a white background", "--image", "first.png")
    result = run("generate", *line, "-o", "out", "--steps", 10, "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    assert "wrote out: 17 frames of 128x128" in result.stdout
    made, given = frames_of(Path("out")), np.asarray(first, dtype=float)
    assert np.abs(made[0] - given).mean() < 0.5 * np.abs(made[0] - given[:, ::-1]).mean(), (
        "it begins where the picture is"
    )
    assert np.abs(made[-1] - given).mean() > 1.5 * np.abs(made[0] - given).mean(), "and goes on"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "pipeline", "line", "expected"),
    [
        ("5b-i2v", "ImageToVideo", ("--image", "first.png"), {"image"}),
        ("2b", "VideoToVideo", ("--video", "in.webp", "--strength", 0.5), {"video", "strength"}),
        ("2b", "VideoToVideo", ("--video", "frames", "--strength", 1), {"video", "strength"}),
        ("fun", "FunControl", ("--control-video", "in.webp"), {"control_video"}),
        ("inp", "FunInpaint", ("--image", "first.png", "--last-image", "last.png"), {"image", "last_image"}),
        ("inp", "FunInpaint", ("--last-image", "last.png"), {"last_image"}),
        ("inp", "FunInpaint", (), set()),
        ("2b", "", (), set()),
    ],
)
def test_the_task_follows_from_what_is_given_and_the_checkpoint(
    run, files, checkpoints, monkeypatch, kind, pipeline, line, expected
):
    calls = called(monkeypatch, f"FastCogVideoX{pipeline}Pipeline")
    result = run("generate", "a cat", "-o", "out", "--model", checkpoints(kind), *FAST, *line)
    assert result.exit_code == 0, result.stderr
    assert "wrote out: 9 frames of 32x32" in result.stdout
    names = {"image", "last_image", "video", "control_video", "strength"}
    assert {name for name in calls[0] if name in names} == expected
    for name in ("video", "control_video"):
        if name in expected:
            assert len(calls[0][name]) == 9 and "num_frames" not in calls[0]


@pytest.mark.slow
def test_it_is_the_pipelines_video(run, files, checkpoints, tmp_path):
    run("generate", "a cat", "-o", "out", "--model", checkpoints("5b-i2v"), *FAST, "--image", "first.png", "--seed", 3)
    given = toy.inputs(num_steps=2, generator=torch.Generator().manual_seed(3), output_type="np")
    expected = toy.pipeline("5b-i2v")(**given, image=picture(1)).frames[0] * 255
    assert np.abs(frames_of(Path("out")) - expected).max() <= 1.01


@pytest.mark.parametrize(
    ("variant", "own", "given", "words"),
    [
        ({}, "", ["--image"], "--image .* needs an image-to-video checkpoint such as .*makes text to video or video"),
        ({}, "", ["--last-image"], "--last-image .* needs a CogVideoX-Fun checkpoint for first and last frames"),
        ({}, "", ["--video", "--control-video"], "--control-video .* needs a control checkpoint"),
        ({"patch_size_t": 2}, "", ["--video"], "--video .* needs a text-to-video checkpoint .*2b or -5b"),
        ({"in_channels": 32}, "ImageToVideo", [], "--image: is missing: .* makes image to video"),
        ({"in_channels": 32}, "ImageToVideo", ["--last-image"], "--last-image .* needs a CogVideoX-Fun"),
        ({"in_channels": 32}, "FunControl", [], "--control-video: is missing"),
        ({"in_channels": 32}, "FunControl", ["--image"], "--image .* needs an image-to-video checkpoint"),
        ({"in_channels": 33}, "", ["--video"], "--video .* makes first and last frame to video"),
        ({"in_channels": 48}, "", [], "none of the family's kinds"),
    ],
)
def test_a_mismatch_says_which_checkpoint_does_it(variant, own, given, words):
    checkpoint = Checkpoint("folder", f"CogVideoX{own}Pipeline", variant=Variant(**variant))
    with pytest.raises(UsageError, match=words):
        tasks.choose(checkpoint, {name: "a.png" if name in given else None for name in tasks._WHO})


def test_of_one_that_names_itself_otherwise_what_is_given_decides():
    checkpoint = Checkpoint("folder", "SomebodysPipeline", variant=Variant(in_channels=32))
    for name, task in (("--image", tasks.IMAGE), ("--control-video", tasks.CONTROL)):
        assert tasks.choose(checkpoint, {name: "a.png"}) is task


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("--video", "nothing.mp4"), "--video 'nothing.mp4': cannot be read"),
        (("--video", "first.png"), "has 1 frames; must have 9 or more"),
        (("--video", "in.webp", "--frames", 17), "--frames 17: is more than in.webp has: 12"),
        (("--video", "in.webp", "--strength", 0.1), "--strength 0.1: must be 0.5 to 1 for 2 steps"),
        (("--strength", 0.5), "--strength 0.5: has no effect without --video"),
        (("--video", "text.mp4"), "--video 'text.mp4': cannot be decoded; must be a video"),
        (("--lora", "nothing.safetensors"), "--lora 'nothing.safetensors': is not there"),
        (("--lora", "first.png"), "must be a .safetensors file"),
        (("--lora", "first.png:much"), "must be PATH or PATH:WEIGHT"),
        (("--seed", "any"), "--seed 'any': must be 0 to .*, or random"),
        (("--num-videos", 0), "--num-videos 0: must be 1 to"),
        (("--max-sequence-length", 3), "--max-sequence-length 3: must be 16"),
        (("--recipe", "int3"), "--recipe 'int3'"),
        (("--recipe", "int8", "--engine", "exact"), "--recipe 'int8'"),
        (("--attention", "magic"), "--attention 'magic'"),
        (("--compile", "all"), "--compile 'all'"),
        (("--vae-memory", "much"), "--vae-memory 'much'"),
        (("--offload", "model", "--device", "cpu"), "--offload 'model': has no effect on a CPU"),
        (("--dynamic-guidance", "--guidance", 1), "--dynamic-guidance: has no effect with --guidance 1"),
        (("--like", "first.png"), "--like 'first.png': carries no settings"),
        (("--like", "nothing.mp4"), "--like 'nothing.mp4': cannot be read"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(run, files, checkpoint, line, words):
    Path("text.mp4").write_text("no video")
    result = run("generate", "a cat", "--model", checkpoint, *FAST, *line)
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    assert re.search(words, " ".join(result.stderr.split())), result.stderr
    assert "out.mp4" not in result.files


def test_an_adapter_needs_peft_and_that_is_said_at_once(monkeypatch, tmp_path):
    (tmp_path / "a.safetensors").touch()
    assert lora.parse(str(tmp_path / "a.safetensors:0.5")).weight == 0.5
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--lora 'a\.safetensors': needs peft: pip install peft"):
        lora.parse("a.safetensors")


def test_a_picture_of_another_shape_is_said_to_be_cut(run, files, checkpoints, monkeypatch):
    picture(1, (90, 60)).save("wide.png")
    calls = called(monkeypatch, "FastCogVideoXImageToVideoPipeline")
    line = ("generate", "a cat", "--model", checkpoints("5b-i2v"), *FAST, "--image", "wide.png")
    result = run(*line, "-o", "a.webp")
    assert "note: wide.png: 90x60 is cut to 32x32" in " ".join(result.stderr.split())
    assert calls[0]["image"].size == (32, 32)
    result = run(*line, "-o", "b.webp", "--fit", "pad")
    assert "is padded to" in " ".join(result.stderr.split())
    assert calls[1]["image"].getpixel((0, 0)) == (0, 0, 0) != calls[0]["image"].getpixel((0, 0))


def test_checkpoints_of_many_sizes_take_the_pictures_shape():
    base = Variant(in_channels=33, sample_height=60, sample_width=90)
    assert inputs.makes_any_size(base) and not inputs.makes_any_size(Variant(in_channels=32))
    for shape in ((480, 720), (720, 480), (1000, 1000), (100, 900)):
        height, width = inputs.size_like(shape, base)
        assert height % 16 == 0 and width % 16 == 0 and 0.9 < height * width / (480 * 720) < 1.1
        assert abs(np.log(height / width) - np.log(shape[0] / shape[1])) < 0.1
    high = inputs.size_like((9000, 100), dataclasses.replace(base, patch_size_t=2, sample_height=60, sample_width=90))
    assert high[0] <= 480, "no more than there are positions for"


@pytest.mark.slow
def test_several_videos_of_one_prompt_have_seeds_behind_each_other(run, checkpoint, calls):
    result = run("generate", "a cat", "-o", "a.webp", "--model", checkpoint, *FAST, "--num-videos", 2, "--seed", 5)
    assert result.files == ["a-1.webp", "a-2.webp"]
    assert [line.rpartition(", ")[2] for line in result.stdout.splitlines()[:2]] == ["seed 5", "seed 6"]
    alone = run("generate", "a cat", "-o", "b.webp", "--model", checkpoint, *FAST, "--seed", 6)
    assert alone.exit_code == 0
    assert metadata.read("b.webp") == metadata.read("a-2.webp")
    assert Path("b.webp").read_bytes() == Path("a-2.webp").read_bytes()


@pytest.mark.slow
def test_a_random_seed_is_said_and_kept(run, checkpoint):
    result = run("generate", "a cat", "-o", "a.gif", "--model", checkpoint, *FAST, "--seed", "random")
    seed = result.stdout.splitlines()[0].rpartition("seed ")[2]
    assert metadata.read("a.gif")["seed"] == seed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "a"])
def test_like_makes_the_same_video_again(run, files, checkpoint, name):
    line = ("generate", "a cät", "-o", name, "--model", checkpoint, "--steps", 3, "--guidance", 3, "--seed", 4)
    assert run(*line, "--negative", "fog", "--scheduler", "dpm", "--frames", 9, "--dtype", "bfloat16").exit_code == 0
    kept = metadata.read(name)
    assert (kept["prompt"], kept["seed"], kept["steps"], kept["dtype"]) == ("a cät", "4", 3, "bfloat16")
    other = "again" + name[1:]
    assert run("generate", "--like", name, "-o", other).exit_code == 0
    assert np.array_equal(pixels_of(name), pixels_of(other))
    assert metadata.read(other) == kept
    # What is given wins.
    assert run("generate", "a dog", "--like", name, "-o", "dog.gif", "--steps", 2).exit_code == 0
    kept = metadata.read("dog.gif")
    assert (kept["prompt"], kept.get("steps"), kept["guidance"]) == ("a dog", 2, 3.0)


def test_settings_that_somebody_else_wrote_are_checked(run, files, checkpoint):
    for bad in ({"steps": "many"}, {"seed": 4}, {"lora": "x"}, {"dynamic_guidance": 1}, {"height": True}):
        write_video([picture()], "bad.webp", settings={metadata.KEY: "1", "prompt": "a", **bad})
        result = run("generate", "--like", "bad.webp", "--model", checkpoint)
        assert result.exit_code == 2 and "Traceback" not in result.stderr
        assert f"--like 'bad.webp': carries a {next(iter(bad))} that is none" in " ".join(result.stderr.split())


@pytest.mark.slow
def test_metadata_can_be_left_out(run, checkpoint):
    run("generate", "a cat", "-o", "a.gif", "--model", checkpoint, *FAST, "--no-metadata")
    with pytest.raises(ValueError, match="holds no settings"):
        metadata.read("a.gif")


@pytest.fixture
def adapter(tmp_path):
    """A LoRA of every query projection, in diffusers' format."""
    from safetensors.torch import save_file

    transformer, tensors = toy.transformer(), {}
    for number, block in enumerate(transformer.transformer_blocks):
        width = block.attn1.to_q.in_features
        for part, shape in (("lora_A", (4, width)), ("lora_B", (width, 4))):
            generator = torch.Generator().manual_seed(number)
            name = f"transformer.transformer_blocks.{number}.attn1.to_q.{part}.weight"
            tensors[name] = torch.randn(shape, generator=generator) * 0.3
    path = tmp_path / "style.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.slow
def test_adapters_are_loaded_with_their_weights(run, checkpoint, adapter):
    line = ("generate", "a cat", "--model", checkpoint, *FAST)
    for name, more in {
        "none": (),
        "off": ("--lora", f"{adapter}:0"),
        "half": ("--lora", f"{adapter}:0.5"),
        "twice": ("--lora", f"{adapter}:0.25", "--lora", f"{adapter.parent}:0.25"),
        "whole": ("--lora", adapter),
    }.items():
        assert run(*line, "-o", name, *more).exit_code == 0
    found = {name: frames_of(Path(name)) for name in ("none", "off", "half", "twice", "whole")}
    assert np.array_equal(found["none"], found["off"]) and np.abs(found["half"] - found["twice"]).max() <= 1
    assert np.abs(found["none"] - found["half"]).max() > 3 < np.abs(found["half"] - found["whole"]).max()


def test_lora_is_read_with_and_without_a_weight(adapter):
    assert lora.parse(str(adapter)) == lora.Lora(str(adapter), 1.0)
    assert lora.parse(f"{adapter.parent}:-0.5") == lora.Lora(str(adapter), -0.5)
    assert lora.parse("owner/name:0.7") == lora.Lora("owner/name", 0.7)
    for bad in (f"{adapter}:nan", f"{adapter}:99"):
        with pytest.raises(UsageError, match="has a weight that is not from -10 to 10"):
            lora.parse(bad)


def test_settings_are_ascii_json(tmp_path):
    text = metadata.as_text({"prompt": 'a "cät" 🐈'})
    assert text.isascii() and json.loads(text)["prompt"] == 'a "cät" 🐈'
