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
) -> torch.Tensor:
    """Expert AdaLN (CogVideoX, arXiv:2408.06072, 2.2): `LayerNorm(x) * (1 + scale[row]) + shift[row]`."""
    normed = F.layer_norm(_wide(x), x.shape[-1:], _wide(weight), _wide(bias), eps)
    scale, shift = (_by_expert(vectors, text_length, x.shape[1]) for vectors in (scale, shift))
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x' = gated_residual(x, y, gate)` and `layer_norm_modulate(x', ...)`, both returned."""
    x = gated_residual(x, y, gate, text_length)
    return x, layer_norm_modulate(x, weight, bias, shift, scale, text_length, eps)


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
    out = F.conv3d(frames, _wide(weight), _wide(bias), padding=(0, size // 2, size // 2)).permute(0, 2, 3, 4, 1)
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
    for p, phases in enumerate(_wide(phase_weights(weight))):
        for q, phase in enumerate(phases):
            padded = F.pad(frames, (1 - q, q, 1 - p, p))
            out[:, :, p::2, q::2] = F.conv2d(padded, phase, _wide(bias))
    out = out.permute(0, 2, 3, 1).unflatten(0, (batch, time)).to(x.dtype)
    if not doubles_time:
        return out.contiguous()
    copies = torch.tensor([1 if time % 2 == 1 and i == 0 else 2 for i in range(time)], device=x.device)
    return out.repeat_interleave(copies, dim=1, output_size=2 * time - time % 2)
