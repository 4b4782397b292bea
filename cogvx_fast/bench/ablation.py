"""The ablation: from diffusers to the whole engine, one optimization more in each row, with what it should gain."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from diffusers import CogVideoXPipeline

from ..config import EngineConfig
from ..vae import FastAutoencoderKLCogVideoX
from ..vae.place import Place
from .contenders import CONTENDERS, Builder, Contender, Prepared, ours
from .models import like
from .workloads import Workload


@dataclass(frozen=True)
class Addition:
    """One row of the ablation.

    Attributes:
        name: of what is added to the row before.
        config: the engine with it, and with all that the rows before have.
        expected: the factor over the row before, by workload and dtype ("dit-2b bfloat16"), predicted and not
            measured; what is not in it was not predicted.
        why: the arithmetic behind the prediction.
    """

    name: str
    config: EngineConfig
    expected: Mapping[str, float] = field(default_factory=dict)
    why: str = ""


_OFF = {
    "modulation_table": False,
    "reuse_text_projection": False,
    "fuse_projections": False,
    "pack_weights": False,
    "fuse_operations": False,
    "fast_vae": False,
    "attention": "sdpa",
    "compile": "off",
}


def _engine(*added: str, **other: str) -> EngineConfig:
    """Nothing of the engine but its joint stream, and the options `added`."""
    return EngineConfig(**(_OFF | dict.fromkeys(added, True) | other))


_TEXT = ("reuse_text_projection",)
_TABLE = (*_TEXT, "modulation_table")
_MERGED = (*_TABLE, "fuse_projections")
_PACKED = (*_MERGED, "pack_weights")
_FUSED = (*_PACKED, "fuse_operations")

# Predictions are for a CPU with AMX. Work of one dit-2b step: 646 GFLOP in linears, 68 in attention. Where a prediction
# rests on the time of an operation alone, it was measured on bare tensors of its size.
ADDITIONS: tuple[Addition, ...] = (
    Addition(
        "joint stream",
        _engine(),
        {"dit-2b bfloat16": 1.06},
        "copies are 6% of diffusers' bf16 step by its profile, most of them cat and split of the two streams",
    ),
    Addition(
        "+ text projection once",
        _engine(*_TEXT),
        {"dit-2b bfloat16": 1.01, "dit-2b float32": 1.01},
        "2 x 226 rows of 4096 to 1920 are 7 of 714 GFLOP",
    ),
    Addition(
        "+ modulation table",
        _engine(*_TABLE),
        {"dit-2b bfloat16": 1.005, "dit-2b float32": 1.003},
        "71 MB of bf16 weights (142 MB in fp32) for two rows: 3.5 ms (7 ms) at 20 GB/s",
    ),
    Addition(
        "+ merged Q, K, V",
        _engine(*_MERGED),
        {"dit-2b bfloat16": 1.005, "dit-2b float32": 1.0},
        "the input, 9.3 MB in bf16, is read once instead of three times: 1 of 215 ms a layer",
    ),
    Addition(
        "+ packed weights",
        _engine(*_PACKED),
        {"dit-2b bfloat16": 1.25},
        "the four products and GELU of a layer alone: 160 ms with plain weights, 112 ms packed with GELU at their end",
    ),
    Addition(
        "+ fused operations",
        _engine(*_FUSED),
        {"dit-2b bfloat16": 1.12},
        "norms, gates and modulation as torch operations go through memory about ten times in fp32: 25 ms a layer;"
        " fused, they read and write the stream once: 6 ms",
    ),
    Addition(
        "+ attention of our own",
        _engine(*_FUSED, attention="auto"),
        {"dit-2b bfloat16": 1.14},
        "42 ms a layer in torch's SDPA alone, 22 ms in ours; without AMX, on one core with AVX512-BF16, 279 and 111 ms",
    ),
    Addition(
        "+ fast autoencoder",
        _engine(*_FUSED, attention="auto", fast_vae=None),
    ),
    Addition(
        "+ compiled where it pays",
        _engine(*_FUSED, attention="auto", compile="auto", fast_vae=None),
        {"dit-2b bfloat16": 1.0, "dit-2b float32": 1.0},
        "nowhere on a CPU: what inductor would fuse is fused already",
    ),
)


def _channels_last(pipe: CogVideoXPipeline, workload: Workload, stage: str) -> Prepared:
    """diffusers' own autoencoder, its weights in the layout of channels-last frames, which convolutions hand on."""
    vae = copy.deepcopy(pipe.vae)
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return Prepared(like(pipe, vae=vae))


def _layers(pipe: CogVideoXPipeline, workload: Workload, stage: str, impl: str, product: str) -> Prepared:
    """Our layers on the same modules, with an implementation of what is between the convolutions, and of these."""
    vae = FastAutoencoderKLCogVideoX.adopt(pipe.vae)
    vae.place = Place(vae.device, vae.dtype, impl, product)
    return Prepared(like(pipe, vae=vae))


_BETWEEN = "a state on the way, not what the engine runs"
# Of the autoencoder's decoder: 9 frames of 64x96 are 1.04 TFLOP as diffusers computes them, 90% in 3x3x3 convolutions
# and 9% in upsampling; 0.98 are needed. Predictions are for a CPU that multiplies bf16 at 0.4 and fp32 at 0.2 TFLOP/s
# (AVX-512, two cores).
VAE_ADDITIONS: tuple[tuple[str, Builder, Mapping[str, float], str], ...] = (
    (
        "channels-last weights",
        _channels_last,
        {"bfloat16": 1.0, "float32": 1.0},
        "without AMX both layouts' convolutions run at the peak of the units; copies to and fro stay",
    ),
    (
        "our layers",
        functools.partial(_layers, impl="torch", product="torch"),
        {"bfloat16": 1.2, "float32": 1.2},
        "no cat, no clone, no pointwise convolution at full size: half of the 15% that are no convolutions; upsampling"
        " as four phases: 20/36 of its 9% of the products",
    ),
    (
        "+ norms in one pass",
        functools.partial(_layers, impl="cpu", product="torch"),
        {"bfloat16": 1.1, "float32": 1.05},
        "norm, modulation and SiLU as torch operations go through memory about eight times in fp32, fused they read and"
        " write once",
    ),
    (
        "+ our convolutions",
        functools.partial(_layers, impl="cpu", product="cpu"),
        {"bfloat16": 1.0, "float32": 1.8},
        "Winograd's: in fp32 16 of 36 products, for 85% of what is left; in bf16 36 of 144, but in fp32 units, which"
        " have less than half of the rate, and not for few pixels: at 64x96 most layers have too few",
    ),
)


def vae_ablation(workload: str, dtype: str) -> dict[str, Contender]:
    """The same for the autoencoder, as far as it has anything for `dtype`."""
    contenders = {"diffusers": CONTENDERS["diffusers"]}
    for name, build, expected, why in VAE_ADDITIONS:
        if dtype in expected:
            gain = expected[dtype] if workload == "vae" else None
            contenders[name] = Contender(
                build,
                name,
                stages=("vae-decode",),
                expected_gain=gain,
                expected_why=None if gain is None else why,
                # The layout alone rounds more than the contract allows in fp32: that is why it is not what runs.
                lossy=_BETWEEN if dtype == "float32" and name != "+ our convolutions" else None,
            )
    return contenders


def ablation(workload: str, dtype: str, additions: Sequence[Addition] = ADDITIONS) -> dict[str, Contender]:
    """Contenders in the order of the ablation; the first is diffusers, eager."""
    if workload.startswith("vae"):
        return vae_ablation(workload, dtype)
    contenders = {"diffusers": CONTENDERS["diffusers"]}
    for addition in additions:
        expected = addition.expected.get(f"{workload} {dtype}")
        contenders[addition.name] = Contender(
            functools.partial(ours, config=addition.config),
            addition.name,
            stages=("dit-step", "generation"),
            expected_gain=expected,
            expected_why=addition.why if expected is not None else None,
        )
    return contenders
