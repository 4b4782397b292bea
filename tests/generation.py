"""Steps of a generation on a toy: plans made for the purpose, and the same step as diffusers computes it."""

from __future__ import annotations

import contextvars
import dataclasses
from typing import Any

import torch
from torch import nn

from cogvx_fast import EngineConfig
from cogvx_fast.plan import EnginePlan
from cogvx_fast.quantization.recipes import AS_THEY_ARE, RECIPES
from cogvx_fast.resolve import decide
from cogvx_fast.session import EngineSession, current
from cogvx_fast.transformer import FastCogVideoXTransformer3DModel
from cogvx_fast.transformer.binding import BoundBlock
from cogvx_fast.vae import choose_vae
from tests import toy


def fast_model(variant: str = "2b", **overrides: Any) -> FastCogVideoXTransformer3DModel:
    return FastCogVideoXTransformer3DModel.adopt(toy.transformer(variant, **overrides))


def forward_inputs(model, batch=2, seed=0, dtype=torch.float32, height=4, width=4) -> dict[str, Any]:
    """Random arguments of a forward pass, the same for the same `seed`; timesteps are no scheduler's."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    p_t = config.patch_size_t or 1
    frames = 3 + 3 % p_t
    tokens = frames // p_t * (height // 2) * (width // 2)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    arguments = {
        "hidden_states": randn(batch, frames, config.in_channels, height, width),
        "encoder_hidden_states": randn(batch, toy.TEXT_LENGTH, toy.TEXT_DIM),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
    }
    if config.use_rotary_positional_embeddings:
        angles = torch.rand(tokens, config.attention_head_dim // 2, generator=generator).repeat_interleave(2, 1) * 6
        arguments["image_rotary_emb"] = (angles.cos(), angles.sin())
    if config.ofs_embed_dim:
        arguments["ofs"] = torch.full((1,), 2.0)
    return arguments


def plan(model: nn.Module, changes: dict[str, Any] | None = None, **config: Any) -> EnginePlan:
    """What is decided for `model` where it is, with some fields as `changes` says."""
    config, device, dtype = EngineConfig(**config), model.device, model.dtype
    made = decide(
        config,
        device=device,
        dtype=dtype,
        head_dim=model.config.attention_head_dim,
        vae=choose_vae(device, dtype, None, None, None),
        recipe=RECIPES.get(config.recipe, AS_THEY_ARE),
    )
    return dataclasses.replace(made, **changes or {})


def session(
    model: nn.Module, num_steps: int = 5, plan: EnginePlan | None = None, watched: bool = True, **config: Any
) -> EngineSession:
    """A generation of `num_steps`, not entered yet, by `plan` or by what `config` leads to."""
    scheduler = toy.scheduler()
    scheduler.set_timesteps(num_steps)
    return EngineSession(plan or _plan(model, **config), model, None, scheduler, watched)


_plan = plan


@torch.no_grad()
def run(model: nn.Module, generation: EngineSession, step: int = 0, **sizes: Any) -> torch.Tensor:
    """A step of `generation`; where that is not entered, a generation of this step alone."""
    arguments = _of_step(model, generation, step, sizes)
    if current(model) is generation:
        return model(**arguments).sample
    with generation.active():
        return model(**arguments).sample


@torch.no_grad()
def plain(model: nn.Module, generation: EngineSession, step: int = 0, **sizes: Any) -> torch.Tensor:
    """The same step where no generation runs: diffusers' own."""
    return outside(model, _of_step(model, generation, step, sizes))


def outside(model: nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    """A forward pass where no generation runs, wherever this is called."""
    return contextvars.Context().run(model, **arguments).sample


def _of_step(model: nn.Module, generation: EngineSession, step: int, sizes: dict[str, Any]) -> dict[str, Any]:
    arguments = forward_inputs(model, **sizes)
    batch = len(arguments["timestep"])
    return arguments | {"timestep": generation.scheduler.timesteps[step].expand(batch)}


def bound(model: nn.Module, generation: EngineSession) -> list[BoundBlock]:
    """How each block of a generation that is entered runs."""
    return [generation.bindings[block] for block in model.transformer_blocks]


def relative(output: torch.Tensor, expected: torch.Tensor) -> float:
    return ((output.float() - expected.float()).norm() / expected.float().norm()).item()
