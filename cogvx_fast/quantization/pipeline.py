"""A pipeline's transformer and text encoder quantized, as copies that share all other weights with the originals."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline

from ..config import EngineConfig
from ..hooks import moves_weights, rewrapped, unwrapped
from ..transformer import FastCogVideoXTransformer3DModel, why_not_adopted
from .apply import Extent, is_quantized, quantize_text_encoder, quantize_transformer, shared_copy, storage_bytes
from .recipes import (
    AS_THEY_ARE,
    BALANCED,
    NATIVE,
    RECIPES,
    Recipe,
    Scheme,
    Target,
    TextScheme,
    best,
    refusal,
    targets,
    why_unsupported,
)


def precision(pipeline: DiffusionPipeline, config: EngineConfig) -> tuple[Recipe, TextScheme]:
    """What `config` makes of the transformer's linears and of the text encoder's, where the pipeline will run.

    Raises:
        ValueError: for a recipe that cannot run there, or a model that is quantized in another way.
    """
    loaded = getattr(pipeline.transformer, "recipe", None)
    check_engine(config, loaded)
    if config.recipe is None:
        return AS_THEY_ARE, NATIVE
    recipe = AS_THEY_ARE
    if config.recipe != NATIVE:
        target, dtype = destination(pipeline), _dtype(pipeline)
        named = loaded or (config.recipe if config.recipe != BALANCED else None)
        recipe = RECIPES[named] if named else best(target, dtype) or AS_THEY_ARE
        if recipe is not AS_THEY_ARE and why_unsupported(recipe, target, dtype) is not None:
            raise ValueError(refusal(recipe, target, dtype))
    if config.text_encoder == "auto":
        return recipe, recipe.text_encoder or NATIVE
    return recipe, NATIVE if config.text_encoder == NATIVE else Scheme(config.text_encoder)


def quantize_pipeline(
    pipeline: DiffusionPipeline, config: EngineConfig, recipe: Recipe, text_encoder: TextScheme
) -> str:
    """Quantize transformer and text encoder; what was done, in words, or "" if nothing was asked for.

    The modules that came with the pipeline are not changed: another pipeline may share them.

    Raises:
        ValueError: for a transformer that is not ours, or a model that is quantized in another way or offloaded.
    """
    if recipe is AS_THEY_ARE and text_encoder == NATIVE and config.recipe in (None, BALANCED):
        if config.recipe is None:
            return ""
        return f"nothing: on {destination(pipeline).name} 8 bits would gain no time; recipe='int8-weight' gains memory"
    parts = []
    if pipeline.transformer is not None:
        parts.append(_transformer(pipeline, config, recipe))
    if pipeline.text_encoder is not None:
        parts.append(_text_encoder(pipeline, text_encoder))
    return "; ".join(parts)


def _transformer(pipeline: DiffusionPipeline, config: EngineConfig, recipe: Recipe) -> str:
    if recipe is AS_THEY_ARE:
        return "transformer as it is"
    transformer: Any = unwrapped(pipeline.transformer)
    if not isinstance(transformer, FastCogVideoXTransformer3DModel):
        reason = why_not_adopted(transformer)
        raise ValueError(f"recipe={recipe.name!r} needs our transformer, and this one stays as it is: {reason}")
    name = f"{recipe.name} ({recipe.what})"
    if config.recipe == BALANCED:
        dtype = str(_dtype(pipeline)).removeprefix("torch.")
        name = f"balanced is {recipe.name} on {destination(pipeline).name} in {dtype}"
    if transformer.recipe is not None:
        return f"{name}; transformer: {_extent(transformer)}, quantized before"
    quantized, extent = _quantized(transformer, recipe)
    pipeline.transformer = rewrapped(pipeline.transformer, quantized)
    return f"{name}; transformer: {extent}"


def _dtype(pipeline: DiffusionPipeline) -> torch.dtype:
    model = pipeline.transformer if pipeline.transformer is not None else pipeline.text_encoder
    return model.dtype


def destination(pipeline: DiffusionPipeline) -> Target:
    """Where the pipeline will run: its accelerator, or the best of this machine while its weights are on the CPU."""
    device = pipeline._execution_device
    return targets()[0] if device.type == "cpu" else Target.of(device)


def check_engine(config: EngineConfig, loaded: str | None) -> None:
    """Raise a ValueError for an engine that a transformer quantized by recipe `loaded` (None: not) cannot run in."""
    if loaded is None or config.tier is None or config.recipe in (BALANCED, loaded):
        return
    if config.recipe is None:
        raise ValueError(
            f"the transformer is quantized ({loaded}): what was rounded does not come back, so engine {config.tier!r}"
            f" cannot have it; use engine={BALANCED!r}"
        )
    raise ValueError(
        f"recipe={config.recipe!r}: the transformer is quantized already, by recipe {loaded!r}; use that, or start from"
        " the full-precision checkpoint"
    )


def _quantized(
    transformer: FastCogVideoXTransformer3DModel, recipe: Recipe
) -> tuple[FastCogVideoXTransformer3DModel, Extent]:
    new = shared_copy(transformer)
    for block in new.transformer_blocks:
        attention: Any = block.attn1
        attention.processor = copy.copy(attention.processor)  # no module, but each pipeline's own
    new.stand_alone()
    extent = quantize_transformer(new, recipe)
    new.recipe = recipe.name
    return new, extent


def _text_encoder(pipeline: DiffusionPipeline, scheme: TextScheme) -> str:
    encoder = pipeline.text_encoder
    if any(map(is_quantized, encoder.modules())):
        return f"text encoder: {_extent(encoder)}, quantized before"
    if scheme == NATIVE:
        return "text encoder as it is"
    if any(map(moves_weights, encoder.modules())):
        raise ValueError("the text encoder is offloaded: quantize first, then enable offloading")
    pipeline.text_encoder = shared_copy(encoder)
    return f"text encoder {scheme}: {quantize_text_encoder(pipeline.text_encoder, Scheme(scheme))}"


def _extent(model: torch.nn.Module) -> Extent:
    weights = [cast(torch.Tensor, module.weight) for module in model.modules() if is_quantized(module)]
    return Extent(
        len(weights),
        sum(weight.numel() * weight.dtype.itemsize for weight in weights),
        sum(map(storage_bytes, weights)),
    )
