"""What a model launches on a GPU: the lists of launches that are inspected, and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import ops
from ..attention.triton import DTYPES as ATTENTION_DTYPES
from ..precision import GROUP
from . import Launch, launches


@dataclass(frozen=True)
class Autoencoder:
    """What sets an autoencoder's kernels apart; the defaults are those of all published checkpoints.

    Attributes:
        channels: of the levels, from the pixels to the latents.
        latent_channels: of the latents.
        groups: of its GroupNorms; divides the channels.
        time_doublings: how many levels double the frames.
    """

    channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    groups: int = 32
    time_doublings: int = 2


PUBLISHED_VAE = Autoencoder()


@dataclass(frozen=True)
class Model:
    """What the launches of a checkpoint depend on, at one size and dtype.

    Attributes:
        dtype: name of the stream's, as torch spells it.
        rotary: whether positions are rotary (all checkpoints but CogVideoX-2b).
        tokens: of the video, in one sample.
        batch: samples of a forward pass: two with guidance.
        vae: the autoencoder.
    """

    heads: int
    head_dim: int
    dtype: str
    rotary: bool
    tokens: int
    text_length: int = 226
    batch: int = 2
    vae: Autoencoder = PUBLISHED_VAE

    @property
    def launches(self) -> list[Launch]:
        """Every launch that running it on a GPU can make: the list that is inspected and built ahead of time.

        The exact transformer's first, then attention and linears in 8 bits, then the autoencoder's.
        """
        dim, dtype = self.heads * self.head_dim, getattr(torch, self.dtype)
        sequence = self.text_length + self.tokens
        block = model_launches(
            dim, dtype, self.head_dim, self.rotary, batch=self.batch, sequence=sequence, text_length=self.text_length
        )
        if dtype not in ATTENTION_DTYPES:
            return block
        attention, linears = [], []
        for value in (None, torch.float8_e4m3fn):
            of_model = (dim, dtype, self.head_dim, value, self.rotary)
            attention += int8_attention_launches(*of_model, sequence=sequence, text_length=self.text_length)
        for numbers in (torch.int8, torch.float8_e4m3fn):
            linears += quantized_launches(dim, dtype, numbers)
        return [*block, *attention, *linears, *vae_launches(dtype, self.vae)]


def _empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """On a GPU, which need not be there where tensors are fake."""
    return torch.empty(shape, dtype=dtype, device="cuda")


def model_launches(
    dim: int,
    dtype: torch.dtype,
    head_dim: int = 64,
    rotary: bool = True,
    *,
    batch: int = 2,
    sequence: int = 300,
    text_length: int = 226,
) -> list[Launch]:
    """Every Triton launch of a transformer block `dim` wide; the size of the stream changes no binary, but its bytes.

    Args:
        dtype: of the stream.
        rotary: whether positions are rotary (all checkpoints but CogVideoX-2b).
        batch, sequence: samples and rows of the stream; `text_length` of the rows are text.
    """
    heads = dim // head_dim
    with FakeTensorMode():
        x, vector, vectors = (_empty(shape, dtype) for shape in ((batch, sequence, dim), (dim,), (1, 2, dim)))
    norm = (vector, vector, vectors, vectors)
    options: Any = {"text_length": text_length, "impl": "triton"}
    with FakeTensorMode():
        # Q and K as they lie in the packed projection.
        query, key, value = _empty((batch, sequence, 3, heads, head_dim), dtype).unbind(2)
        normed = _empty((batch, sequence, heads, head_dim), dtype)
        affine = [_empty((head_dim,), dtype)] * 2
        tables = [_empty((sequence - text_length, head_dim), torch.float32)] * 2

    def norm_rope(query: torch.Tensor, key: torch.Tensor, affine: list[torch.Tensor], tables: Any) -> tuple:
        weight, bias = affine
        return ops.qk_norm_rope(query, key, weight, bias, weight, bias, tuple(tables) or None, **options)

    # Q and K come contiguous from the norms, V is read where the projection put it.
    attention = []
    if dtype in ATTENTION_DTYPES:
        attention = launches(partial(ops.attention, impl="triton"), normed, normed, value)
    return [
        *launches(partial(ops.layer_norm_modulate, **options), x, *norm),
        *launches(partial(ops.gated_residual, **options), x, x, vectors),
        *launches(partial(ops.gated_residual_layer_norm_modulate, **options), x, x, vectors, *norm),
        *launches(norm_rope, query, key, affine, tables if rotary else []),
        *attention,
    ]


def vae_launches(
    dtype: torch.dtype, vae: Autoencoder = PUBLISHED_VAE, latents: tuple[int, int, int] = (2, 60, 90)
) -> list[Launch]:
    """Every Triton launch of the autoencoder, each once: the decoder's in its order, then what only the encoder has.

    Args:
        latents: `(time, height, width)`; the kernels are the same for any.
    """
    time, height, width = latents
    mode = FakeTensorMode()
    found: dict[tuple, Launch] = {}

    def add(operation: Callable, *given: Any, **options: Any) -> None:
        for launch in launches(partial(operation, **options, impl="triton"), *given):
            chosen = {name: value for name, value in launch.arguments.items() if name.isupper() or value is None}
            found.setdefault((launch.name, *chosen.items()), launch)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        with mode:
            return _empty(shape, dtype)

    def norm(frames: tuple[int, ...], channels: int) -> None:
        x, table = empty(*frames, channels), empty(1, *latents, channels, dtype=torch.float32)
        indices = [empty(length, dtype=torch.int64) for length in frames[1:]]
        add(ops.group_norm_statistics, x, groups=vae.groups)
        add(ops.group_norm_modulate_silu, x, table, table, *indices, x)

    def conv(frames: tuple[int, ...], before: int, after: int, adds: bool = False) -> None:
        # As channels-last weights lie.
        weight = empty(after, 3, 3, 3, before).permute(0, 4, 1, 2, 3)
        past = empty(1, 2, *frames[2:], before)
        add(
            ops.causal_conv3d,
            empty(*frames, before),
            weight,
            empty(after),
            past,
            empty(*frames, after) if adds else None,
        )

    def upsample(frames: tuple[int, ...], channels: int, doubles_time: bool) -> tuple[int, ...]:
        weight = empty(channels, channels, 3, 3)
        add(
            ops.upsample_conv2d,
            empty(*frames, channels),
            weight,
            empty(channels),
            doubles_time=doubles_time,
        )
        return 1, frames[1] * (1 + doubles_time), 2 * frames[2], 2 * frames[3]

    frames: tuple[int, ...] = (1, time, height, width)
    before = vae.channels[-1]
    conv(frames, vae.latent_channels, before)
    for level, after in enumerate(reversed(vae.channels)):
        for first in (before, after):
            norm(frames, first)
            conv(frames, first, after)
        conv(frames, after, after, adds=True)
        if level < len(vae.channels) - 1:
            frames = upsample(frames, after, doubles_time=level < vae.time_doublings)
        before = after
    norm(frames, before)
    conv(frames, before, 3)
    conv(frames, 3, before)
    for before, after in pairwise(vae.channels):
        conv(frames, before, after)
    conv(frames, vae.channels[-1], 2 * vae.latent_channels)
    return list(found.values())


def quantized_launches(dim: int, dtype: torch.dtype, quantized: torch.dtype) -> list[Launch]:
    """The Triton launches that take the place of a block's linears and norms where its products are in 8 bits.

    In order: the norm before QKV, QKV, the rows that attention gives, the projection of them, the second norm, and the
    feed-forward's two layers, between which there are 8 bits only.

    Args:
        dtype: of the stream, fp16 or bf16.
        quantized: `torch.int8`, or `torch.float8_e4m3fn` for targets that multiply it.
    """
    with FakeTensorMode():
        x, vector, vectors = (_empty(shape, dtype) for shape in ((2, 300, dim), (dim,), (1, 2, dim)))
        numbers, scales = _empty((2, 300, dim), quantized), _empty((2, 300), torch.float32)
        hidden = _empty((2, 300, 4 * dim), quantized)
        hidden_scales = _empty((2, 300, 4 * dim // GROUP), torch.float32)

        def weights(out_features: int, in_features: int) -> tuple[torch.Tensor, ...]:
            weight = _empty((out_features, in_features), quantized)
            return weight, _empty((out_features,), torch.float32), _empty((out_features,), dtype)

        qkv, projection, up, down = (
            weights(*shape) for shape in ((3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim))
        )
    norm = (vector, vector, vectors, vectors)
    options: Any = {"text_length": 226, "impl": "triton", "quantize": quantized}

    def linear(activation: str | None, out_dtype: torch.dtype) -> Callable:
        return partial(ops.scaled_linear, activation=activation, out_dtype=out_dtype, impl="triton")

    return [
        *launches(partial(ops.layer_norm_modulate, **options), x, *norm),
        *launches(linear(None, dtype), numbers, scales, *qkv),
        *launches(lambda x: ops.quantize_rows(x, quantized, impl="triton"), x),
        *launches(linear(None, dtype), numbers, scales, *projection),
        *launches(partial(ops.gated_residual_layer_norm_modulate, **options), x, x, vectors, *norm),
        *launches(linear("gelu_tanh", quantized), numbers, scales, *up),
        *launches(linear(None, dtype), hidden, hidden_scales, *down),
    ]


def int8_attention_launches(
    dim: int,
    dtype: torch.dtype,
    head_dim: int = 64,
    value_dtype: torch.dtype | None = None,
    rotary: bool = True,
    *,
    sequence: int = 300,
    text_length: int = 226,
) -> list[Launch]:
    """Every Triton launch of attention in 8 bits, with a guard, in a transformer block `dim` wide.

    Both ways of Q and K to their 8 bits are there: from the packed projection, and from what another norm left. The
    size of the stream changes no binary, but its bytes.
    """
    with FakeTensorMode():
        query, key, value = _empty((2, sequence, 3, dim // head_dim, head_dim), dtype).unbind(2)
        normed = _empty((2, sequence, dim // head_dim, head_dim), dtype)
        affine = [_empty((head_dim,), dtype)] * 2
        tables = [_empty((sequence - text_length, head_dim), torch.float32)] * 2 if rotary else []
        guard = _empty((1,), torch.int32)
    smooth = value_dtype is not None

    def attention(query: torch.Tensor, value: torch.Tensor, guard: torch.Tensor) -> torch.Tensor:
        return ops.int8_attention(query, query, value, None, value_dtype, smooth, guard, "triton")

    def norm_rope(query: torch.Tensor, key: torch.Tensor, affine: list[torch.Tensor], tables: Any) -> tuple:
        weight, bias = affine
        rotary = tuple(tables) or None
        return ops.qk_norm_rope_int8(query, key, weight, bias, weight, bias, rotary, text_length, impl="triton")

    fused = head_dim <= ops.FUSED_HEAD_DIM
    return [
        *(launches(norm_rope, query, key, affine, tables) if fused else []),
        *launches(attention, normed, value, guard),
    ]
