"""The facts of the family, for its published members."""

import pytest

from cogvx_fast.family import Variant, latent_frames
from tests import toy

COGVIDEOX_2B = Variant()
COGVIDEOX_5B = Variant(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)
COGVIDEOX_5B_I2V = Variant(
    in_channels=32,
    num_attention_heads=48,
    num_layers=42,
    use_rotary_positional_embeddings=True,
    use_learned_positional_embeddings=True,
)
COGVIDEOX_1_5 = Variant(
    num_attention_heads=48,
    num_layers=42,
    patch_size_t=2,
    sample_frames=81,
    sample_height=300,
    sample_width=300,
    max_text_seq_length=224,
    use_rotary_positional_embeddings=True,
)


@pytest.mark.parametrize(
    ("variant", "width", "size", "largest", "tokens", "fps", "period", "dtype", "adds_positions"),
    [
        (COGVIDEOX_2B, 1920, (480, 720), None, 17550, 8, 8, "float16", True),
        (COGVIDEOX_5B, 3072, (480, 720), None, 17550, 8, 8, "bfloat16", False),
        (COGVIDEOX_5B_I2V, 3072, (480, 720), None, 17550, 8, 8, "bfloat16", True),
        # 81 frames are 21 of latents, filled up to 22.
        (COGVIDEOX_1_5, 3072, (768, 1360), (2400, 2400), 44880, 16, 16, "bfloat16", False),
    ],
)
def test_what_sets_the_members_apart(variant, width, size, largest, tokens, fps, period, dtype, adds_positions):
    assert (variant.width, variant.default_size, variant.largest_size) == (width, size, largest)
    assert variant.video_tokens(variant.sample_frames, *size) == tokens
    assert (variant.default_fps, variant.frame_period, variant.trained_dtype) == (fps, period, dtype)
    assert variant.adds_positions is adds_positions


def test_a_small_model_with_a_time_axis_has_its_own_size():
    assert Variant(patch_size_t=2, sample_height=4, sample_width=6).default_size == (32, 48)


def test_a_variant_is_read_from_a_configuration():
    config = toy.transformer("1.5-5b-i2v").config
    variant = Variant.of(config)
    assert (variant.in_channels, variant.patch_size_t, variant.ofs_embed_dim) == (32, 2, 24)
    assert (variant.width, variant.num_layers) == (64, 3)
    assert Variant.of({"attention_bias": True}) == COGVIDEOX_2B


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (9, 3), (17, 5), (48, 12), (49, 13), (81, 21)])
def test_four_frames_are_one_of_latents_but_for_the_first(frames, latents):
    assert latent_frames(frames) == latents


def test_tokens_fill_up_the_last_span():
    assert COGVIDEOX_2B.video_tokens(17, 48, 64) == 60 and COGVIDEOX_1_5.video_tokens(17, 48, 64) == 36
