"""What the weights of a pipeline take by recipe, and the activations of a step, from configurations alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel
from torch import nn
from transformers import T5Config, T5EncoderModel

from .recipes import T5, Recipe, Scheme


@dataclass(frozen=True)
class Prediction:
    """Bytes by component: the weights of each model, and what a step of the transformer allocates at its peak."""

    text_encoder: int
    transformer: int
    activations: int


def predict(
    transformer: dict[str, Any],
    text_encoder: dict[str, Any],
    recipe: Recipe | None,
    text_scheme: Scheme | None,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
) -> Prediction:
    """
    Args:
        transformer, text_encoder: their configurations, as their `config.json` has them.
        recipe: None for weights as they are.
        text_scheme: of the text encoder; None likewise.
        batch: samples of a step, two with guidance.
        tokens: text and video tokens of a sample.
    """
    with init_empty_weights():
        model = CogVideoXTransformer3DModel.from_config(transformer)
        encoder = T5EncoderModel(T5Config(**text_encoder))
    encoder.encoder.embed_tokens.weight = encoder.shared.weight  # making it without weights has untied them
    scheme_of = recipe.scheme_of if recipe is not None else lambda name: None
    width = model.config.num_attention_heads * model.config.attention_head_dim
    return Prediction(
        weight_bytes(encoder, lambda name: text_scheme if re.fullmatch(T5, name) else None, dtype),
        weight_bytes(model, scheme_of, dtype),
        activation_bytes(batch * tokens, width, dtype, recipe is not None and Scheme.INT8 in recipe.schemes),
    )


def weight_bytes(model: nn.Module, scheme_of: Callable[[str], Scheme | None], dtype: torch.dtype) -> int:
    """The bytes of all parameters of `model`, which needs none, once `scheme_of` has quantized its linears.

    torchao keeps int8 scales in the dtype of the weight and a zero point of a byte beside each, fp8 scales in fp32.
    """
    total, seen, given = 0, set(), dtype
    for name, module in model.named_modules():
        # T5's `wo` overflows fp16: transformers keeps it in fp32.
        dtype = torch.float32 if given == torch.float16 and name.endswith("DenseReluDense.wo") else given
        scheme = scheme_of(name) if isinstance(module, nn.Linear) else None
        for kind, parameter in module._parameters.items():
            if parameter is None or parameter in seen:
                continue
            seen.add(parameter)
            if kind == "weight" and scheme is not None:
                each = dtype.itemsize + 1 if scheme in (Scheme.INT8, Scheme.INT8_WEIGHT) else 4
                total += parameter.numel() + len(parameter) * each
            else:
                total += parameter.numel() * dtype.itemsize
    return total


def activation_bytes(rows: int, width: int, dtype: torch.dtype, int8: bool) -> int:
    """The peak of a block over `rows` rows of `width`: in its feed-forward, whose inner side is four times as wide.

    Alive then are the block's input, its stream after attention, attention's result, the normed stream and the
    feed-forward's inside and result. In int8 the inside is a byte and its sums four; the normed stream's bytes are
    there too. Tensors alone: what the allocator keeps and the library's own buffers come on top.
    """
    row = width * dtype.itemsize
    inside = 4 * width + 4 * width * 4 + width if int8 else 4 * row
    return rows * (5 * row + inside)
