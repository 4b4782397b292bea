"""CogVideoX-Fun InP: videos of which the first frames, the last or any others are given."""

from .pipeline import CogVideoXFunInpaintPipeline

__all__ = ["CogVideoXFunInpaintPipeline"]
