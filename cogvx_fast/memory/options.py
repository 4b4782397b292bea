"""The ways of running a generation that a configuration leaves open, the most exact first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..config import EngineConfig, QuantizedGemm
from ..hooks import moves_weights
from ..plan import Offload
from ..quantization.recipes import (
    AS_THEY_ARE,
    BALANCED,
    NATIVE,
    RECIPES,
    Recipe,
    Scheme,
    Target,
    TextScheme,
    best,
    why_no_native_products,
    why_unsupported,
)
from .weights import Models

# By the PSNR against exact of the demo checkpoint's worst clip: `tools.demo_model.recipes`, where fp8 is emulated.
# On average fp8 weights are a decibel better than int8, in the worst clip 1.6 worse.
BY_QUALITY = (Scheme.INT8_WEIGHT, Scheme.INT8, Scheme.FP8_WEIGHT, Scheme.FP8)


@dataclass(frozen=True)
class Option:
    """One way of running a generation, as far as memory is what decides.

    Attributes:
        recipe: of the transformer.
        text_encoder: scheme of its linears.
        packs: whether a CPU holds copies of plain weights in oneDNN's order.
    """

    recipe: Recipe = AS_THEY_ARE
    text_encoder: TextScheme = "native"
    offload: Offload = Offload.NONE
    packs: bool = True

    def __str__(self) -> str:
        parts = [f"transformer {_in_words(self.recipe.name)}", f"text encoder {_in_words(self.text_encoder)}"]
        parts += ["each model on the device only while it runs"] if self.offload is Offload.MODELS else []
        parts += [] if self.packs else ["no packed weights"]
        return ", ".join(parts)


def options(
    config: EngineConfig,
    target: Target,
    dtype: torch.dtype,
    recipe: Recipe = AS_THEY_ARE,
    text_scheme: TextScheme = "native",
) -> Iterator[Option]:
    """What `config` leaves open on `target`, the most exact first, and of what is equally exact the fastest.

    Args:
        recipe, text_scheme: what the transformer and the text encoder are quantized by already.
    """
    for each, schemes in _precisions(config, target, dtype, recipe):
        for scheme in schemes if text_scheme == "native" else [text_scheme]:
            yield from same_precision(config, target, each, scheme)


def same_precision(config: EngineConfig, target: Target, recipe: Recipe, text_scheme: TextScheme) -> Iterator[Option]:
    """The options of one precision, the fastest first: weights leave a GPU, where there is a host to go to."""
    yield Option(recipe, text_scheme, packs=config.pack_weights)
    if target.device == "cpu" and config.pack_weights and recipe == AS_THEY_ARE:
        yield Option(recipe, text_scheme, packs=False)
    if target.device != "cpu":
        yield Option(recipe, text_scheme, Offload.MODELS, packs=config.pack_weights)


def offload_of(models: Models) -> Offload:
    """Which weights hooks that hang on the models keep elsewhere."""
    there = [model for model in (models.text_encoder, models.transformer, models.vae) if model is not None]
    if any(moves_weights(module) for model in there for module in model.modules() if module is not model):
        return Offload.BY_HAND
    return Offload.MODELS if any(map(moves_weights, there)) else Offload.NONE


def _precisions(
    config: EngineConfig, target: Target, dtype: torch.dtype, loaded: Recipe
) -> Iterator[tuple[Recipe, list[TextScheme]]]:
    """Recipes, and with each the schemes of the text encoder."""
    by_quality = [
        recipe for recipe in map(RECIPES.__getitem__, BY_QUALITY) if why_unsupported(recipe, target, dtype) is None
    ]
    if config.gemm is QuantizedGemm.NATIVE:
        by_quality = [recipe for recipe in by_quality if why_no_native_products(recipe, target) is None]
    named: list[TextScheme] = []
    if config.text_encoder != "auto":
        named = ["native" if config.text_encoder == "native" else Scheme(config.text_encoder)]

    def of(recipe: Recipe) -> TextScheme:
        return recipe.text_encoder or "native"

    if loaded != AS_THEY_ARE:
        yield loaded, named or ["native", of(loaded)]
    elif config.tier == "exact":
        yield AS_THEY_ARE, ["native"]
    elif config.recipe == NATIVE:
        yield AS_THEY_ARE, named or ["native"]
    elif config.recipe == BALANCED:
        first = best(target, dtype) or AS_THEY_ARE
        for recipe in [first, *(r for r in by_quality if r is not first)]:
            yield recipe, named or [of(recipe)]
    elif config.recipe is not None:
        recipe = RECIPES[config.recipe]
        yield recipe, named or [of(recipe)]
    else:
        yield AS_THEY_ARE, named or ["native", Scheme.INT8_WEIGHT]
        for recipe in by_quality:
            yield recipe, named or ["native", of(recipe)]


def _in_words(name: str) -> str:
    return "as it is" if name == NATIVE else name
