"""The recipes as data: which linears are stored and multiplied in which 8-bit format, and where that works.

Never quantized, whatever the recipe: the modulation (`norm1.linear`, `norm2.linear`: CogVideoX 1.5 breaks with it, and
its table is computed once a generation), the patch, time and ofs embeddings, the final projection, and all norms. They
are named by no pattern here.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    import torch
    from torchao.core.config import AOBaseConfig

BALANCED = "balanced"
# The transformer as it is, where the text encoder alone is quantized.
NATIVE: Final = "native"
# The linears of a block that run over all tokens, as `named_modules()` of the transformer names them. With an adapter
# beside it, a linear lies one level deeper.
ATTENTION = r"transformer_blocks\.\d+\.attn1\.to_(q|k|v|out\.0)(\.base_layer)?"
FEED_FORWARD = r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)(\.base_layer)?"
# All linears of a T5 encoder; its embedding and its table of relative positions are none.
T5 = r"encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.(wi|wi_0|wi_1|wo))"
# torchao multiplies rowwise fp8 with the tensor cores that came with this compute capability.
FP8_CAPABILITY = (8, 9)
# What our own kernels for GPUs are made for, at least.
TRITON_CAPABILITY = (8, 0)


class Scheme(enum.StrEnum):
    """A format of weights and activations. "weight": activations stay as they are, the weight is widened when used."""

    INT8_WEIGHT = "int8-weight"
    INT8 = "int8"
    FP8_WEIGHT = "fp8-weight"
    FP8 = "fp8"

    @property
    def multiplies_8_bits(self) -> bool:
        """Whether the product itself is of 8-bit numbers: activations are rounded too, row by row, at every call."""
        return self in (Scheme.INT8, Scheme.FP8)

    def torchao_config(self) -> AOBaseConfig:
        """Scales: one for each output channel of a weight and, where they are rounded, each row of the activations."""
        from ..quiet import quiet_imports

        with quiet_imports():  # torchao deprecates a default of its own
            from torchao import quantization as ao

            # set_inductor_config would change process-wide settings of other people's compiled code.
            plain = {"version": 2, "set_inductor_config": False}
            match self:
                case Scheme.INT8_WEIGHT:
                    return ao.Int8WeightOnlyConfig(**plain)
                case Scheme.INT8:
                    return ao.Int8DynamicActivationInt8WeightConfig(**plain)
                case Scheme.FP8_WEIGHT:
                    return ao.Float8WeightOnlyConfig(**plain)
                case Scheme.FP8:
                    return ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), **plain)


@dataclass(frozen=True)
class QuantizedAttention:
    """How attention with Q and K in int8 treats V; its sums are fp32 either way, so that V's size cannot break them.

    Attributes:
        fp8_value: V and the probabilities in e4m3, where a GPU multiplies that: twice the rate of their product, and 9
            dB more noise. Otherwise they stay in 16 bits.
        smooth_value: take V's mean off before it is rounded and add it to the output. For `fp8_value` and checkpoints
            with a large bias in V, as CogVideoX-2b's (12 dB); in 16 bits it gains nothing.
    """

    fp8_value: bool = False
    smooth_value: bool = False

    def __str__(self) -> str:
        value = ("e4m3" if self.fp8_value else "16 bits") + (" without its mean" if self.smooth_value else "")
        return f"Q and K in int8, V in {value}"


@dataclass(frozen=True)
class Recipe:
    """
    Attributes:
        what: in one line, for people.
        layers: pattern of a linear's fully-qualified name in the transformer, and its scheme; the first match counts.
        text_encoder: the scheme of the text encoder's linears; None leaves them.
        attention: of attention where `attention="auto"` may take it: on GPUs where 8 bits gain time; None leaves it in
            16 bits.
    """

    name: str
    what: str
    layers: tuple[tuple[str, Scheme], ...]
    text_encoder: Scheme | None
    attention: QuantizedAttention | None = None

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of the linear called `name` in the transformer; None: it stays as it is."""
        return next((scheme for pattern, scheme in self.layers if re.fullmatch(pattern, name)), None)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        return tuple(dict.fromkeys(scheme for _, scheme in self.layers))


def _uniform(scheme: Scheme, what: str, text_encoder: Scheme) -> Recipe:
    attention = QuantizedAttention() if scheme.multiplies_8_bits else None
    return Recipe(scheme.value, what, ((ATTENTION, scheme), (FEED_FORWARD, scheme)), text_encoder, attention)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _uniform(Scheme.INT8, "int8 weights and activations: half the memory, twice the products", Scheme.INT8_WEIGHT),
        _uniform(Scheme.INT8_WEIGHT, "int8 weights: half the memory, no faster", Scheme.INT8_WEIGHT),
        _uniform(Scheme.FP8, "fp8 weights and activations: half the memory, twice the products", Scheme.FP8_WEIGHT),
        _uniform(Scheme.FP8_WEIGHT, "fp8 weights: half the memory, no faster", Scheme.FP8_WEIGHT),
    )
}
AS_THEY_ARE = Recipe(NATIVE, "weights as they are", (), None)
# Of the text encoder's linears; "native": they stay as they are.
TextScheme = Scheme | Literal["native"]
TEXT_ENCODER_SCHEMES = (Scheme.INT8_WEIGHT, Scheme.FP8_WEIGHT)


@dataclass(frozen=True)
class Target:
    """What a recipe is judged by: the type of a device and, of a GPU, its compute capability.

    `name` is for people; `int8_units`: of a CPU, what multiplies int8 matrices, None for nothing.
    """

    device: str
    name: str
    capability: tuple[int, int] | None = None
    int8_units: str | None = None

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """The target that `device` is.

        Raises:
            ValueError: for a GPU that torch does not find.
        """
        import torch

        from .. import machine

        if device.type == "cuda":
            try:
                capability = torch.cuda.get_device_capability(device)
            except (AssertionError, RuntimeError):  # a torch without CUDA, or no driver
                raise ValueError(f"device {device}: torch finds no GPU here") from None
            return cls(
                "cuda", f"{torch.cuda.get_device_name(device)} (compute capability {_dotted(capability)})", capability
            )
        if device.type == "cpu":
            units = machine.cpu_int8_units()
            return cls("cpu", f"a CPU with {units}" if units else "a CPU without int8 products", int8_units=units)
        return cls(device.type, device.type)


def targets() -> list[Target]:
    """What this machine could run a pipeline on, best first."""
    import torch

    gpus = [Target.of(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    return [*gpus, Target.of(torch.device("cpu"))]


def best(target: Target, dtype: torch.dtype) -> Recipe | None:
    """What `balanced` is on `target` for weights of `dtype`; None where 8 bits would gain no time: all stays as it is.

    fp8 rounds less than int8 where rows have outliers; torchao makes it of bf16 weights alone.
    """
    import torch

    if why_unsupported(RECIPES[Scheme.FP8], target, dtype) is None and dtype == torch.bfloat16:
        return RECIPES[Scheme.FP8]
    if target.capability is not None and target.capability >= (7, 5):
        return RECIPES[Scheme.INT8]
    return RECIPES[Scheme.INT8] if target.int8_units is not None else None


def why_unsupported(recipe: Recipe, target: Target, dtype: torch.dtype | None = None) -> str | None:
    """What keeps `recipe` from running on `target` with weights of `dtype` (None: of one that works), or None."""
    import torch

    if Scheme.FP8 in recipe.schemes and (target.capability is None or target.capability < FP8_CAPABILITY):
        return (
            f"fp8 products need a GPU of compute capability {_dotted(FP8_CAPABILITY)} or newer; this is {target.name}"
        )
    if Scheme.FP8 in recipe.schemes and dtype not in (None, torch.bfloat16):
        return f"torchao makes rowwise fp8 of bfloat16 weights, these are {str(dtype).removeprefix('torch.')}"
    return None


def why_no_native_products(recipe: Recipe, target: Target) -> str | None:
    """What keeps products of our own from running `recipe` on `target`, or None."""
    from cogvx_kernels import ops

    if target.device == "cuda":
        if not any(scheme.multiplies_8_bits for scheme in recipe.schemes):
            return f"on a GPU there are some for recipes 'int8' and 'fp8' alone, not for {recipe.name!r}"
        if target.capability is not None and target.capability < TRITON_CAPABILITY:
            return f"they need compute capability {_dotted(TRITON_CAPABILITY)} or newer; this is {target.name}"
        return ops.why_unavailable("scaled_linear", "triton")
    if target.device != "cpu":
        return f"there are none for {target.device}"
    if Scheme.INT8 not in recipe.schemes:
        return f"on a CPU there are some for recipe 'int8' alone, not for {recipe.name!r}"
    return ops.why_unavailable("int8_products", "cpu")


def check_possible(name: str, among: list[Target] | None = None) -> None:
    """Raise a ValueError for a recipe that no device of `among` (None: of this machine) can run; says what can."""
    among = targets() if among is None else among
    if name in RECIPES and all(why_unsupported(RECIPES[name], target) is not None for target in among):
        raise ValueError(refusal(RECIPES[name], among[0]))


def refusal(recipe: Recipe, target: Target, dtype: torch.dtype | None = None) -> str:
    """Why `recipe` cannot run on `target`, and which can."""
    working = ", ".join(repr(name) for name, other in RECIPES.items() if why_unsupported(other, target, dtype) is None)
    return f"recipe={recipe.name!r} cannot work here: {why_unsupported(recipe, target, dtype)}; what can: {working}"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
