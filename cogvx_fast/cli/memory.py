"""What a video of some size will take, from the checkpoint's configuration alone: for `cogvx-fast doctor`."""

from __future__ import annotations

from typing import Any

from cogvx_fast.quiet import quiet_imports

from .checkpoint import PIXELS_PER_LATENT, Checkpoint, read_config
from .console import UsageError


def vae_memory(
    checkpoint: Checkpoint | None, height: int, width: int, num_frames: int, dtype: str, device: str, budget: str | None
) -> dict[str, Any]:
    """The plans of the autoencoder.

    Args:
        checkpoint: None for the autoencoder that the whole family has.
        height, width: in pixels.
        dtype: name of a torch dtype.
        budget: `EngineConfig.vae_memory`.

    Returns:
        The size, and under "plans" for each way of using the autoencoder `peak` and `put_away` (bytes) and a sentence.

    Raises:
        UsageError: for a budget that is too small.
    """
    with quiet_imports():
        import torch
        from accelerate import init_empty_weights
        from diffusers import AutoencoderKLCogVideoX

        from cogvx_fast import EngineConfig
        from cogvx_fast.vae import FastAutoencoderKLCogVideoX, why_not_adopted
        from cogvx_fast.vae.place import Place

    config = {} if checkpoint is None else read_config(checkpoint.source, "vae/config.json")
    with init_empty_weights():
        vae = AutoencoderKLCogVideoX.from_config(config)
    reason = why_not_adopted(vae)
    if reason is not None:
        raise UsageError("--model", repr(checkpoint.source), f"no plan for its autoencoder: {reason}")
    vae = FastAutoencoderKLCogVideoX.adopt(vae)
    place = Place.of(torch.device(device), getattr(torch, dtype))
    latent_frames = (num_frames - 1) // vae.config.temporal_compression_ratio + 1
    latents = (1, vae.config.latent_channels, latent_frames, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    pixels = (1, vae.config.in_channels, num_frames, height, width)
    try:
        vae.memory_budget = EngineConfig(vae_memory=budget).vae_memory
        plans = {
            "decode": vae.plan_decode(latents, place=place),
            "decode, streamed": vae.plan_decode(latents, keeps_output=False, place=place),
            "encode": vae.plan_encode(pixels, place=place),
        }
    except ValueError as error:
        raise UsageError("--vae-memory", repr(budget), str(error)) from None
    return {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "dtype": dtype,
        "device": device,
        "plans": {
            use: {"peak": plan.peak, "put_away": plan.put_away, "plan": str(plan)} for use, plan in plans.items()
        },
    }
