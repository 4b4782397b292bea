"""The operations as formulas in plain torch: the specification that every other implementation is tested against.

Those of the transformer work on the joint stream `(batch, sequence, dim)` whose first `text_length` rows are text
and whose other rows are video. The two experts' vectors come as `(1 or batch, 2, dim)`, text first. Those of the VAE
work on channels-last frames `(batch, time, height, width, channels)`. Half-precision inputs are computed in fp32 and
rounded once, at the end: that is what a fused kernel does.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _wide_or_none(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else _wide(tensor)


def _by_expert(vectors: torch.Tensor, text_length: int, sequence: int) -> torch.Tensor:
    """Each row's own vector: `(1 or batch, 2, dim)` to `(1 or batch, sequence, dim)`."""
    text, video = _wide(vectors[:, :1]), _wide(vectors[:, 1:])
    return torch.cat([text.expand(-1, text_length, -1), video.expand(-1, sequence - text_length, -1)], dim=1)


def layer_norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    text_length: int,
    eps: float = 1e-5,
    quantize: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Expert AdaLN (CogVideoX, arXiv:2408.06072, 2.2): `LayerNorm(x) * (1 + scale[row]) + shift[row]`; with `quantize`
    its `quantize_rows`, from fp32, in its place."""
    normed = F.layer_norm(_wide(x), x.shape[-1:], _wide_or_none(weight), _wide_or_none(bias), eps)
    scale, shift = (_by_expert(vectors, text_length, x.shape[1]) for vectors in (scale, shift))
    modulated = torch.addcmul(shift, normed, 1 + scale)
    return modulated.to(x.dtype) if quantize is None else quantize_rows(modulated, quantize)


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, text_length: int) -> torch.Tensor:
    """`x + gate[row] * y`."""
    return torch.addcmul(_wide(x), _by_expert(gate, text_length, x.shape[1]), _wide(y)).to(x.dtype)


def gated_residual_layer_norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    text_length: int,
    eps: float = 1e-5,
    quantize: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """`x' = gated_residual(x, y, gate)` and `layer_norm_modulate(x', ...)`, both returned."""
    x = gated_residual(x, y, gate, text_length)
    normed = layer_norm_modulate(x, weight, bias, shift, scale, text_length, eps, quantize)
    return (x, normed) if isinstance(normed, torch.Tensor) else (x, *normed)


def norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    text_length: int,
    eps: float,
) -> torch.Tensor:
    """LayerNorm over each head; past `text_length`, channels (2i, 2i + 1) rotate by the position's angle i (RoPE,
    arXiv:2104.09864, in 3-D as CogVideoX has it)."""
    normed = F.layer_norm(_wide(x), x.shape[-1:], _wide_or_none(weight), _wide_or_none(bias), eps)
    if rotary is not None:
        cosines, sines = (table[:, None] for table in rotary)  # (tokens, 1, head_dim)
        video = normed[:, text_length:]
        turned = torch.stack([-video[..., 1::2], video[..., ::2]], dim=-1).flatten(3)
        normed = torch.cat([normed[:, :text_length], video * cosines + turned * sines], dim=1)
    return normed.to(x.dtype).contiguous()


def qk_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor | None,
    query_bias: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    text_length: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_rope` of Q and of K, each with its own affine."""
    return (
        norm_rope(query, query_weight, query_bias, rotary, text_length, eps),
        norm_rope(key, key_weight, key_bias, rotary, text_length, eps),
    )


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017) over `(batch, sequence, heads, head_dim)`."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)


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


def group_norm_statistics(x: torch.Tensor, groups: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """GroupNorm's mean and `1 / sqrt(variance + eps)` (Wu and He 2018), each `(batch, groups)`, over all frames.

    Frame by frame, since the wide copy of one is all that there should be; what the frames give is joined as in
    Chan, Golub and LeVeque 1979: a mean of means, and their own spread added to the mean variance.
    """
    variances, means = [], []
    for frame in x.unbind(1):
        variance, mean = torch.var_mean(_wide(frame).unflatten(-1, (groups, -1)), dim=(1, 2, 4), correction=0)
        variances.append(variance)
        means.append(mean)
    spread, mean = torch.var_mean(torch.stack(means), dim=0, correction=0)
    return mean, torch.rsqrt(torch.stack(variances).mean(0) + spread + eps)


def group_norm_modulate_silu(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    frames: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """`out = silu(x * scale[f, r, c] + shift[f, r, c])`, the tables of low resolution read at each axis' own index."""
    for t, frame in enumerate(frames.tolist()):
        offset, factor = (table[:, frame].index_select(1, rows).index_select(2, columns) for table in (shift, scale))
        out[:, t] = F.silu(torch.addcmul(offset, _wide(x[:, t]), factor)).to(x.dtype)


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
    frames = _wide(torch.cat([past, x], dim=1)).permute(0, 4, 1, 2, 3)
    out = F.conv3d(frames, _wide(weight), _wide_or_none(bias), padding=(0, size // 2, size // 2)).permute(0, 2, 3, 4, 1)
    out = out[:, :, rows[0] : rows[1]]
    return (out if residual is None else out + _wide(residual)).to(x.dtype)


def phase_weights(weight: torch.Tensor) -> torch.Tensor:
    """Weights `(2, 2, out, in, 2, 2)` of the four phases, first of rows and then of columns, of a 3x3 convolution
    `(out, in, 3, 3)` after nearest doubling; summed in fp32.

    An output row `2i + p` reads input rows `i - 1 + p` and `i + p` only: of an even row the last two taps read the same
    input, of an odd one the first two. Columns likewise.
    """

    def pairs(weight: torch.Tensor, axis: int) -> torch.Tensor:
        a, b, c = weight.unbind(axis)
        return torch.stack([torch.stack([a, b + c], axis), torch.stack([a + b, c], axis)])

    return pairs(pairs(_wide(weight), 2), 4).transpose(0, 1).to(weight.dtype)


def upsample_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, doubles_time: bool
) -> torch.Tensor:
    """A 3x3 convolution of frames doubled by nearest interpolation, in its phases; where time is doubled, of an odd
    number of frames the first stays alone."""
    batch, time, height, width, _ = x.shape
    frames = _wide(x).flatten(0, 1).permute(0, 3, 1, 2)
    out = frames.new_empty(batch * time, weight.shape[0], 2 * height, 2 * width)
    for p, phases in enumerate(_wide(phase_weights(weight)).unbind()):
        for q, phase in enumerate(phases):
            padded = F.pad(frames, (1 - q, q, 1 - p, p))
            out[:, :, p::2, q::2] = F.conv2d(padded, phase, _wide_or_none(bias))
    out = out.permute(0, 2, 3, 1).unflatten(0, (batch, time)).to(x.dtype)
    if not doubles_time:
        return out.contiguous()
    copies = torch.tensor(
        [1 if time % 2 == 1 and i == 0 else 2 for i in range(time)], dtype=torch.int64, device=x.device
    )
    return out.repeat_interleave(copies, dim=1, output_size=2 * time - time % 2)


# The largest number that each 8-bit type holds.
QUANTIZED_MAXIMUM = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Columns that share a scale where a row has several: what one tile of a GEMM has of its row.
GROUP = 128
# No scale is of a smaller maximum than this, 2^-100: the inverse of a scale, and its product with another, stay normal
# numbers of fp32.
SMALLEST_MAXIMUM = 2.0**-100


def quantize_rows(x: torch.Tensor, dtype: torch.dtype, grouped: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric absmax quantization, `scale = max|x| / 127` (int8) or `/ 448` (e4m3fn) and `round(x / scale)`, half to
    even, for each row or each `GROUP` columns of one, of which the last may be narrower. As a kernel computes it: one
    division for a scale, and products with what it gives and with 1 / 127.

    Zeros stay zeros: a maximum below `SMALLEST_MAXIMUM` counts as that. Where the maximum is not finite the scale is
    NaN and the numbers are zeros: whatever is computed from them is NaN, whole rows of it, and can be found.
    """
    x = _wide(x)
    columns = x.shape[-1]
    size = GROUP if grouped else max(columns, 1)
    parts = F.pad(x, (0, -columns % size)).unflatten(-1, (-1, size))
    maximum = parts.abs().amax(-1, keepdim=True)
    finite = maximum.isfinite()
    maximum = maximum.clamp(min=SMALLEST_MAXIMUM)
    largest = QUANTIZED_MAXIMUM[dtype]
    numbers = torch.where(finite, parts * (maximum.new_tensor(largest) / maximum), 0.0).flatten(-2)[..., :columns]
    numbers = numbers.round() if dtype == torch.int8 else numbers
    scales = torch.where(finite, maximum * (1 / largest), float("nan")).squeeze(-1)
    return numbers.to(dtype).contiguous(), scales if grouped else scales.squeeze(-1)


def scaled_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`activation((x * x_scale) @ (weight * weight_scale)^T + bias)`, the products of 8-bit numbers exact.

    fp64 holds every sum of them exactly, those of int8 as the integers that they are. To an 8-bit `out_dtype` the
    result goes by `quantize_rows` in groups, from fp32.
    """
    x, weight = x.double(), weight.double()
    if x_scale.ndim == x.ndim:
        by_column = x_scale.double().repeat_interleave(GROUP, dim=-1)[..., : x.shape[-1]]
        products = (x * by_column) @ weight.T
    else:
        products = (x @ weight.T) * x_scale.double()[..., None]
    result = products * weight_scale.double()
    result = result if bias is None else result + bias.double()
    result = result if activation is None else F.gelu(result, approximate="tanh")
    if out_dtype in QUANTIZED_MAXIMUM:
        return quantize_rows(result.float(), out_dtype, grouped=True)
    return result.to(out_dtype)
