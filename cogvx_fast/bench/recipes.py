"""The quantization recipes as contenders: each beside exact, and beside diffusers with torchao on the same linears."""

from __future__ import annotations

import dataclasses
import functools

import torch
from diffusers import CogVideoXPipeline
from diffusers.utils.torch_utils import is_compiled_module

from ..config import EngineConfig
from ..quantization import RECIPES
from ..quantization.apply import quantize_transformer, shared_copy, storage_bytes
from .contenders import CONTENDERS, Builder, Contender, Prepared, freezing, ours
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


def weighed(build: Builder) -> Builder:
    """The same contender, which also says what its transformer's weights take, copies that a session holds included."""

    def with_weights(pipe: CogVideoXPipeline, workload: Workload, stage: str) -> Prepared:
        prepared = build(pipe, workload, stage)
        transformer = prepared.pipeline.transformer
        transformer = transformer._orig_mod if is_compiled_module(transformer) else transformer

        def late() -> dict[str, float]:
            session = getattr(transformer, "_session", None)
            copies = 0 if session is None else sum(plan.packed_bytes for plan in session.block_plans)
            return {"weights_bytes": sum(map(storage_bytes, transformer.parameters())) + copies}

        return dataclasses.replace(prepared, late_extras=late)

    return with_weights


def recipes() -> dict[str, Contender]:
    """Contenders in the order in which they alternate; exact is held to its own budget, the others to `FLOOR_DB`."""
    plain = {name: CONTENDERS[name] for name in ("diffusers", "ours")}
    contenders = {name: dataclasses.replace(one, build=weighed(one.build)) for name, one in plain.items()}

    def add(name: str, build: functools.partial, what: str, devices: tuple[str, ...] | None = None) -> None:
        contenders[name] = Contender(weighed(build), what, stages=_STAGES, devices=devices, floor_db=FLOOR_DB)

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
