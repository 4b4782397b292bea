"""Who runs in a benchmark: how each contender is made of diffusers' pipeline, whose weights all of them share."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..config import EngineConfig
from ..pipelines import accelerate
from ..plan import Implementation
from . import engine
from .engine import SDPA
from .reference import STAGES, Pipeline, StageCall, like, shapes
from .workloads import Workload

DENOISING = ("dit-step", "generation")
VAE = ("vae-decode", "vae-encode")
_ALL = ("text", "dit-step", *VAE, "denoise", "generation", "cold-start")
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_IN_SESSION = (
    "inside an engine session whose tables are made already; what a session's first step costs more is in extras"
)


@dataclass(frozen=True)
class Prepared:
    """A contender made ready.

    Attributes:
        pipeline: that a stage calls.
        call: replaces the stage's call, for a bound that computes no result.
        engine: fields of the `EngineConfig` as resolved.
        report: the engine report's lines, once the first call was made.
        loop: what the pipeline opens around its denoising loop; entered around the stages that are a part of it.
        compiling: entered around the first call, in which what compiles is compiled.
        note: what there is to add to what a row of the stage measures.
        extras: numbers for the row, the unit in the name.
        late_extras: those that are known once the calls were made.
    """

    pipeline: Pipeline
    call: StageCall | None = None
    engine: dict[str, Any] | None = None
    report: Callable[[], list[str]] = list
    loop: Callable[[], AbstractContextManager[Any]] | None = None
    compiling: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    note: str = ""
    extras: Mapping[str, float] = field(default_factory=dict)
    late_extras: Callable[[], Mapping[str, float]] = dict


Builder = Callable[[Pipeline, Workload, str], Prepared]


@dataclass(frozen=True)
class Contender:
    """What is timed beside others, and by which measure it is judged.

    Attributes:
        build: `(diffusers' pipeline, workload, stage) -> Prepared`.
        what: in one line, for people.
        stages: in which it differs from the others; it is left out of the rest.
        is_bound: whether it is a lower bound, which has no result to be judged.
        lossy: what makes its result another one by design, or None; then its distance is stated and not judged.
        devices: types of device it runs on; None: all.
        rehearses: whether it runs on a CPU all the same where the workload is a rehearsal.
        floor_db: of one that may lose precision: the signal-to-noise ratio that its gate asks for instead.
        expected_gain, expected_why: in an ablation, the factor over the contender before that is expected, from what.
    """

    build: Builder
    what: str
    stages: tuple[str, ...] = _ALL
    is_bound: bool = False
    lossy: str | None = None
    devices: tuple[str, ...] | None = None
    rehearses: bool = False
    floor_db: float | None = None
    expected_gain: float | None = None
    expected_why: str | None = None

    def why_not(self, device: torch.device, workload: Workload) -> str | None:
        """What keeps it from being run on `device`, in words; None: nothing."""
        if self.devices is None or device.type in self.devices or (self.rehearses and workload.is_rehearsal):
            return None
        return f"it runs on {' and '.join(self.devices)}, not on {device}"


def diffusers_eager(pipe: Pipeline, workload: Workload, stage: str) -> Prepared:
    """The reference, as it is."""
    return Prepared(pipe)


def diffusers_compiled(pipe: Pipeline, workload: Workload, stage: str, freezes: bool = False) -> Prepared:
    """diffusers with `torch.compile` of the transformer, with or without inductor's freezing of its weights."""
    # The option makes this another backend to dynamo, which would otherwise take the code that it compiled for the
    # other contender. It is not enough: whether weights become constants is read from the process-wide setting.
    options: dict[str, Any] | None = {"freezing": True} if freezes else None
    compiled = torch.compile(pipe.transformer, fullgraph=True, options=options)
    return Prepared(like(pipe, transformer=compiled), compiling=freezing if freezes else contextlib.nullcontext)


@contextlib.contextmanager
def freezing() -> Iterator[None]:
    """Within the block, and nowhere else, inductor makes constants of the weights of what it compiles."""
    import torch._inductor.config as inductor

    with inductor.patch(freezing=True):
        yield


def diffusers_tiled(pipe: Pipeline, workload: Workload, stage: str) -> Prepared:
    """diffusers with its autoencoder in blended tiles."""
    vae = engine.reference_autoencoder(pipe.vae)
    vae.enable_tiling()
    return Prepared(like(pipe, vae=vae))


def diffusers_vae_compiled(pipe: Pipeline, workload: Workload, stage: str) -> Prepared:
    """diffusers with `torch.compile` of its autoencoder's two halves."""
    vae = engine.reference_autoencoder(pipe.vae)
    vae.encoder, vae.decoder = torch.compile(vae.encoder), torch.compile(vae.decoder)
    return Prepared(like(pipe, vae=vae))


def diffusers_channels_last(pipe: Pipeline, workload: Workload, stage: str) -> Prepared:
    """diffusers with its autoencoder's weights in the layout of channels-last frames, which convolutions hand on."""
    vae: Any = copy.deepcopy(pipe.vae)
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.weight.data = module.weight.data.contiguous(memory_format=_CHANNELS_LAST[module.weight.ndim])
    return Prepared(like(pipe, vae=vae))


def diffusers_torchao(pipe: Pipeline, workload: Workload, stage: str, recipe: str, compiles: bool = False) -> Prepared:
    """diffusers with torchao's tensors in the recipe's linears, as its own quantizer would put them there."""
    quantized = like(pipe, transformer=engine.quantized_copy(pipe.transformer, recipe))
    return diffusers_compiled(quantized, workload, stage, freezes=True) if compiles else Prepared(quantized)


def ours(pipe: Pipeline, workload: Workload, stage: str, config: EngineConfig) -> Prepared:
    """The engine on the same weights, in a session as its pipeline opens one."""
    fast = accelerate(pipe, engine=config)
    return Prepared(
        fast,
        engine=engine.as_plain(config),
        report=lambda: engine.report_lines(fast),
        loop=functools.partial(fast.engine_session, watched=False),  # as without a callback
        note=_IN_SESSION if STAGES[stage].in_loop else "",
    )


def our_layers(
    pipe: Pipeline,
    workload: Workload,
    stage: str,
    operations: Implementation | None = None,
    convolution: Implementation | None = None,
) -> Prepared:
    """diffusers with our autoencoder's layers.

    Args:
        operations, convolution: who computes what is between the convolutions, and these; None: who does in the engine.
    """
    vae = engine.partly_fast_autoencoder(pipe.vae, operations, convolution)
    note = f"{vae.operations} between the convolutions, these by {vae.convolution}"
    return Prepared(like(pipe, vae=vae), note=note)


def weighed(build: Builder) -> Builder:
    """A contender that also says how many bytes its transformer's weights take, with copies that a session holds."""

    def with_weights(pipe: Pipeline, workload: Workload, stage: str) -> Prepared:
        prepared = build(pipe, workload, stage)
        pipeline = prepared.pipeline
        return dataclasses.replace(prepared, late_extras=lambda: {"weights_bytes": engine.weights_bytes(pipeline)})

    return with_weights


def arithmetic(
    pipe: Pipeline,
    workload: Workload,
    stage: str,
    linears: bool = True,
    attention: str | None = SDPA,
    packed: bool = False,
) -> Prepared:
    """The roofline of a step: its matrix products and its attention on bare tensors, which no exact step is without.

    Args:
        linears: whether the products are in it.
        attention: whose attention is in it, one of `engine.ATTENTIONS`; None: none is.
        packed: whether the products' weights are in oneDNN's order.
    """
    parts = ["the linears of all blocks and proj_out"] if linears else []
    parts += [] if attention is None else [engine.ATTENTIONS[attention].what]
    note = f"only {' and '.join(parts)} on tensors of the step's shapes"
    call = _arithmetic_call(pipe, workload, linears, attention, packed)
    work = flop(workload, pipe)
    if not linears:
        del work["linear_flop"]
    if attention is None:
        del work["attention_flop"]
    return Prepared(pipe, call=call, note=note + (", weights prepacked for oneDNN" if packed else ""), extras=work)


def block_linears(block: Any) -> list[nn.Linear]:
    """The linears of one block that run over all tokens, in order; AdaLN's see a few vectors only."""
    attention, feed_forward = block.attn1, block.ff.net
    return [attention.to_q, attention.to_k, attention.to_v, attention.to_out[0], feed_forward[0].proj, feed_forward[2]]


def flop(workload: Workload, pipe: Pipeline) -> dict[str, int]:
    """Floating-point operations of one step in the linears and in attention, a multiplication and an addition each."""
    size, transformer = shapes(workload, pipe), pipe.transformer
    rows = size["batch"] * size["tokens"]
    per_row = sum(
        linear.in_features * linear.out_features
        for block in transformer.transformer_blocks
        for linear in block_linears(block)
    )
    out = transformer.proj_out
    linears = 2 * rows * per_row + 2 * size["batch"] * size["video_tokens"] * out.in_features * out.out_features
    attention = 4 * rows * size["tokens"] * size["heads"] * size["head_dim"] * size["layers"]
    return {"linear_flop": linears, "attention_flop": attention}


def _arithmetic_call(
    pipe: Pipeline, workload: Workload, linears: bool, attention: str | None, packed: bool
) -> Callable[[int], Any]:
    """A call that runs the linears and the attention of all blocks, then `proj_out`, on random tensors.

    Each block multiplies with its own weights, so that they come from memory as they do in a step. The patch
    embedding, whose products are less than a thousandth of the step's, is left out. `packed` reorders copies of the
    weights for oneDNN first, as inductor does when it freezes; for CPUs.
    """
    transformer = pipe.transformer
    size, dtype, device = shapes(workload, pipe), transformer.dtype, pipe._execution_device
    rows, dim = size["batch"] * size["tokens"], size["heads"] * size["head_dim"]
    blocks = [block_linears(block) for block in transformer.transformer_blocks] if linears else []
    make: Callable[[nn.Linear, int], Callable[[torch.Tensor], torch.Tensor]]
    make = packed_linear if packed else lambda linear, rows: linear
    products = [[make(linear, rows) for linear in block] for block in blocks] or [[]] * size["layers"]
    project_out = make(transformer.proj_out, size["batch"] * size["video_tokens"]) if linears else None
    heads = (size["batch"], size["tokens"], size["heads"], size["head_dim"])
    query, key, value = (torch.randn(heads, dtype=dtype, device=device) for _ in range(3))
    attend = (lambda *heads: None) if attention is None else engine.ATTENTIONS[attention].call
    narrow = torch.randn(rows, dim, dtype=dtype, device=device)
    hidden = blocks[0][-1].in_features if blocks else dim
    wide = torch.randn(rows, hidden, dtype=dtype, device=device)
    video = narrow[: size["batch"] * size["video_tokens"]]

    def call(number: int) -> None:
        for block in products:
            for product in block[:3]:
                product(narrow)
            attend(query, key, value)
            for product, x in zip(block[3:], (narrow, narrow, wide), strict=bool(block)):
                product(x)
        if project_out is not None:
            project_out(video)

    return call


def packed_linear(linear: nn.Linear, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What `linear` computes for so many rows, with a copy of its weight in the order that oneDNN prefers."""
    # The one place that reads weights: plain linears of a model that was made for this measurement.
    mkldnn = torch.ops.mkldnn
    weight = mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
    return lambda x: mkldnn._linear_pointwise(x, weight, linear.bias, "none", [], "")


# To add a contender, add a line.
CONTENDERS: dict[str, Contender] = {
    "diffusers": Contender(diffusers_eager, "diffusers, eager"),
    "diffusers-compile": Contender(diffusers_compiled, "diffusers, torch.compile of the transformer", stages=DENOISING),
    "diffusers-compile-freeze": Contender(
        functools.partial(diffusers_compiled, freezes=True),
        "the same with inductor's freezing (weights become constants)",
        stages=DENOISING,
        devices=("cpu",),  # on a GPU the constants would be a second copy of the weights beside them
    ),
    "diffusers-tiled": Contender(
        diffusers_tiled,
        "diffusers with enable_tiling(), in the autoencoder's stages",
        stages=VAE,
        lossy="tiles are blended, and GroupNorm's statistics are those of a tile",
    ),
    "diffusers-vae-compile": Contender(
        diffusers_vae_compiled, "diffusers, torch.compile of the autoencoder's encoder and decoder", stages=VAE
    ),
    "ours": Contender(functools.partial(ours, config=EngineConfig()), 'cogvx_fast, engine="exact"'),
    "ours-eager": Contender(
        functools.partial(ours, config=EngineConfig(compile="off")),
        'cogvx_fast, engine="exact" with compile="off"',
        stages=DENOISING,
        devices=("cuda",),  # on a CPU that is what "ours" is
        rehearses=True,
    ),
    "ours-triton": Contender(
        functools.partial(ours, config=EngineConfig(attention="triton")),
        'cogvx_fast, engine="exact" with attention="triton"',
        stages=DENOISING,
        devices=("cuda",),
    ),
    "ours-cudnn-conv": Contender(
        functools.partial(our_layers, convolution="torch"),
        "our autoencoder's layers with our norms, the convolutions by torch, which on a GPU takes cuDNN's",
        stages=VAE,
        devices=("cuda",),
        rehearses=True,
    ),
    "ours-compile": Contender(
        functools.partial(ours, config=EngineConfig(compile="blocks")),
        'cogvx_fast, engine="exact" with compile="blocks"',
        stages=DENOISING,
    ),
    "ours-4GiB": Contender(
        functools.partial(ours, config=EngineConfig(vae_memory="4GiB")),
        "cogvx_fast with vae_memory='4GiB'",
        stages=VAE,
    ),
    "ours-1.5GiB": Contender(
        functools.partial(ours, config=EngineConfig(vae_memory="1.5GiB")),
        "cogvx_fast with vae_memory='1.5GiB'",
        stages=VAE,
    ),
    "arithmetic": Contender(
        arithmetic, "bound: the step's linears and attention alone", stages=("dit-step",), is_bound=True
    ),
    "arithmetic-packed": Contender(
        functools.partial(arithmetic, packed=True),
        "the same bound with weights prepacked for oneDNN",
        stages=("dit-step",),
        is_bound=True,
        devices=("cpu",),
    ),
    "products": Contender(
        functools.partial(arithmetic, attention=None),
        "part of the bound: the step's linears alone",
        stages=("dit-step",),
        is_bound=True,
        devices=("cuda",),
        rehearses=True,
    ),
    "attention": Contender(
        functools.partial(arithmetic, linears=False),
        "part of the bound: the step's attention alone",
        stages=("dit-step",),
        is_bound=True,
    ),
    **{
        f"attention-{name}": Contender(
            functools.partial(arithmetic, linears=False, attention=name),
            f"the same by {one.what}",
            stages=("dit-step",),
            is_bound=True,
            devices=("cuda",),
        )
        for name, one in engine.ATTENTIONS.items()
        if name != SDPA
    },
}
