"""Toy members of the CogVideoX family: the real classes and options at a size that tests can afford, random weights."""

from __future__ import annotations

import string

import diffusers
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

TEXT_LENGTH = 16
TEXT_DIM = 32
SIZE = 32  # pixels
NUM_FRAMES = 9

# What sets each checkpoint apart from CogVideoX-2b: the published configurations, see FAMILY in the tests.
VARIANTS: dict[str, dict] = {
    "2b": {},
    "5b": {"use_rotary_positional_embeddings": True},
    "5b-i2v": {
        "in_channels": 32,
        "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": True,
    },
    "1.5-5b": {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
    "1.5-5b-i2v": {
        "in_channels": 32,
        "use_rotary_positional_embeddings": True,
        "patch_size_t": 2,
        "patch_bias": False,
        "ofs_embed_dim": 24,
        "time_embed_dim": 24,
    },
    "fun": {"in_channels": 32, "use_rotary_positional_embeddings": True},
}
PIPELINES = {
    "2b": "CogVideoXPipeline",
    "5b": "CogVideoXPipeline",
    "5b-i2v": "CogVideoXImageToVideoPipeline",
    "1.5-5b": "CogVideoXPipeline",
    "1.5-5b-i2v": "CogVideoXImageToVideoPipeline",
    "fun": "CogVideoXFunControlPipeline",
}


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random values for every parameter, norms and biases too, so that none can be forgotten unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(noise * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return module


def transformer(variant: str = "2b", seed: int = 0, **overrides) -> CogVideoXTransformer3DModel:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "in_channels": 16,
        "out_channels": 16,
        "time_embed_dim": 24,
        "text_embed_dim": TEXT_DIM,
        "num_layers": 3,
        "sample_width": SIZE // 8,
        "sample_height": SIZE // 8,
        "sample_frames": NUM_FRAMES,
        "max_text_seq_length": TEXT_LENGTH,
    }
    model = CogVideoXTransformer3DModel(**{**config, **VARIANTS[variant], **overrides})
    return randomize(model, seed).eval()


def vae(seed: int = 1) -> AutoencoderKLCogVideoX:
    model = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=SIZE,
        sample_width=SIZE,
        temporal_compression_ratio=4,
    )
    return randomize(model, seed).eval()


def tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -4.0) for letter in string.ascii_lowercase + ".,"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


def text_encoder(seed: int = 2) -> T5EncoderModel:
    config = T5Config(
        vocab_size=32,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return randomize(T5EncoderModel(config), seed).eval()


def scheduler(kind: str = "ddim", snr_shift_scale: float = 3.0) -> CogVideoXDDIMScheduler | CogVideoXDPMScheduler:
    cls = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}[kind]
    return cls(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=snr_shift_scale,
        timestep_spacing="trailing",
    )


def pipeline(
    variant: str = "2b", cls: str | type | None = None, scheduler_kind: str = "ddim", seed: int = 0
) -> diffusers.DiffusionPipeline:
    """A reference pipeline of `variant`, of its own class or of `cls`; the same `seed` gives the same weights."""
    cls = cls or PIPELINES[variant]
    cls = getattr(diffusers, cls) if isinstance(cls, str) else cls
    pipe = cls(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=vae(),
        transformer=transformer(variant, seed),
        scheduler=scheduler(scheduler_kind),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(num_steps: int = 3, **overrides) -> dict:
    """Arguments of a short generation, the same noise each time."""
    return {
        "prompt": "a cat",
        "num_inference_steps": num_steps,
        "guidance_scale": 6.0,
        "height": SIZE,
        "width": SIZE,
        "num_frames": NUM_FRAMES,
        "max_sequence_length": TEXT_LENGTH,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "pt",
        **overrides,
    }
