"""What a workload stands for: diffusers' own pipeline at its sizes, and the calls of a pipeline that are timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import nn

from .engine import config_of
from .fresh_process import cold_start
from .workloads import Workload

# diffusers sets a pipeline's components when it is made, where no type checker sees them.
Pipeline: TypeAlias = Any
StageCall = Callable[[int], torch.Tensor]


def build_pipeline(workload: Workload, dtype: torch.dtype, device: torch.device) -> Pipeline:
    """diffusers' own pipeline of `workload`; parts that a workload with random weights does not name are None."""
    if workload.checkpoint is not None:
        pipe: Pipeline = CogVideoXPipeline.from_pretrained(workload.checkpoint_path(), dtype=dtype)
    else:
        pipe = CogVideoXPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=_random(AutoencoderKLCogVideoX, workload.vae, dtype, device, seed=1),
            transformer=_random(CogVideoXTransformer3DModel, workload.transformer, dtype, device, seed=0),
            scheduler=scheduler(),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def widened(pipe: Pipeline, dtype: torch.dtype) -> Pipeline:
    """A copy of `pipe` whose models have the same weights in a wider `dtype`; tokenizer and scheduler are shared."""
    parts = {
        name: copy.deepcopy(part).to(dtype) if isinstance(part, nn.Module) else part
        for name, part in pipe.components.items()
    }
    return like(pipe, **parts)


def first_layers(pipe: Pipeline, layers: int | None) -> Pipeline:
    """A pipeline whose transformer is the first `layers` of that of `pipe`, and its end, on the same weights.

    Args:
        layers: None: all, which is `pipe` itself.
    """
    if layers is None:
        return pipe
    whole = pipe.transformer
    with init_empty_weights(include_buffers=True):
        part = type(whole).from_config({**whole.config, "num_layers": layers})
    for name, child in whole.named_children():
        part.add_module(name, child)
    part.transformer_blocks = nn.ModuleList(list(whole.transformer_blocks)[:layers])
    return like(pipe, transformer=part.eval())


def like(pipe: Pipeline, **parts: Any) -> Pipeline:
    """A pipeline of the class of `pipe` that shares all its components but `parts`."""
    other = type(pipe)(**{**pipe.components, **parts})
    other.set_progress_bar_config(disable=True)
    return other


def randomize(module: nn.Module, seed: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Give every parameter, also those without storage yet, random values on `device`.

    Matrices keep the scale of their input; affine weights are about one, biases about zero, so that activations stay
    of the size that a trained model's have. Norms and biases are random too: one that is forgotten changes the output.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for owner in module.modules():
        for name, old in list(owner.named_parameters(recurse=False)):
            # Uniform, as it takes a third of the time of normal; the variance is one.
            noise = torch.empty(old.shape, dtype=dtype, device=device).uniform_(-(3**0.5), 3**0.5, generator=generator)
            if old.ndim > 1:
                noise.mul_(old[0].numel() ** -0.5)
            else:
                noise.mul_(0.1).add_(1.0 if "norm" in type(owner).__name__.lower() and name == "weight" else 0.0)
            setattr(owner, name, nn.Parameter(noise, requires_grad=False))
    return module


def _random(
    cls: Callable[..., Any], config: Mapping[str, Any] | None, dtype: torch.dtype, device: torch.device, seed: int
) -> nn.Module | None:
    """A model of diffusers' class `cls` with random weights; None without a configuration."""
    if config is None:
        return None
    with init_empty_weights(include_buffers=False):  # no time for initial values that would be thrown away
        model = cls(**config)
    return randomize(model, seed, dtype, device).to(device=device, dtype=dtype).eval()


def scheduler() -> CogVideoXDDIMScheduler:
    """CogVideoX-2b's."""
    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
    )


@dataclass(frozen=True)
class Stage:
    """A part of a generation as a call that can be made again and again, with inputs of its own number.

    Attributes:
        make: `(pipeline, workload, dtype) -> call`. Inputs are rounded to `dtype` before they are cast to what the
            pipeline runs in, so that a pipeline of a wider dtype is given the same ones.
        measures: what one call is, in words.
        in_loop: whether the call is a part of the denoising loop, in which an engine keeps its constants.
        in_process: whether the work is done in this process, whose memory is what is measured.
    """

    make: Callable[[Pipeline, Workload, torch.dtype], StageCall]
    measures: str
    in_loop: bool = False
    in_process: bool = True


@dataclass(frozen=True)
class Clip:
    """The size of a workload's video: frames and pixels, and the latents `(1, frames, channels, height, width)`.

    Attributes:
        latents: that the transformer is given. Where a token spans latent frames, the pipeline fills the last one up.
        video_latents: how many of their frames the autoencoder is given.
    """

    num_frames: int
    height: int
    width: int
    latents: tuple[int, int, int, int, int]
    video_latents: int

    @classmethod
    def of(cls, workload: Workload, pipe: Pipeline) -> Clip:
        config, spatial = pipe.transformer.config, pipe.vae_scale_factor_spatial
        num_frames = workload.num_frames or config.sample_frames
        height = workload.height or config.sample_height * spatial
        width = workload.width or config.sample_width * spatial
        frames, span = (num_frames - 1) // pipe.vae_scale_factor_temporal + 1, config.patch_size_t or 1
        padded = -(-frames // span) * span
        latents = (1, padded, config.in_channels, height // spatial, width // spatial)
        return cls(num_frames, height, width, latents, frames)


def shapes(workload: Workload, pipe: Pipeline) -> dict[str, int]:
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


def _text(pipe: Pipeline, workload: Workload, dtype: torch.dtype) -> StageCall:
    length = pipe.transformer.config.max_text_seq_length

    def call(number: int) -> torch.Tensor:
        prompt = workload.prompts[number % len(workload.prompts)]
        return torch.cat(pipe.encode_prompt(prompt, negative_prompt="", max_sequence_length=length))

    return call


def _dit_step(pipe: Pipeline, workload: Workload, dtype: torch.dtype) -> StageCall:
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


def _vae_decode(pipe: Pipeline, workload: Workload, dtype: torch.dtype) -> StageCall:
    clip = Clip.of(workload, pipe)
    shape = (1, clip.video_latents, pipe.vae.config.latent_channels, *clip.latents[3:])
    latents = _vae_inputs(pipe, workload, shape, dtype)
    return lambda number: pipe.decode_latents(latents[number % len(latents)])


def _vae_encode(pipe: Pipeline, workload: Workload, dtype: torch.dtype) -> StageCall:
    clip = Clip.of(workload, pipe)
    shape = (1, pipe.vae.config.in_channels, clip.num_frames, clip.height, clip.width)
    pixels = _vae_inputs(pipe, workload, shape, dtype)
    return lambda number: pipe.vae.encode(pixels[number % len(pixels)]).latent_dist.parameters


def _vae_inputs(pipe: Pipeline, workload: Workload, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    device, own = pipe._execution_device, pipe.vae.dtype
    return [_noise(shape, seed, dtype).to(device, own) for seed in range(workload.gate_samples)]


def _arguments(pipe: Pipeline, workload: Workload) -> dict[str, Any]:
    """Those of a whole generation but for the prompt and the noise."""
    clip = Clip.of(workload, pipe)
    return {
        "height": clip.height,
        "width": clip.width,
        "num_frames": clip.num_frames,
        "num_inference_steps": workload.steps,
        "guidance_scale": 6.0,
        "max_sequence_length": pipe.transformer.config.max_text_seq_length,
    }


def _generation(pipe: Pipeline, workload: Workload, dtype: torch.dtype) -> StageCall:
    clip, arguments = Clip.of(workload, pipe), _arguments(pipe, workload)

    def call(number: int) -> torch.Tensor:
        frames: torch.Tensor = pipe(
            prompt=workload.prompts[number % len(workload.prompts)],
            latents=_noise(clip.latents, number % workload.gate_samples, dtype).to(pipe.transformer.dtype),
            generator=torch.Generator().manual_seed(number),
            output_type="pt",
            **arguments,
        ).frames
        return frames

    return call


def _denoise(pipe: Pipeline, workload: Workload, dtype: torch.dtype) -> StageCall:
    """A generation of a pipeline that has a transformer alone: from embeddings to latents."""
    clip, arguments, config = Clip.of(workload, pipe), _arguments(pipe, workload), pipe.transformer.config
    shape = (1, config.max_text_seq_length, config.text_embed_dim)
    prompt, negative = ((_noise(shape, 1000 + seed, dtype) / 4).to(pipe.transformer.dtype) for seed in range(2))

    def call(number: int) -> torch.Tensor:
        latents: torch.Tensor = pipe(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            latents=_noise(clip.latents, number % workload.gate_samples, dtype).to(pipe.transformer.dtype),
            generator=torch.Generator().manual_seed(number),
            output_type="latent",
            **arguments,
        ).frames
        return latents

    return call


def _cold_start(pipe: Pipeline, workload: Workload, dtype: torch.dtype) -> StageCall:
    clip, arguments = Clip.of(workload, pipe), _arguments(pipe, workload)
    order = {
        "checkpoint": workload.checkpoint_path(),
        "dtype": dtype_name(pipe.transformer.dtype),
        "device": str(pipe.transformer.device),
        "engine": config_of(pipe),
    }

    def call(number: int) -> torch.Tensor:
        prompt = workload.prompts[number % len(workload.prompts)]
        noise = {"shape": clip.latents, "seed": number, "dtype": dtype_name(dtype)}
        of_this_process = {"tf32_convolutions": torch.backends.cudnn.allow_tf32}
        return cold_start(order | of_this_process | {"arguments": arguments | {"prompt": prompt}, "noise": noise})

    return call


def _noise(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as rows have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


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
    "denoise": Stage(_denoise, "one call of the pipeline with guidance, from embeddings to latents"),
    "generation": Stage(_generation, "one call of the pipeline with guidance, from the prompt to frames in memory"),
}
