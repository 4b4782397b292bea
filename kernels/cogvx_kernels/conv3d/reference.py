"""The formulas in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..precision import wide, wide_or_none


def causal_conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    past: torch.Tensor | None,
    residual: torch.Tensor | None,
    rows: tuple[int, int],
) -> torch.Tensor:
    """CogVideoX' causal convolution (arXiv:2408.06072, 2.1): zeros around a frame, and before the first the `past`, or
    the first frame again and again; of `rows` only, and `residual` added."""
    kernel, _, size = weight.shape[2:]
    past = x[:, :1].expand(-1, kernel - 1, -1, -1, -1) if past is None else past[:, past.shape[1] - (kernel - 1) :]
    frames = wide(torch.cat([past, x], dim=1)).permute(0, 4, 1, 2, 3)
    out = F.conv3d(frames, wide(weight), wide_or_none(bias), padding=(0, size // 2, size // 2)).permute(0, 2, 3, 4, 1)
    out = out[:, :, rows[0] : rows[1]]
    return (out if residual is None else out + wide(residual)).to(x.dtype)


def phase_weights(weight: torch.Tensor) -> torch.Tensor:
    """Weights `(2, 2, out, in, 2, 2)` of the four phases, first of rows and then of columns, of a 3x3 convolution
    `(out, in, 3, 3)` after nearest doubling; summed in fp32.

    An output row `2i + p` reads input rows `i - 1 + p` and `i + p` only: of an even row the last two taps read the same
    input, of an odd one the first two. Columns likewise.
    """

    def pairs(weight: torch.Tensor, axis: int) -> torch.Tensor:
        a, b, c = weight.unbind(axis)
        return torch.stack([torch.stack([a, b + c], axis), torch.stack([a + b, c], axis)])

    return pairs(pairs(wide(weight), 2), 4).transpose(0, 1).to(weight.dtype)


def upsample_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, doubles_time: bool
) -> torch.Tensor:
    """A 3x3 convolution of frames doubled by nearest interpolation, in its phases; where time is doubled, of an odd
    number of frames the first stays alone."""
    batch, time, height, width, _ = x.shape
    frames = wide(x).flatten(0, 1).permute(0, 3, 1, 2)
    out = frames.new_empty(batch * time, weight.shape[0], 2 * height, 2 * width)
    for p, phases in enumerate(wide(phase_weights(weight)).unbind()):
        for q, phase in enumerate(phases):
            padded = F.pad(frames, (1 - q, q, 1 - p, p))
            out[:, :, p::2, q::2] = F.conv2d(padded, phase, wide_or_none(bias))
    out = out.permute(0, 2, 3, 1).unflatten(0, (batch, time)).to(x.dtype)
    if not doubles_time:
        return out.contiguous()
    copies = torch.tensor(
        [1 if time % 2 == 1 and i == 0 else 2 for i in range(time)], dtype=torch.int64, device=x.device
    )
    return out.repeat_interleave(copies, dim=1, output_size=2 * time - time % 2)
