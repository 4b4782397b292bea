"""The autoencoder, trained on single frames first, then on short and on whole clips; small ones first, then larger.

It is trained as a deterministic autoencoder with a little noise on the latents. The noise is the
posterior's own: the log-variance half of the encoder's output is pinned to a constant, so that
`encode(...).latent_dist.sample()` adds exactly what the decoder was trained to forgive.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX

from cogvx_fast.family import latent_frames
from cogvx_fast.machine import cpu_bf16_units

from .data import HELD_OUT, NUM_FRAMES, SIZE, SMALL, TRAINING, render
from .state import load_state, save_state

if TYPE_CHECKING:
    from .latents import LatentCache

LATENT_NOISE = 0.1
LATENT_PENALTY = 1e-4
ANCHOR_PENALTY = 0.02  # of a latent's squared distance from what it was, where the denoiser knows that


@dataclass(frozen=True)
class Stage:
    """One training run: its file, pixels of a side, and phases of (steps, clips a step, frames a clip).

    `after`: the stage whose weights it starts from. `anchored`: latents stay near those of that stage's encoder.
    `jitter`: variety of the clips, as in `data.path`; None is what fits the latents. `noise`: the most of it on the
    latents that are decoded, in units of `LATENT_NOISE`. `from_drawn`: every other clip is decoded from what the
    denoiser leaves of it.
    """

    name: str
    size: int
    phases: tuple[tuple[int, int, int], ...]
    peak_lr: float
    after: Stage | None = None
    decoder_only: bool = False
    anchored: bool = False
    jitter: float | None = 1.0
    noise: float = 2.0  # for a denoiser that is there already, whose errors are of any size; a half of it before
    from_drawn: bool = False

    @property
    def steps(self) -> int:
        return sum(steps for steps, _, _ in self.phases)

    def clips_and_frames(self, step: int) -> tuple[int, int]:
        for steps, clips, frames in self.phases:
            if step < steps:
                return clips, frames
            step -= steps
        raise ValueError(f"step={step} is past the last of stage {self.name}")

    def learning_rate(self, step: int) -> float:
        warmup = min(1.0, (step + 1) / 50)
        return self.peak_lr * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


TRAIN = Stage("vae", SMALL, ((500, 24, 1), (700, 4, 9), (700, 4, NUM_FRAMES)), peak_lr=2e-3)
# The denoiser sees the encoder alone, which knows edges and flat ground from the small clips: both learn at once.
ENLARGE = Stage("vae_large", SIZE, ((750, 1, 9), (150, 1, NUM_FRAMES)), peak_lr=6e-4, after=TRAIN, decoder_only=True)
# Things move twice as many pixels a frame as in the small clips, and the encoder has to learn it; the denoiser follows.
SHARPEN = Stage("vae_sharp", SIZE, ((1800, 1, 9), (700, 1, NUM_FRAMES)), peak_lr=1.5e-4, after=ENLARGE, anchored=True)
# The denoiser's last pictures are of one size and in places of whole cells: so few that the decoder can tell which one
# is meant, and draws that.
SETTLE = Stage(
    "vae_settle",
    SIZE,
    ((1800, 1, 9), (900, 1, NUM_FRAMES)),
    peak_lr=4e-4,
    after=SHARPEN,
    decoder_only=True,
    jitter=None,
    noise=1.0,
    from_drawn=True,
)
# With what the denoiser leaves by now, which is nearer to true latents: the two want the same, and less noise.
REST = replace(SETTLE, name="vae_rest", phases=((1700, 1, NUM_FRAMES),), peak_lr=3e-4, after=SETTLE, noise=0.5)
# True latents alone, now that the denoiser draws clips that there are.
CLEAR = replace(REST, name="vae_clear", phases=((400, 1, NUM_FRAMES),), peak_lr=1.5e-4, after=REST, from_drawn=False)


def bf16_where_fast() -> contextlib.AbstractContextManager:
    """Autocast to bf16 on a CPU that has units for it; elsewhere float32, which is many times faster there."""
    fast = cpu_bf16_units() is not None
    return torch.autocast("cpu", torch.bfloat16) if fast else contextlib.nullcontext()


def build(size: int = SIZE) -> AutoencoderKLCogVideoX:
    """CogVideoX's autoencoder with few channels. One norm group: more normalise flat colours away."""
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        norm_num_groups=1,
        sample_height=size,
        sample_width=size,
    )
    pin_log_variance(vae)
    return vae


def memory_format() -> torch.memory_format:
    """Of convolutions: channels last halves the time of bf16 ones; float32 ones take 1.7 times as long backward."""
    return torch.channels_last_3d if cpu_bf16_units() is not None else torch.contiguous_format


def order_weights(vae: AutoencoderKLCogVideoX) -> None:
    for weight in vae.parameters():
        if weight.ndim == 5:
            weight.data = weight.data.contiguous(memory_format=memory_format())


@torch.no_grad()
def pin_log_variance(vae: AutoencoderKLCogVideoX) -> None:
    """Make the encoder's log-variance output constant: 2 log(LATENT_NOISE), whatever the input."""
    conv = vae.encoder.conv_out.conv
    latent_channels = conv.out_channels // 2
    conv.weight[latent_channels:] = 0
    conv.bias[latent_channels:] = 2 * math.log(LATENT_NOISE)


def batch(
    name: str, step: int, clips: int, frames: int, size: int, scenes=TRAINING, jitter: float | None = 1.0
) -> torch.Tensor:
    """Clips for step `step` of a stage: a function of the two alone, so that a resumed run repeats it."""
    rng = random.Random(f"{name} {step}")
    return torch.stack([render(rng.choice(scenes), rng, frames, size, jitter) for _ in range(clips)])


def relative_loss(output: torch.Tensor, clips: torch.Tensor) -> torch.Tensor:
    """Squared and absolute error of clips `(B, 3, F, H, W)`, each clip's against its own contrast.

    An object that is as gray as its ground has errors as faint as itself, and an outline that matters as much.
    """
    deviation = clips.std(dim=(2, 3, 4), keepdim=True).square().mean(dim=1, keepdim=True).sqrt()
    difference = (output - clips) / deviation
    return difference.square().mean() + 0.1 * difference.abs().mean()


@torch.no_grad()
def psnr(vae: AutoencoderKLCogVideoX, num_clips: int = 24, jitter: float | None = None) -> float:
    """Mean PSNR in dB (peak: the range of 2) of reconstructions of held-out clips, through the public API.

    The clips are what the denoiser draws, or of any size and place (`jitter` as in `data.path`).
    """
    values = []
    for i in range(num_clips):
        clip = batch("vae", -1 - i, 1, NUM_FRAMES, vae.config.sample_height, HELD_OUT, jitter)
        output = vae.decode(vae.encode(clip).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(10 * math.log10(4 / F.mse_loss(output, clip).item()))
    return sum(values) / len(values)


@torch.no_grad()
def scaling_factor(vae: AutoencoderKLCogVideoX, num_clips: int = 64) -> float:
    """1 / standard deviation of the latents, as diffusers' `scaling_factor` is defined."""
    size = vae.config.sample_height
    latents = [vae.encode(batch("vae", i, 1, NUM_FRAMES, size)).latent_dist.mode() for i in range(num_clips)]
    return 1 / torch.cat(latents).std().item()


def of_drawn(drawn: LatentCache, name: str, step: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `frames` of a clip, `(1, 3, frames, size, size)`, and its latents as the denoiser left them."""
    assert drawn.latents is not None
    index = random.Random(f"{name} {step}").randrange(len(drawn))
    latents = drawn.latents[index : index + 1].transpose(1, 2) / drawn.scale
    return drawn.clip(index)[None, :, :frames], latents[:, :, : latent_frames(frames)]


def train(
    folder: Path, stage: Stage = TRAIN, drawn: LatentCache | None = None, save_every: int = 50
) -> AutoencoderKLCogVideoX:
    """Run a stage to its end, resuming from its own file in `folder` or starting from the stage `after` which it is.

    `drawn`: training clips as the denoiser leaves them, for a stage that is `from_drawn`.
    """
    torch.manual_seed(0)
    vae = build(stage.size)
    if stage.after is not None:
        vae.load_state_dict(load_state(folder / f"{stage.after.name}.pt")["model"])
    vae.encoder.requires_grad_(not stage.decoder_only)
    order_weights(vae)
    anchor = copy.deepcopy(vae).requires_grad_(False) if stage.anchored else None
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=stage.peak_lr, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    path = folder / f"{stage.name}.pt"
    state = load_state(path)
    first = 0
    if state is not None:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        first = state["step"]
    started, running = time.perf_counter(), {}
    for step in range(first, stage.steps):
        count, frames = stage.clips_and_frames(step)
        left = None
        if stage.from_drawn and step % 2:
            clips, left = of_drawn(drawn, stage.name, step, frames)
        else:
            clips = batch(stage.name, step, count, frames, stage.size, jitter=stage.jitter)
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate(step)
        clips = clips.contiguous(memory_format=memory_format())
        with bf16_where_fast():
            with torch.set_grad_enabled(not stage.decoder_only):
                mean = left if left is not None else vae.encode(clips).latent_dist.mean.float()
            noise = torch.randn(mean.shape, generator=generator)
            strength = 1.0 if stage.after is None else stage.noise * torch.rand((), generator=generator)
            latents = mean + noise * LATENT_NOISE * strength
            output = vae.decode(latents).sample.float()
        error = F.mse_loss(output, clips)
        loss = relative_loss(output, clips) + LATENT_PENALTY * mean.square().mean()
        if anchor is not None:
            with torch.no_grad(), bf16_where_fast():
                known = anchor.encode(clips).latent_dist.mean.float()
            loss = loss + ANCHOR_PENALTY * F.mse_loss(mean, known)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if not stage.decoder_only:
            pin_log_variance(vae)
        kind = "psnr" if left is None else "of what the denoiser left"
        running[kind] = 0.95 * running.get(kind, error.item()) + 0.05 * error.item()
        if (step + 1) % 20 == 0:
            each = (time.perf_counter() - started) / (step + 1 - first)
            print(
                f"{stage.name} {step + 1}/{stage.steps}  frames {clips.shape[2]}"
                + "".join(f"  {kind} {10 * math.log10(4 / one):.1f} dB" for kind, one in running.items())
                + f"  latent std {mean.std().item():.2f}"
                + (f"  moved {F.mse_loss(mean, known).sqrt().item():.2f}" if anchor is not None else "")
                + f"  {each:.2f} s/step",
                flush=True,
            )
        if (step + 1) % save_every == 0 or step + 1 == stage.steps:
            save_state(
                path,
                {
                    "model": vae.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                    "step": step + 1,
                },
            )
    return vae.eval()
