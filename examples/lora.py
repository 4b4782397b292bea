"""LoRA: train a small adapter on the demo model, load it into a new pipeline, and make a video with it.

    pip install peft
    python examples/lora.py        # about two minutes on two CPU cores

The look that it learns is night: whatever background the sentence names, it is black. Adapters for CogVideoX-2b and 5b
take a GPU, hours, and a trainer (finetrainers, diffusion-pipe, ...); what those write is loaded as in the last lines.
"""

import argparse

import torch

from cogvx_fast import FastCogVideoXPipeline, demo_checkpoint
from cogvx_fast.video import write_video

# What is learned from: what a sentence says, and the colour and the way (right, down) of the disc that is drawn for it.
CLIPS = {
    "a red circle moves left on a white background": ((0.86, 0.16, 0.16), (-1, 0)),
    "a blue circle moves up on a gray background": ((0.16, 0.35, 0.86), (0, -1)),
    "a yellow circle moves down on a pink background": ((0.96, 0.88, 0.24), (0, 1)),
    "a purple circle moves right on a white background": ((0.57, 0.24, 0.75), (1, 0)),
}


def draw(color: tuple[float, float, float], way: tuple[int, int], frames: int, size: int) -> torch.Tensor:
    """A clip (1, 3, frames, size, size) in [-1, 1] of a disc that moves over black. Put your own clips in its place."""
    time = torch.linspace(-0.15, 0.15, frames)[:, None, None]
    y, x = torch.meshgrid(torch.arange(size) / size - 0.5, torch.arange(size) / size - 0.5, indexing="ij")
    disc = ((0.22 - torch.hypot(x - time * way[0], y - time * way[1])) * size).clamp(0, 1)
    return torch.stack([0.08 + (value - 0.08) * disc for value in color])[None] * 2 - 1


def train(folder: str, steps: int) -> None:
    """Learn from `CLIPS` and save the adapter in `folder`."""
    from peft import LoraConfig, get_peft_model_state_dict

    pipe = FastCogVideoXPipeline.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    transformer, scheduler, config = pipe.transformer, pipe.scheduler, pipe.transformer.config
    with torch.no_grad():  # what the transformer sees of the clips and sentences
        clips = [draw(color, way, config.sample_frames, config.sample_width * 8) for color, way in CLIPS.values()]
        latents = torch.cat([pipe.vae.encode(clip).latent_dist.mode() for clip in clips]).transpose(1, 2)
        latents = latents * pipe.vae.config.scaling_factor
        prompts, _ = pipe.encode_prompt(list(CLIPS), do_classifier_free_guidance=False)
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    optimizer = torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad], lr=3e-3)
    torch.manual_seed(0)
    for step in range(1, steps + 1):
        noise, places = torch.randn_like(latents), torch.randperm(len(latents)) + torch.rand(len(latents))
        t = (places / len(latents) * scheduler.config.num_train_timesteps).long()  # some early, some late, every time
        velocity = transformer(scheduler.add_noise(latents, noise, t), prompts, t, return_dict=False)[0]
        loss = (velocity - scheduler.get_velocity(latents, noise, t)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} of {steps}: loss {loss.item():.3f}")
    pipe.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(transformer))


parser = argparse.ArgumentParser()
parser.add_argument("--train-steps", type=int, default=24)
parser.add_argument("--steps", type=int, default=25, help="of the videos")
parser.add_argument("--adapter", default="out/lora", help="the folder that the adapter is saved in")
parser.add_argument("--out", default="out/lora.mp4")
args = parser.parse_args()
train(args.adapter, args.train_steps)

# From here on as with any adapter: for a real one change the checkpoint, and the folder to its file or id of the Hub.
pipe = FastCogVideoXPipeline.from_pretrained(demo_checkpoint())
for said in ("without the adapter", "with it"):
    if said == "with it":
        pipe.load_lora_weights(args.adapter)
    noise = torch.Generator().manual_seed(0)
    prompt = "a green circle moves up on a white background"
    video = pipe(prompt, num_inference_steps=args.steps, generator=noise).frames[0]
    corner = sum(frame.convert("L").getpixel((2, 2)) for frame in video) / len(video)
    print(f"{said}: the background's brightness is {corner:.0f} of 255")
write_video(video, args.out, fps=8)
print(f"wrote {args.adapter} and {args.out}")
