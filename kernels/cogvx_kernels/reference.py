"""The operations as formulas in plain torch: the specification that every other implementation is tested against.

Those of the transformer work on the joint stream `(batch, sequence, dim)` whose first `text_length` rows are text
and whose other rows are video. The two experts' vectors come as `(1 or batch, 2, dim)`, text first. Those of the VAE
work on channels-last frames `(batch, time, height, width, channels)`. Half-precision inputs are computed in fp32 and
rounded once, at the end: that is what a fused kernel does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.float() if tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16) else tensor


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
    normed = F.layer_norm(_wide(x), x.shape[-1:], _wide(weight), _wide(bias), eps)
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
    return (x, normed) if quantize is None else (x, *normed)


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
    normed = F.layer_norm(_wide(x), x.shape[-1:], _wide(weight), _wide(bias), eps)
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
