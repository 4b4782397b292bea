"""The autoencoder: diffusers' weights and configuration, our layers on channels-last frames."""

from .model import FastAutoencoderKLCogVideoX

__all__ = ["FastAutoencoderKLCogVideoX"]
