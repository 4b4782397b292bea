"""The quantization recipes as contenders: each beside exact, and beside diffusers with torchao on the same linears."""

from __future__ import annotations

import functools

import torch
from diffusers import CogVideoXPipeline

from ..config import EngineConfig
from ..quantization import RECIPES
from ..quantization.apply import quantize_transformer, shared_copy
from .contenders import CONTENDERS, Contender, Prepared, freezing, ours
from .gate import FLOOR_DB
from .models import like
from .workloads import Workload

_STAGES = ("dit-step", "generation")
_ON_GPU = {"fp8": ("cuda",)}


def diffusers_torchao(
    pipe: CogVideoXPipeline, workload: Workload, stage: str, recipe: str, compiles: bool = False
) -> Prepared:
    """diffusers with torchao's tensors in the recipe's linears, as its own quantizer would put them there."""
    transformer = shared_copy(pipe.transformer)
    quantize_transformer(transformer, RECIPES[recipe])
    if not compiles:
        return Prepared(like(pipe, transformer=transformer))
    compiled = torch.compile(transformer, fullgraph=True, options={"freezing": True})
    return Prepared(like(pipe, transformer=compiled), compiling=freezing)


def recipes() -> dict[str, Contender]:
    """Contenders in the order in which they alternate; exact is held to its own budget, the others to `FLOOR_DB`."""
    contenders = {name: CONTENDERS[name] for name in ("diffusers", "ours")}

    def add(name: str, build: functools.partial, what: str, devices: tuple[str, ...] | None = None) -> None:
        contenders[name] = Contender(build, what, stages=_STAGES, devices=devices, floor_db=FLOOR_DB)

    for name in RECIPES:
        config = EngineConfig(recipe=name, text_encoder="native")
        add(f"ours-{name}", functools.partial(ours, config=config), f"cogvx_fast, recipe {name}", _ON_GPU.get(name))
    torchaos = EngineConfig(recipe="int8", text_encoder="native", gemm="torchao")
    add("ours-int8-torchao", functools.partial(ours, config=torchaos), "the same with torchao's own products")
    inductors = EngineConfig(recipe="int8", text_encoder="native", compile="blocks")
    add("ours-int8-compile", functools.partial(ours, config=inductors), 'recipe int8 with compile="blocks"')
    for suffix, compiles in (("", False), ("-compile-freeze", True)):
        build = functools.partial(diffusers_torchao, recipe="int8", compiles=compiles)
        add(f"diffusers-int8{suffix}", build, f"diffusers with torchao's int8{suffix.replace('-', ' ')}")
    return contenders
