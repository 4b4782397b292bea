"""What is done to a pipeline when it is made: our models in the place of diffusers' own, and quantized weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel, DiffusionPipeline
from torch import nn

from .hooks import rewrapped, unwrapped
from .plan import UNLIMITED, VaePlan
from .transformer import FastCogVideoXTransformer3DModel, why_not_adopted
from .vae import FastAutoencoderKLCogVideoX


def adopt_models(pipeline: DiffusionPipeline) -> None:
    """Put our transformer, made of the same modules, in the place of diffusers' own; one that cannot be stays.

    Raises:
        ValueError: for offloading hooks that are on already.
    """
    model = unwrapped(pipeline.transformer)
    if isinstance(model, FastCogVideoXTransformer3DModel):
        model.take_over()
    elif isinstance(model, CogVideoXTransformer3DModel) and not why_not_adopted(model):
        pipeline.transformer = rewrapped(pipeline.transformer, FastCogVideoXTransformer3DModel.adopt(model))


def adopt_vae(pipeline: DiffusionPipeline, plan: VaePlan) -> None:
    """Put our autoencoder in place if the plan has it, else diffusers' own, both of the same modules."""
    model = unwrapped(pipeline.vae)
    if plan.ours and not isinstance(model, FastAutoencoderKLCogVideoX):
        pipeline.vae = FastAutoencoderKLCogVideoX.adopt(pipeline.vae)
    elif not plan.ours and isinstance(model, FastAutoencoderKLCogVideoX):
        pipeline.vae = rewrapped(pipeline.vae, model.as_reference())


def set_memory_budget(pipeline: DiffusionPipeline, budget: int) -> None:
    """What the user's own calls of the autoencoder may take; one of another budget belongs to another pipeline."""
    model = unwrapped(pipeline.vae)
    if isinstance(model, FastAutoencoderKLCogVideoX) and (model.memory_budget or UNLIMITED) != budget:
        pipeline.vae = FastAutoencoderKLCogVideoX.adopt(pipeline.vae)
        ours: Any = unwrapped(pipeline.vae)
        ours.memory_budget = budget


def class_names(pipeline: DiffusionPipeline) -> dict[str, list[str]]:
    """Library and class that a saved pipeline names for models that are ours or compiled: those that everyone has."""
    names = {}
    for part, reference in (("transformer", CogVideoXTransformer3DModel), ("vae", AutoencoderKLCogVideoX)):
        if isinstance(unwrapped(getattr(pipeline, part, None)), reference):
            names[part] = ["diffusers", reference.__name__]
    return names


def models_of(pipeline: DiffusionPipeline) -> tuple[nn.Module | None, nn.Module | None]:
    """The pipeline's transformer and autoencoder, out of what compiles them."""
    return unwrapped(pipeline.transformer), unwrapped(pipeline.vae)


def device_and_dtype(pipeline: DiffusionPipeline) -> tuple[torch.device, torch.dtype]:
    """Where and in what the transformer runs; without one, the autoencoder or the text encoder."""
    device = pipeline._execution_device
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        if part is not None:
            return device, part.dtype
    return device, torch.float32
