"""A pipeline's transformer and text encoder quantized, as copies that share all other weights with the originals."""

from __future__ import annotations

import copy

import torch
from diffusers import DiffusionPipeline

from ..config import EngineConfig
from ..hooks import moves_weights
from ..transformer import FastCogVideoXTransformer3DModel
from .apply import Extent, is_quantized, quantize_text_encoder, quantize_transformer, shared_copy, storage_bytes
from .recipes import BALANCED, NATIVE, RECIPES, Recipe, Scheme, Target, best, refusal, targets, why_not


def quantize_pipeline(pipeline: DiffusionPipeline, config: EngineConfig) -> str | None:
    """Quantize by `config`; what was done in words, or None if the tier changes no precision.

    The modules that came with the pipeline are not changed: another pipeline may share them.

    Raises:
        ValueError: for a recipe that cannot run where the pipeline will, or a model that is quantized in another way.
    """
    loaded = getattr(pipeline.transformer, "recipe", None)
    check_engine(config, loaded)
    if config.recipe is None:
        return None
    if config.recipe == NATIVE:
        return f"transformer as it is; {_text_encoder(pipeline, text_encoder_scheme(config, None))}"
    target, dtype = destination(pipeline), pipeline.transformer.dtype
    recipe = RECIPES[loaded] if loaded else best(target, dtype) if config.recipe == BALANCED else RECIPES[config.recipe]
    if recipe is None:
        return f"nothing: on {target.name} 8 bits would gain no time; recipe='int8-weight' gains memory"
    if why_not(recipe, target, dtype) is not None:
        raise ValueError(refusal(recipe, target, dtype))
    parts = [f"{recipe.name} ({recipe.what})"]
    if config.recipe == BALANCED:
        parts[0] = f"balanced is {recipe.name} on {target.name} in {str(dtype).removeprefix('torch.')}"
    if loaded is None:
        pipeline.transformer, extent = _quantized(pipeline.transformer, recipe)
        parts.append(f"transformer: {extent}")
    else:
        parts.append(f"transformer: {_extent(pipeline.transformer)}, quantized before")
    parts.append(_text_encoder(pipeline, text_encoder_scheme(config, recipe)))
    return "; ".join(part for part in parts if part)


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


def text_encoder_scheme(config: EngineConfig, recipe: Recipe | None) -> Scheme | None:
    """What becomes of the text encoder's linears; None: nothing."""
    if config.text_encoder == "auto":
        return None if recipe is None else recipe.text_encoder
    return None if config.text_encoder == "native" else Scheme(config.text_encoder)


def _quantized(
    transformer: FastCogVideoXTransformer3DModel, recipe: Recipe
) -> tuple[FastCogVideoXTransformer3DModel, Extent]:
    new = shared_copy(transformer)
    for block in new.transformer_blocks:
        block.attn1.processor = copy.copy(block.attn1.processor)  # no module, but each pipeline's own
    extent = quantize_transformer(new, recipe)
    new.recipe = recipe.name
    return new, extent


def _text_encoder(pipeline: DiffusionPipeline, scheme: Scheme | None) -> str:
    encoder = pipeline.text_encoder
    if encoder is None:
        return ""
    if any(map(is_quantized, encoder.modules())):
        return f"text encoder: {_extent(encoder)}, quantized before"
    if scheme is None:
        return "text encoder as it is"
    if any(map(moves_weights, encoder.modules())):
        raise ValueError("the text encoder is offloaded: quantize first, then enable offloading")
    pipeline.text_encoder = shared_copy(encoder)
    return f"text encoder {scheme}: {quantize_text_encoder(pipeline.text_encoder, scheme)}"


def _extent(model: torch.nn.Module) -> Extent:
    weights = [module.weight for module in model.modules() if is_quantized(module)]
    return Extent(
        len(weights),
        sum(weight.numel() * weight.dtype.itemsize for weight in weights),
        sum(map(storage_bytes, weights)),
    )
