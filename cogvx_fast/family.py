"""The facts of the CogVideoX family: what sets one checkpoint apart, and the rules of its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

# Of the autoencoder that all checkpoints have.
PIXELS_PER_LATENT = 8  # along height and width
FRAMES_PER_LATENT = 4
LATENT_CHANNELS = 16
HEAD_DIM = 64  # of the transformer's attention
# Of the prompt, as the tokenizer pads it; a checkpoint's configuration may say otherwise (224 for CogVideoX 1.5).
TEXT_TOKENS = 226
# What CogVideoX 1.5 makes, in latent pixels: its configuration has the size of its table of positions (300 x 300).
SIZE_OF_1_5 = (96, 170)


@dataclass(frozen=True)
class Variant:
    """One member of the family, as its transformer's `config.json` describes it; the defaults are CogVideoX-2b's.

    Attributes:
        patch_size_t: latent frames that a token spans; None for one, where the patches have no time axis.
        sample_frames: of the video that it makes unless told otherwise, in frames.
        sample_height, sample_width: likewise, in latent pixels.
        ofs_embed_dim: of the embedding that CogVideoX1.5-5B-I2V adds to the timestep's; None: it has none.
    """

    in_channels: int = LATENT_CHANNELS
    out_channels: int = LATENT_CHANNELS
    num_attention_heads: int = 30
    attention_head_dim: int = HEAD_DIM
    num_layers: int = 30
    patch_size: int = 2
    patch_size_t: int | None = None
    ofs_embed_dim: int | None = None
    sample_frames: int = 49
    sample_height: int = 60
    sample_width: int = 90
    max_text_seq_length: int = TEXT_TOKENS
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False

    @classmethod
    def of(cls, transformer: Mapping[str, Any]) -> Variant:
        """The member that a transformer's configuration describes; what it leaves out is as in diffusers' class."""
        known = {field.name: transformer[field.name] for field in fields(cls) if field.name in transformer}
        return cls(**known)

    @property
    def width(self) -> int:
        """How many numbers a token has in the transformer."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def adds_positions(self) -> bool:
        """Whether positions are added to the tokens (sin-cos, learned) and not only rotated into attention."""
        return not self.use_rotary_positional_embeddings or self.use_learned_positional_embeddings

    @property
    def default_latents(self) -> tuple[int, int]:
        """Height and width of its own clip in latent pixels."""
        if self.patch_size_t is None or self.sample_height < SIZE_OF_1_5[0] or self.sample_width < SIZE_OF_1_5[1]:
            return self.sample_height, self.sample_width
        return SIZE_OF_1_5

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of its own clip in pixels."""
        height, width = self.default_latents
        return height * PIXELS_PER_LATENT, width * PIXELS_PER_LATENT

    @property
    def largest_size(self) -> tuple[int, int] | None:
        """Height and width in pixels beyond which it has no positions; None: it makes them for any size.

        CogVideoX 1.5 cuts its positions out of a table; the other kinds compute or interpolate theirs.
        """
        if self.patch_size_t is None:
            return None
        return self.sample_height * PIXELS_PER_LATENT, self.sample_width * PIXELS_PER_LATENT

    @property
    def pixels_per_token(self) -> int:
        """Pixels that a token spans along height and width."""
        return PIXELS_PER_LATENT * self.patch_size

    @property
    def numbers_per_token(self) -> int:
        """Numbers of the predicted latents that a token stands for."""
        return self.patch_size**2 * (self.patch_size_t or 1) * self.out_channels

    def video_tokens(self, num_frames: int, height: int, width: int) -> int:
        """Tokens of one video of this size in pixels; where a token spans latent frames, the last is filled up."""
        frames = -(-latent_frames(num_frames) // (self.patch_size_t or 1))
        return frames * (height // self.pixels_per_token) * (width // self.pixels_per_token)

    @property
    def default_fps(self) -> int:
        """Frames a second: 16 for CogVideoX 1.5, 8 for the others."""
        return 8 if self.patch_size_t is None else 16

    @property
    def frame_period(self) -> int:
        """It makes this many frames times N, and one more.

        The autoencoder makes 4 frames of every latent frame but the first, and decodes another length than it was given
        unless the latent frames are odd in number. CogVideoX 1.5 joins latent frames in pairs and was trained on
        16N + 1.
        """
        return 8 if self.patch_size_t is None else 16

    @property
    def trained_dtype(self) -> str:
        """The half precision that its kind was trained in."""
        return "bfloat16" if self.use_rotary_positional_embeddings else "float16"


def latent_frames(num_frames: int) -> int:
    """Latent frames of a video."""
    return (num_frames - 1) // FRAMES_PER_LATENT + 1


def decoded_frames(latents: int) -> int:
    """Frames that the autoencoder makes of so many latent frames: 4 of each, of the first of an odd number one."""
    return FRAMES_PER_LATENT * latents - (FRAMES_PER_LATENT - 1) * (latents % 2)
