"""Makes the reference pipeline of a workload, and its copy in a higher precision that counts as the truth."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
)
from torch import nn

from .workloads import DEMO, Workload


def build_pipeline(workload: Workload, dtype: torch.dtype, device: torch.device) -> CogVideoXPipeline:
    """diffusers' own pipeline of `workload`; parts that a workload with random weights does not name are None."""
    if workload.checkpoint is not None:
        pipe = CogVideoXPipeline.from_pretrained(resolved_checkpoint(workload), dtype=dtype)
    else:
        pipe = CogVideoXPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=_random(AutoencoderKLCogVideoX, workload.vae, dtype, device, seed=1),
            transformer=_random(CogVideoXTransformer3DModel, workload.transformer, dtype, device, seed=0),
            scheduler=scheduler(),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def widened(pipe: DiffusionPipeline, dtype: torch.dtype) -> DiffusionPipeline:
    """A copy of `pipe` whose models have the same weights in a wider `dtype`; tokenizer and scheduler are shared."""
    parts = {
        name: copy.deepcopy(part).to(dtype) if isinstance(part, nn.Module) else part
        for name, part in pipe.components.items()
    }
    return like(pipe, **parts)


def like(pipe: DiffusionPipeline, **parts: Any) -> DiffusionPipeline:
    """A pipeline of the class of `pipe` that shares all its components but `parts`."""
    other = type(pipe)(**{**pipe.components, **parts})
    other.set_progress_bar_config(disable=True)
    return other


def randomize(module: nn.Module, seed: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Give every parameter, also those without storage yet, random values on `device`.

    Matrices keep the scale of their input; affine weights are about one, biases about zero, so that activations stay
    of the size that a trained model's have. Norms and biases are random too: one that is forgotten changes the output.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for owner in module.modules():
        for name, old in list(owner.named_parameters(recurse=False)):
            # Uniform, as it takes a third of the time of normal; the variance is one.
            noise = torch.empty(old.shape, dtype=dtype, device=device).uniform_(-(3**0.5), 3**0.5, generator=generator)
            if old.ndim > 1:
                noise.mul_(old[0].numel() ** -0.5)
            else:
                noise.mul_(0.1).add_(1.0 if "norm" in type(owner).__name__.lower() and name == "weight" else 0.0)
            setattr(owner, name, nn.Parameter(noise, requires_grad=False))
    return module


def _random(cls: type, config: dict | None, dtype: torch.dtype, device: torch.device, seed: int) -> nn.Module | None:
    if config is None:
        return None
    with init_empty_weights(include_buffers=False):  # no time for initial values that would be thrown away
        model = cls(**config)
    return randomize(model, seed, dtype, device).to(device=device, dtype=dtype).eval()


def scheduler() -> CogVideoXDDIMScheduler:
    """CogVideoX-2b's."""
    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
    )


def resolved_checkpoint(workload: Workload) -> str:
    """The folder or Hub id of a workload that has a checkpoint."""
    from ..demo import demo_checkpoint

    return demo_checkpoint() if workload.checkpoint == DEMO else workload.checkpoint
