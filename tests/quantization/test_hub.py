"""Quantized checkpoints by Hub id, with a hub that is a folder here."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from cogvx_fast import EngineConfig, FastCogVideoXPipeline
from cogvx_fast.memory import LimitError
from cogvx_fast.quantization.convert import quantize_checkpoint
from cogvx_fast.quantization.manifest import CheckpointError
from tests import toy

ID = "someone/toy-int8"


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    toy.pipeline("5b").to(torch.bfloat16).save_pretrained(folder / "plain")
    quantize_checkpoint(folder / "plain", folder / "int8", "int8")
    return folder / "int8"


@pytest.fixture
def hub(uploaded, monkeypatch, tmp_path):
    """The calls of a hub that has `ID` alone; a download is a copy."""
    calls = []

    def hf_hub_download(repo_id, filename, **options):
        calls.append(("file", repo_id, filename, options))
        if repo_id != ID:
            raise LocalEntryNotFoundError(f"no {filename} of {repo_id}")
        return str(uploaded / filename)

    def snapshot_download(repo_id, **options):
        calls.append(("snapshot", repo_id, options))
        return shutil.copytree(uploaded, tmp_path / "snapshot", dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_an_id_loads_like_its_folder(hub, uploaded, tmp_path):
    options = {"revision": "v1", "token": "hf_x", "cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    pipe = FastCogVideoXPipeline.from_pretrained(ID, **options)
    assert hub == [("file", ID, "quantization.json", options), ("snapshot", ID, options)]
    assert pipe.transformer.recipe == "int8"
    local = FastCogVideoXPipeline.from_pretrained(uploaded)
    arguments = {"num_steps": 1, "output_type": "latent"}
    assert torch.equal(pipe(**toy.inputs(**arguments)).frames, local(**toy.inputs(**arguments)).frames)


def test_what_was_downloaded_is_checked(hub, uploaded, monkeypatch, tmp_path):
    def broken(repo_id, **options):
        folder = Path(shutil.copytree(uploaded, tmp_path / "broken", dirs_exist_ok=True))
        weights = next((folder / "transformer").glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-1])
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(CheckpointError, match="truncated"):
        FastCogVideoXPipeline.from_pretrained(ID)
    with pytest.raises(ValueError, match="is quantized already, by recipe 'int8'"):
        FastCogVideoXPipeline.from_pretrained(ID, engine=EngineConfig(recipe="int8-weight"))


def test_other_ids_are_left_to_diffusers(hub, monkeypatch):
    asked = []
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", lambda name, **options: asked.append(name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        FastCogVideoXPipeline.from_pretrained("someone/plain")
    files = ("quantization.json", "model_index.json")
    assert asked == ["someone/plain"] and hub == [("file", "someone/plain", name, {}) for name in files]


def test_an_engine_that_cannot_work_asks_no_hub(hub):
    with pytest.raises(ValueError, match="recipe='fp8' cannot work here"):
        FastCogVideoXPipeline.from_pretrained(ID, engine=EngineConfig(recipe="fp8"))
    assert hub == []


def test_a_quantized_checkpoint_is_fitted_as_it_is(hub):
    with pytest.raises(LimitError, match="with transformer int8, text encoder int8-weight"):
        FastCogVideoXPipeline.from_pretrained(ID, engine=EngineConfig(memory_limit="10KiB"))
    assert (
        FastCogVideoXPipeline.from_pretrained(ID, engine=EngineConfig(memory_limit="1GiB")).transformer.recipe == "int8"
    )
