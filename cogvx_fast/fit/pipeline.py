"""A pipeline, or a checkpoint that is none yet, fitted into the memory limit of its engine."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel, DiffusionPipeline
from transformers import T5Config

from ..config import EngineConfig
from ..hooks import moves_weights
from ..quantization.memory import Models
from ..quantization.pipeline import check_engine, destination
from ..quantization.recipes import BALANCED, NATIVE, RECIPES, Recipe, Scheme, Target, best, targets
from .choice import Choice, LimitError, choose, options, variants
from .demand import Option, Predictor
from .request import Request


def fit_new(pipeline: DiffusionPipeline, config: EngineConfig) -> tuple[EngineConfig, Choice, str]:
    """What a pipeline that is being made becomes, for the size that it makes if none is given; where that does not
    fit, for as many frames as do: a generation of more is refused when it is asked for.

    Returns:
        `config` with what was open decided, the choice, and in words for what it was made.

    Raises:
        LimitError: if nothing fits, not one frame.
        ValueError: for an engine that a quantized transformer cannot run in.
    """
    target, dtype = destination(pipeline), pipeline.transformer.dtype
    loaded = getattr(pipeline.transformer, "recipe", None)
    check_engine(config, loaded)
    request = Request.default(pipeline.transformer.config, type(pipeline))
    left = options(config, target, dtype, RECIPES.get(loaded), _scheme_of(pipeline.text_encoder))
    choice, what = _choose_or_fewer(_models(pipeline), request, config, target, dtype, left)
    return resolved(config, choice, target, dtype), choice, what


def fit_generation(
    pipeline: DiffusionPipeline, config: EngineConfig, request: Request, device: torch.device
) -> tuple[EngineConfig, Choice | None]:
    """What changes for one generation: precision stays as it was chosen when the pipeline was made.

    Args:
        config: as it was resolved then, but for `pack_weights` and `vae_memory`, which are open again.
        device: where it runs.

    Returns:
        `config` with this generation's `pack_weights` and `vae_memory`, and the choice; None where offloading finer
        than whole models was turned on by hand, which no plan knows.

    Raises:
        LimitError: if nothing fits.
    """
    models = [model for model in (pipeline.text_encoder, pipeline.transformer, pipeline.vae) if model is not None]
    if any(moves_weights(module) for model in models for module in model.modules() if module is not model):
        return config, None
    target, dtype = Target.of(device), pipeline.transformer.dtype
    recipe = RECIPES.get(pipeline.transformer.recipe)
    left = list(variants(config, target, recipe, _scheme_of(pipeline.text_encoder), target.device != "cpu"))
    if any(map(moves_weights, models)):
        left = [replace(option, offloads=True) for option in left[:1]]
    choice = _choose(_models(pipeline), request, config, target, dtype, left)
    return replace(config, pack_weights=choice.option.packs, vae_memory=choice.vae_memory or config.vae_memory), choice


def check_checkpoint(
    source: Any,
    pipeline_class: type,
    config: EngineConfig,
    dtype: torch.dtype | None,
    hub: Mapping[str, Any],
    quantized: tuple[Recipe | None, Scheme | None] = (None, None),
) -> None:
    """Raise a `LimitError` for a checkpoint that will not fit, from its configurations alone.

    Args:
        dtype: that it will be loaded in.
        hub: arguments of a download.
        quantized: what transformer and text encoder are quantized by.
    """
    models = Models.from_configs(
        CogVideoXTransformer3DModel.load_config(source, subfolder="transformer", **hub),
        T5Config.from_pretrained(source, subfolder="text_encoder", **hub).to_dict(),
        AutoencoderKLCogVideoX.load_config(source, subfolder="vae", **hub),
    )
    target, dtype = targets()[0], dtype or torch.float32
    request = Request.default(models.transformer.config, pipeline_class)
    _choose_or_fewer(models, request, config, target, dtype, options(config, target, dtype, *quantized))


def predict_choice(
    models: Models, request: Request, config: EngineConfig, device: torch.device, dtype: torch.dtype
) -> Choice:
    """What would be chosen on a device of this machine, and what that takes.

    Raises:
        LimitError: if nothing fits.
    """
    target = Target.of(device)
    return _choose(models, request, config, target, dtype, list(options(config, target, dtype)))


def resolved(config: EngineConfig, choice: Choice, target: Target, dtype: torch.dtype) -> EngineConfig:
    """`config` with what `choice` decided, as a user would have written it."""
    option = choice.option
    decided: dict[str, Any] = {"pack_weights": option.packs, "vae_memory": choice.vae_memory or config.vae_memory}
    if config.tier == "exact" or (option.recipe is None and option.text_encoder is None and config.recipe is None):
        return replace(config, tier="exact", **decided)
    if config.recipe != BALANCED or option.recipe is not best(target, dtype):
        decided["recipe"] = NATIVE if option.recipe is None else option.recipe.name
    scheme = "native" if option.text_encoder is None else option.text_encoder.value
    return replace(config, tier=BALANCED, text_encoder=scheme, **decided)


def _choose_or_fewer(
    models: Models,
    request: Request,
    config: EngineConfig,
    target: Target,
    dtype: torch.dtype,
    left: Iterable[Option],
) -> tuple[Choice, str]:
    """The choice for `request`, for as many of its frames as fit, or for the least; and in words for what it is."""
    left = list(left)
    try:
        return _choose(models, request, config, target, dtype, left), "the model's own size"
    except LimitError as error:
        fewer = request.of_frames(error.num_frames) if error.num_frames else request.least
        with contextlib.suppress(LimitError):
            choice = _choose(models, fewer, config, target, dtype, left)
            return choice, f"{fewer}, as the model's own {request.num_frames} do not fit"
        raise


def _choose(
    models: Models, request: Request, config: EngineConfig, target: Target, dtype: torch.dtype, left: list[Option]
) -> Choice:
    """The choice; where nothing fits, what would is looked for."""
    try:
        return _chosen(models, request, config, target, dtype, left)
    except LimitError as error:
        refusal = error
    other = None
    if config.tier is not None:
        # What would be chosen if the precision were left open, when the pipeline is made.
        left_open = replace(config, tier=None, recipe=None, text_encoder="auto")
        with contextlib.suppress(LimitError):
            other = _chosen(models, request, left_open, target, dtype, list(options(left_open, target, dtype))).option
    counts = range(1, request.num_frames, 8)  # what the family takes, CogVideoX 1.5 every second of them

    def is_too_long(number: int) -> bool:
        try:
            _chosen(models, request.of_frames(number), config, target, dtype, left)
        except LimitError:
            return True
        return False

    fitting = bisect.bisect_left(counts, True, key=is_too_long)
    raise refusal.with_advice(counts[fitting - 1] if fitting else 0, other)


def _chosen(
    models: Models, request: Request, config: EngineConfig, target: Target, dtype: torch.dtype, left: list[Option]
) -> Choice:
    predictor = Predictor(models, request, torch.device(target.device), dtype, config)
    frames_within = predictor.frames if config.vae_memory is None and predictor.vae is not None else None
    what = f"{request} in {str(dtype).removeprefix('torch.')} on {target.name}"
    return choose(config.memory_limit, left, predictor.demand, frames_within, what)


def _models(pipeline: DiffusionPipeline) -> Models:
    return Models(pipeline.transformer, pipeline.text_encoder, pipeline.vae)


def _scheme_of(text_encoder: torch.nn.Module | None) -> Scheme | None:
    """What a text encoder is quantized by already."""
    parameters = () if text_encoder is None else text_encoder.parameters()
    # Of torchao's, which need not be imported for it.
    first = next((type(weight).__name__ for weight in parameters if hasattr(weight, "tensor_data_names")), None)
    if first is None:
        return None
    return Scheme.FP8_WEIGHT if "Float8" in first else Scheme.INT8_WEIGHT
