"""What the ranks of the tests do. Each returns numpy arrays and plain values, which go through a pipe."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import cpu_offload
from cogvx_kernels import ops
from diffusers import ContextParallelConfig, PyramidAttentionBroadcastConfig
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from cogvx_fast import EngineConfig, ParallelConfig, accelerate
from cogvx_fast.parallel import collectives, sequence
from cogvx_fast.parallel.ranks import ranks_of
from cogvx_fast.parallel.traffic import step_traffic
from cogvx_fast.plan import VaePlan
from cogvx_fast.session import EngineSession
from cogvx_fast.vae import FastAutoencoderKLCogVideoX
from tests import toy
from tests.turbo.conftest import STEPS, STRIP, schedule_file
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


def clip_by_diffusers(degrees):
    """A generation that is split by diffusers' own call, and what the report says of it."""
    pipe = pipeline(engine="exact")
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(**degrees))
    made = pipe(**given("2b", "float32")).frames
    return made.numpy(), pipe.engine_report().line("parallel").detail


def refusals_of_diffusers():
    """What it raises the second time, for too many processes, for a plan, and beside `EngineConfig.parallel`."""

    def kind(call):
        try:
            call()
        except Exception as error:
            return type(error).__name__
        return "nothing"

    transformer, two = pipeline(engine="exact").transformer, ContextParallelConfig(ulysses_degree=2)
    transformer.enable_parallelism(config=two)
    other = pipeline(engine="exact").transformer
    both = pipeline(engine=EngineConfig(parallel="auto"))
    both.transformer.enable_parallelism(config=two)
    return [
        kind(lambda: transformer.enable_parallelism(config=two)),
        kind(lambda: other.enable_parallelism(config=ContextParallelConfig(ring_degree=4))),
        kind(lambda: other.enable_parallelism(config=two, cp_plan={})),
        kind(lambda: both(**given("2b", "float32"))),
    ]


def clip_with_weights_elsewhere(config, how):
    """A generation whose weights come to the blocks when they run: by offloading, or from all processes."""
    pipe = pipeline(engine=EngineConfig(parallel=ParallelConfig(**config)))
    if how == "offload":
        for block in pipe.transformer.transformer_blocks:
            cpu_offload(block, torch.device("cpu"))
    made = pipe(**given("2b", "float32")).frames
    return made.numpy(), dict(pipe._ran.why_whole)


def clip_with_a_cache(config):
    """A generation with diffusers' pyramid attention broadcast."""
    pipe = pipeline(engine=EngineConfig(parallel=None if config is None else ParallelConfig(**config)))
    skip = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: pipe._current_timestep,
        spatial_attention_block_identifiers=["transformer_blocks"],
    )
    pipe.transformer.enable_cache(skip)
    made = pipe(**given("2b", "float32")).frames
    return made.numpy(), dict(pipe._ran.why_whole)


def turbo_clip(config, path):
    """A generation of ten steps, of which some are predicted: with how many were computed."""
    schedule_file(pipeline(), path)
    parallel = None if config is None else ParallelConfig(**config)
    speed = STEPS / STRIP.count("#")
    pipe = pipeline(engine=EngineConfig("turbo", recipe="native", schedule=path, speed=speed, parallel=parallel))
    made = pipe(**given("2b", "float32", num_inference_steps=STEPS)).frames
    return made.numpy(), pipe._ran.steps


def int8_clip(config):
    """A generation with int8 products."""
    parallel = None if config is None else ParallelConfig(**config)
    pipe = pipeline("5b", EngineConfig(recipe="int8", parallel=parallel))
    made = pipe(**given("5b", "float32")).frames
    return made.numpy(), dict(pipe._ran.why_whole)


def _said(call):
    try:
        call()
    except Exception as error:
        return str(error)
    return "nothing"


def differing_calls(changes):
    """What is said where the ranks but the first call with `changes`."""
    pipe = pipeline(engine=EngineConfig(parallel="auto"))
    arguments = given("2b", "float32") | {"callback_on_step_end": lambda _pipe, _step, _timestep, found: found}
    if dist.get_rank():
        if "seed" in changes:
            arguments["generator"] = torch.Generator().manual_seed(changes["seed"])
        elif "latents" in changes:
            arguments["latents"] = arguments["latents"] + changes["latents"]
        else:
            arguments |= changes
    return _said(lambda: pipe(**arguments))


def clip_without_a_generator(seed=0):
    """A generation from torch's own generator, which each rank has seeded by itself."""
    pipe = pipeline(engine=EngineConfig(parallel="auto"))
    arguments = given("2b", "float32")
    del arguments["latents"], arguments["generator"]
    torch.manual_seed(1000 * seed + dist.get_rank())
    return pipe(**arguments).frames.numpy()


def clip_with_one_text_encoder():
    """A generation where only the first rank has one."""
    pipe = pipeline(engine=EngineConfig(parallel="auto"))
    if dist.get_rank():
        pipe.text_encoder = None
    return pipe(**given("2b", "float32")).frames.numpy()


def failing_text_encoder():
    """What each rank raises where encoding the prompt fails."""
    pipe = pipeline(engine=EngineConfig(parallel="auto"))

    def fail(*args, **kwargs):
        raise OSError("no prompt today")

    pipe.text_encoder.forward = fail
    try:
        pipe(**given("2b", "float32"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def impossible_degrees():
    """What is said of them, for two ranks."""
    four = pipeline(engine=EngineConfig(parallel=ParallelConfig(2, 2)))
    three = pipeline(engine=EngineConfig(parallel=ParallelConfig(ulysses=2)), heads=3)
    ring = EngineConfig(parallel=ParallelConfig(ring=2), attention="triton")
    return [
        _said(lambda: four(**given("2b", "float32"))),
        _said(lambda: three(**given("2b", "float32"))),
        _said(lambda: pipeline(engine=ring)(**given("2b", "float32"))),
    ]


def sent_in_a_step(config, variant):
    """Bytes that this rank has sent in a generation's step, counted at the collectives, and what the formula says."""
    sent = {"rows": 0, "ring": 0, "gathered": 0}
    to_all, to_next, gather = collectives.all_to_all, collectives.to_next, collectives.gathered

    def all_to_all(rows, numbers, received, axis):
        other = sum(numbers) - numbers[axis.index]
        sent["rows"] += other * rows[0].numel() * rows.itemsize
        return to_all(rows, numbers, received, axis)

    def ring(tensor, axis):
        sent["ring"] += tensor.nbytes
        return to_next(tensor, axis)

    def gathered(piece, dim, sizes, axis):
        sent["gathered"] += piece.nbytes * (axis.size - 1)
        return gather(piece, dim, sizes, axis)

    pipe = pipeline(variant, EngineConfig(parallel=ParallelConfig(**config)))
    with (
        mock.patch.object(collectives, "all_to_all", all_to_all),
        mock.patch.object(collectives, "to_next", ring),
        mock.patch.object(collectives, "gathered", gathered),
    ):
        pipe(**given(variant, "float32", num_inference_steps=1))
    model = pipe.transformer.config
    video = 3 * 4 if model.patch_size_t is None else 2 * 4
    formula = step_traffic(
        ParallelConfig(**config),
        rows=toy.TEXT_LENGTH + video,
        text=toy.TEXT_LENGTH,
        heads=model.num_attention_heads,
        head_dim=model.attention_head_dim,
        layers=model.num_layers,
        numbers_per_token=pipe.transformer.proj_out.out_features,
        samples=2,
        itemsize=4,
    )
    return sent, (formula.heads, formula.ring, formula.output)


def clip_with_parts_of_weights(config):
    """A generation whose weights are shared out over the ranks, and how many of them each holds between steps."""
    pipe = pipeline(engine=EngineConfig(parallel=ParallelConfig(**config, shard_weights=True)))
    made = pipe(**given("2b", "float32")).frames
    held = sum(
        parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()
        for block in pipe.transformer.transformer_blocks
        for parameter in block.parameters()
    )
    whole = sum(parameter.numel() for block in pipe.transformer.transformer_blocks for parameter in block.parameters())
    return made.numpy(), dict(pipe._ran.why_whole), held / whole


def clip_with_an_adapter(config):
    """A generation with an adapter on attention and feed-forward, which changes it."""
    parallel = None if config is None else ParallelConfig(**config)
    pipe = pipeline(engine=EngineConfig(parallel=parallel))
    plain = pipe(**given("2b", "float32")).frames
    targets = ["to_q", "to_v", "to_out.0", "ff.net.2"]
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    made = pipe(**given("2b", "float32")).frames
    assert (made - plain).abs().max() > 0.01
    return made.numpy(), dict(pipe._ran.why_whole)
