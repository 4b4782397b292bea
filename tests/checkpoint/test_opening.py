"""Loading without a dtype gives all parts one, and by Hub id what a folder gives."""

import shutil

import huggingface_hub
import pytest
import torch

from cogvx_fast import FastCogVideoXPipeline, machine
from cogvx_fast.checkpoint import CheckpointError
from tests import toy

PARTS = ("transformer", "vae", "text_encoder")


def dtypes(pipe):
    return {getattr(pipe, part).dtype for part in PARTS}


def precision(pipe):
    return pipe.engine_report().line("precision")


@pytest.mark.parametrize(("units", "dtype"), [(None, torch.float32), ("units", torch.bfloat16)])
def test_on_a_cpu_what_it_is_good_at(whole, monkeypatch, units, dtype):
    monkeypatch.setattr(machine, "cpu_bf16_units", lambda: units)
    pipe = FastCogVideoXPipeline.from_pretrained(whole)
    assert dtypes(pipe) == {dtype}
    name = str(dtype).removeprefix("torch.")
    assert precision(pipe).detail == f"{name}, what this CPU is good at: no dtype was given"
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(**toy.inputs(num_steps=1)).frames  # upstream: "expected m1 and m2 to have the same dtype"
    assert torch.isfinite(frames).all()


def test_on_a_gpu_what_is_stored(whole, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    pipe = FastCogVideoXPipeline.from_pretrained(whole)
    # T5's `wo` overflows float16: transformers keeps it in float32.
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.text_encoder.shared.weight.dtype == torch.float16
    assert pipe._why_dtype == "as the checkpoint is stored"


def test_a_part_that_is_given_decides(whole):
    pipe = FastCogVideoXPipeline.from_pretrained(whole, transformer=toy.transformer().to(torch.float64))
    assert dtypes(pipe) == {torch.float64} and pipe._why_dtype == "as the transformer that was given"


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_what_is_asked_for_stays(whole, name):
    pipe = FastCogVideoXPipeline.from_pretrained(whole, **{name: torch.float64})
    assert dtypes(pipe) == {torch.float64} and pipe._why_dtype == ""
    mixed = {"transformer": torch.float64, "default": torch.float32}
    pipe = FastCogVideoXPipeline.from_pretrained(whole, **{name: mixed})
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.float64, torch.float32)


@pytest.fixture
def hub(whole, monkeypatch, tmp_path):
    """A hub that has one repository, `someone/toy`; what was asked of it."""
    asked = []

    def hf_hub_download(repo_id, filename, **options):
        asked.append(filename)
        if repo_id != "someone/toy" or not (whole / filename).is_file():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"no {filename} of {repo_id}")
        return str(whole / filename)

    def download(cls, repository, **options):
        asked.append(("all", sorted(options)))
        return shutil.copytree(whole, tmp_path / "downloaded", dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", classmethod(download))
    return asked


def test_an_id_is_described_before_it_is_downloaded_and_checked_after(hub, tmp_path):
    pipe = FastCogVideoXPipeline.from_pretrained("someone/toy", variant=None)
    assert pipe.name_or_path == "someone/toy" and len(dtypes(pipe)) == 1
    assert hub[-1] == ("all", ["use_safetensors", "variant"]) and "transformer/config.json" in hub
    hub.clear()
    from cogvx_fast import FastCogVideoXImageToVideoPipeline

    with pytest.raises(CheckpointError, match=r"someone/toy: its transformer .* makes videos of text alone"):
        FastCogVideoXImageToVideoPipeline.from_pretrained("someone/toy")
    assert not any(isinstance(each, tuple) for each in hub)


def test_what_was_downloaded_is_checked(hub, whole, monkeypatch, tmp_path):
    def download(cls, repository, **options):
        folder = shutil.copytree(whole, tmp_path / "cut", dirs_exist_ok=True)
        path = folder / "vae" / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        return folder

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", classmethod(download))
    with pytest.raises(CheckpointError, match=r"vae/diffusion_pytorch_model\.safetensors: has .* it was cut off"):
        FastCogVideoXPipeline.from_pretrained("someone/toy")
