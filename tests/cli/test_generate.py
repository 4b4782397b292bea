import errno
import json
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

from .conftest import assert_usage_error

ROOT = Path(__file__).parents[2]
PROMPT = "a cat"


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if weights would be loaded."""

    def fail(*_, **__):
        pytest.fail("weights were loaded before the error")

    monkeypatch.setattr(FastCogVideoXPipeline, "from_pretrained", fail)


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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a cat", "--height", 100], ["--height 100", "multiple of 16", "96 or 112"]),
        (["a cat", "--width", 20], ["--width 20", "16 or 32"]),
        (["a cat", "--frames", 48], ["--frames 48", "8N+1", "41 or 49"]),
        (["a cat", "--steps", 0], ["--steps 0", "1 to 1000"]),
        (["a cat", "--steps", 1001], ["--steps 1001", "1 to 1000"]),
        (["a cat", "--fps", 121], ["--fps 121", "1 to 120"]),
        (["a cat", "--fps", 51, "-o", "out.gif"], ["--fps 51", "1 to 50"]),
        (["a cat", "--guidance", 0.5], ["--guidance 0.5", "1 (no guidance) to 30"]),
        (["a cat", "--seed", -1], ["--seed -1", "0 to"]),
        (["a cat", "-o", "out.avi"], ["--output", "'out.avi'", ".mp4, .gif and .webp"]),
        (["a cat", "-o", "/proc/none/out.mp4"], ["--output", "'/proc/none/out.mp4'", "cannot be written"]),
        (["a cat", "-o", ""], ["--output: '.'", "ends in no name"]),
        (["a cat", "--negative", "\udcff"], ["--negative '\\udcff'", "not text in UTF-8"]),
        (["a cat", "--memory-limit", "9" * 400 + "GiB"], ["--memory-limit", "must be a number of bytes"]),
        (["a cat", "--sheet", "sheet.jpg"], ["--sheet", "'sheet.jpg'", ".png"]),
        ([""], ["PROMPT ''", "is empty"]),
        ([], ["PROMPT", "is missing", "--prompt-file"]),
        (["--prompt-file", "none.txt"], ["--prompt-file 'none.txt'", "No such file"]),
        (["--prompt-file", os.devnull], [f"--prompt-file '{os.devnull}'", "is empty"]),
        (["a cat", "--prompt-file", "none.txt"], ["--prompt-file 'none.txt'", "not both"]),
        (["a cat", "--device", "cuda:99"], ["--device 'cuda:99'", "available:", "cpu ("]),
        (["a cat", "--device", "toaster"], ["--device 'toaster'", "available:"]),
        (["a cat", "--engine", "warp"], ["--engine 'warp'", "'exact'"]),
        (["a cat", "--memory-limit", "much"], ["--memory-limit 'much'", "must be a number of bytes"]),
    ],
)
def test_bad_arguments_end_before_any_weight_is_loaded(arguments, expected, run, configuration, no_weights):
    assert_usage_error(run("generate", *arguments, "--model", configuration()), *expected)


@pytest.mark.parametrize("option", [["--dtype", "float8"], ["--scheduler", "euler"], ["--steps", "many"], ["--what"]])
def test_values_of_another_kind_are_refused(option, run, configuration, no_weights):
    result = run("generate", PROMPT, "--model", configuration(), *option)
    assert result.exit_code == 2
    assert option[0] in result.stderr
    assert result.files == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_says_what_there_is(run, configuration, no_weights):
    result = run("generate", PROMPT, "--model", configuration(), "--device", "cuda")
    assert_usage_error(result, "--device 'cuda'", "is not there", "available: cpu (")


def test_a_model_that_is_none_ends_before_any_weight_is_loaded(run, configuration, no_weights):
    assert_usage_error(run("generate", PROMPT, "--model", "no-such-model"), "--model 'no-such-model'", "no such folder")
    other = configuration("sd", pipeline_class="StableDiffusionPipeline")
    assert_usage_error(run("generate", PROMPT, "--model", other), other, "StableDiffusionPipeline", "CogVideoX")
    image = configuration("i2v", pipeline_class="CogVideoXImageToVideoPipeline", in_channels=32)
    assert_usage_error(run("generate", PROMPT, "--model", image), image, "--image: is missing", "image to video")


def test_the_form_of_the_frame_count_is_the_model_s(run, configuration, no_weights):
    model = configuration(patch_size_t=2, sample_frames=81)
    assert_usage_error(run("generate", PROMPT, "--model", model, "--frames", 57), "--frames 57", "16N+1", "49 or 65")


def test_the_hub_s_failure_is_one_message(run, no_weights, monkeypatch):
    def offline(repo_id, filename):
        raise OSError("cannot reach\nthe hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    result = run("generate", PROMPT, "--model", "THUDM/CogVideoX-2b")
    assert_usage_error(result, "--model 'THUDM/CogVideoX-2b'", "no folder here", "(cannot reach the hub)")


def test_a_missing_demo_checkpoint_is_one_message(run, no_weights, monkeypatch):
    def missing(kind):
        raise FileNotFoundError("the demo checkpoint is missing")

    monkeypatch.setattr(cogvx_fast, "demo_checkpoint", missing, raising=False)
    assert_usage_error(run("generate", PROMPT), "--model: the demo checkpoint is missing")


def test_the_demo_checkpoint_is_the_default(run, checkpoint, monkeypatch):
    monkeypatch.setattr(cogvx_fast, "demo_checkpoint", lambda kind: str(checkpoint), raising=False)
    assert run("generate", PROMPT, "--steps", 1).files == ["out.mp4"]


@pytest.mark.parametrize(
    ("broken", "content", "message"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", None, "transformer: has no weights"),
        ("transformer/diffusion_pytorch_model.safetensors", b"\xff" * 64, "is no safetensors file, or cut off"),
        ("tokenizer/tokenizer.json", None, "has no tokenizer"),
        ("tokenizer/tokenizer.json", b"{", "cannot be loaded"),
    ],
)
def test_a_broken_checkpoint_is_one_message(broken, content, message, run, checkpoint, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    (folder / broken).unlink()
    if content is not None:
        (folder / broken).write_bytes(content)
    assert_usage_error(run("generate", PROMPT, "--model", folder, "--steps", 1), folder, message)


def test_an_interrupt_while_denoising_leaves_finished_videos_only(run, checkpoint, monkeypatch):
    call, prompts = FastCogVideoXPipeline.__call__, []

    def interrupted(self, **kwargs):
        prompts.append(kwargs["prompt"])
        if len(prompts) == 2:
            inner = kwargs["callback_on_step_end"]

            def stop(pipe, step, timestep, callback_kwargs):
                inner(pipe, step, timestep, callback_kwargs)
                raise KeyboardInterrupt

            kwargs["callback_on_step_end"] = stop
        return call(self, **kwargs)

    monkeypatch.setattr(FastCogVideoXPipeline, "__call__", interrupted)
    Path("prompts.txt").write_text("a cat\na dog\na hen\n")
    result = run("generate", "--prompt-file", "prompts.txt", "-o", "new/out.mp4", "--model", checkpoint, "--steps", 2)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr and "Traceback" not in result.stderr
    assert prompts == ["a cat", "a dog"]
    assert result.files == ["new", "new/out-1.mp4", "prompts.txt"]
    assert "wrote new/out-1.mp4" in result.stdout


@pytest.mark.parametrize("name", ["new/out.mp4", "out.gif", "frames"])
def test_a_full_disk_is_one_message_and_leaves_nothing(name, run, checkpoint, monkeypatch):
    def full(images, path, fps, settings):
        path.mkdir() if name == "frames" else path.write_bytes(b"the first half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setitem(video._WRITERS, Path(name).suffix, full)
    result = run("generate", PROMPT, "-o", name, "--model", checkpoint, "--steps", 1)
    assert result.exit_code == 1
    assert f"error: {name} could not be written: No space left on device; nothing of it is left" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.files == []


def test_a_full_disk_at_the_sheet_keeps_the_video(run, checkpoint, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(video, "contact_sheet", full)
    result = run("generate", PROMPT, "--sheet", "sheet.png", "--model", checkpoint, "--steps", 1)
    assert result.exit_code == 1
    assert "sheet.png could not be written: No space left" in result.stderr
    assert result.files == ["out.mp4"]


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


def test_a_device_without_enough_memory_is_one_message(run, checkpoint, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(FastCogVideoXPipeline, "__call__", fail)
    result = run("generate", PROMPT, "-o", "a.mp4", "--model", checkpoint)
    assert result.exit_code == 1 and result.files == []
    assert "out of memory at 9 frames of 32x32" in result.stderr and "--height" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 4 TB")])
@pytest.mark.parametrize("where", ["from_pretrained", "__call__", "decode_stream"])
def test_a_cpu_without_enough_memory_is_one_message(where, error, run, checkpoint, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(FastCogVideoXPipeline, where, fail)
    result = run("generate", PROMPT, "-o", "a.mp4", "--model", checkpoint, "--steps", 1)
    assert result.exit_code == 1 and result.files == []
    assert "error: cpu ran out of memory at 9 frames of 32x32" in result.stderr and "--height" in result.stderr


def test_a_checkpoint_that_a_library_stumbles_over_is_one_message(run, checkpoint, monkeypatch):
    def fail(*_, **__):
        raise UnboundLocalError("act_fn")

    monkeypatch.setattr(FastCogVideoXPipeline, "from_pretrained", fail)
    result = run("generate", PROMPT, "--model", checkpoint)
    assert_usage_error(result, f"--model {str(checkpoint)!r}", "cannot be loaded (act_fn)")


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("transformer", "activation_fn", "x", "cannot be loaded ("),
        ("transformer", "dropout", [], "cannot be loaded ("),
        ("vae", "norm_num_groups", 0, "its vae/config.json has norm_num_groups=0; must be"),
        ("vae", "block_out_channels", None, "its vae/config.json has block_out_channels=None; must be"),
        ("text_encoder", "d_model", "x", "its text_encoder/config.json has d_model=x; must be"),
        ("text_encoder", "vocab_size", -1, "its text_encoder/config.json has vocab_size=-1; must be"),
    ],
)
def test_a_configuration_that_makes_no_model_is_one_message(
    name, key, value, message, run, checkpoint, tmp_path, no_weights
):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    config = folder / name / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    for command in (["generate", PROMPT], ["doctor"]):
        result = run(*command, "--model", folder, "--device", "cpu")
        assert_usage_error(result, f"--model {str(folder)!r}", message)


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


@pytest.mark.parametrize("arguments", [["--version"], ["doctor", "--json"]])
def test_a_full_disk_behind_standard_output_is_one_message(arguments):
    code = [sys.executable, "-c", "from cogvx_fast.cli import main; main()"]
    with open("/dev/full", "w") as stdout:
        result = subprocess.run([*code, *arguments], cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr == "error: standard output could not be written: No space left on device\n"
