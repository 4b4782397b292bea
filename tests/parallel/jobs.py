"""What the ranks of the tests do. Each returns numpy arrays and plain values, which go through a pipe."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from cogvx_kernels import ops

from cogvx_fast import EngineConfig, ParallelConfig, accelerate
from cogvx_fast.parallel import sequence
from cogvx_fast.parallel.ranks import ranks_of
from cogvx_fast.plan import VaePlan
from cogvx_fast.session import EngineSession
from cogvx_fast.vae import FastAutoencoderKLCogVideoX
from tests import toy
from tests.vae.conftest import family

HEADS = 6


def pipeline(variant="2b", engine=None, heads=HEADS, dtype="float32", **options):
    """A toy pipeline that is fast by `engine`, with heads enough to be shared out."""
    reference, dtype = toy.pipeline(variant, **options), getattr(torch, dtype)
    reference.transformer = toy.transformer(variant, num_attention_heads=heads)
    conv, channels = reference.vae.encoder.conv_out.conv, reference.vae.config.latent_channels
    with torch.no_grad():  # no noise on encoded pictures, which would be another one in another precision
        conv.weight[channels:], conv.bias[channels:] = 0, -30
    if dtype != torch.float32:
        reference = reference.to(dtype)
    if engine is None:
        return reference
    pipe = accelerate(reference, engine=engine)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip(config, variant="2b", heads=HEADS, changes=None, dtype="float32", options=None, **arguments):
    """A generation at this rank: what it made, why parts were computed whole, and how many steps were ours."""
    engine = EngineConfig(parallel=ParallelConfig(**config) if isinstance(config, dict) else config, **(changes or {}))
    pipe = pipeline(variant, engine, heads, dtype, **(options or {}))
    made = pipe(**given(variant, dtype, **arguments)).frames
    return made.float().numpy(), dict(pipe._ran.why_whole), pipe._ran.fast


def reference(variant="2b", heads=HEADS, dtype="float64", options=None, **arguments):
    """diffusers' own, of one process."""
    pipe = pipeline(variant, None, heads, dtype, **(options or {}))
    return pipe(**given(variant, dtype, **arguments)).frames.double().numpy()


def given(variant, dtype, output_type="latent", noise=(4, 4), videos=1, **arguments):
    """What a variant's pipeline is called with: the same noise, of this height and width, in every dtype."""
    dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(5)
    inputs = toy.inputs(output_type=output_type)
    frames = 4 if variant.startswith("1.5") else 3
    latents = torch.randn(videos, frames, 16, *noise, generator=generator).to(dtype)
    inputs |= {"latents": latents, "prompt": ["a cat"] * videos, **arguments}
    if variant in ("5b-i2v", "1.5-5b-i2v"):
        inputs["image"] = torch.rand(videos, 3, toy.SIZE, toy.SIZE, generator=generator).to(dtype)
    if variant == "fun":
        inputs["control_video"] = torch.rand(videos, 9, 3, toy.SIZE, toy.SIZE, generator=generator).to(dtype)
        del inputs["num_frames"]
    return inputs


def in_8_bits(shape):
    """What a round through the 8-bit payload does to random rows: the error, in units of each row's largest."""
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, shape[-2])[:, None]
    back = sequence.from_8_bits(sequence.in_8_bits(rows), rows.dtype)
    return ((back - rows).abs() / rows.abs().amax(-1, keepdim=True)).max().item()


def hooked_clip(config):
    """A generation where somebody looks at what a block gets: also how many rows that were at each step."""
    pipe = pipeline(engine=EngineConfig(parallel=ParallelConfig(**config)))
    rows = []

    def look(module, args, kwargs):
        rows.append(kwargs["hidden_states"].shape[1] + kwargs["encoder_hidden_states"].shape[1])

    pipe.transformer.transformer_blocks[1].register_forward_pre_hook(look, with_kwargs=True)
    made = pipe(**given("2b", "float32")).frames
    return made.numpy(), dict(pipe._ran.why_whole), rows


def watched_clip(config):
    """Shapes of what a callback sees, and of the pictures of a preview."""
    pipe = pipeline(engine=EngineConfig(parallel=ParallelConfig(**config)))
    seen = []

    def watch(_pipe, _step, _timestep, arguments):
        seen.append(tuple(arguments["latents"].shape))
        return arguments

    pipe(**given("2b", "float32"), callback_on_step_end=watch)
    pipe(**given("2b", "float32"), callback_on_step_end=watch, preview=True)
    return seen


def through_the_autoencoder(what, size, bands, implementation="torch", budget=0):
    """Frames decoded or encoded at this rank, in bands or whole, and why not in bands.

    Args:
        what: "decode" or "encode".
        size: `(batch, time, height, width)` of latents or pixels.
        implementation: who convolves and norms; "triton": its code, with torch's numbers, as there is no GPU.
    """
    model = FastAutoencoderKLCogVideoX.adopt(family())
    channels = 16 if what == "decode" else 3
    batch, *rest = size
    frames = torch.randn(batch, channels, *rest, generator=torch.Generator().manual_seed(1))
    plan = VaePlan(frames.device, frames.dtype, operations=implementation, convolution=implementation, budget=budget)
    ranks = ranks_of(ParallelConfig(ulysses=dist.get_world_size(), vae=None if bands else 1), frames.device)
    session = EngineSession(SimpleNamespace(vae=plan, device=frames.device), vae=model, ranks=ranks)
    with session.active(), torch.no_grad(), _on_a_cpu(implementation):
        if what == "decode":
            made = torch.cat(list(model.decode_stream(frames)), dim=2)
        else:
            made = model.encode(frames).latent_dist.parameters
    return made.numpy(), dict(session.ran.why_whole)


@contextlib.contextmanager
def _on_a_cpu(implementation):
    """Operations that are asked for Triton's compute by torch's formula."""
    if implementation != "triton":
        yield
        return

    def by_formula(operation):
        def call(*given, **named):
            given = ["torch" if value == "triton" else value for value in given]
            named = {name: "torch" if value == "triton" else value for name, value in named.items()}
            return operation(*given, **named)

        return call

    names = "causal_conv3d", "upsample_conv2d", "group_norm_statistics", "group_norm_modulate_silu"
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(ops, name, by_formula(getattr(ops, name))))
        yield
