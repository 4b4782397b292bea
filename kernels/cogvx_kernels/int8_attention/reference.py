"""The formulas in plain torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..qk_norm_rope.reference import qk_norm_rope

BLOCK_ROWS = 128  # rows of one head that share a scale in `quantize_blocks`

SAMPLES = 64  # rows of K, at most, whose mean stands for that of all

LOG2_E = math.log2(math.e)


def quantize_blocks(x: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`x * factor` as 8-bit integers times a scale for each block of rows: absmax / 127 (SageAttention, 3.2).

    The scale is rounded up to 11 significant bits: products of two, and of those with integers, then stay exact for
    longer. A block that holds a number that is not finite has the scale infinity.

    Returns:
        int8 of the shape of `x`, and fp32 `(batch, heads, blocks)`.
    """
    sequence = x.shape[1]
    rows = F.pad(x.float(), (0, 0, 0, 0, 0, -sequence % BLOCK_ROWS)).unflatten(1, (-1, BLOCK_ROWS))
    largest = rows.abs().nan_to_num(nan=math.inf, posinf=math.inf).amax((2, 4))
    scale = (largest * (factor / 127)).clamp_min(2.0**-60)
    scale = ((scale.view(torch.int32) + 0x1FFF) & ~0x1FFF).view(torch.float32)
    values = (rows * (factor / scale)[:, :, None, :, None]).round().nan_to_num(0)
    return values.flatten(1, 2)[:, :sequence].to(torch.int8), scale.transpose(1, 2).contiguous()


def sample_step(sequence: int) -> int:
    """From each of at most `SAMPLES` rows to the next; odd, so that they are not all of the same columns of a frame."""
    step = -(-sequence // SAMPLES)
    return step + 1 - step % 2


def quantize_qk(
    query: torch.Tensor, key: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantize_blocks` of `query * scale * log2(e)`, and of K without its mean over the sequence.

    A vector taken off all of K adds one number to all scores of a query, to which softmax is blind (SageAttention,
    3.1): the mean of some rows, spread over the sequence, serves as well, and is that of all where those are few.
    """
    key = key.float()
    mean = key[:, :: sample_step(key.shape[1])].mean(1, keepdim=True)
    return *quantize_blocks(query, scale * LOG2_E), *quantize_blocks(key - mean, 1.0)


def qk_norm_rope_int8(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor | None,
    query_bias: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    text_length: int,
    eps: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantize_qk` of `qk_norm_rope`, which is not rounded in between."""
    affine = (query_weight, query_bias, key_weight, key_bias)
    return quantize_qk(*qk_norm_rope(query.float(), key.float(), *affine, rotary, text_length, eps), scale)


def quantize_value(
    value: torch.Tensor, dtype: torch.dtype, smooth: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """V for the product with probabilities, in `dtype`: `value = values * scale + mean` (SageAttention2, 3.3 and 3.4).

    Returns:
        The values, of the shape of `value`; for 8 bits the scale of each channel, absmax / 448, otherwise None; and if
        `smooth`, the mean over the sequence, otherwise None. Both fp32 `(batch, heads, head_dim)`.
    """
    mean = value.float().mean(1) if smooth else None
    if dtype.itemsize > 1:
        return (value if mean is None else (value.float() - mean[:, None]).to(dtype)), None, mean
    wide = value.float() if mean is None else value.float() - mean[:, None]
    scale = (wide.abs().amax(1) / torch.finfo(dtype).max).clamp_min(2.0**-60)
    return (wide / scale[:, None]).to(dtype), scale, mean


def quantized_attention(
    query_int8: torch.Tensor,
    query_scale: torch.Tensor,
    key_int8: torch.Tensor,
    key_scale: torch.Tensor,
    value: torch.Tensor,
    value_dtype: torch.dtype,
    smooth_value: bool,
) -> torch.Tensor:
    """`attention` of what `quantize_qk` gives, and V of `quantize_value`; probabilities are rounded to V's dtype."""
    values, value_scale, mean = quantize_value(value, value_dtype, smooth_value)
    # Products of 8-bit integers are exact in fp32, sums of 128 as well.
    products = query_int8.float().transpose(1, 2) @ key_int8.float().permute(0, 2, 3, 1)
    scales = (
        s.repeat_interleave(BLOCK_ROWS, 2)[..., : x.shape[1]]
        for s, x in ((query_scale, query_int8), (key_scale, key_int8))
    )
    exponents = products * torch.einsum("bhq,bhk->bhqk", *scales)
    weights = torch.exp2(exponents - exponents.amax(-1, keepdim=True))
    total = weights.sum(-1, keepdim=True)
    # Probabilities are at most 1, and e4m3 goes to 448: 8 more powers of two.
    fill = 256.0 if value_dtype.itemsize == 1 else 1.0
    output = (weights * fill).to(value_dtype).float() @ values.float().transpose(1, 2) / (total * fill)
    if value_scale is not None:
        output *= value_scale[:, :, None]
    if mean is not None:
        output += mean[:, :, None]
    return output.transpose(1, 2).to(value.dtype)
