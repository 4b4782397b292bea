"""The denoiser: diffusers' weights and configuration, our forward pass."""

from .adoption import why_not_adopted
from .model import FastCogVideoXTransformer3DModel

__all__ = ["FastCogVideoXTransformer3DModel", "why_not_adopted"]
