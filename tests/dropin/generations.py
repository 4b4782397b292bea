"""Short generations and the comparisons that the tests of this package share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests import toy

CPU = torch.device("cpu")
LIMIT = 1e-4  # relative, in fp32: the order of rounding


def latents(pipe: Any, **overrides: Any) -> torch.Tensor:
    """The final latents of a short generation: the same noise each time."""
    return pipe(**toy.inputs(**{"output_type": "latent", **overrides})).frames


def frames(pipe: Any, **overrides: Any) -> torch.Tensor:
    """The pixels of a short generation, of the prompt to the autoencoder."""
    return torch.as_tensor(pipe(**toy.inputs(**{"output_type": "pt", **overrides})).frames)


def relative(output: torch.Tensor, expected: torch.Tensor) -> float:
    output, expected = output.detach().float(), expected.detach().float()
    return ((output - expected).norm() / expected.norm()).item()


def assert_same(output: torch.Tensor, expected: torch.Tensor, limit: float = LIMIT) -> None:
    assert output.shape == expected.shape and output.dtype == expected.dtype
    assert torch.isfinite(expected).all() and expected.float().std() > 0
    assert torch.isfinite(output).all(), "not finite"
    assert relative(output, expected) < limit


def assert_differs(output: torch.Tensor, other: torch.Tensor, least: float = 1e-3) -> None:
    """Guards a comparison: what was changed has an effect."""
    assert relative(output, other) > least


def outcome(run: Callable[[], torch.Tensor]) -> torch.Tensor | Exception:
    """What `run` gives, or the exception that it raises: to compare where upstream itself may raise."""
    try:
        return run()
    except Exception as error:
        return error


def line(pipe: Any, name: str) -> Any:
    """A line of the engine's report."""
    lines = {line.name: line for line in pipe.engine_report().lines}
    assert name in lines, f"the report has no line {name!r}: {pipe.engine_report()}"
    return lines[name]


def picture() -> Image.Image:
    pixels = torch.randint(0, 255, (toy.SIZE, toy.SIZE, 3), generator=torch.Generator().manual_seed(4))
    return Image.fromarray(pixels.byte().numpy().astype(np.uint8))


def transformer_inputs(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of one forward pass at toy size."""
    generator = torch.Generator().manual_seed(0)
    config, batch = model.config, 2

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    arguments = {
        "hidden_states": randn(batch, 3, config.in_channels, toy.SIZE // 8, toy.SIZE // 8),
        "encoder_hidden_states": randn(batch, toy.TEXT_LENGTH, toy.TEXT_DIM),
        "timestep": torch.tensor([700, 300]),
    }
    if config.use_rotary_positional_embeddings:
        angles = torch.rand(12, config.attention_head_dim // 2, generator=generator).repeat_interleave(2, 1) * 6
        arguments["image_rotary_emb"] = (angles.cos(), angles.sin())
    return arguments
