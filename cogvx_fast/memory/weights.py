"""What the weights of a pipeline take by recipe, and encoding a prompt beside them, from shapes alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel, DiffusionPipeline
from torch import nn
from transformers import T5Config, T5EncoderModel

from ..family import Variant
from ..hooks import unwrapped
from ..quantization.apply import storage_bytes
from ..quantization.recipes import AS_THEY_ARE, RECIPES, T5, Recipe, Scheme, TextScheme


@dataclass(frozen=True)
class Models:
    """The models of a pipeline, whose weights are not looked at and may be on the meta device.

    Attributes:
        transformer, text_encoder, vae: None where the pipeline has none.
        recipe, text_scheme: what transformer and text encoder are quantized by already.
    """

    transformer: CogVideoXTransformer3DModel | None
    text_encoder: T5EncoderModel | None
    vae: AutoencoderKLCogVideoX | None
    recipe: Recipe = AS_THEY_ARE
    text_scheme: TextScheme = "native"

    @classmethod
    def of(cls, pipeline: DiffusionPipeline) -> Models:
        """The models of a pipeline."""
        parts = (pipeline.transformer, pipeline.text_encoder, pipeline.vae)
        models: list[Any] = list(map(unwrapped, parts))
        transformer, text_encoder, vae = models
        recipe = getattr(transformer, "recipe", None)
        known = AS_THEY_ARE if recipe is None else RECIPES[recipe]
        return cls(transformer, text_encoder, vae, known, _quantized_by(text_encoder))

    @classmethod
    def from_configs(
        cls,
        transformer: Mapping[str, Any],
        text_encoder: Mapping[str, Any] | None,
        vae: Mapping[str, Any] | None,
        recipe: Recipe = AS_THEY_ARE,
        text_scheme: TextScheme = "native",
    ) -> Models:
        """Without weights, from what their `config.json` has."""
        with init_empty_weights():
            model = CogVideoXTransformer3DModel.from_config(dict(transformer))
            encoder = None if text_encoder is None else T5EncoderModel(T5Config(**text_encoder))
            autoencoder = None if vae is None else AutoencoderKLCogVideoX.from_config(dict(vae))
        if encoder is not None:
            encoder.encoder.embed_tokens.weight = encoder.shared.weight  # making it without weights has untied them
        return cls(model, encoder, autoencoder, recipe, text_scheme)

    @classmethod
    def from_checkpoint(
        cls, source: str | Path, recipe: Recipe = AS_THEY_ARE, text_scheme: TextScheme = "native", **hub: Any
    ) -> Models:
        """The models of a checkpoint that is not loaded, from its configurations alone.

        Args:
            hub: arguments of a download.
        """
        return cls.from_configs(
            CogVideoXTransformer3DModel.load_config(source, subfolder="transformer", **hub),
            T5Config.from_pretrained(source, subfolder="text_encoder", **hub).to_dict(),
            AutoencoderKLCogVideoX.load_config(source, subfolder="vae", **hub),
            recipe,
            text_scheme,
        )

    @property
    def variant(self) -> Variant:
        """Which member of the family that is; CogVideoX-2b where there is no transformer to ask."""
        return Variant() if self.transformer is None else Variant.of(self.transformer.config)


def transformer_bytes(models: Models, recipe: Recipe, dtype: torch.dtype) -> int:
    """The transformer's weights, quantized by `recipe`."""
    return 0 if models.transformer is None else weight_bytes(models.transformer, recipe.scheme_of, dtype)


def text_encoder_bytes(models: Models, scheme: TextScheme, dtype: torch.dtype) -> int:
    """The text encoder's weights, its linears quantized by `scheme`."""
    if models.text_encoder is None:
        return 0
    of_linears = None if scheme == "native" else scheme
    return weight_bytes(models.text_encoder, lambda name: of_linears if re.fullmatch(T5, name) else None, dtype)


def vae_bytes(models: Models, dtype: torch.dtype) -> int:
    """The autoencoder's weights."""
    return 0 if models.vae is None else weight_bytes(models.vae, lambda name: None, dtype)


def weight_bytes(model: nn.Module, scheme_of: Callable[[str], Scheme | None], dtype: torch.dtype) -> int:
    """The bytes of all parameters and buffers of `model`, which needs none, once `scheme_of` has quantized its linears.

    torchao keeps int8 scales in the dtype of the weight and a zero point of a byte beside each, fp8 scales in fp32.
    What is quantized already counts as it is.
    """
    total, given = 0, dtype
    seen: set[torch.Tensor] = set()
    for name, module in model.named_modules():
        # T5's `wo` overflows fp16: transformers keeps it in fp32.
        dtype = torch.float32 if given == torch.float16 and name.endswith("DenseReluDense.wo") else given
        scheme = scheme_of(name) if isinstance(module, nn.Linear) else None
        for kind, parameter in module._parameters.items():
            if parameter is None or parameter in seen:
                continue
            seen.add(parameter)
            if hasattr(parameter, "tensor_data_names"):  # one of torchao's, which need not be imported for it
                total += storage_bytes(parameter)
            elif kind == "weight" and scheme is not None:
                each = dtype.itemsize + 1 if scheme in (Scheme.INT8, Scheme.INT8_WEIGHT) else 4
                total += parameter.numel() + len(parameter) * each
            else:
                total += parameter.numel() * dtype.itemsize
        # Loading leaves buffers as they are: of 2b, which has no file for its positions, in float64.
        total += sum(storage_bytes(buffer) for buffer in module._buffers.values() if buffer is not None)
    return total


def text_encoding_bytes(models: Models, tokens: int, dtype: torch.dtype, scheme: TextScheme) -> int:
    """What encoding a prompt of `tokens` tokens allocates at its peak: in a layer's attention or its feed-forward.

    The table of relative positions is alive beside four of its size at most in attention, and one more in the
    feed-forward, where an 8-bit weight is widened (fp8 of half precision by way of fp32).
    """
    if models.text_encoder is None:
        return 0
    config, each = models.text_encoder.config, dtype.itemsize
    scores, rows, wide = (count * tokens * each for count in (config.num_heads * tokens, config.d_model, config.d_ff))
    weight = 0 if scheme == "native" else config.d_model * config.d_ff * each
    widening = 5 if scheme is Scheme.FP8_WEIGHT and each == 2 else 2 if scheme is Scheme.FP8_WEIGHT else 1
    return max(4 * scores + 4 * rows, 2 * scores + 4 * rows + 3 * wide + widening * weight)


def _quantized_by(text_encoder: nn.Module | None) -> TextScheme:
    """What a text encoder is quantized by already."""
    parameters = () if text_encoder is None else text_encoder.parameters()
    # Of torchao's, which need not be imported for it.
    first = next((type(weight).__name__ for weight in parameters if hasattr(weight, "tensor_data_names")), None)
    if first is None:
        return "native"
    return Scheme.FP8_WEIGHT if "Float8" in first else Scheme.INT8_WEIGHT
