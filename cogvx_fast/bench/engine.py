"""All that the benchmark asks of the engine beyond `EngineConfig` and `accelerate`: the one file to change with it."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cogvx_kernels import ops
from diffusers import CogVideoXTransformer3DModel
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention import sdpa
from ..config import EngineConfig
from ..family import HEAD_DIM
from ..memory.step import Tokens, step_memory
from ..memory.weights import Models, transformer_bytes
from ..plan import Implementation
from ..quantization import RECIPES
from ..quantization.apply import quantize_transformer, shared_copy, storage_bytes
from ..quantization.checkpoint import load_transformer
from ..quantization.convert import quantize_checkpoint
from ..quantization.manifest import read_manifest
from ..quantization.recipes import AS_THEY_ARE, Target, why_unsupported
from ..resolve import decide
from ..session import EngineSession
from ..vae import FastAutoencoderKLCogVideoX
from ..vae.choice import default_plan

# The type of device on which an implementation runs; torch's run on all.
IMPLEMENTED_ON: dict[str, str] = {"cpu": "cpu", "triton": "cuda"}


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention over bare query, key and value `(batch, tokens, heads, head_dim)`, and whose it is, in words."""

    what: str
    call: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _efficient(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return _sdpa(query, key, value)


SDPA = "sdpa"
ATTENTIONS = {
    SDPA: Attention("scaled_dot_product_attention", _sdpa),
    "cudnn": Attention("cuDNN's attention", sdpa.cudnn),
    "flash": Attention("the flash attention that torch has", sdpa.flash),
    "efficient": Attention("torch's memory-efficient attention", _efficient),
    "triton": Attention("our attention in Triton", functools.partial(ops.attention, impl="triton")),
}


def as_plain(config: EngineConfig) -> dict[str, Any]:
    """The fields of `config` as JSON has them."""
    values = dataclasses.asdict(config)
    return {name: value.value if isinstance(value, enum.Enum) else value for name, value in values.items()}


def config_of(pipe: Any) -> dict[str, Any] | None:
    """The fields of the configuration that a pipeline of ours runs with; None for diffusers' own."""
    config = getattr(pipe, "_config", None)
    return None if config is None else as_plain(config)


def report_lines(pipe: Any) -> list[str]:
    """What the engine report of a pipeline of ours says, a line for each pass."""
    return [f"{line.name}: {'on' if line.applied else 'off'}: {line.detail}" for line in pipe.engine_report().lines]


def reference_autoencoder(vae: Any) -> Any:
    """diffusers' own autoencoder on the modules of `vae`, so that its settings can differ."""
    return FastAutoencoderKLCogVideoX.adopt(vae).as_reference()


class PartlyFastAutoencoder(FastAutoencoderKLCogVideoX):
    """Our autoencoder in a generation whose plan says who computes: a state on the way to the engine."""

    operations: Implementation = "torch"
    convolution: Implementation = "torch"

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        with self._session():
            return super().decode(*args, **kwargs)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        with self._session():
            return super().encode(*args, **kwargs)

    def _session(self) -> AbstractContextManager[Any]:
        vae = dataclasses.replace(
            default_plan(self.device, self.dtype), operations=self.operations, convolution=self.convolution
        )
        plan = decide(EngineConfig(), device=self.device, dtype=self.dtype, head_dim=HEAD_DIM, vae=vae)
        return EngineSession(plan, None, self).active()


def partly_fast_autoencoder(
    vae: Any, operations: Implementation | None = None, convolution: Implementation | None = None
) -> Any:
    """Our autoencoder on the modules of `vae`, with these for what is between the convolutions, and for those.

    Args:
        operations, convolution: None: who computes them in the engine.

    Raises:
        ValueError: for what does not compute on the device of `vae`: C++ would read a GPU's addresses as its own.
    """
    default, device = default_plan(vae.device, vae.dtype), vae.device
    chosen = {
        "operations": default.operations if operations is None else operations,
        "convolution": default.convolution if convolution is None else convolution,
    }
    for name, value in chosen.items():
        if IMPLEMENTED_ON.get(value, device.type) != device.type:
            raise ValueError(f"{name}={value!r} runs on {IMPLEMENTED_ON[value]}, the autoencoder is on {device}")
    fast: Any = PartlyFastAutoencoder.adopt(vae)
    fast.operations, fast.convolution = chosen["operations"], chosen["convolution"]
    return fast


def recipe_names() -> list[str]:
    """The quantization recipes, in the order in which they are shown."""
    return list(RECIPES)


def recipes_on_a_cpu(dtype: torch.dtype) -> list[str]:
    """The recipes that this machine's CPU can run in `dtype`."""
    target = Target.of(torch.device("cpu"))
    return [name for name, recipe in RECIPES.items() if why_unsupported(recipe, target, dtype) is None]


def with_recipe(recipe: str | None) -> EngineConfig:
    """The engine with a recipe for the transformer alone; without one, exact."""
    return EngineConfig() if recipe is None else EngineConfig(recipe=recipe, text_encoder="native")


def quantized_copy(transformer: nn.Module, recipe: str) -> nn.Module:
    """The transformer with torchao's tensors in the recipe's linears; shares all other weights."""
    transformer = shared_copy(transformer)
    quantize_transformer(transformer, RECIPES[recipe])
    return transformer


def weights_bytes(pipe: Any) -> int:
    """The bytes of a pipeline's transformer, and of the copies in oneDNN's order that our last generation held."""
    transformer = pipe.transformer
    own: Any = transformer._orig_mod if is_compiled_module(transformer) else transformer
    ran = getattr(pipe, "_ran", None)
    copies = 0 if ran is None else sum(block.packed_bytes for block in ran.blocks)
    return sum(map(storage_bytes, own.parameters())) + copies


def quantized_checkpoint(folder: Path, recipe: str | None) -> Path:
    """The folder of the checkpoint in `folder` quantized, written beside it; itself without a recipe."""
    if recipe is None:
        return folder
    out = folder.with_name(f"{folder.name}-{recipe}")
    quantize_checkpoint(folder, out, recipe)
    return out


def read_transformer(folder: Path, recipe: str | None, dtype: torch.dtype) -> Any:
    """The transformer of a checkpoint, with a byte of every page of its weights read: what is mapped is resident."""
    transformer: Any
    if recipe is None:
        transformer = CogVideoXTransformer3DModel.from_pretrained(folder / "transformer", dtype=dtype)
    else:
        transformer = load_transformer(folder, read_manifest(folder))
    for parameter in transformer.parameters():
        quantized: Any = parameter
        parts = [quantized.qdata, quantized.scale] if hasattr(parameter, "qdata") else [parameter]
        for tensor in parts:
            torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage())[::4096].sum()
    return transformer


def predicted_bytes(
    transformer: Mapping[str, Any], shapes: Mapping[str, int], dtype: torch.dtype, recipe: str | None
) -> dict[str, int]:
    """What loading a transformer of this configuration and running a step of it on a CPU take, from shapes alone.

    Args:
        shapes: those of a row, see `reference.shapes`.
    """
    chosen, device = AS_THEY_ARE if recipe is None else RECIPES[recipe], torch.device("cpu")
    models = Models.from_configs(transformer, None, None)
    weights = transformer_bytes(models, chosen, dtype)
    tokens = Tokens(
        shapes["text_tokens"], shapes["video_tokens"], shapes["batch"], shapes["steps"], reads_positions=False
    )
    head_dim, vae = models.variant.attention_head_dim, default_plan(device, dtype)
    plan = decide(with_recipe(recipe), device=device, dtype=dtype, head_dim=head_dim, vae=vae, recipe=chosen)
    step = step_memory(models.variant, tokens, plan, mapped=True)
    return {
        "loading_predicted_bytes": weights,
        "running_predicted_bytes": weights + step.total,
        "packed_predicted_bytes": step.packed,
    }
