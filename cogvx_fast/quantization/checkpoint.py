"""Loads a quantized checkpoint: its tensors go straight into a model without weights, none in full precision first."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel
from safetensors import safe_open
from torch import nn
from transformers import T5Config, T5EncoderModel

from ..quiet import quiet_imports
from .manifest import CheckpointError, Manifest

SHARD = "quantized-{:05d}.safetensors"


def load_transformer(folder: Path, manifest: Manifest) -> CogVideoXTransformer3DModel:
    """The transformer of a checkpoint whose files were checked; it knows its recipe as `.recipe`."""
    config = _config(folder / "transformer")
    with init_empty_weights(include_buffers=False):
        model = CogVideoXTransformer3DModel.from_config(config)
    fill(model, folder / "transformer", getattr(torch, manifest.dtype))
    model.recipe = manifest.recipe
    return model


def load_text_encoder(folder: Path, manifest: Manifest) -> T5EncoderModel:
    """The text encoder, likewise."""
    config = T5Config.from_pretrained(folder / "text_encoder")
    with init_empty_weights(include_buffers=False):
        model = T5EncoderModel(config)
    fill(model, folder / "text_encoder", getattr(torch, manifest.dtype), tied={"encoder.embed_tokens.weight"})
    model.encoder.embed_tokens.weight = model.shared.weight
    return model


def fill(model: nn.Module, folder: Path, dtype: torch.dtype, tied: Set[str] = frozenset()) -> None:
    """Give `model`, made without weights, the tensors of the shards in `folder`; its own buffers become `dtype`.

    `tied`: names of parameters that are others of the model.

    Raises:
        CheckpointError: for tensors that are missing or that the model does not know.
    """
    wanted = set(model.state_dict()) - tied
    for path in sorted(folder.glob(SHARD.split("-")[0] + "-*.safetensors")):
        for name, tensor in read_shard(path).items():
            if name in tied:
                continue
            if name not in wanted:
                raise CheckpointError(f"{path} has a tensor {name} that the model of {folder} does not know")
            wanted.remove(name)
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            if attribute in module._buffers:
                module._buffers[attribute] = tensor
            else:
                module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
    if wanted:
        raise CheckpointError(f"{folder} lacks {', '.join(sorted(wanted)[:3])} and {max(0, len(wanted) - 3)} more")
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    model.eval()


def read_shard(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a shard by their names in the model, torchao's put together again."""
    with quiet_imports():
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        whole, left = unflatten_tensor_state_dict(tensors, file.metadata())
    if left:
        raise CheckpointError(f"{path} holds parts of tensors that it does not describe: {', '.join(left)}")
    return whole


def check_dtype(manifest: Manifest, source: Path, dtype: torch.dtype | None) -> None:
    """Raise a `CheckpointError` for a dtype that the checkpoint does not have."""
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name != manifest.dtype:
        raise CheckpointError(
            f"dtype={name}: {source} was quantized in {manifest.dtype}; leave dtype out, or quantize again with --dtype"
            f" {name}"
        )


def _config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
