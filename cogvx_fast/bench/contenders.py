"""Who runs in a benchmark: how each contender is made of diffusers' pipeline, whose weights all of them share."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import CogVideoXPipeline, DiffusionPipeline

from ..config import EngineConfig
from ..pipelines import accelerate
from ..vae import FastAutoencoderKLCogVideoX
from .arithmetic import arithmetic_call, flop
from .models import like
from .stages import STAGES, StageCall
from .workloads import Workload

_DENOISING = ("dit-step", "generation")
_VAE = ("vae-decode", "vae-encode")
_ALL = ("text", "dit-step", *_VAE, "generation", "cold-start")
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
    """

    pipeline: DiffusionPipeline
    call: StageCall | None = None
    engine: dict[str, Any] | None = None
    report: Callable[[], list[str]] = list
    loop: Callable[[], AbstractContextManager] | None = None
    compiling: Callable[[], AbstractContextManager] = contextlib.nullcontext
    note: str = ""
    extras: Mapping[str, float] = field(default_factory=dict)


Builder = Callable[[CogVideoXPipeline, Workload, str], Prepared]


@dataclass(frozen=True)
class Contender:
    """
    Attributes:
        build: `(diffusers' pipeline, workload, stage) -> Prepared`.
        what: in one line, for people.
        stages: in which it differs from the others; it is left out of the rest.
        is_bound: whether it is a lower bound, which has no result to be judged.
        lossy: what makes its result another one by design, or None; then its distance is stated and not judged.
        devices: types of device it runs on; None: all.
        floor_db: of one that may lose precision: the signal-to-noise ratio that its gate asks for instead.
        expected_gain, expected_why: in an ablation, the factor over the contender before that is expected, from what.
    """

    build: Builder
    what: str
    stages: tuple[str, ...] = _ALL
    is_bound: bool = False
    lossy: str | None = None
    devices: tuple[str, ...] | None = None
    floor_db: float | None = None
    expected_gain: float | None = None
    expected_why: str | None = None


def diffusers_eager(pipe: CogVideoXPipeline, workload: Workload, stage: str) -> Prepared:
    """The reference, as it is."""
    return Prepared(pipe)


def diffusers_compiled(pipe: CogVideoXPipeline, workload: Workload, stage: str, freezes: bool = False) -> Prepared:
    """diffusers with `torch.compile` of the transformer, with or without inductor's freezing of its weights."""
    # The option makes this another backend to dynamo, which would otherwise take the code that it compiled for the
    # other contender. It is not enough: whether weights become constants is read from the process-wide setting.
    options = {"freezing": True} if freezes else None
    compiled = torch.compile(pipe.transformer, fullgraph=True, options=options)
    return Prepared(like(pipe, transformer=compiled), compiling=freezing if freezes else contextlib.nullcontext)


def diffusers_tiled(pipe: CogVideoXPipeline, workload: Workload, stage: str) -> Prepared:
    """diffusers with its autoencoder in blended tiles."""
    vae = FastAutoencoderKLCogVideoX.adopt(pipe.vae).as_reference()
    vae.enable_tiling()
    return Prepared(like(pipe, vae=vae))


def diffusers_vae_compiled(pipe: CogVideoXPipeline, workload: Workload, stage: str) -> Prepared:
    """diffusers with `torch.compile` of its autoencoder's two halves."""
    vae = FastAutoencoderKLCogVideoX.adopt(pipe.vae).as_reference()
    vae.encoder, vae.decoder = torch.compile(vae.encoder), torch.compile(vae.decoder)
    return Prepared(like(pipe, vae=vae))


@contextlib.contextmanager
def freezing() -> Iterator[None]:
    """Within the block, and nowhere else, inductor makes constants of the weights of what it compiles."""
    import torch._inductor.config as inductor

    with inductor.patch(freezing=True):
        yield


def ours(pipe: CogVideoXPipeline, workload: Workload, stage: str, config: EngineConfig) -> Prepared:
    """The engine on the same weights, in a session as its pipeline opens one."""
    fast = accelerate(pipe, engine=config)

    def report() -> list[str]:
        lines = fast.engine_report().lines
        return [f"{line.name}: {'on' if line.applied else 'off'}: {line.detail}" for line in lines]

    return Prepared(
        fast,
        engine=as_plain(config),
        report=report,
        loop=fast.engine_session,
        note=_IN_SESSION if STAGES[stage].in_loop else "",
    )


def as_plain(config: EngineConfig) -> dict[str, Any]:
    """The fields of `config` as JSON has them."""
    values = dataclasses.asdict(config)
    return {name: value.value if isinstance(value, enum.Enum) else value for name, value in values.items()}


def arithmetic(
    pipe: CogVideoXPipeline, workload: Workload, stage: str, linears: bool = True, packed: bool = False
) -> Prepared:
    """What no exact step can do without: its matrix products and its attention, alone."""
    parts = ["the linears of all blocks and proj_out"] if linears else []
    note = f"only {' and '.join([*parts, 'scaled_dot_product_attention'])} on tensors of the step's shapes"
    call = arithmetic_call(pipe, workload, linears=linears, packed=packed)
    work = flop(workload, pipe)
    if not linears:
        del work["linear_flop"]
    return Prepared(pipe, call=call, note=note + (", weights prepacked for oneDNN" if packed else ""), extras=work)


# To add a contender, add a line.
CONTENDERS: dict[str, Contender] = {
    "diffusers": Contender(diffusers_eager, "diffusers, eager"),
    "diffusers-compile": Contender(
        diffusers_compiled, "diffusers, torch.compile of the transformer", stages=_DENOISING
    ),
    "diffusers-compile-freeze": Contender(
        functools.partial(diffusers_compiled, freezes=True),
        "the same with inductor's freezing (weights become constants)",
        stages=_DENOISING,
    ),
    "diffusers-tiled": Contender(
        diffusers_tiled,
        "diffusers with enable_tiling(), in the autoencoder's stages",
        stages=_VAE,
        lossy="tiles are blended, and GroupNorm's statistics are those of a tile",
    ),
    "diffusers-vae-compile": Contender(
        diffusers_vae_compiled, "diffusers, torch.compile of the autoencoder's encoder and decoder", stages=_VAE
    ),
    "ours": Contender(functools.partial(ours, config=EngineConfig()), 'cogvx_fast, engine="exact"'),
    "ours-compile": Contender(
        functools.partial(ours, config=EngineConfig(compile="blocks")),
        'cogvx_fast, engine="exact" with compile="blocks"',
        stages=_DENOISING,
    ),
    "ours-4GiB": Contender(
        functools.partial(ours, config=EngineConfig(vae_memory="4GiB")),
        "cogvx_fast with vae_memory='4GiB'",
        stages=_VAE,
    ),
    "ours-1.5GiB": Contender(
        functools.partial(ours, config=EngineConfig(vae_memory="1.5GiB")),
        "cogvx_fast with vae_memory='1.5GiB'",
        stages=_VAE,
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
    "attention": Contender(
        functools.partial(arithmetic, linears=False),
        "part of the bound: the step's attention alone",
        stages=("dit-step",),
        is_bound=True,
    ),
}
