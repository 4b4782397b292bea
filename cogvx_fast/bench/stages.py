"""The stages of a generation, each as a call that can be made again and again with inputs of its own number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .cold import in_a_fresh_process
from .models import resolved_checkpoint
from .workloads import Workload

StageCall = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Stage:
    """
    Attributes:
        make: `(pipeline, workload, dtype) -> call`. Inputs are rounded to `dtype` before they are cast to what the
            pipeline runs in, so that a pipeline of a wider dtype is given the same ones.
        measures: what one call is, in words.
        in_loop: whether the call is a part of the denoising loop, in which an engine keeps its constants.
        in_process: whether the work is done in this process, whose memory is what is measured.
    """

    make: Callable[[DiffusionPipeline, Workload, torch.dtype], StageCall]
    measures: str
    in_loop: bool = False
    in_process: bool = True


@dataclass(frozen=True)
class Clip:
    """The size of a workload's video: frames and pixels, and the latents `(1, frames, channels, height, width)`."""

    num_frames: int
    height: int
    width: int
    latents: tuple[int, int, int, int, int]

    @classmethod
    def of(cls, workload: Workload, pipe: DiffusionPipeline) -> Clip:
        config, spatial = pipe.transformer.config, pipe.vae_scale_factor_spatial
        num_frames = workload.num_frames or config.sample_frames
        height = workload.height or config.sample_height * spatial
        width = workload.width or config.sample_width * spatial
        latent_frames = (num_frames - 1) // pipe.vae_scale_factor_temporal + 1
        return cls(
            num_frames, height, width, (1, latent_frames, config.in_channels, height // spatial, width // spatial)
        )


def shapes(workload: Workload, pipe: DiffusionPipeline) -> dict[str, int]:
    """The sizes that a row states: of the model, of the clip, and how many tokens a sample has."""
    config, clip = pipe.transformer.config, Clip.of(workload, pipe)
    _, frames, _, height, width = clip.latents
    video = frames // (config.patch_size_t or 1) * (height // config.patch_size) * (width // config.patch_size)
    return {
        "layers": config.num_layers,
        "layers_of_the_real_model": workload.layers_of or config.num_layers,
        "heads": config.num_attention_heads,
        "head_dim": config.attention_head_dim,
        "batch": 2,
        "num_frames": clip.num_frames,
        "height": clip.height,
        "width": clip.width,
        "video_tokens": video,
        "text_tokens": config.max_text_seq_length,
        "tokens": video + config.max_text_seq_length,
        "steps": workload.steps,
    }


def _text(pipe: DiffusionPipeline, workload: Workload, dtype: torch.dtype) -> StageCall:
    length = pipe.transformer.config.max_text_seq_length

    def call(number: int) -> torch.Tensor:
        prompt = workload.prompts[number % len(workload.prompts)]
        return torch.cat(pipe.encode_prompt(prompt, negative_prompt="", max_sequence_length=length))

    return call


def _dit_step(pipe: DiffusionPipeline, workload: Workload, dtype: torch.dtype) -> StageCall:
    transformer, device, clip = pipe.transformer, pipe._execution_device, Clip.of(workload, pipe)
    config = transformer.config
    if pipe.scheduler.num_inference_steps != workload.steps:
        pipe.scheduler.set_timesteps(workload.steps, device=device)
    # Guidance: both halves of the batch share the latents.
    latents = [
        torch.cat([_noise(clip.latents, seed, dtype)] * 2).to(device, transformer.dtype)
        for seed in range(workload.gate_samples)
    ]
    text = (2, config.max_text_seq_length, config.text_embed_dim)
    arguments: dict[str, Any] = {
        "encoder_hidden_states": (_noise(text, 1000, torch.float32) / 4).to(dtype).to(device, transformer.dtype),
        "return_dict": False,
    }
    if config.use_rotary_positional_embeddings:
        arguments["image_rotary_emb"] = pipe._prepare_rotary_positional_embeddings(
            clip.height, clip.width, clip.latents[1], device
        )
    stride = max(1, workload.steps // workload.gate_samples)

    def call(number: int) -> torch.Tensor:
        # Another step and other latents each time, the gate's ones from all over the schedule.
        timestep = pipe.scheduler.timesteps[number * stride % workload.steps].expand(2)
        with transformer.cache_context("cond_uncond"):
            return transformer(hidden_states=latents[number % len(latents)], timestep=timestep, **arguments)[0]

    return call


def _vae_decode(pipe: DiffusionPipeline, workload: Workload, dtype: torch.dtype) -> StageCall:
    clip = Clip.of(workload, pipe)
    shape = (*clip.latents[:2], pipe.vae.config.latent_channels, *clip.latents[3:])
    latents = [
        _noise(shape, seed, dtype).to(pipe._execution_device, pipe.vae.dtype) for seed in range(workload.gate_samples)
    ]
    return lambda number: pipe.decode_latents(latents[number % len(latents)])


def _vae_encode(pipe: DiffusionPipeline, workload: Workload, dtype: torch.dtype) -> StageCall:
    clip = Clip.of(workload, pipe)
    shape = (1, pipe.vae.config.in_channels, clip.num_frames, clip.height, clip.width)
    pixels = [
        _noise(shape, seed, dtype).to(pipe._execution_device, pipe.vae.dtype) for seed in range(workload.gate_samples)
    ]
    return lambda number: pipe.vae.encode(pixels[number % len(pixels)]).latent_dist.parameters


def _generation(pipe: DiffusionPipeline, workload: Workload, dtype: torch.dtype) -> StageCall:
    clip = Clip.of(workload, pipe)

    def call(number: int) -> torch.Tensor:
        return pipe(
            prompt=workload.prompts[number % len(workload.prompts)],
            height=clip.height,
            width=clip.width,
            num_frames=clip.num_frames,
            num_inference_steps=workload.steps,
            guidance_scale=6.0,
            latents=_noise(clip.latents, number % workload.gate_samples, dtype).to(pipe.transformer.dtype),
            generator=torch.Generator().manual_seed(number),
            max_sequence_length=pipe.transformer.config.max_text_seq_length,
            output_type="pt",
        ).frames

    return call


def _cold_start(pipe: DiffusionPipeline, workload: Workload, dtype: torch.dtype) -> StageCall:
    clip, config = Clip.of(workload, pipe), getattr(pipe, "_engine_config", None)
    arguments = {
        "height": clip.height,
        "width": clip.width,
        "num_frames": clip.num_frames,
        "num_inference_steps": workload.steps,
        "guidance_scale": 6.0,
        "max_sequence_length": pipe.transformer.config.max_text_seq_length,
    }
    order = {
        "checkpoint": resolved_checkpoint(workload),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "engine": None if config is None else dataclasses.asdict(config),
    }

    def call(number: int) -> torch.Tensor:
        prompt = workload.prompts[number % len(workload.prompts)]
        noise = {"shape": clip.latents, "seed": number, "dtype": str(dtype).removeprefix("torch.")}
        return in_a_fresh_process(order | {"arguments": arguments | {"prompt": prompt}, "noise": noise})

    return call


def _noise(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


STAGES: dict[str, Stage] = {
    "text": Stage(_text, "encode_prompt of one prompt and the empty negative prompt"),
    "dit-step": Stage(
        _dit_step,
        "one call of the transformer as the denoising loop makes it: both samples of guidance in a batch of 2, another "
        "timestep and other latents each time, the same prompt; without the scheduler's own arithmetic",
        in_loop=True,
    ),
    "vae-decode": Stage(_vae_decode, "decode_latents of one clip"),
    "vae-encode": Stage(_vae_encode, "vae.encode of one clip: the posterior's mean and log-variance"),
    "cold-start": Stage(
        _cold_start,
        "a fresh process: start Python, import, load the checkpoint, make one generation, write its frames",
        in_process=False,
    ),
    "generation": Stage(_generation, "one call of the pipeline with guidance, from the prompt to frames in memory"),
}
