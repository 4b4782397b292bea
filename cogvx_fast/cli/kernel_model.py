"""Which launches `cogvx-fast kernels` is about: those of a checkpoint at a size, or of a width."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cogvx_fast.family import HEAD_DIM, TEXT_TOKENS, Variant

from .console import UsageError
from .generate import Precision

if TYPE_CHECKING:
    from cogvx_kernels.aot.models import Autoencoder, Model

    from .checkpoint import Checkpoint

PUBLISHED = Variant()  # CogVideoX-2b
DIM = PUBLISHED.width


def inspected_model(checkpoint: str | None, dim: int | None, dtype: Precision | None) -> Model:
    from cogvx_kernels.aot.models import Model

    if checkpoint is not None:
        if dim is not None:
            raise UsageError("--dim", dim, "cannot be combined with --checkpoint, which has its own")
        return model_of(*asked_checkpoint(checkpoint), None, None, None, dtype)
    if dim is not None and (dim < HEAD_DIM or dim % HEAD_DIM):
        raise UsageError("--dim", dim, f"must be a multiple of {HEAD_DIM}, the width of a head")
    return Model(
        heads=(dim or DIM) // HEAD_DIM,
        head_dim=HEAD_DIM,
        dtype=dtype.value if dtype else PUBLISHED.trained_dtype,
        rotary=dim not in (None, DIM),
        tokens=PUBLISHED.video_tokens(PUBLISHED.sample_frames, *PUBLISHED.default_size),
        text_length=TEXT_TOKENS,
    )


def asked_checkpoint(name: str | None) -> tuple[Checkpoint, str]:
    """The checkpoint, and the name of its argument."""
    from . import validate
    from .checkpoint import read_checkpoint

    try:
        return read_checkpoint(validate.model_or_demo(name)), "--checkpoint"
    except UsageError as error:
        raise error.renamed("--checkpoint") from None


def model_of(
    checkpoint: Checkpoint,
    argument: str,
    height: int | None,
    width: int | None,
    frames: int | None,
    dtype: Precision | None,
) -> Model:
    from cogvx_kernels.aot.models import Model

    from . import validate

    variant = checkpoint.variant
    head_dim = variant.attention_head_dim
    if head_dim < 2 or head_dim & (head_dim - 1):
        raise UsageError(argument, repr(checkpoint.source), f"has heads of {head_dim}; the kernels take powers of two")
    pixels, num_frames = validate.video_size(height, width, variant), validate.num_frames(frames, variant)
    return Model(
        heads=variant.num_attention_heads,
        head_dim=head_dim,
        dtype=dtype.value if dtype else checkpoint.native_dtype,
        rotary=variant.use_rotary_positional_embeddings,
        tokens=variant.video_tokens(num_frames, *pixels),
        text_length=variant.max_text_seq_length,
        vae=_autoencoder(checkpoint, argument),
    )


def _autoencoder(checkpoint: Checkpoint, argument: str) -> Autoencoder:
    """The checkpoint's own; what its configuration leaves out is as in diffusers' class, which is the family's."""
    from cogvx_kernels.aot.models import PUBLISHED_VAE, Autoencoder

    from .checkpoint import read_config

    try:
        config = read_config(checkpoint.source, "vae/config.json")
    except UsageError as error:
        raise error.renamed(argument) from None
    channels = tuple(config.get("block_out_channels", PUBLISHED_VAE.channels))
    groups = config.get("norm_num_groups", PUBLISHED_VAE.groups)
    if any(width % groups for width in channels):
        raise UsageError(
            argument, repr(checkpoint.source), f"its vae has {groups} groups, which do not divide {channels}"
        )
    return Autoencoder(
        channels,
        config.get("latent_channels", PUBLISHED_VAE.latent_channels),
        groups,
        int(math.log2(config.get("temporal_compression_ratio", 2**PUBLISHED_VAE.time_doublings))),
    )
