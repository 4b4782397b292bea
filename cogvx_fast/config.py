"""What the engine may do: presets by name, details by field, all checked when made."""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import TYPE_CHECKING

from .parallel.degrees import AUTO, ParallelConfig, Payload
from .quantization.recipes import BALANCED, NATIVE, RECIPES, TEXT_ENCODER_SCHEMES, QuantizedAttention, check_possible
from .turbo.speeds import MOST_SPEED, SPEEDS

TURBO = "turbo"
# Tier -> what it may change.
TIERS = {
    "exact": "the order of rounding",
    BALANCED: "the precision of GEMMs and attention",
    TURBO: "which steps are computed, and the precision of GEMMs and attention",
}


class AttentionBackend(enum.StrEnum):
    """What computes attention; `AUTO` takes the fastest that works for the device, dtype and tier.

    `SDPA` leaves it to torch which of its kernels runs, the report names it; `SDPA_CUDNN` and `SDPA_FLASH` are the two
    of them for GPUs.
    """

    AUTO = "auto"
    SDPA = "sdpa"
    SDPA_CUDNN = "sdpa-cudnn"
    SDPA_FLASH = "sdpa-flash"
    FLASH = "flash-attn"
    FLASH_3 = "flash-attn-3"
    XFORMERS = "xformers"
    SAGE = "sage"
    AMX = "amx"
    AVX512 = "avx512"
    TRITON = "triton"
    TRITON_INT8 = "triton-int8"


class QuantizedGemm(enum.StrEnum):
    """What multiplies quantized weights; `AUTO` takes ours where there is one for the device and the recipe.

    On a GPU it does so where every product of a block can be ours: norms and GELU then write 8 bits, and nothing else,
    for the next product. `NATIVE` takes those that can be.
    """

    AUTO = "auto"
    TORCHAO = "torchao"
    NATIVE = "native"


class CompileMode(enum.StrEnum):
    """What of the transformer `torch.compile` takes.

    `AUTO`: nothing, but on a GPU "blocks" where some of a block is tensor code, which inductor fuses: torchao's
    products, or norms and gates in torch's form. The report says why.
    """

    AUTO = "auto"
    OFF = "off"
    BLOCKS = "blocks"
    FULL = "full"


if TYPE_CHECKING:

    class Size:
        """A field that is given as bytes or as "4GiB" and read as bytes."""

        def __get__(self, config: object, owner: type | None = None) -> int | None: ...

        def __set__(self, config: object, value: int | str | None) -> None: ...

    _NO_SIZE = Size()
else:
    Size, _NO_SIZE = int | str | None, None  # no descriptor: `__post_init__` puts bytes in the place of what is given


@dataclass(frozen=True)
class EngineConfig:
    """How a pipeline is made fast. Immutable; a string such as `"exact"` stands for the preset of that name.

    Attributes:
        tier: the contract, one of `TIERS`; None: "balanced" with a recipe, else "exact". With a memory limit and no
            recipe it stays None until that has chosen: "exact" if that fits, else "balanced".
        recipe: which linears are quantized and how, one of `quantization.RECIPES`; "balanced", which is what its tier
            takes if none is named, stands for the best for the device and dtype, named in the report; "native" leaves
            the transformer as it is. A recipe that no device of this machine can run is refused when the pipeline is
            made.
        text_encoder: likewise for the text encoder, one of `quantization.TEXT_ENCODER_SCHEMES`; "auto": the recipe's,
            "native": as it is.
        gemm: a `QuantizedGemm` or its value: who multiplies. Both give the same numbers within rounding.
        modulation_table: compute the AdaLN modulation of all steps once a generation instead of
            twice per layer and step. Changes nothing but the order of rounding.
        reuse_text_projection: project the prompt to the transformer's width once a generation
            instead of once a step. Changes nothing.
        fuse_projections: compute Q, K and V in one product. Changes nothing but the order of rounding.
        pack_weights: on a CPU, hold a copy of the blocks' weights in oneDNN's own order while a generation runs,
            instead of reordering them in every call. Costs as much memory again as those weights take.
        fuse_operations: do what stands between the matrix products (norms, modulation, gates, rotations) in one pass
            each: in Triton on a GPU, in C++ on a CPU that has a compiler. Changes nothing but the order of rounding.
        compile: a `CompileMode` or its value. "blocks" compiles one block and uses it for all, "full" the whole loop
            over them, which takes as many times longer to compile as there are blocks.
        fast_vae: run the autoencoder layer by layer on channels-last frames. Changes nothing but the order of rounding.
            None: wherever that keeps the tier's contract. In fp32 on a CPU that needs a C++ compiler: torch's
            channels-last convolutions round two to three times as much as the order that diffusers uses.
        vae_memory: what the autoencoder's frames may take, in bytes or as "4GiB": layers are then computed some rows at
            a time, which changes nothing but the order of rounding. None: as little as costs no time.
        memory_limit: what the tensors of a generation may take on its device, in bytes or as "8GiB", weights included.
            Chosen is, when the pipeline is made and again for the size of each generation, the most exact way that
            fits: which of `recipe`, `text_encoder`, `pack_weights` and `vae_memory` stand at their defaults, and on a
            GPU whether each model is there only while it runs. See the report; None: no limit.
        attention: an `AttentionBackend` or its value. Whether it can work is decided for the device
            when a generation starts; one that works nowhere is refused when the pipeline is made.
        quantized_attention: how attention in 8 bits, chosen by "auto" or by name, treats V; None: as the recipe says.
        speed: of tier "turbo": steps of a generation for each evaluation of the network, a number from 1 or one of
            `turbo.SPEEDS`.
        schedule: of tier "turbo": the file of schedules that `cogvx-fast calibrate` wrote; None: the one that comes
            with the package for the checkpoint, or one from published coefficients. Read when a pipeline is made.
        parallel: how the processes that `torch.distributed` has make one clip together, a `ParallelConfig`; "auto": as
            follows from their number; None: each makes clips of its own. All of them must make the same calls.
    """

    tier: str | None = None
    recipe: str | None = None
    text_encoder: str = "auto"
    gemm: QuantizedGemm | str = QuantizedGemm.AUTO
    modulation_table: bool = True
    reuse_text_projection: bool = True
    fuse_projections: bool = True
    pack_weights: bool = True
    fuse_operations: bool = True
    fast_vae: bool | None = None
    vae_memory: Size = _NO_SIZE
    memory_limit: int | str | None = None
    compile: CompileMode | str = CompileMode.AUTO
    attention: AttentionBackend | str = AttentionBackend.AUTO
    quantized_attention: QuantizedAttention | None = None
    speed: float | str = 2.0
    schedule: str | os.PathLike[str] | None = None
    parallel: ParallelConfig | str | None = None

    def __post_init__(self) -> None:
        if self.tier is None and self.recipe is not None:
            object.__setattr__(self, "tier", BALANCED)
        if self.tier is None and self.memory_limit is None:
            object.__setattr__(self, "tier", "exact")
        if self.tier is not None and not isinstance(self.tier, str):
            raise ValueError(f"EngineConfig.tier={shown(self.tier)} must be a string or None; strings: {_names()}")
        if self.tier not in (None, *TIERS):
            raise ValueError(f"engine tier {shown(self.tier)} is unknown; available: {_names()}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise ValueError(f"EngineConfig.{field.name}={shown(value)} must be True or False")
        if not isinstance(self.fast_vae, bool | None):
            raise ValueError(f"EngineConfig.fast_vae={shown(self.fast_vae)} must be None, True or False")
        if not isinstance(self.quantized_attention, QuantizedAttention | None):
            raise ValueError(
                f"EngineConfig.quantized_attention={shown(self.quantized_attention)} must be None or a"
                " cogvx_fast.quantization.QuantizedAttention"
            )
        self._check_turbo()
        self._check_recipe()
        self._check_parallel()
        self._enforce("gemm", QuantizedGemm)
        self._enforce("attention", AttentionBackend)
        self._enforce("compile", CompileMode)
        for name in ("vae_memory", "memory_limit"):
            if getattr(self, name) is None:
                continue
            object.__setattr__(self, name, _bytes(name, getattr(self, name)))
            if self.fast_vae is False:
                raise ValueError(f"EngineConfig.{name} needs fast_vae=True: diffusers' own code knows no budget")
            object.__setattr__(self, "fast_vae", True)  # a budget asks for it

    def _check_recipe(self) -> None:
        schemes = ("auto", "native", *map(str, TEXT_ENCODER_SCHEMES))
        recipes = (BALANCED, NATIVE, *RECIPES)
        if not _is_one_of(self.text_encoder, schemes):
            raise _unknown("text_encoder", self.text_encoder, schemes)
        if self.recipe is not None and not _is_one_of(self.recipe, recipes):
            raise _unknown("recipe", self.recipe, recipes)
        if self.tier == "exact":
            for name, default in (("recipe", None), ("text_encoder", "auto"), ("quantized_attention", None)):
                value = getattr(self, name)
                if value != default:
                    raise ValueError(
                        f"EngineConfig.{name}={value!r} changes precision, which tier 'exact' does not; use tier="
                        f"{BALANCED!r}"
                    )
            return
        if self.tier is None:
            return
        if self.recipe is None:
            object.__setattr__(self, "recipe", BALANCED)

    def _check_parallel(self) -> None:
        if not (isinstance(self.parallel, ParallelConfig | None) or _is_one_of(self.parallel, (AUTO,))):
            raise ValueError(
                f"EngineConfig.parallel={shown(self.parallel)} must be None, {AUTO!r} or a cogvx_fast.ParallelConfig"
            )
        lossy = isinstance(self.parallel, ParallelConfig) and self.parallel.payload is not Payload.NATIVE
        if lossy and self.tier == "exact":
            raise ValueError(
                "ParallelConfig.payload='int8' changes precision, which tier 'exact' does not; use tier"
                f"={BALANCED!r} or payload='native'"
            )

    def _check_turbo(self) -> None:
        speed: object = self.speed
        number = isinstance(speed, int | float) and not isinstance(speed, bool) and 1 <= speed <= MOST_SPEED
        if not (number or _is_one_of(speed, SPEEDS)):
            names = ", ".join(map(repr, SPEEDS))
            raise ValueError(
                f"EngineConfig.speed={shown(speed)} must be a number from 1 to {MOST_SPEED} or one of {names}"
            )
        if not isinstance(self.schedule, str | os.PathLike | None):
            raise ValueError(f"EngineConfig.schedule={shown(self.schedule)} must be a path or None")
        for name, default in (("speed", 2.0), ("schedule", None)):
            value = getattr(self, name)
            if self.tier != TURBO and value != default:
                raise ValueError(
                    f"EngineConfig.{name}={shown(value)} must be left at {default}: only tier {TURBO!r} has it"
                )

    @property
    def skips_steps(self) -> bool:
        """Whether not all steps are computed."""
        return self.tier == TURBO

    @property
    def schedule_path(self) -> str | None:
        return None if self.schedule is None else os.fspath(self.schedule)

    def check_machine(self) -> None:
        """Raise a ValueError if no device of this machine can run this; called before anything is loaded."""
        if self.recipe is not None:
            check_possible(self.recipe)

    def _enforce(self, name: str, kind: type[enum.StrEnum]) -> None:
        value, allowed = getattr(self, name), [member.value for member in kind]
        if not _is_one_of(value, allowed):
            raise _unknown(name, value, allowed)
        object.__setattr__(self, name, kind(value))

    @classmethod
    def from_name(cls, engine: str | EngineConfig) -> EngineConfig:
        """The preset called `engine`; an `EngineConfig` is returned as it is.

        Raises:
            ValueError: for a name that is no preset, or a tier that is not available yet.
            TypeError: for anything but a string or an `EngineConfig`.
        """
        if isinstance(engine, cls):
            return engine
        if not isinstance(engine, str):
            raise TypeError(f"engine={shown(engine)} must be a string or an EngineConfig; strings: {_names()}")
        return cls(tier=engine)


_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
# Digits enough for any memory; longer numbers are no sizes, and slow to read.
_NUMBER = r"\d{1,20}(?:\.\d{1,20})?"
_SIZE = re.compile(rf"\s*(?:(?P<bytes>\d{{1,20}})|(?P<number>{_NUMBER})\s*(?P<unit>{'|'.join(_UNITS)}))\s*")
_MOST_BYTES = 2**63 - 1  # that torch counts


def _bytes(name: str, value: int | str) -> int:
    """A size such as 4294967296, "4294967296", "4GiB" or "1.5 GB" in bytes."""
    size = value
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        size = 0 if match is None else int(match["bytes"] or Fraction(match["number"]) * _UNITS[match["unit"]])
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= _MOST_BYTES:
        raise ValueError(
            f"EngineConfig.{name}={shown(value)} must be a number of bytes or a string such as '4GiB', above 0 and"
            f" below 8192 PiB; units: {', '.join(_UNITS)}"
        )
    return size


def shown(value: object) -> str:
    """A value as an error shows it: in one line, and of a long one the start."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of more digits than Python writes
        text = f"a number of {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}…"


def _is_one_of(value: object, names: Iterable[str]) -> bool:
    return isinstance(value, str) and value in names


def _unknown(name: str, value: object, names: Iterable[str]) -> ValueError:
    return ValueError(f"EngineConfig.{name}={shown(value)} is unknown; allowed: {', '.join(map(repr, names))}")


def _names() -> str:
    return ", ".join(repr(name) for name in TIERS)
