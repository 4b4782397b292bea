"""What `generate` makes, and what it says of it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import cogvx_fast
from cogvx_fast import FastCogVideoXPipeline, video
from tests import toy

ROOT = Path(__file__).parents[2]
PROMPT = "a cat"


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), stream.average_rate


def test_help_and_version_import_nothing_heavy(run):
    code = "import sys, cogvx_fast.cli; print([m for m in ('torch', 'diffusers', 'av', 'PIL') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert "--prompt-file" in run("generate", "--help").stdout
    assert cogvx_fast.__version__ in run("--version").stdout


def test_one_prompt_makes_the_video_of_the_pipeline(run, checkpoint, calls):
    result = run("generate", PROMPT, "-o", "new/out", "--model", checkpoint, "--steps", 2, "--seed", 3)
    assert result.exit_code == 0
    assert result.files == ["new", "new/out"] + [f"new/out/frame-{number:04d}.png" for number in range(1, 10)]
    assert result.stdout.startswith("wrote new/out: 9 frames of 32x32, ")
    inputs = toy.inputs(num_steps=2, generator=torch.Generator().manual_seed(3), output_type="np")
    expected = (toy.pipeline()(**inputs).frames[0] * 255).round()
    frames = np.stack([np.asarray(Image.open(f"new/out/frame-{number:04d}.png")) for number in range(1, 10)])
    assert np.abs(frames - expected).max() <= 1, "rounding may differ, nothing else"
    assert calls[0]["pipe"].dtype == torch.float32, "the default on a CPU"


def test_a_cpu_with_units_for_bf16_uses_them(run, checkpoint, calls, monkeypatch):
    from cogvx_fast import machine

    monkeypatch.setattr(machine, "cpu_bf16_units", lambda: "AMX-BF16")
    assert run("generate", PROMPT, "-o", "a.gif", "--model", checkpoint, "--steps", 1).exit_code == 0
    assert (
        run("generate", PROMPT, "-o", "b.gif", "--model", checkpoint, "--steps", 1, "--dtype", "float32").exit_code == 0
    )
    assert [call["pipe"].dtype for call in calls] == [torch.bfloat16, torch.float32]


def test_the_last_lines_say_what_was_made(run, checkpoint):
    result = run(
        "generate", "[red] :cat:", "--model", checkpoint, "--steps", 2, "--sheet", "sheet.png", "--device", "cpu"
    )
    assert result.exit_code == 0
    assert result.files == ["out.mp4", "sheet.png"]
    size = os.path.getsize("out.mp4") / 1e3
    made, sheet, times = result.stdout.splitlines()
    assert made == f"wrote out.mp4: 9 frames of 32x32 at 8 fps, {size:.1f} kB, '[red] :cat:'"
    assert sheet.startswith("wrote sheet.png: a contact sheet")
    assert re.fullmatch(
        r"cpu, float32, engine exact, 2 steps: "
        r"load \d+\.\d s, text \d+\.\d s, denoise \d+\.\d s, decode \d+\.\d s, write \d+\.\d s",
        times,
    )
    frames, rate = decode("out.mp4")
    assert frames.shape == (9, 32, 32, 3)
    assert rate == 8
    assert "9/9" in result.stderr, "the progress bar came to its end"


@pytest.mark.parametrize("name", ["out.mp4", "frames"])
def test_frames_are_written_while_others_are_decoded(run, checkpoint, monkeypatch, name):
    events = []
    decode_stream = FastCogVideoXPipeline.decode_stream

    def watched(self, *arguments):
        for chunk in decode_stream(self, *arguments):
            events.append("decoded")
            yield chunk

    of_one_size = video._of_one_size
    monkeypatch.setattr(FastCogVideoXPipeline, "decode_stream", watched)
    monkeypatch.setattr(
        video, "_of_one_size", lambda f: (events.append("written") or frame for frame in of_one_size(f))
    )
    order = ("generate", PROMPT, "--model", checkpoint, "--steps", 1, "--frames", 17, "--dtype", "bfloat16")
    assert run(*order, "-o", name).exit_code == 0
    assert events == ["decoded"] + ["written"] * 9 + ["decoded"] + ["written"] * 8


def test_every_option_reaches_the_pipeline(run, checkpoint, calls):
    result = run(
        *("generate", PROMPT, "-o", "out.gif", "--model", checkpoint, "--steps", 3, "--guidance", 4.5, "--seed", 7),
        *("--negative", "a dog", "--frames", 17, "--height", 48, "--width", 64, "--fps", 10, "--engine", "exact"),
        *("--dtype", "bfloat16", "--device", "cpu", "--scheduler", "dpm"),
    )
    assert result.exit_code == 0
    (call,) = calls
    expected = {
        "prompt": PROMPT,
        "negative_prompt": "a dog",
        "num_inference_steps": 3,
        "guidance_scale": 4.5,
        "num_frames": 17,
        "height": 48,
        "width": 64,
        "max_sequence_length": toy.TEXT_LENGTH,
    }
    assert {name: call[name] for name in expected} == expected
    assert call["generator"].initial_seed() == 7
    pipe = call["pipe"]
    assert pipe.dtype == torch.bfloat16
    assert type(pipe.scheduler).__name__ == "CogVideoXDPMScheduler"
    with Image.open("out.gif") as image:
        assert image.size == (64, 48)
        assert image.info["duration"] == 100
    assert "17 frames of 64x48 at 10 fps" in result.stdout


def test_a_prompt_file_makes_numbered_videos_with_one_seed(run, checkpoint, calls):
    Path("prompts.txt").write_text("a cat\n\na dog\n")
    result = run(
        *("generate", "--prompt-file", "prompts.txt", "-o", "out.webp", "--model", checkpoint, "--steps", 1),
        *("--seed", 5, "--sheet", "sheet.png"),
    )
    assert result.exit_code == 0
    assert result.files == ["out-1.webp", "out-2.webp", "prompts.txt", "sheet.png"]
    assert [call["prompt"] for call in calls] == ["a cat", "a dog"]
    assert [call["generator"].initial_seed() for call in calls] == [5, 5]
    assert "wrote out-1.webp" in result.stdout and "'a dog'" in result.stdout
    with Image.open("out-2.webp") as image:
        assert (image.n_frames, image.size) == (9, (32, 32))


def test_a_long_prompt_is_warned_of_before_the_weights_are_loaded(run, checkpoint, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(FastCogVideoXPipeline, "from_pretrained", stop)
    # One token for each letter and space, one for the start of a word and one for the end of the text: 14 letters fit.
    result = run("generate", "abcdefghijklmnopqrs", "--negative", "x" * 15, "--model", checkpoint)
    assert (
        "the prompt 'abcdefghijklmnopqrs' is longer than the model's 16 tokens; this is cut off: 'opqrs'"
        in result.stderr
    )
    assert "--negative 'xxxxxxxxxxxxxxx'" in result.stderr and "cut off: 'x'" in result.stderr


def test_a_prompt_that_fits_is_not_warned_of(run, checkpoint):
    result = run("generate", "abcdefghijklmn", "--model", checkpoint, "--steps", 1)
    assert result.exit_code == 0
    assert "warning" not in result.stderr


def test_the_demo_checkpoint_is_the_default(run, checkpoint, monkeypatch):
    monkeypatch.setattr(cogvx_fast, "demo_checkpoint", lambda kind: str(checkpoint), raising=False)
    assert run("generate", PROMPT, "--steps", 1).files == ["out.mp4"]


@pytest.mark.slow
def test_the_command_alone_is_heard(checkpoint, tmp_path):
    # A process of its own: the libraries keep the standard error that they found when they were imported.
    code = "import sys; from cogvx_fast.cli import main; sys.argv[0] = 'cogvx-fast'; main()"
    arguments = ["generate", "a very long text about a cat", "--model", str(checkpoint), "--steps", "2"]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    said = [line for line in result.stderr.splitlines() if line.strip()]
    warning, bar = (line for line in said if not line.startswith("note: threads"))  # on a busy machine
    assert warning.startswith("warning: the prompt 'a very long text about a cat' is longer")
    assert bar.startswith("done") and "9/9" in bar
    assert len(result.stdout.splitlines()) == 2


def test_the_libraries_are_left_as_they_were(run, checkpoint):
    import diffusers.utils.logging as logging

    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    assert run("generate", PROMPT, "--model", checkpoint, "--steps", 1).exit_code == 0
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.WARNING, True)


def test_a_named_scheduler_is_used_with_the_spacing_of_the_family(run, checkpoint, calls, tmp_path):
    folder = tmp_path / "linspace"
    shutil.copytree(checkpoint, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"trailing"', '"linspace"'))
    for scheduler in ([], ["--scheduler", "ddim"], ["--scheduler", "dpm"]):
        assert run("generate", PROMPT, "--model", folder, "--steps", 2, *scheduler).exit_code == 0
    spacings = [call["pipe"].scheduler.config.timestep_spacing for call in calls]
    assert spacings == ["linspace", "trailing", "trailing"]
    names = [type(call["pipe"].scheduler).__name__ for call in calls]
    assert names == ["CogVideoXDDIMScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"]


def test_zoom_enlarges_the_frames_and_nothing_else(run, checkpoint):
    for zoom in (1, 3):
        arguments = ("generate", PROMPT, "-o", f"x{zoom}", "--model", checkpoint, "--steps", 1, "--zoom", zoom)
        assert run(*arguments).exit_code == 0
    small, large = (Image.open(f"x{zoom}/frame-0005.png") for zoom in (1, 3))
    assert large.size == (96, 96) and small.size == (32, 32)
    assert np.array_equal(np.asarray(large), np.asarray(small.resize((96, 96), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_the_letters_sees_their_numbers(encoding, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    order = ["generate", "ein Kätzchen …", "-o", "Kätz\udce9.gif", "--model", str(checkpoint), "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["cogvx-fast", *order])
    with open("said", "w", encoding=encoding) as stdout, pytest.raises(SystemExit) as ended:
        monkeypatch.setattr(sys, "stdout", stdout)
        cogvx_fast.cli.main()
    assert ended.value.code == 0
    assert Path("Kätz\udce9.gif").is_file()
    letter, dots = {"ascii": ("\\xe4", "\\u2026"), "latin-1": ("ä", "\\u2026"), "utf-8": ("ä", "…")}[encoding]
    said = Path("said").read_text(encoding=encoding)
    assert f"wrote K{letter}tz\\udce9.gif" in said and f"'ein K{letter}tzchen {dots}'" in said
