"""The ablation: from diffusers to the whole engine, one optimization more in each row, with what it should gain."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .comparison import BASELINE, TimedSeries

if TYPE_CHECKING:
    import torch

    from .contenders import Contender
    from .workloads import Workload


@dataclass(frozen=True)
class Addition:
    """One row of the ablation.

    Attributes:
        name: of what is added to the row before.
        options: of the `EngineConfig` that add it, to those of the rows before.
        expected: the factor over the row before on a CPU, by workload and dtype ("dit-2b bfloat16"), predicted and not
            measured; what is not in it was not predicted.
        why: the arithmetic behind the prediction.
        devices: types of device on which it is something; None: all.
    """

    name: str
    options: Mapping[str, Any]
    expected: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    devices: tuple[str, ...] | None = None


# Predictions are for a CPU with AMX. Work of one dit-2b step: 646 GFLOP in linears, 68 in attention. Where a prediction
# rests on the time of an operation alone, it was measured on bare tensors of its size.
ADDITIONS: tuple[Addition, ...] = (
    Addition(
        "joint stream",
        {
            "modulation_table": False,
            "reuse_text_projection": False,
            "fuse_projections": False,
            "pack_weights": False,
            "fuse_operations": False,
            "fast_vae": False,
            "attention": "sdpa",
            "compile": "off",
        },
        {"dit-2b bfloat16": 1.06},
        "copies are 6% of diffusers' bf16 step by its profile, most of them cat and split of the two streams",
    ),
    Addition(
        "+ text projection once",
        {"reuse_text_projection": True},
        {"dit-2b bfloat16": 1.01, "dit-2b float32": 1.01},
        "2 x 226 rows of 4096 to 1920 are 7 of 714 GFLOP",
    ),
    Addition(
        "+ modulation table",
        {"modulation_table": True},
        {"dit-2b bfloat16": 1.005, "dit-2b float32": 1.003},
        "71 MB of bf16 weights (142 MB in fp32) for two rows: 3.5 ms (7 ms) at 20 GB/s",
    ),
    Addition(
        "+ merged Q, K, V",
        {"fuse_projections": True},
        {"dit-2b bfloat16": 1.005, "dit-2b float32": 1.0},
        "the input, 9.3 MB in bf16, is read once instead of three times: 1 of 215 ms a layer",
    ),
    Addition(
        "+ packed weights",
        {"pack_weights": True},
        {"dit-2b bfloat16": 1.25},
        "the four products and GELU of a layer alone: 160 ms with plain weights, 112 ms packed with GELU at their end",
        devices=("cpu",),
    ),
    Addition(
        "+ fused operations",
        {"fuse_operations": True},
        {"dit-2b bfloat16": 1.12},
        "norms, gates and modulation as torch operations go through memory about ten times in fp32: 25 ms a layer;"
        " fused, they read and write the stream once: 6 ms",
    ),
    Addition(
        "+ attention of our own",
        {"attention": "auto"},
        {"dit-2b bfloat16": 1.14},
        "42 ms a layer in torch's SDPA alone, 22 ms in ours; without AMX, on one core with AVX512-BF16, 279 and 111 ms",
        devices=("cpu",),
    ),
    # On a GPU it takes a package that is known to be faster, or torch's again.
    Addition("+ the fastest attention that is known", {"attention": "auto"}, devices=("cuda",)),
    Addition("+ fast autoencoder", {"fast_vae": None}),
    Addition(
        "+ compiled where it pays",
        {"compile": "auto"},
        {"dit-2b bfloat16": 1.0, "dit-2b float32": 1.0},
        "nowhere on a CPU: what inductor would fuse is fused already",
    ),
)
# Of the autoencoder's decoder, by dtype: 9 frames of 64x96 are 1.04 TFLOP as diffusers computes them, 90% in 3x3x3
# convolutions and 9% in upsampling; 0.98 are needed. Predictions are for a CPU that multiplies bf16 at 0.4 and fp32 at
# 0.2 TFLOP/s (AVX-512, two cores). Options: which implementations compute what is between convolutions, and these; our
# own are in C++ on a CPU and in Triton on a GPU, where they take half precision only.
_CPU, _GPU = ("cpu",), ("cuda",)
VAE_ADDITIONS: tuple[Addition, ...] = (
    Addition(
        "channels-last weights",
        {},
        {"bfloat16": 1.0, "float32": 1.0},
        "without AMX both layouts' convolutions run at the peak of the units; copies to and fro stay",
    ),
    Addition(
        "our layers",
        {"operations": "torch", "convolution": "torch"},
        {"bfloat16": 1.2, "float32": 1.2},
        "no cat, no clone, no pointwise convolution at full size: half of the 15% that are no convolutions; upsampling"
        " as four phases: 20/36 of its 9% of the products",
    ),
    Addition(
        "+ norms in one pass",
        {"operations": "cpu"},
        {"bfloat16": 1.1, "float32": 1.05},
        "norm, modulation and SiLU as torch operations go through memory about eight times in fp32, fused they read and"
        " write once",
        devices=_CPU,
    ),
    Addition("+ norms in one pass, in Triton", {"operations": "triton"}, devices=_GPU),
    Addition("+ our convolutions, in Triton", {"convolution": "triton"}, devices=_GPU),
    Addition(
        "+ our convolutions",
        {"convolution": "cpu"},
        {"bfloat16": 1.0, "float32": 1.8},
        "Winograd's: in fp32 16 of 36 products, for 85% of what is left; in bf16 36 of 144, but in fp32 units, which"
        " have less than half of the rate, and not for few pixels: at 64x96 most layers have too few",
        devices=_CPU,
    ),
)
# Precisions in which the autoencoder's states are what the engine runs on such a device.
_VAE_DTYPES = {"cpu": ("bfloat16", "float32"), "cuda": ("bfloat16", "float16")}


class Ablation(TimedSeries):
    """One optimization more in each row, beside the gain over the row before that was expected of it."""

    name = label = "ablation"
    columns = (*TimedSeries.columns[:3], "x the row before", "expected", *TimedSeries.columns[3:])

    @classmethod
    def contenders(cls, workload: Workload, dtype: str, device: torch.device) -> Mapping[str, Contender]:
        """The states on the way to the whole engine, or, for a workload of the autoencoder, to its decoder.

        What is nothing on `device` is among them, with no options taken from it.
        """
        from .contenders import CONTENDERS, DENOISING

        of_model = _of_transformer if set(DENOISING) & set(workload.stages) else _of_autoencoder
        return {BASELINE: CONTENDERS[BASELINE], **of_model(workload.name, dtype, device)}


def _of_transformer(workload: str, dtype: str, device: torch.device) -> dict[str, Contender]:
    from ..config import EngineConfig
    from .contenders import DENOISING, Contender, ours

    options: dict[str, Any] = {}
    contenders = {}
    for addition in ADDITIONS:
        # Also where it is nothing: all additions make the whole engine, on every device.
        options |= addition.options
        expected = addition.expected.get(f"{workload} {dtype}") if device.type == "cpu" else None
        contenders[addition.name] = Contender(
            functools.partial(ours, config=EngineConfig(**options)),
            addition.name,
            stages=DENOISING,
            devices=addition.devices,
            expected_gain=expected,
            expected_why=None if expected is None else addition.why,
        )
    return contenders


def _of_autoencoder(workload: str, dtype: str, device: torch.device) -> dict[str, Contender]:
    from .contenders import Contender, diffusers_channels_last, our_layers

    if dtype not in _VAE_DTYPES.get(device.type, ()):
        return {}
    options: dict[str, Any] = {}
    contenders = {}
    last = [addition for addition in VAE_ADDITIONS if addition.devices is None or device.type in addition.devices][-1]
    for addition in VAE_ADDITIONS:
        runs = addition.devices is None or device.type in addition.devices
        if runs:
            options |= addition.options
        expected = addition.expected[dtype] if runs and workload == "vae" and device.type == "cpu" else None
        # The layout alone rounds more than the contract allows in fp32: that is why it is not what runs.
        on_the_way = dtype == "float32" and addition is not last
        contenders[addition.name] = Contender(
            functools.partial(our_layers, **options) if options else diffusers_channels_last,
            addition.name,
            stages=("vae-decode",),
            devices=addition.devices,
            expected_gain=expected,
            expected_why=None if expected is None else addition.why,
            lossy="a state on the way, not what the engine runs" if on_the_way else None,
        )
    return contenders
