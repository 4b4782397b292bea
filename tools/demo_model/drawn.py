"""Training clips as the denoiser leaves them, to learn what to make of that.

A generation's latents are not quite what an encoder makes: an outline wobbles by a part of a pixel from one latent to
the next, and what a step has left there the next one takes for meant. So that what is meant is known, these are clips
that were noised so little that they still say where everything is, and denoised as the pipeline does it.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX

from cogvx_fast.family import PIXELS_PER_LATENT, latent_frames

from .data import all_on_cells, describe
from .dit import TEXT_LENGTH, Stage, build_scheduler, build_transformer, encode_text
from .latents import LatentCache
from .objective import guide
from .state import load_state
from .text import build_text_encoder, build_tokenizer, tie_cases
from .vae import bf16_where_fast

NUM_STEPS = 25
WHOLE_STEPS = 16
GUIDANCE = 6.0
CLIPS = 320
WHOLE_CLIPS = 256


class DrawnCache(LatentCache):
    """Scaled latents of training clips, noised to one of `starts` in turn and denoised by what `stage` has learned.

    They are in `folder`, as the weights of the stage are.
    """

    def __init__(self, vae: AutoencoderKLCogVideoX, folder: Path, stage: Stage, starts: tuple[int, ...]):
        scale = load_state(stage.latents_in(folder))["scale"]
        super().__init__(vae, folder / f"{stage.name}_drawn.pt", stage.size, scale, stage.jitter)
        self.starts = starts
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        self.transformer = build_transformer(stage.size)
        model = torch.nn.ModuleDict({"transformer": self.transformer, "text_encoder": self.text_encoder})
        model.load_state_dict(load_state(folder / f"{stage.name}.pt")["average"])
        tie_cases(self.text_encoder)
        self.scheduler = build_scheduler()
        self.scheduler.set_timesteps(NUM_STEPS)

    def pair(self, index: int, clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What was left of clip `index`, whose latents are `clean`, and what it was to be."""
        assert self.latents is not None
        return self.latents[index], clean

    def made_of(self, clips: torch.Tensor, indices: range) -> torch.Tensor:
        clean = self.encode(clips)
        prompts = [describe(self.scene(i), random.Random(f"drawn {i}")) for i in indices]
        made = torch.empty_like(clean)
        for place, start in enumerate(self.starts):
            chosen = [k for k, i in enumerate(indices) if i % len(self.starts) == place]
            if chosen:
                made[chosen] = self.redrawn(clean[chosen], [prompts[k] for k in chosen], start, indices[chosen[0]])
        return made

    @torch.no_grad()
    def redrawn(self, clean: torch.Tensor, prompts: list[str], start: int, seed: int) -> torch.Tensor:
        """`clean` noised to timestep `start` and denoised from there with guidance, as a generation does it."""
        scheduler, count = self.scheduler, len(clean)
        steps = [step for step in scheduler.timesteps if step < start]
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        latents = scheduler.add_noise(clean, noise, steps[0][None].expand(count))
        with bf16_where_fast():
            embeds = encode_text(self.text_encoder, self.tokenizer, prompts + [""] * count, TEXT_LENGTH)
            for step in steps:
                doubled = torch.cat([latents, latents])
                output = self.transformer(doubled, embeds, step.expand(2 * count), return_dict=False)[0].float()
                velocity = guide(*output.chunk(2), torch.full((count,), GUIDANCE))
                latents = scheduler.step(velocity, step, latents, return_dict=False)[0]
        return latents


class WholeCache(DrawnCache):
    """Latents of whole generations, and what they should have been, (N, 2, 5, 16, size / 8, size / 8).

    That is the clip that fits the latents whose first frame is nearest. In the noisiest steps a denoiser draws the mean
    of the places that are possible, which is none of them.
    """

    def __init__(self, vae: AutoencoderKLCogVideoX, folder: Path, stage: Stage):
        super().__init__(vae, folder, stage, (1000,))
        self.scheduler.set_timesteps(WHOLE_STEPS)

    def pair(self, index: int, clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.latents is not None
        left, meant = self.latents[index]
        return left, meant

    def made_of(self, clips: torch.Tensor, indices: range) -> torch.Tensor:
        prompts = [describe(self.scene(i), random.Random(f"drawn {i}")) for i in indices]
        side = self.size // PIXELS_PER_LATENT
        nothing = torch.zeros(len(indices), latent_frames(clips.shape[2]), 16, side, side)
        made = self.redrawn(nothing, prompts, self.starts[0], indices[0])
        return torch.stack([made, torch.cat([self.meant(i, one) for i, one in zip(indices, made, strict=True)])], dim=1)

    def meant(self, index: int, made: torch.Tensor) -> torch.Tensor:
        """The latents `(1, ...)` of the clip of scene `index` that `made` is nearest to."""
        clips = all_on_cells(self.scene(index), self.size)
        first = self.encode(clips[:, :, :1])
        nearest = int((first[:, 0] - made[0]).square().mean(dim=(1, 2, 3)).argmin())
        return self.encode(clips[nearest : nearest + 1])
