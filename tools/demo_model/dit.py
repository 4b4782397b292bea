"""Stage 2: the denoiser and its text encoder, trained together on cached latents.

The objective is the scheduler's own: v-prediction with zero terminal SNR (Salimans & Ho 2022, Lin et
al. 2023), uniform timesteps. Latents of clip i are a function of i alone; the cache starts small and
grows by `GROWTH` clips a step, so that the first steps need not wait for all of them. Each draw adds
the noise that the decoder was trained to forgive.
"""

from __future__ import annotations

import copy
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5EncoderModel, T5Tokenizer

from .data import NUM_FRAMES, SIZE, TRAINING, Scene, describe, render
from .state import load_state, save_state
from .text import WORD_DIM, build_text_encoder, build_tokenizer, disturb, teach_words
from .vae import LATENT_NOISE, scaling_factor

TEXT_LENGTH = 226  # what the pipeline pads to
LONG_TEXT_STEPS = 300  # the last steps see prompts padded as the pipeline pads them, every other step
BATCH = 32
PROMPT_DROPOUT = 0.1
EMA_DECAY = 0.999
GROWTH = 0.4


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Attributes:
        jitter: variety of the clips, see `data.path`.
        first_clips: how many are cached before its first step.
        horizon: steps over which the cosine of the learning rate would reach its end.
        from_average: go on from the averaged weights.
        on_object: weigh the loss, see `object_weights`.
        teach_words: first train the text encoder anew, by `text.teach_words`.
        noisy_share: share of a batch whose timesteps are drawn from the noisiest quarter alone. What the prompt
            decides, shape and way, is decided there: once the noise is lower, the latents show it.
    """

    name: str
    steps: int
    jitter: float
    first_clips: int
    horizon: int
    peak_lr: float = 8e-4
    warmup: int = 200
    noisy_share: float = 0.0
    teach_words: bool = False
    from_average: bool = False
    on_object: bool = False

    def learning_rate(self, step: int) -> float:
        warmup = min(1.0, (step + 1) / self.warmup)
        return self.peak_lr * warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / self.horizon)))

    def timesteps(self, generator: torch.Generator, num_train_timesteps: int) -> torch.Tensor:
        """Evenly spread over their range, with a random offset."""
        noisy = int(BATCH * self.noisy_share)
        offset = torch.rand((), generator=generator)
        even = (offset + torch.arange(BATCH - noisy) / (BATCH - noisy)) % 1
        high = 0.75 + 0.25 * ((offset + torch.arange(noisy) / max(noisy, 1)) % 1)
        return (torch.cat([even, high]) * num_train_timesteps).long()


# As it was trained: the first two phases learned colours and backgrounds, but neither shapes nor ways. At the
# highest noise the prediction was the same for "left" and "right", so the words were taught and that noise dwelt on:
# ways came within 500 steps. For shapes, a quarter of what is then left to explain, the rate came down.
PHASES = (
    Phase("wide", steps=2250, jitter=1.0, first_clips=1600, horizon=6500),
    Phase("narrow", steps=750, jitter=0.35, first_clips=1200, horizon=4500, noisy_share=0.5),
    Phase("prompt", steps=750, jitter=0.35, first_clips=1504, horizon=4000, noisy_share=0.85, teach_words=True),
    Phase("ways", steps=750, jitter=0.35, first_clips=1808, horizon=2200, warmup=20, noisy_share=0.5),
    Phase(
        "settle",
        steps=500,
        jitter=0.15,
        first_clips=1200,
        horizon=1700,
        peak_lr=2.5e-4,
        warmup=50,
        noisy_share=0.4,
        from_average=True,
    ),
    Phase(
        "shapes",
        steps=1300,
        jitter=0.15,
        first_clips=1408,
        horizon=1300,
        peak_lr=3e-4,
        warmup=50,
        noisy_share=0.4,
        from_average=True,
        on_object=True,
    ),
)
TOTAL_STEPS = sum(phase.steps for phase in PHASES)


def build_transformer() -> CogVideoXTransformer3DModel:
    """CogVideoX-2b's architecture with 4 heads and 6 layers; gates and output start at zero (DiT's adaLN-zero)."""
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        num_layers=6,
        time_embed_dim=128,
        text_embed_dim=WORD_DIM,
        sample_height=SIZE // 8,
        sample_width=SIZE // 8,
        sample_frames=NUM_FRAMES,
        max_text_seq_length=TEXT_LENGTH,
        spatial_interpolation_scale=1.0,
    )
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm2):
            torch.nn.init.zeros_(norm.linear.weight)
            torch.nn.init.zeros_(norm.linear.bias)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def build_scheduler() -> CogVideoXDDIMScheduler:
    """CogVideoX-2b's own settings."""
    return CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        set_alpha_to_one=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
    )


class ShortText:
    """Lets a transformer made for `TEXT_LENGTH` take shorter prompts: text rows have no position anyway."""

    def __init__(self, transformer: CogVideoXTransformer3DModel):
        self.patch_embed = transformer.patch_embed
        self.video_positions = transformer.patch_embed.pos_embedding[:, TEXT_LENGTH:].clone()

    def set(self, length: int) -> None:
        text_positions = torch.zeros(1, length, self.video_positions.shape[-1])
        self.patch_embed.pos_embedding = torch.cat([text_positions, self.video_positions], dim=1)


def object_weights(latents: torch.Tensor) -> torch.Tensor:
    """Weights (B, frames, 1, h, w) of mean 1, up to five times as large where the object is as on the background.

    Used with the factor 1 - alpha_bar, which makes the error of v that of the clean latents: what is left of the loss
    at low noise is the noise that was added to the latents, and teaches nothing.
    """
    background = latents.flatten(3).median(dim=3).values[..., None, None]
    distance = (latents - background).norm(dim=2, keepdim=True)
    weights = 1 + 4 * distance / distance.amax(dim=(3, 4), keepdim=True).clamp(min=1e-6)
    return weights / weights.mean(dim=(3, 4), keepdim=True)


class LatentCache:
    """Scaled latents of training clips, (N, 5, 16, 8, 8), made on demand and kept on disk."""

    def __init__(self, vae: AutoencoderKLCogVideoX, path: Path, jitter: float):
        self.vae, self.path, self.jitter = vae, path, jitter
        state = load_state(path) or {"scale": scaling_factor(vae), "latents": None}
        self.scale: float = state["scale"]
        self.latents: torch.Tensor | None = state["latents"]

    def __len__(self) -> int:
        return 0 if self.latents is None else len(self.latents)

    @staticmethod
    def scene(index: int) -> Scene:
        """Scenes in turn, in an order that mixes all factors early."""
        return TRAINING[(index * 149) % len(TRAINING)]

    @torch.no_grad()
    def grow(self, size: int) -> None:
        while len(self) < size:
            indices = range(len(self), min(len(self) + 16, size))
            clips = torch.stack(
                [render(self.scene(i), random.Random(f"clip {i}"), jitter=self.jitter) for i in indices]
            )
            latents = self.vae.encode(clips).latent_dist.mode().transpose(1, 2) * self.scale
            self.latents = latents if self.latents is None else torch.cat([self.latents, latents])
            if len(self) % 400 == 0:
                print(f"latents {len(self)}", flush=True)
                self.save()

    def save(self) -> None:
        save_state(self.path, {"scale": self.scale, "latents": self.latents})


def phase_of(step: int) -> tuple[Phase, int]:
    """The phase that step `step` belongs to, and its number within that phase."""
    for phase in PHASES:
        if step < phase.steps:
            return phase, step
        step -= phase.steps
    raise ValueError(f"step={step} is past the last phase")


def encode_text(text_encoder: T5EncoderModel, tokenizer: T5Tokenizer, prompts: list[str], length: int) -> torch.Tensor:
    """Prompt embeddings (B, length, dim), without a mask on the padding: as the pipeline makes them."""
    ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return text_encoder(ids)[0]


def train(folder: Path, vae: AutoencoderKLCogVideoX, save_every: int = 250) -> None:
    """Train to the end, resuming from `folder/dit.pt`; the averaged weights are what is exported."""
    torch.manual_seed(0)
    transformer, scheduler, tokenizer = build_transformer(), build_scheduler(), build_tokenizer()
    model = torch.nn.ModuleDict({"transformer": transformer, "text_encoder": build_text_encoder(len(tokenizer))})
    average = copy.deepcopy(model).requires_grad_(False)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=PHASES[0].peak_lr,
        betas=(0.9, 0.98),
    )
    jitters = {phase.jitter for phase in PHASES}
    caches = {jitter: LatentCache(vae, folder / f"latents_{jitter}.pt", jitter) for jitter in jitters}
    short_text, first = ShortText(transformer), 0
    state = load_state(folder / "dit.pt")
    if state is not None:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    started, running = time.perf_counter(), None

    for step in range(first, TOTAL_STEPS):
        phase, phase_step = phase_of(step)
        cache = caches[phase.jitter]
        if phase.from_average and phase_step == 0:
            model.load_state_dict(average.state_dict())
        if phase.teach_words and phase_step == 0:
            text_encoder = build_text_encoder(len(tokenizer))
            teach_words(text_encoder, tokenizer)
            for owner in (model, average):
                owner["text_encoder"].load_state_dict(text_encoder.state_dict())
        cache.grow(phase.first_clips + int(GROWTH * phase_step) // 16 * 16)
        rng = random.Random(f"dit {step}")
        generator = torch.Generator().manual_seed(step)
        chosen = [rng.randrange(len(cache)) for _ in range(BATCH)]
        prompts = [disturb(describe(cache.scene(i), rng), rng) for i in chosen]
        prompts = ["" if rng.random() < PROMPT_DROPOUT else prompt for prompt in prompts]
        length = max(len(ids) for ids in tokenizer(prompts).input_ids) + rng.randint(0, 12)
        if step >= TOTAL_STEPS - LONG_TEXT_STEPS and step % 2:
            length = TEXT_LENGTH

        clean = cache.latents[chosen]
        latents = clean + LATENT_NOISE * cache.scale * torch.randn(clean.shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = phase.timesteps(generator, scheduler.config.num_train_timesteps)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps)

        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate(phase_step)
        short_text.set(length)
        # On a CPU the backward pass of the flash kernel is slower than plain matrix products at 110 tokens.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            embeds = encode_text(model["text_encoder"], tokenizer, prompts, length)
            output = transformer(noisy, embeds, timesteps, return_dict=False)[0]
        error = (output.float() - target).square()
        if phase.on_object:
            error = error * object_weights(clean) * (1 - scheduler.alphas_cumprod[timesteps]).view(-1, 1, 1, 1, 1)
        loss = error.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)

        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            each = (time.perf_counter() - started) / (step + 1 - first)
            print(
                f"dit {step + 1}/{TOTAL_STEPS}  loss {running:.4f}  clips {len(cache)}  {each:.2f} s/step", flush=True
            )
        if (step + 1) % save_every == 0 or step + 1 == TOTAL_STEPS:
            cache.save()
            save_state(
                folder / "dit.pt",
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                },
            )
