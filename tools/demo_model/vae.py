"""Stage 1: the autoencoder, trained on single frames first, then on short and on whole clips.

It is trained as a deterministic autoencoder with a little noise on the latents. The noise is the
posterior's own: the log-variance half of the encoder's output is pinned to a constant, so that
`encode(...).latent_dist.sample()` adds exactly what the decoder was trained to forgive.
"""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX

from .data import HELD_OUT, NUM_FRAMES, SIZE, TRAINING, render
from .state import load_state, save_state

LATENT_NOISE = 0.1
LATENT_PENALTY = 1e-4
PEAK_LR = 2e-3
# (steps, clips a step, frames a clip)
PHASES = ((420, 24, 1), (700, 4, 9), (520, 4, NUM_FRAMES))
TOTAL_STEPS = sum(steps for steps, _, _ in PHASES)


def build() -> AutoencoderKLCogVideoX:
    """CogVideoX's autoencoder with few channels. One norm group: more normalise flat colours away."""
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        norm_num_groups=1,
        sample_height=SIZE,
        sample_width=SIZE,
    )
    pin_log_variance(vae)
    return vae


@torch.no_grad()
def pin_log_variance(vae: AutoencoderKLCogVideoX) -> None:
    """Make the encoder's log-variance output constant: 2 log(LATENT_NOISE), whatever the input."""
    conv = vae.encoder.conv_out.conv
    latent_channels = conv.out_channels // 2
    conv.weight[latent_channels:] = 0
    conv.bias[latent_channels:] = 2 * math.log(LATENT_NOISE)


def batch(step: int, clips: int, frames: int, scenes=TRAINING) -> torch.Tensor:
    """Clips for training step `step`: a function of the step alone, so that a resumed run repeats it."""
    rng = random.Random(f"vae {step}")
    return torch.stack([render(rng.choice(scenes), rng, frames) for _ in range(clips)])


def phase_of(step: int) -> tuple[int, int]:
    for steps, clips, frames in PHASES:
        if step < steps:
            return clips, frames
        step -= steps
    raise ValueError(f"step={step} is past the last of {TOTAL_STEPS}")


def learning_rate(step: int) -> float:
    warmup = min(1.0, (step + 1) / 50)
    return PEAK_LR * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / TOTAL_STEPS)))


@torch.no_grad()
def psnr(vae: AutoencoderKLCogVideoX, num_clips: int = 24) -> float:
    """Mean PSNR in dB (peak: the range of 2) of reconstructions of held-out clips, through the public API."""
    values = []
    for i in range(num_clips):
        clip = batch(-1 - i, 1, NUM_FRAMES, HELD_OUT)
        output = vae.decode(vae.encode(clip).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(10 * math.log10(4 / F.mse_loss(output, clip).item()))
    return sum(values) / len(values)


@torch.no_grad()
def scaling_factor(vae: AutoencoderKLCogVideoX, num_clips: int = 64) -> float:
    """1 / standard deviation of the latents, as diffusers' `scaling_factor` is defined."""
    latents = [vae.encode(batch(i, 1, NUM_FRAMES)).latent_dist.mode() for i in range(num_clips)]
    return 1 / torch.cat(latents).std().item()


def train(folder: Path, save_every: int = 100) -> AutoencoderKLCogVideoX:
    """Train to the end, resuming from `folder/vae.pt` if it is there."""
    torch.manual_seed(0)
    vae = build()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    state = load_state(folder / "vae.pt")
    first = 0
    if state is not None:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        first = state["step"]
    started, running = time.perf_counter(), None
    for step in range(first, TOTAL_STEPS):
        clips = batch(step, *phase_of(step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        posterior = vae.encode(clips).latent_dist
        output = vae.decode(posterior.sample(generator)).sample
        error = F.mse_loss(output, clips)
        loss = error + 0.2 * F.l1_loss(output, clips) + LATENT_PENALTY * posterior.mean.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        pin_log_variance(vae)
        running = error.item() if running is None else 0.95 * running + 0.05 * error.item()
        if (step + 1) % 20 == 0:
            each = (time.perf_counter() - started) / (step + 1 - first)
            print(
                f"vae {step + 1}/{TOTAL_STEPS}  frames {clips.shape[2]}  psnr {10 * math.log10(4 / running):.1f} dB"
                f"  latent std {posterior.mean.std().item():.2f}  {each:.2f} s/step",
                flush=True,
            )
        if (step + 1) % save_every == 0 or step + 1 == TOTAL_STEPS:
            save_state(
                folder / "vae.pt",
                {
                    "model": vae.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                    "step": step + 1,
                },
            )
    vae.eval()
    return vae
