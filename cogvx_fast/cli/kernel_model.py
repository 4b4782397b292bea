"""Which launches `cogvx-fast kernels` is about: those of a checkpoint at a size, or of a width."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .console import UsageError
from .generate import Precision

if TYPE_CHECKING:
    from cogvx_kernels.models import Autoencoder, Model

    from .checkpoint import Checkpoint

DIM, VIDEO_TOKENS = 1920, 17550  # CogVideoX-2b at 49 frames of 480x720


def inspected_model(checkpoint: str | None, dim: int | None, dtype: Precision | None) -> Model:
    from cogvx_kernels.models import Model

    if checkpoint is not None:
        if dim is not None:
            raise UsageError("--dim", dim, "cannot be combined with --checkpoint, which has its own")
        return model_of(*asked_checkpoint(checkpoint), None, None, None, dtype)
    if dim is not None and (dim < 64 or dim % 64):
        raise UsageError("--dim", dim, "must be a multiple of 64, the width of a head")
    name = dtype.value if dtype else "float16"
    return Model((dim or DIM) // 64, 64, name, rotary=dim not in (None, DIM), tokens=VIDEO_TOKENS)


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
    from cogvx_kernels.models import Model

    from . import validate
    from .checkpoint import PIXELS_PER_LATENT

    head_dim = checkpoint.attention_head_dim
    if head_dim < 2 or head_dim & (head_dim - 1):
        raise UsageError(argument, repr(checkpoint.source), f"has heads of {head_dim}; the kernels take powers of two")
    pixels = validate.video_size(height, width, checkpoint)
    latent_frames = (validate.num_frames(frames, checkpoint) - 1) // 4 + 1
    rows, columns = (side // PIXELS_PER_LATENT // checkpoint.patch_size for side in pixels)
    return Model(
        heads=checkpoint.num_attention_heads,
        head_dim=head_dim,
        dtype=dtype.value if dtype else checkpoint.native_dtype,
        rotary=checkpoint.use_rotary_positional_embeddings,
        tokens=-(-latent_frames // (checkpoint.patch_size_t or 1)) * rows * columns,
        text_length=checkpoint.max_text_seq_length,
        vae=_autoencoder(checkpoint, argument),
    )


def _autoencoder(checkpoint: Checkpoint, argument: str) -> Autoencoder:
    """The checkpoint's own; what its configuration leaves out is as in diffusers' class, which is the family's."""
    from cogvx_kernels.models import PUBLISHED_VAE, Autoencoder

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
