"""Writes the trained parts as checkpoints in diffusers format, fp16 safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline

from .dit import SNAP, Stage, build_scheduler, build_transformer
from .state import load_state
from .text import build_text_encoder, build_tokenizer, tie_cases
from .vae import CLEAR, SHARPEN, build
from .vae import Stage as VaeStage

TOLD_PIPELINE = "CogVideoXFunInpaintPipeline"


def load_vae(folder: Path, stage: VaeStage, scale: float | None = None) -> AutoencoderKLCogVideoX:
    """The autoencoder after `stage`, with its `scaling_factor` set where it is known."""
    vae = build(stage.size)
    vae.load_state_dict(load_state(folder / f"{stage.name}.pt")["model"])
    if scale is not None:
        vae.register_to_config(scaling_factor=round(scale, 6))
    return vae.eval()


def export(folder: Path, target: Path, stage: Stage = SNAP) -> None:
    """The averaged weights of a stage as a pipeline in `target`, which appears whole or not at all.

    A stage that is told of frames makes a checkpoint of Fun-InP's form. It was trained on frames of any size and place,
    and has the decoder for them.
    """
    tokenizer = build_tokenizer()
    transformer = build_transformer(stage.size, stage.told)
    model = torch.nn.ModuleDict({"transformer": transformer, "text_encoder": build_text_encoder(len(tokenizer))})
    model.load_state_dict(load_state(folder / f"{stage.name}.pt")["average"])
    tie_cases(model["text_encoder"])
    scale = load_state(stage.latents_in(folder))["scale"]
    pipe = CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=model["text_encoder"].eval(),
        vae=load_vae(folder, SHARPEN if stage.told else CLEAR, scale),
        transformer=model["transformer"].eval(),
        scheduler=build_scheduler(),
    )
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(partial, max_shard_size="8MB")
    if stage.told:
        index = partial / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": TOLD_PIPELINE}, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
