"""The denoiser: diffusers' weights and configuration, our forward pass."""

from .model import FastCogVideoXTransformer3DModel
from .session import EngineSession

__all__ = ["EngineSession", "FastCogVideoXTransformer3DModel"]
