"""What `from_pretrained` finds out and decides before diffusers reads a weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint.opening import Opened, default_dtype, opened
from .config import EngineConfig
from .memory import Models, Request
from .quantization.checkpoint import check_dtype, load_text_encoder, load_transformer
from .quantization.hub import hub_arguments, quantized_folder
from .quantization.manifest import (
    check_files,
    check_small_files,
    is_quantized_checkpoint,
    read_manifest,
    text_encoder_scheme,
)
from .quantization.pipeline import check_engine
from .quantization.recipes import NATIVE, RECIPES, targets
from .resolve import resolve_new
from .turbo import ScheduleError
from .turbo import choice as turbo

_MODELS = ("transformer", "text_encoder", "vae")
# Arguments of `from_pretrained` with which it is not a folder of files that is loaded, or not into our class.
_AS_UPSTREAM = {"custom_pipeline", "dduf_file", "from_flax", "use_onnx"}


@dataclass(frozen=True)
class Ready:
    """A checkpoint that was checked, and how diffusers is to load it.

    Attributes:
        folder: where its files are.
        arguments: of diffusers' `from_pretrained`.
        why_dtype: why it is of the dtype that it gets, where none was asked for; else "".
    """

    found: Opened
    folder: Path
    arguments: dict[str, Any]
    why_dtype: str


def prepare(pipeline_class: Any, source: Any, asked: dict[str, Any]) -> Ready | None:
    """The checkpoint `source`, a folder or a Hub id, for a fast pipeline class; downloaded, checked, not read.

    Args:
        asked: arguments of `from_pretrained`; what only this function takes is removed from them.

    Returns:
        None where it is diffusers that has to load it as it is asked to, or to say why it cannot be had.

    Raises:
        CheckpointError, LimitError, ValueError: as `FastPipelineMixin.from_pretrained`.
    """
    config = EngineConfig.from_name(asked.get("engine", "exact"))
    reference, hub = pipeline_class._reference, hub_arguments(asked)
    if not is_quantized_checkpoint(source):
        config.check_machine()
    if asked.pop("use_safetensors", None) is False:
        raise ValueError("use_safetensors=False: loading a pickle can run any code; allowed: True")
    if not _AS_UPSTREAM.isdisjoint(name for name, value in asked.items() if value is not None):
        return None
    quantized, own = quantized_folder(source, hub), {}
    if quantized is not None:
        own = _as_quantized(quantized, reference, asked)
    found = opened(quantized or source, reference.__name__, asked, **hub)
    if found is None:
        return None
    if config.skips_steps and "transformer" in found.configs:
        reason = turbo.why_not(config.schedule_path, found.configs["transformer"])
        if reason:
            raise ScheduleError(reason)
    arguments = asked | own
    if quantized is not None:
        arguments |= _quantized_parts(quantized, asked)
    elif config.memory_limit is not None and "transformer" in found.configs and asked.keys().isdisjoint(_MODELS):
        dtype = asked["dtype"] if isinstance(asked.get("dtype"), torch.dtype) else None
        dtype = dtype or default_dtype(found.checkpoint, asked)[0] or torch.float32
        transformer, text_encoder, vae = map(found.configs.get, _MODELS)
        models = Models.from_configs(transformer or {}, text_encoder, vae)
        _check_limit(config, models, dtype, reference)
    if found.folder is None:
        files = {name: asked[name] for name in ("variant", "proxies", *found.given) if name in asked}
        found = found.in_folder(Path(pipeline_class.download(source, **hub, **files, use_safetensors=True)))
    found.check_files(apart=() if quantized is None else ("transformer", "text_encoder"))
    chosen, why = default_dtype(found.checkpoint, arguments)
    if chosen is not None:
        arguments["dtype"] = chosen
    assert found.folder is not None
    return Ready(found, found.folder, arguments, why)


def _as_quantized(folder: Path, pipeline_class: type, asked: dict[str, Any]) -> dict[str, Any]:
    """Engine and dtype for the quantized checkpoint in `folder`, once what was asked for is found to fit it."""
    manifest = read_manifest(folder)
    own: dict[str, Any] = {"recipe": manifest.recipe, "text_encoder": manifest.text_encoder or NATIVE}
    config = EngineConfig.from_name(asked.get("engine", EngineConfig(**own)))
    check_engine(config, manifest.recipe)
    check_dtype(manifest, folder, asked.get("dtype"))
    check_small_files(folder, manifest)
    dtype = getattr(torch, manifest.dtype)
    if config.memory_limit is not None:
        models = Models.from_checkpoint(folder, RECIPES[manifest.recipe], text_encoder_scheme(manifest) or NATIVE)
        _check_limit(config, models, dtype, pipeline_class)
    return {"engine": config, "dtype": dtype}


def _quantized_parts(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make `from_pretrained` take the quantized models of `folder`."""
    manifest, parts = read_manifest(folder), {}
    check_files(folder, manifest)
    if "transformer" not in asked:
        parts["transformer"] = load_transformer(folder, manifest)
    if "text_encoder" not in asked:
        parts["text_encoder"] = load_text_encoder(folder, manifest)
    return parts


def _check_limit(config: EngineConfig, models: Models, dtype: torch.dtype, pipeline_class: type) -> None:
    """Raise a `LimitError` for a checkpoint that will not fit, before its weights are read."""
    resolve_new(config, models, targets()[0], dtype, Request.default(models.variant, pipeline_class))
