"""Quantized checkpoints: written shard by shard, gone on with, checked before use, loaded without the full weights."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from cogvx_fast import EngineConfig, FastCogVideoXPipeline, accelerate
from cogvx_fast.cli import app
from cogvx_fast.quantization import convert, manifest
from cogvx_fast.quantization.apply import quantized_names
from cogvx_fast.quantization.convert import quantize_checkpoint
from cogvx_fast.quantization.manifest import CheckpointError, read_manifest
from tests import toy

SHARD = 2**15
PREFIX = "transformer/quantized-0000"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    toy.pipeline("5b").to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "int8"
    quantize_checkpoint(source, out, "int8", max_shard=SHARD)
    return out


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def run(pipe):
    return pipe(**toy.inputs(num_steps=2, output_type="latent")).frames


@pytest.mark.parametrize(("recipe", "dtype"), [("int8", None), ("fp8-weight", "float16")])
def test_what_is_written_is_what_quantizing_in_memory_gives(source, tmp_path, recipe, dtype):
    quantize_checkpoint(source, tmp_path / "out", recipe, dtype=dtype)
    loaded = FastCogVideoXPipeline.from_pretrained(tmp_path / "out")
    here = FastCogVideoXPipeline.from_pretrained(
        source, torch_dtype=getattr(torch, dtype or "bfloat16"), engine=EngineConfig(recipe=recipe)
    )
    for name in ("transformer", "text_encoder"):
        ours, expected = getattr(loaded, name), getattr(here, name)
        assert list(quantized_names(ours)) == list(quantized_names(expected)) != []
        dtypes = [{n: p.dtype for n, p in model.state_dict().items()} for model in (ours, expected)]
        assert dtypes[0] == dtypes[1]
    if dtype is None:  # a CPU has no fp16 to run it in
        assert torch.equal(run(loaded), run(here))
    assert not loaded.transformer.training and not list(quantized_names(loaded.vae))


def test_files_are_small_many_and_all_listed(source, finished):
    own = read_manifest(finished)
    found = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    assert set(own.files) | {manifest.NAME} == found
    shards = [name for name in own.files if name.startswith(PREFIX)]
    assert len(shards) > 3 and own.recipe == "int8" and own.dtype == "bfloat16"
    for name in shards:
        with safe_open(finished / name, framework="pt") as file:
            assert (finished / name).stat().st_size <= SHARD * 1.5 or len(file.keys()) <= 3
    for name in ("vae/diffusion_pytorch_model.safetensors", "model_index.json"):
        assert (finished / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("stop", [1, 3, 9])
def test_an_interrupted_run_goes_on_and_leaves_nothing_half_written(source, tmp_path, monkeypatch, stop, finished):
    written = []
    write, copy = convert._write_shard, convert._copy

    def interrupt(path, *arguments):
        written.append(path)
        if len(written) == stop:
            raise KeyboardInterrupt
        return (write if path.name.startswith("quantized") else copy)(*_order(path, arguments))

    def _order(path, arguments):
        return (path, *arguments) if path.name.startswith("quantized") else (*arguments, path)

    out = tmp_path / "out"
    monkeypatch.setattr(convert, "_write_shard", interrupt)
    monkeypatch.setattr(convert, "_copy", lambda source, path: interrupt(path, source))
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, "int8", max_shard=SHARD)
    assert not (out / manifest.NAME).exists()
    first = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors") if not path.name.startswith(".")}
    assert len(first) == stop - 1
    monkeypatch.setattr(convert, "_write_shard", write)
    monkeypatch.setattr(convert, "_copy", copy)
    with pytest.raises(CheckpointError, match=r"holds part of another checkpoint \(int8, bfloat16\)"):
        quantize_checkpoint(source, out, "int8-weight", max_shard=SHARD)
    quantize_checkpoint(source, out, "int8", max_shard=SHARD)
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())  # not made again
    assert not list(out.rglob("*.partial")) and not (out / convert.PROGRESS).exists()
    contents = [
        {n: _tensors(folder / n) for n in read_manifest(folder).files if n.startswith(PREFIX)}
        for folder in (out, finished)
    ]
    assert contents[0].keys() == contents[1].keys()
    for name in contents[0]:
        assert all(torch.equal(contents[0][name][key], value) for key, value in contents[1][name].items())


def _tensors(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", [f"{PREFIX}2.safetensors", "transformer/config.json", "vae/config.json"])
def test_truncated_tampered_and_missing_files_are_named_before_use(copied, name):
    path = copied / name
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=rf"{re.escape(name)} has {len(content) - 10} bytes instead of {len(content)}"):
        FastCogVideoXPipeline.from_pretrained(copied)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{re.escape(name)} was changed since it was written"):
        FastCogVideoXPipeline.from_pretrained(copied)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is missing"):
        FastCogVideoXPipeline.from_pretrained(copied)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("torchao", "0.1.0", r"holds tensors of torchao 0\.1\.0, installed is .*: pip install torchao==0\.1\.0, or"),
        ("recipe", "int3", r"recipe 'int3' is unknown; this version has 'int8'"),
        ("format", 99, r"format 99; this version reads format 1"),
        ("files", None, r"quantization\.json cannot be read"),
        ("files", {"../x": {"size": 1, "sha256": ""}}, r"cannot be read: '\.\./x' must be a file in the folder"),
        ("files", {}, r"quantized-00001\.safetensors is not listed in quantization\.json"),
        ("recipe", [], r"cannot be read: \[\] must be text"),
        ("dtype", "rand", r"cannot be read: dtype 'rand' must be one of float32, float16, bfloat16"),
    ],
)
def test_a_manifest_that_does_not_fit_says_what_would(copied, field, value, message):
    path = copied / manifest.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=message):
        FastCogVideoXPipeline.from_pretrained(copied)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "exact"}, r"the transformer is quantized \(int8\).*use engine='balanced'"),
        ({"engine": EngineConfig(recipe="int8-weight")}, r"recipe='int8-weight': .* already, by recipe 'int8'"),
        ({"torch_dtype": torch.float32}, r"dtype=float32: .* was quantized in bfloat16; leave dtype out, or quantize"),
    ],
)
def test_what_a_quantized_checkpoint_cannot_be_is_said_before_it_is_read(finished, arguments, message, monkeypatch):
    monkeypatch.setattr("cogvx_fast.loading.check_files", lambda *_: pytest.fail("read too early"))
    with pytest.raises(ValueError, match=message):
        FastCogVideoXPipeline.from_pretrained(finished, **arguments)


def test_sources_and_folders_that_cannot_be_used(source, finished, tmp_path):
    with pytest.raises(CheckpointError, match="is quantized already; start from the full-precision checkpoint"):
        quantize_checkpoint(finished, tmp_path / "a", "int8")
    with pytest.raises(CheckpointError, match="holds a quantized checkpoint already"):
        quantize_checkpoint(source, finished, "int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty, and nothing in it says how to go on"):
        quantize_checkpoint(source, tmp_path / "full", "int8")
    with pytest.raises(CheckpointError, match="has no model_index"):
        quantize_checkpoint(tmp_path / "full", tmp_path / "a", "int8")
    with pytest.raises(ValueError, match="recipe='int3' is unknown"):
        quantize_checkpoint(source, tmp_path / "a", "int3")
    broken = shutil.copytree(source, tmp_path / "broken")
    weights = next((broken / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=re.escape(weights.name)):
        quantize_checkpoint(broken, tmp_path / "a", "int8")
    assert not (tmp_path / "a").exists()


def test_room_on_the_disk_is_looked_for_first(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GB, its disk has 0\.00 GB left"):
        quantize_checkpoint(source, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def test_a_quantized_pipeline_says_how_to_save_it(source, tmp_path):
    fast = accelerate(toy.pipeline(), EngineConfig(recipe="int8"))
    with pytest.raises(ValueError, match=r"`cogvx-fast quantize MODEL OUT --recipe int8`"):
        fast.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(source, tmp_path):
    result = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "out"), "--recipe", "int8-weight"])
    assert result.exit_code == 0 and "int8-weight in bfloat16" in result.stdout
    assert read_manifest(tmp_path / "out").text_encoder == "int8-weight"
    for arguments, message in (
        ([str(source), str(tmp_path / "b"), "--recipe", "int3"], "--recipe 'int3': is unknown; allowed: int8"),
        ([str(tmp_path / "none"), str(tmp_path / "b")], "no such folder"),
        ([str(tmp_path / "out"), str(tmp_path / "b")], "is quantized already"),
    ):
        result = CliRunner().invoke(app, ["quantize", *arguments])
        assert result.exit_code == 2 and message in " ".join(result.stderr.split())


_LOAD = """
import os, sys, torch
from pathlib import Path
from cogvx_fast import EngineConfig, FastCogVideoXPipeline

if "RANK" in os.environ:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = "file://" + os.environ["MEETING"]
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

small, large = sys.argv[1:]
FastCogVideoXPipeline.from_pretrained(small)  # what loading imports, it has imported
Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
before = status("VmRSS")
pipe = FastCogVideoXPipeline.from_pretrained(large, engine=EngineConfig("balanced", recipe="int8", parallel="auto"))
total = sum(p.qdata.max().item() for p in pipe.transformer.parameters() if hasattr(p, "qdata"))  # all pages are read
print(status("VmHWM") - before, total)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_loading_takes_no_more_memory_than_the_quantized_weights(finished, tmp_path):
    """Alone, and at each of two processes that make clips together."""
    pipe = toy.pipeline()
    pipe.transformer = _large_transformer()
    pipe.save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", "int8")
    size = sum(file.size for file in read_manifest(tmp_path / "out").files.values())
    assert size > 150e6
    for processes in (1, 2):
        for peak in _peaks_of_loading(processes, finished, tmp_path / "out", tmp_path / "meeting"):
            assert size * 0.8 < peak < 1.15 * size, processes


def _peaks_of_loading(processes, small, large, meeting):
    """Bytes that each process has taken at most."""
    together = {"MEETING": str(meeting), "WORLD_SIZE": str(processes)}
    running = []
    for rank in range(processes):
        environment = {**os.environ, **({**together, "RANK": str(rank)} if processes > 1 else {})}
        command = [sys.executable, "-c", _LOAD, str(small), str(large)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes
    return [int(words.split()[-2]) for words in said]


def _large_transformer():
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = type(toy.transformer())(
            num_attention_heads=16, num_layers=13, time_embed_dim=16, text_embed_dim=toy.TEXT_DIM, sample_frames=9
        )
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = torch.full(parameter.shape, 0.01, dtype=torch.bfloat16)
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
    return model
