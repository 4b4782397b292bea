"""The autoencoder: diffusers' weights and configuration, our layers on channels-last frames."""

from .model import FastAutoencoderKLCogVideoX, why_not_adopted

__all__ = ["FastAutoencoderKLCogVideoX", "why_not_adopted"]
