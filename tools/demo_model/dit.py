"""The denoiser and its text encoder, trained together on cached latents: of small clips, of larger ones, with guidance.

The objective is the scheduler's own, v-prediction with zero terminal SNR (Salimans & Ho 2022, Lin et
al. 2023), weighed so that it is the error of the clean latents, and of the object more than of the
ground. The text encoder is taught its words first. The matrices of the blocks follow Muon (Jordan et
al. 2024), all else AdamW. The cache of latents starts small and grows by a stage's `growth` of clips a step,
so that the first steps need not wait for all of them. Each draw adds the noise that the decoder was trained
to forgive.

Guidance adds to what the model says without a prompt six times what the prompt changes of it, and so six times what the
two got wrong by chance: pictures that are clean without it become mottled. Where the latents show what the prompt says,
it should change nothing. The last stage learns that: there, it is the guided prediction whose error counts.
"""

from __future__ import annotations

import copy
import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from transformers import T5EncoderModel, T5Tokenizer

from cogvx_fast.family import PIXELS_PER_LATENT, TEXT_TOKENS

from .data import NUM_FRAMES, SIZE, SMALL, describe
from .latents import JITTER, KnownCache, LatentCache
from .muon import Muon
from .objective import draw_timesteps, faint_weights, from_drawn, guidance_scales, guide, nearly_clean, object_weights
from .state import load_state, save_state
from .text import WORD_DIM, build_text_encoder, build_tokenizer, disturb, teach_words
from .vae import LATENT_NOISE, bf16_where_fast

if TYPE_CHECKING:
    from .drawn import DrawnCache

TEXT_LENGTH = TEXT_TOKENS  # what the pipeline pads to
PROMPT_DROPOUT = 0.1
EMA_DECAY = 0.999


@dataclass(frozen=True)
class Stage:
    """One training run.

    Attributes:
        name: of its file.
        size: pixels of a side.
        long_text_steps: the last ones, of which every other sees prompts padded as the pipeline pads them.
        first_clips, growth: of the cache of latents, at the start and a step.
        after: the stage whose averaged weights it starts from.
        told: of frames that are known, in 17 channels more. The text encoder stays that of `after`.
        guided: the largest guidance scale whose prediction is trained; 0 trains with and without a prompt apart.
        noisy_share: the part of a batch that is of the noisiest quarter; the rest is of the others.
        evenness: 1 spreads the others evenly; less of them are noisy the larger it is.
        redrawn: the part of what is nearly clean that is made of latents as the denoiser leaves them (`drawn`).
        starts: the timesteps of 1,000 to which clips are noised for that.
        below: the timestep below which a clip is nearly clean.
        whole: these latents are those of whole generations, and what is asked for is the clip that they are nearest to.
        fine: the error of v itself counts, which is that of the clean latents the more the less noise there is, and the
            latents have no noise of their own, which would be what is left to predict.
        jitter: variety of the clips, as in `data.path`; None is what fits the latents.
        latents: the name of the stage whose clips these are; its own unless it says another. Their scale is that of
            the stage before it: a colour is the same latent in all.
    """

    name: str
    size: int
    steps: int
    batch: int
    peak_lr: float
    long_text_steps: int = 400
    first_clips: int = 1200
    growth: float = 0.6
    after: Stage | None = None
    told: bool = False
    guided: float = 0.0
    noisy_share: float = 0.475
    evenness: float = 1.0
    redrawn: float = 0.0
    starts: tuple[int, ...] = (60, 120, 200, 280)
    below: int = 320
    whole: bool = False
    fine: bool = False
    jitter: float | None = JITTER
    latents: str = ""
    warmup: int = 200

    def latents_in(self, folder: Path) -> Path:
        return folder / f"{self.latents or self.name}_latents.pt"

    def learning_rate(self, step: int) -> float:
        warmup = min(1.0, (step + 1) / self.warmup)
        return self.peak_lr * warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


TRAIN = Stage("dit", SMALL, steps=5000, batch=32, peak_lr=1e-3)
ENLARGE = Stage("dit_large", SIZE, steps=1500, batch=16, peak_lr=5e-4, first_clips=320, growth=0.5, after=TRAIN)
GUIDED = Stage(
    "dit_guided",
    SIZE,
    steps=850,
    batch=8,
    peak_lr=4e-4,
    long_text_steps=850,
    first_clips=480,
    growth=1.0,
    after=ENLARGE,
    guided=7.0,
    latents=ENLARGE.name,
    warmup=40,
)
# On the latents of the sharpened autoencoder. What the prompt decides is learned; outlines are decided where there is
# little noise, of which the error of the clean latents hardly speaks.
FOLLOW = replace(GUIDED, name="dit_follow", steps=300, first_clips=960, after=GUIDED, latents="", noisy_share=0.375)
FINE = replace(FOLLOW, name="dit_fine", steps=750, after=FOLLOW, latents=FOLLOW.name, noisy_share=0.13, fine=True)
# A denoiser takes what it has done wrong itself, two steps before, for what is meant: where little noise is left, it is
# given latents of its own making, and asked for those of the clip.
FINER = replace(
    FINE, name="dit_finer", steps=1050, peak_lr=6e-4, first_clips=1700, after=FINE, evenness=1.5, redrawn=0.6
)
# What can be drawn is now a set of pictures, not a continuum, that a model of this size can know exactly.
SETTLE = replace(
    FINER,
    name="dit_settle",
    steps=1000,
    peak_lr=8e-4,
    first_clips=320,
    growth=1.0,
    after=FINER,
    noisy_share=0.25,
    evenness=1.2,
    redrawn=0.0,
    jitter=None,
    latents="",
)
# Again what the denoiser leaves itself, of more noise, at a rate that lets it come to rest.
STEADY = replace(
    SETTLE,
    name="dit_steady",
    steps=500,
    peak_lr=3e-4,
    first_clips=1312,
    growth=0.0,
    after=SETTLE,
    redrawn=0.5,
    starts=(120, 250, 400, 550),
    below=590,
    latents=SETTLE.name,
)
# The same once more and longer: what it leaves by now is nearer to the clips.
REST = replace(
    STEADY,
    name="dit_rest",
    steps=850,
    peak_lr=3.5e-4,
    growth=0.4,
    after=STEADY,
    noisy_share=0.13,
)
# Where a shape is, is decided between two cells as often as not; no place there is any clip's, and it is drawn badly.
SNAP = replace(REST, name="dit_snap", peak_lr=5e-4, after=REST, redrawn=0.6, below=700, whole=True)
INPAINT = replace(
    FINER,
    name="dit_inpaint",
    steps=650,
    peak_lr=5e-4,
    first_clips=480,
    growth=0.5,
    after=FINER,
    latents="",
    told=True,
    noisy_share=0.3,
)


def build_optimizers(model: torch.nn.Module, peak_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the attention and feed-forward matrices of the denoiser's blocks, AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        of_block = "transformer_blocks" in name and (".attn1." in name or ".ff." in name)
        (matrices if of_block and parameter.ndim == 2 else others).append(parameter)
    return [
        Muon(matrices, lr=peak_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def build_transformer(size: int = SIZE, told: bool = False) -> CogVideoXTransformer3DModel:
    """CogVideoX-2b's architecture with 4 heads and 6 layers; gates and output start at zero (DiT's adaLN-zero).

    Positions are those of the smallest clips, whatever the size: what was learned of a place there is true of it here.
    With `told` it takes the 33 channels of CogVideoX-Fun's InP checkpoints.
    """
    transformer = CogVideoXTransformer3DModel(
        in_channels=33 if told else 16,
        num_attention_heads=4,
        attention_head_dim=64,
        num_layers=6,
        time_embed_dim=128,
        text_embed_dim=WORD_DIM,
        sample_height=size // PIXELS_PER_LATENT,
        sample_width=size // PIXELS_PER_LATENT,
        sample_frames=NUM_FRAMES,
        max_text_seq_length=TEXT_LENGTH,
        spatial_interpolation_scale=size / SMALL,
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


def widened(state: dict[str, torch.Tensor], channels: int) -> dict[str, torch.Tensor]:
    """A model's weights for more channels of its input, which change nothing at first: their weights are zero."""
    name = "transformer.patch_embed.proj.weight"
    weight = state[name]
    more = weight.new_zeros(weight.shape[0], channels - weight.shape[1], *weight.shape[2:])
    return state | {name: torch.cat([weight, more], dim=1)}


class ShortText:
    """Lets a transformer made for `TEXT_LENGTH` take shorter prompts: text rows have no position anyway."""

    def __init__(self, transformer: CogVideoXTransformer3DModel):
        self.patch_embed = transformer.patch_embed
        self.video_positions = transformer.patch_embed.pos_embedding[:, TEXT_LENGTH:].clone()

    def set(self, length: int) -> None:
        text_positions = torch.zeros(1, length, self.video_positions.shape[-1])
        self.patch_embed.pos_embedding = torch.cat([text_positions, self.video_positions], dim=1)


def encode_text(text_encoder: T5EncoderModel, tokenizer: T5Tokenizer, prompts: list[str], length: int) -> torch.Tensor:
    """Prompt embeddings (B, length, dim), without a mask on the padding: as the pipeline makes them."""
    ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return text_encoder(ids)[0]


def train(
    folder: Path,
    autoencoder: AutoencoderKLCogVideoX,
    stage: Stage = TRAIN,
    drawn: DrawnCache | None = None,
    save_every: int = 100,
) -> None:
    """Run a stage to its end, resuming from its own file in `folder`; the averaged weights are what is exported.

    `drawn`: training clips as the denoiser leaves them, for a stage with a part `redrawn`.
    """
    torch.manual_seed(0)
    transformer = build_transformer(stage.size, stage.told)
    scheduler, tokenizer = build_scheduler(), build_tokenizer()
    model = torch.nn.ModuleDict({"transformer": transformer, "text_encoder": build_text_encoder(len(tokenizer))})
    optimizers = build_optimizers(model, stage.peak_lr)
    scale = None if stage.after is None else load_state(stage.after.latents_in(folder))["scale"]
    cache = LatentCache(autoencoder, stage.latents_in(folder), stage.size, scale, stage.jitter)
    known = KnownCache(autoencoder, folder / "known.pt", stage.size, scale, stage.jitter) if stage.told else None
    short_text = ShortText(transformer)
    path = folder / f"{stage.name}.pt"
    state = load_state(path)
    if state is None:
        if stage.after is None:
            teach_words(model["text_encoder"], tokenizer)
        else:
            weights = load_state(folder / f"{stage.after.name}.pt")["average"]
            model.load_state_dict(widened(weights, transformer.config.in_channels))
        average, first = copy.deepcopy(model).requires_grad_(False), 0
    else:
        model.load_state_dict(state["model"])
        average, first = copy.deepcopy(model).requires_grad_(False), state["step"]
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    model["text_encoder"].requires_grad_(not stage.told)
    started, running = time.perf_counter(), None

    for step in range(first, stage.steps):
        for grown in (cache, known):
            if grown is not None:
                grown.grow(stage.first_clips + int(stage.growth * step) // 16 * 16)
        rng = random.Random(f"{stage.name} {step}")
        generator = torch.Generator().manual_seed(step)
        chosen = [rng.randrange(len(cache)) for _ in range(stage.batch)]
        timesteps = draw_timesteps(
            generator, scheduler.config.num_train_timesteps, stage.batch, stage.noisy_share, stage.evenness
        )
        again = []
        if drawn is not None:
            again = [k for k in nearly_clean(timesteps, stage.below) if rng.random() < stage.redrawn]
            for k in again:
                chosen[k] = rng.randrange(len(drawn))
        prompts = [disturb(describe(cache.scene(i), rng), rng) for i in chosen]
        if stage.guided:
            prompts += [""] * len(prompts)
        else:
            prompts = ["" if rng.random() < PROMPT_DROPOUT else prompt for prompt in prompts]
        length = max(len(ids) for ids in tokenizer(prompts).input_ids) + rng.randint(0, 12)
        if step >= stage.steps - stage.long_text_steps and step % 2:
            length = TEXT_LENGTH

        clean = cache.latents[chosen]
        left = {}
        for k in again:
            left[k], clean[k] = drawn.pair(chosen[k], clean[k])
        latents = clean
        if not stage.fine:
            latents = clean + LATENT_NOISE * cache.scale * torch.randn(clean.shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps)
        for k in again:
            alpha = scheduler.alphas_cumprod[timesteps[k]].float()
            noisy[k], target[k] = from_drawn(left[k], clean[k], noise[k], alpha)
        if known is not None:
            noisy = torch.cat([noisy, known.draw(chosen, rng)], dim=2)

        short_text.set(length)
        if stage.guided:
            noisy, timesteps = torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps])
        with bf16_where_fast():
            embeds = encode_text(model["text_encoder"], tokenizer, prompts, length)
            output = transformer(noisy, embeds, timesteps, return_dict=False)[0]
        if stage.guided:
            scales = guidance_scales(timesteps[: stage.batch], stage.guided, generator)
            output, timesteps = guide(*output.chunk(2), scales), timesteps[: stage.batch]
        weights = object_weights(clean) * faint_weights(clean, timesteps)
        if not stage.fine:
            weights = weights * (1 - scheduler.alphas_cumprod[timesteps]).view(-1, 1, 1, 1, 1)  # error of v -> of x0
        loss = ((output.float() - target).square() * weights).mean()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with bf16_where_fast():
            for optimizer in optimizers:
                optimizer.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)

        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            each = (time.perf_counter() - started) / (step + 1 - first)
            print(
                f"{stage.name} {step + 1}/{stage.steps}  loss {running:.4f}  clips {len(cache)}  {each:.2f} s/step",
                flush=True,
            )
        if (step + 1) % save_every == 0 or step + 1 == stage.steps:
            for grown in (cache, known):
                if grown is not None:
                    grown.save()
            save_state(
                path,
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "step": step + 1,
                },
            )
