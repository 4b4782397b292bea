"""8-bit weights and products: recipes, their application, and checkpoints that hold quantized weights."""

from .recipes import BALANCED, NATIVE, RECIPES, TEXT_ENCODER_SCHEMES, QuantizedAttention, Recipe, Scheme

__all__ = ["BALANCED", "NATIVE", "RECIPES", "TEXT_ENCODER_SCHEMES", "QuantizedAttention", "Recipe", "Scheme"]
