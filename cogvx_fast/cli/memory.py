"""What a video of some size will take, from the checkpoint's configuration alone: for `cogvx-fast doctor`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from cogvx_fast.quiet import quiet_imports

from .checkpoint import PIXELS_PER_LATENT, Checkpoint, read_config
from .console import UsageError

if TYPE_CHECKING:
    from cogvx_fast import EngineConfig
    from cogvx_fast.fit.request import Request
    from cogvx_fast.quantization.memory import Models


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


def model_memory(
    checkpoint: Checkpoint,
    request: Request,
    dtype: str,
    device: str,
    recipe: str | None,
    budget: str | None,
    limit: str | None,
) -> dict[str, Any]:
    """What a generation takes by component and by stage.

    Args:
        recipe, budget, limit: `recipe`, `vae_memory` and `memory_limit` of an `EngineConfig`.

    Returns:
        `recipe`; in bytes `text_encoder`, `transformer`, `vae` (weights), `packed`, `tables` and `activations` of a
        step, and by name the `stages`; with a limit also `choice`, in words.

    Raises:
        UsageError: for a recipe that is unknown or cannot run on `device`, and for a limit in which nothing fits.
    """
    with quiet_imports():
        import torch

        from cogvx_fast import EngineConfig
        from cogvx_fast.fit.demand import Option, Predictor
        from cogvx_fast.fit.pipeline import predict_choice
        from cogvx_fast.quantization import BALANCED, NATIVE, RECIPES
        from cogvx_fast.quantization.recipes import Target, best, refusal, why_not

    precision, target = getattr(torch, dtype), Target.of(torch.device(device))
    if recipe not in (None, BALANCED, NATIVE, *RECIPES):
        raise UsageError("--recipe", repr(recipe), f"is unknown; allowed: {', '.join((BALANCED, NATIVE, *RECIPES))}")
    chosen = best(target, precision) if recipe == BALANCED else RECIPES.get(recipe)
    if chosen is not None and why_not(chosen, target, precision) is not None:
        raise UsageError("--recipe", repr(recipe), refusal(chosen, target, precision))
    models = _models(checkpoint)
    if limit is None:
        config = EngineConfig(recipe=recipe, vae_memory=budget)
        option = Option(chosen, None if chosen is None else chosen.text_encoder)
        demand, choice = Predictor(models, request, torch.device(device), precision, config).demand(option), None
    else:
        try:
            config = EngineConfig(recipe=recipe, vae_memory=budget, memory_limit=limit)
            choice = predict_choice(models, request, config, torch.device(device), precision)
        except ValueError as error:
            raise UsageError("--memory-limit", repr(limit), str(error)) from None
        demand, chosen = choice.demand, choice.option.recipe
    return {
        "recipe": None if chosen is None else chosen.name,
        "text_encoder": demand.text_encoder,
        "transformer": demand.transformer,
        "vae": demand.vae,
        "packed": demand.step.packed,
        "tables": demand.step.kept,
        "activations": demand.step.peak,
        "stages": demand.stages,
    } | ({} if choice is None else {"choice": str(choice)})


def fitted(checkpoint: Checkpoint, request: Request, dtype: str, device: str, config: EngineConfig) -> EngineConfig:
    """`config` with what its memory limit leaves open decided for `request`.

    A checkpoint that is quantized decides for itself, when it is loaded.

    Raises:
        UsageError: for a limit in which nothing fits.
    """
    with quiet_imports():
        import torch

        from cogvx_fast.fit.pipeline import predict_choice, resolved
        from cogvx_fast.quantization.manifest import is_quantized_checkpoint
        from cogvx_fast.quantization.recipes import Target

    if is_quantized_checkpoint(checkpoint.source):
        return config
    target, precision = torch.device(device), getattr(torch, dtype)
    try:
        choice = predict_choice(_models(checkpoint), request, config, target, precision)
    except ValueError as error:
        raise UsageError("--memory-limit", repr(config.memory_limit), str(error)) from None
    return resolved(config, choice, Target.of(target), precision)


def _models(checkpoint: Checkpoint) -> Models:
    from cogvx_fast.quantization.memory import Models

    return Models.from_configs(
        *(read_config(checkpoint.source, f"{part}/config.json") for part in ("transformer", "text_encoder", "vae"))
    )


def request_of(checkpoint: Checkpoint, height: int, width: int, num_frames: int) -> Request:
    """A generation of one video of this size, with guidance."""
    with quiet_imports():
        import diffusers

        from cogvx_fast.fit.request import Request

    return Request.default(
        dataclasses.asdict(checkpoint),
        getattr(diffusers, checkpoint.pipeline_class, None),
        num_frames=num_frames,
        height=height,
        width=width,
    )
