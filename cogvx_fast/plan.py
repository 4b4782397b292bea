"""The plan of a generation: everything that is decided, decided once, by `resolve`.

Session, blocks, autoencoder, memory estimate and report read the same object. It is complete: nothing in it is None
or "auto". What it decides holds for modules as the checkpoint has them; a block on which something hangs (an adapter,
a hook) is called as diffusers calls it, and the report says so afterwards.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

import torch

from .attention.backends import CAPABILITIES, Capability
from .config import AttentionBackend, CompileMode
from .parallel.degrees import ALONE, ParallelConfig
from .quantization.recipes import QuantizedAttention, Recipe, Scheme
from .turbo.schedule import StepSchedule

# Who computes what stands between the matrix products, as `cogvx_kernels.ops` names it.
Implementation = Literal["torch", "cpu", "triton"]
UNLIMITED = 0  # as a budget of bytes: what costs no time


class Product(enum.StrEnum):
    """How a block's linears are multiplied where nothing hangs on them."""

    MODULES = "modules"  # they are called: torch's products, or torchao's
    CUBLASLT = "cublaslt"  # on a GPU, GELU at the end of the feed-forward's first product
    ONEDNN = "onednn"  # half precision on a CPU, on copies of the weights in oneDNN's own order
    BUFFERED = "buffered"  # fp32 on a CPU, the wide activations in a buffer that all blocks use
    INT8 = "int8"  # ours on a CPU
    SCALED = "scaled"  # ours on a GPU, int8 or fp8, fed by norms that write 8 bits


class Offload(enum.StrEnum):
    """Which weights are elsewhere until they are needed."""

    NONE = "none"
    MODELS = "models"  # each model is on the device only while it runs
    BY_HAND = "by hand"  # turned on by the user, finer than whole models


@dataclass(frozen=True)
class AttentionPlan:
    """Which attention runs.

    Attributes:
        fallback: what redoes a step in which `backend` overflows; `backend` itself where that is an exact one.
        value: how attention in 8 bits treats V; of no effect elsewhere.
        why: what `auto` tried before and why not that, in words; empty where nothing was.
        kernel: which of its kernels torch takes for `AttentionBackend.SDPA`, in words; empty elsewhere, and where torch
            cannot say.
    """

    backend: AttentionBackend = AttentionBackend.SDPA
    fallback: AttentionBackend = AttentionBackend.SDPA
    value: QuantizedAttention = field(default_factory=QuantizedAttention)
    why: str = ""
    kernel: str = ""

    @property
    def capability(self) -> Capability:
        return CAPABILITIES[self.backend]

    @property
    def may_overflow(self) -> bool:
        return self.backend is not self.fallback

    @property
    def in_8_bits(self) -> bool:
        return self.capability.operation == "int8_attention"

    def exact(self) -> AttentionPlan:
        """The plan of a step that is redone."""
        return AttentionPlan(self.fallback, self.fallback, self.value)

    def __str__(self) -> str:
        detail = str(self.value) if self.in_8_bits else self.kernel
        return f"{self.backend}" + (f": {detail}" if detail else "") + (f" ({self.why})" if self.why else "")


@dataclass(frozen=True)
class VaePlan:
    """Where and how the autoencoder runs.

    Attributes:
        ours: whether it runs layer by layer on channels-last frames; else diffusers' own code does.
        why: it does not, in words; empty where it does.
        operations: who computes what stands between the convolutions.
        convolution: who convolves.
        budget: bytes that the layers' tensors may take; `UNLIMITED`: what costs no time.
    """

    device: torch.device
    dtype: torch.dtype
    ours: bool = True
    why: str = ""
    operations: Implementation = "torch"
    convolution: Implementation = "torch"
    budget: int = UNLIMITED


@dataclass(frozen=True)
class EnginePlan:
    """What one generation does. Made by `resolve.resolve`, never changed.

    Attributes:
        tier: the contract, see `config.TIERS`.
        device, dtype: of the transformer where it runs.
        recipe: of the transformer's linears; `recipes.AS_THEY_ARE` for none.
        text_encoder: scheme of the text encoder's linears; "native" for none.
        operations: who computes norms, modulation, gates and rotations.
        why_not_cpp: what keeps them from being C++ on a CPU where they should be, in words, or empty.
        product: how the linears are multiplied.
        merges: whether Q, K and V are one product where `product` leaves that open.
        mixes: whether, of quantized linears on a GPU, ours take those that can be ours where not all of a block can.
        compile: what of the transformer runs compiled.
        compile_why: of that choice, in words.
        keeps_modulation: whether the modulation of all steps is one table.
        keeps_text: whether the prompt is projected to the transformer's width once.
        vae: of the autoencoder.
        steps: which of them the network computes; a schedule of another number of steps is moved to those of the
            generation when it starts.
        memory_limit: bytes that the tensors may take, weights included; `UNLIMITED`.
        memory: what that has led to, in words; empty without a limit.
        parallel: of how many processes each part is.
    """

    tier: str
    device: torch.device
    dtype: torch.dtype
    recipe: Recipe
    text_encoder: Scheme | Literal["native"]
    attention: AttentionPlan
    operations: Implementation
    product: Product
    merges: bool
    mixes: bool
    compile: CompileMode
    compile_why: str
    keeps_modulation: bool
    keeps_text: bool
    vae: VaePlan
    offload: Offload = Offload.NONE
    steps: StepSchedule | Literal["all"] = "all"
    memory_limit: int = UNLIMITED
    memory: str = ""
    why_not_cpp: str = ""
    parallel: ParallelConfig = ALONE

    @property
    def chains(self) -> bool:
        """Whether a block leaves its last addition to the norm of the next: one read of the stream less.

        Not in torch's form, which a compiler takes whole.
        """
        return self.operations != "torch"
