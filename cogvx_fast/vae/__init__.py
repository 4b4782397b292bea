"""The autoencoder: diffusers' weights and configuration, our layers on channels-last frames."""

from .choice import choose_vae, why_not_adopted
from .model import FastAutoencoderKLCogVideoX

__all__ = ["FastAutoencoderKLCogVideoX", "choose_vae", "why_not_adopted"]
