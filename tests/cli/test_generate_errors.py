"""What `generate` refuses before any weight is loaded, and what it says and leaves where making fails."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cogvx_fast
from cogvx_fast import FastCogVideoXPipeline, video

from .conftest import assert_usage_error

ROOT = Path(__file__).parents[2]
PROMPT = "a cat"


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if weights would be loaded."""

    def fail(*_, **__):
        pytest.fail("weights were loaded before the error")

    monkeypatch.setattr(FastCogVideoXPipeline, "from_pretrained", fail)


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


@pytest.mark.parametrize("arguments", [["--version"], ["doctor", "--json"]])
def test_a_full_disk_behind_standard_output_is_one_message(arguments):
    code = [sys.executable, "-c", "from cogvx_fast.cli import main; main()"]
    with open("/dev/full", "w") as stdout:
        result = subprocess.run([*code, *arguments], cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr == "error: standard output could not be written: No space left on device\n"
