"""`generate` and `quantize` on damaged checkpoints: one line that names the fault, before any work; never a video."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvx_fast import FastCogVideoXPipeline
from tests import toy

SMALL = ("--steps", 1, "--frames", 9, "--height", 32, "--width", 32)


@pytest.fixture
def damaged(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "damaged")


def lose(folder, part, name):
    path = next((folder / part).glob("*.safetensors"))
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})


def wo(folder):
    path = next((folder / "text_encoder").glob("*.safetensors"))
    tensors = load_file(path)
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    save_file(tensors | {name: tensors[name][:1].clone()}, path, {"format": "pt"})


def rewrite(folder, name, **values):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | values))


FAULTS = {
    "text encoder lacks a tensor": (
        lambda folder: lose(folder, "text_encoder", "encoder.final_layer_norm.weight"),
        "lacks the tensor encoder.final_layer_norm.weight of its text_encoder",
    ),
    "transformer lacks a tensor": (
        lambda folder: lose(folder, "transformer", "norm_final.weight"),
        "lacks the tensor norm_final.weight",
    ),
    "wo of another shape": (wo, "DenseReluDense.wo.weight has shape 1x"),
    "an empty tokenizer": (
        lambda folder: (folder / "tokenizer" / "tokenizer.json").write_bytes(b""),
        "tokenizer.json: is empty",
    ),
    "a tokenizer that is no JSON": (
        lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{"),
        "damaged",
    ),
    "a cut index": (
        lambda folder: (folder / "model_index.json").write_bytes((folder / "model_index.json").read_bytes()[:80]),
        "its model_index.json cannot be read",
    ),
    "a class to run code of": (
        lambda folder: rewrite(folder, "model_index.json", tokenizer=["transformers", "AutoTokenizer"]),
        "its tokenizer is a AutoTokenizer; must be a T5Tokenizer",
    ),
    "endless layers": (
        lambda folder: rewrite(folder, "transformer/config.json", num_layers=10**30),
        "must be a whole number of 1 to 1000",
    ),
    "a scheduler that cannot be": (
        lambda folder: rewrite(folder, "scheduler/scheduler_config.json", beta_schedule="none"),
        "its scheduler/scheduler_config.json makes no CogVideoXDDIMScheduler (NotImplementedError",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", ["generate", "quantize"])
def test_a_fault_is_one_line_and_nothing_is_left(run, damaged, fault, command):
    damage, message = FAULTS[fault]
    damage(damaged)
    arguments = ("a cat", "--model", damaged, *SMALL) if command == "generate" else (damaged, "out")
    result = run(command, *arguments)
    assert result.exit_code == 2 and result.stdout == "", result.stderr
    assert message in result.stderr.replace("\n", " ") and "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1 and not result.files


def test_a_name_that_is_too_long_is_no_folder(run):
    result = run("quantize", "a" * 300, "out")
    assert result.exit_code == 2 and "no such folder" in result.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_quantize_writes_generate_takes_without_options(run, tmp_path, dtype):
    toy.pipeline().to(dtype).save_pretrained(tmp_path / "plain")
    assert run("quantize", tmp_path / "plain", tmp_path / "int8").exit_code == 0
    result = run("generate", "a cat", "--model", tmp_path / "int8", *SMALL, "-o", "frames")
    assert result.exit_code == 0, result.stderr
    name = str(dtype).removeprefix("torch.")
    assert f"{name}, engine balanced" in result.stdout
    pipe = FastCogVideoXPipeline.from_pretrained(tmp_path / "int8")
    assert pipe.transformer.recipe == "int8" and pipe.transformer.dtype is dtype


def test_frames_that_are_not_finite_are_no_video(run, damaged):
    path = next((damaged / "vae").glob("*.safetensors"))
    tensors = load_file(path)
    tensors["decoder.conv_out.conv.bias"][0] = torch.inf
    save_file(tensors, path, {"format": "pt"})
    result = run("generate", "a cat", "--model", damaged, *SMALL)
    assert result.exit_code == 1 and not result.files
    assert "no video could be made: the decoded frames must be finite" in result.stderr.replace("\n", " ")
