"""What a video of some size will take, from the checkpoint's configuration alone."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvx_fast.family import PIXELS_PER_LATENT, latent_frames
from cogvx_fast.quiet import quiet_imports

from .checkpoint import Checkpoint, read_config
from .console import UsageError
from .loading import loading_errors

if TYPE_CHECKING:
    import torch

    from cogvx_fast import EngineConfig
    from cogvx_fast.memory import Models, Request, RoomError
    from cogvx_fast.memory.choice import PlanOf
    from cogvx_fast.plan import EnginePlan


def vae_memory(
    checkpoint: Checkpoint | None, height: int, width: int, num_frames: int, dtype: str, device: str, budget: str | None
) -> dict[str, Any]:
    """The slices that the autoencoder goes by, and what they take.

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
        from cogvx_fast.plan import UNLIMITED
        from cogvx_fast.vae import FastAutoencoderKLCogVideoX, choose_vae

    config = {} if checkpoint is None else read_config(checkpoint.source, "vae/config.json")
    with contextlib.nullcontext() if checkpoint is None else loading_errors(checkpoint), init_empty_weights():
        vae = AutoencoderKLCogVideoX.from_config(config)
    size = latent_frames(num_frames), height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
    latents = (1, vae.config.latent_channels, *size)
    pixels = (1, vae.config.in_channels, num_frames, height, width)
    plan = choose_vae(torch.device(device), getattr(torch, dtype), fast=True, budget=UNLIMITED, autoencoder=vae)
    if not plan.ours:
        source = None if checkpoint is None else repr(checkpoint.source)
        raise UsageError("--model", source, f"no plan for its autoencoder: {plan.why}")
    fast = FastAutoencoderKLCogVideoX.adopt(vae)
    try:
        plan = dataclasses.replace(plan, budget=EngineConfig(vae_memory=budget).vae_memory or UNLIMITED)
        plans = {
            "decode": fast.plan_decode(latents, plan=plan),
            "decode, streamed": fast.plan_decode(latents, keeps_output=False, plan=plan),
            "encode": fast.plan_encode(pixels, plan=plan),
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
            use: {"peak": slices.peak, "put_away": slices.spilled_bytes, "plan": str(slices)}
            for use, slices in plans.items()
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
        from cogvx_fast.memory import Option, Predictor, fit
        from cogvx_fast.quantization import BALANCED, NATIVE, RECIPES
        from cogvx_fast.quantization.recipes import AS_THEY_ARE, Target, best, refusal, why_unsupported

    place, precision = torch.device(device), getattr(torch, dtype)
    target = Target.of(place)
    if recipe not in (None, BALANCED, NATIVE, *RECIPES):
        raise UsageError("--recipe", repr(recipe), f"is unknown; allowed: {', '.join((BALANCED, NATIVE, *RECIPES))}")
    chosen = (best(target, precision) if recipe == BALANCED else RECIPES.get(recipe or NATIVE)) or AS_THEY_ARE
    if why_unsupported(chosen, target, precision) is not None:
        raise UsageError("--recipe", repr(recipe), refusal(chosen, target, precision))
    models = _models(checkpoint)
    if limit is None:
        config = EngineConfig(recipe=recipe, vae_memory=budget)
        option = Option(chosen, chosen.text_encoder or "native")
        plan = _planner(config, models, place, precision)(option)
    else:
        try:
            config = EngineConfig(recipe=recipe, vae_memory=budget, memory_limit=limit)
            plan = fit(config, models, request, target, precision, _planner(config, models, place, precision))
        except ValueError as error:
            raise UsageError("--memory-limit", repr(limit), str(error)) from None
    demand = Predictor(models, request).demand(plan)
    return {
        "recipe": None if plan.recipe == AS_THEY_ARE else plan.recipe.name,
        "text_encoder": demand.text_encoder,
        "transformer": demand.transformer,
        "vae": demand.vae,
        "packed": demand.step.packed,
        "tables": demand.step.kept,
        "activations": demand.step.peak,
        "stages": demand.stages,
    } | ({"choice": plan.memory} if plan.memory else {})


def fitted(checkpoint: Checkpoint, request: Request, dtype: str, device: str, config: EngineConfig) -> EngineConfig:
    """`config` with the precision that its memory limit allows for `request`, by name.

    A pipeline that is made decides for the size that its model makes by itself, where this one is asked for. A
    checkpoint that is quantized decides for itself, when it is loaded.

    Raises:
        UsageError: for a limit in which nothing fits.
    """
    with quiet_imports():
        import torch

        from cogvx_fast.memory import fit
        from cogvx_fast.quantization.manifest import is_quantized_checkpoint
        from cogvx_fast.quantization.recipes import Target

    if is_quantized_checkpoint(checkpoint.source):
        return config
    place, precision, models = torch.device(device), getattr(torch, dtype), _models(checkpoint)
    plan_of = _planner(config, models, place, precision)
    try:
        plan = fit(config, models, request, Target.of(place), precision, plan_of)
    except ValueError as error:
        raise UsageError("--memory-limit", repr(config.memory_limit), str(error)) from None
    if plan.tier == "exact":
        return dataclasses.replace(config, tier=plan.tier)
    return dataclasses.replace(config, tier=plan.tier, recipe=plan.recipe.name, text_encoder=str(plan.text_encoder))


def room_error(
    checkpoint: Checkpoint | None,
    request: Request,
    dtype: str,
    device: str,
    config: EngineConfig,
    kept_per_frame: int = 0,
    loaded: tuple[Models, EngineConfig] | None = None,
) -> RoomError | None:
    """What is wrong with `request` where it needs more than is free on `device`; None where it fits or nobody knows.

    Args:
        checkpoint: None for the autoencoder that the whole family has, of which `request` should be a decoding.
        config: with a memory limit, the plan that it allows counts.
        kept_per_frame: as `memory.check_room` has it.
        loaded: what `loaded_models` says of `checkpoint` and `config`: for who asks again and again.
    """
    with quiet_imports():
        import torch

        from cogvx_fast import devices
        from cogvx_fast.memory import Predictor, RoomError, check_room, fit, options
        from cogvx_fast.quantization.recipes import Target
        from cogvx_fast.vae.chunks import BEYOND_MEMORY

    place, precision = torch.device(device), getattr(torch, dtype)
    free = devices.free_memory(place)
    if free is None:
        return None
    models, config = loaded or loaded_models(checkpoint, config)
    target, plan_of = Target.of(place), _planner(config, models, place, precision)
    try:
        plan = plan_of(next(options(config, target, precision, models.recipe, models.text_scheme)))
    except ValueError:  # an engine that cannot run here: loading says so
        return None

    def error_of(plan: EnginePlan) -> RoomError | None:
        try:
            check_room(free, plan, Predictor(models, request), kept_per_frame)
        except RoomError as error:
            return error
        return None

    error = error_of(plan)
    if config.memory_limit is None or error is None or error.needed >= BEYOND_MEMORY:
        return error
    try:
        return error_of(fit(config, models, request, target, precision, plan_of))
    except ValueError:  # a limit that is too small, which is said by name
        return None


def loaded_models(checkpoint: Checkpoint | None, config: EngineConfig) -> tuple[Models, EngineConfig]:
    """The models as loading them would give them, and the configuration that goes with them."""
    from cogvx_fast.memory import Models
    from cogvx_fast.quantization.manifest import (
        CheckpointError,
        is_quantized_checkpoint,
        read_manifest,
        text_encoder_scheme,
    )
    from cogvx_fast.quantization.recipes import BALANCED, RECIPES, TextScheme

    if checkpoint is None:
        return Models(None, None, Models.from_configs({}, None, {}).vae), config
    models = _models(checkpoint)
    if is_quantized_checkpoint(checkpoint.source):
        with contextlib.suppress(CheckpointError):  # loading says so
            manifest = read_manifest(Path(checkpoint.source))
            scheme: TextScheme = text_encoder_scheme(manifest) or "native"
            models = dataclasses.replace(models, recipe=RECIPES[manifest.recipe], text_scheme=scheme)
            tier = config.tier if config.skips_steps else BALANCED
            config = dataclasses.replace(config, tier=tier, recipe=manifest.recipe, text_encoder=str(scheme))
    return models, config


def _planner(config: EngineConfig, models: Models, device: torch.device, dtype: torch.dtype) -> PlanOf:
    from cogvx_fast.resolve import decide
    from cogvx_fast.vae import choose_vae

    vae = choose_vae(device, dtype, True, config.vae_memory, models.vae)
    head_dim = models.variant.attention_head_dim
    return lambda option: decide(config, device=device, dtype=dtype, head_dim=head_dim, vae=vae, **vars(option))


def _models(checkpoint: Checkpoint) -> Models:
    from cogvx_fast.memory import Models

    parts = ("transformer", "text_encoder", "vae")
    transformer, text_encoder, vae = (read_config(checkpoint.source, f"{part}/config.json") for part in parts)
    with loading_errors(checkpoint):
        return Models.from_configs(transformer, text_encoder, vae)


def request_of(
    checkpoint: Checkpoint, height: int, width: int, num_frames: int, pipeline: str | None = None
) -> Request:
    """A generation of one video of this size, with guidance.

    Args:
        pipeline: the name of our class that makes it; None: the checkpoint's own.
    """
    with quiet_imports():
        import cogvx_fast
        from cogvx_fast.memory import Request

    name = pipeline or f"Fast{checkpoint.pipeline_class}"
    pipeline_class = getattr(cogvx_fast, name) if name in cogvx_fast.__all__ else None
    return Request.default(checkpoint.variant, pipeline_class, num_frames=num_frames, height=height, width=width)
