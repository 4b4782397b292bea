"""A plan bound to the blocks of a transformer: what replaces calls of their modules during one generation.

Bound at the generation's first step, when offloading hooks have put the weights where they run, and dropped when it
ends: between generations nothing but the user's own modules exists, under their own names, so saving, LoRA, quantizing
and moving need not know of it. A module on which something hangs is called the way diffusers calls it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from cogvx_kernels import ops
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import CogVideoXLayerNormZero
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..hooks import aligns_devices, is_hooked, is_patched, moves_weights
from ..parallel.sequence import SequenceSplit
from ..plan import AttentionPlan, EnginePlan, Implementation, Product
from ..state import State
from .attention import FastCogVideoXAttnProcessor
from .linear import (
    BufferedFeedForward,
    CublasLtLinear,
    FeedForwardPair,
    Int8FeedForward,
    Int8Linear,
    MergedLinear,
    OneDnnLinear,
    QuantizedWeight,
    ScaledFeedForward,
    ScaledLinear,
    merged,
    multiplies_int8,
    multiplies_scaled,
)

# The classes whose forward our formula stands for.
_REPLACED = (CogVideoXBlock, CogVideoXLayerNormZero, Attention, FeedForward)


class BlockRan(NamedTuple):
    """How a block ran.

    Attributes:
        called: as diffusers calls it.
        merged: Q, K and V were one product.
        operations: who computed norms, gates and rotations.
        product: which of our forms of its linears, by name; empty where its own modules were called.
        packed_bytes: of copies of its weights.
    """

    called: bool
    merged: bool
    operations: str
    product: str
    packed_bytes: int


@dataclass(frozen=True)
class BoundBlock:
    """How one block runs.

    Attributes:
        called: it has to be called as diffusers does, with video and text apart: something hangs on it, or it is no
            block that we know.
        fused: it can be computed by our formula, be it called or not: its norms are what they were made as.
        attends: our formula stands for a call of its attention.
        eager: it is not to be compiled: something in it is hooked, be it by a device map, which dynamo cannot take
            whole.
        operations: who computes norms, gates and rotations.
        qkv, out, ff: what replaces calls of the projections to Q, K and V, of that of attention's output, and of the
            feed-forward; None: the modules are called.
        attention: which attention runs.
        by_hand: the backend that `set_attention_backend()` has named, which wins.
        guard: int32 of one element, which attention in 8 bits sets to 1 where its output is not finite; None: nobody
            looks.
        split: which rows of the stream are this process's; None: all.
        made_from: what the weights were then.
    """

    called: bool = True
    fused: bool = False
    attends: bool = False
    eager: bool = False
    operations: Implementation = "torch"
    qkv: MergedLinear | OneDnnLinear | Int8Linear | ScaledLinear | None = None
    out: OneDnnLinear | Int8Linear | ScaledLinear | None = None
    ff: FeedForwardPair | BufferedFeedForward | Int8FeedForward | ScaledFeedForward | None = None
    attention: AttentionPlan = dataclasses.field(default_factory=AttentionPlan)
    by_hand: AttentionBackendName | None = None
    guard: torch.Tensor | None = None
    split: SequenceSplit | None = None
    made_from: State = dataclasses.field(default_factory=State, repr=False)

    @property
    def chains(self) -> bool:
        """Whether its last addition may be left to the norm of the next block: one read of the stream less.

        Not in torch's form, which a compiler takes whole.
        """
        return not self.called and self.operations != "torch"

    @property
    def norm1_dtype(self) -> torch.dtype | None:
        """The 8-bit dtype in which the first norm writes for the projections; None: it writes the stream's dtype."""
        return self.qkv.dtype if self.attends and isinstance(self.qkv, ScaledLinear) else None

    @property
    def norm2_dtype(self) -> torch.dtype | None:
        """The 8-bit dtype in which the second norm writes for the feed-forward; None: the stream's dtype."""
        return self.ff.dtype if isinstance(self.ff, ScaledFeedForward) else None

    def ran(self) -> BlockRan:
        """What a report says of it."""
        form = next((form for form in (self.qkv, self.out, self.ff) if form is not None), None)
        product = "" if form is None else _name(form)
        return BlockRan(self.called, self.qkv is not None, self.operations, product, _packed_bytes(self))


def bind(blocks: Iterable[nn.Module], plan: EnginePlan, rows: int, watched: bool) -> list[BoundBlock]:
    """The plan bound to each block, where its weights are now; blocks share their buffers.

    Args:
        rows: of the stream, all samples'.
        watched: whether somebody may write to the weights between two steps.
    """
    buffers: dict[tuple, torch.Tensor] = {}

    def buffer(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if (shape, dtype) not in buffers:
            buffers[shape, dtype] = torch.empty(shape, dtype=dtype, device="cpu")
        return buffers[shape, dtype]

    return [_bind(block, plan, rows, watched, buffer) for block in blocks]


def is_current(block: nn.Module, bound: BoundBlock, plan: EnginePlan, watched: bool) -> bool:
    """Whether the block has what it had when it was bound: the same modules and weights, unchanged."""
    return (
        bound.called == (is_hooked(block) or not bound.fused)
        and bound.attends == (bound.fused and attends_by_formula(block.attn1))
        and bound.by_hand == _named_backend(block)
        and bound.made_from == _state(block, plan, watched)
    )


def _bind(
    block: nn.Module,
    plan: EnginePlan,
    rows: int,
    watched: bool,
    buffer: Callable[[tuple[int, ...], torch.dtype], torch.Tensor],
) -> BoundBlock:
    if not _has_our_formula(block):
        state = _state(block, plan, watched)
        return BoundBlock(made_from=state, attention=plan.attention, by_hand=_named_backend(block))
    bound = BoundBlock(
        called=is_hooked(block),
        fused=True,
        attends=attends_by_formula(block.attn1),
        eager=any(is_hooked(module) or aligns_devices(module) for module in block.modules()),
        operations=_operations(block, plan.operations),
        attention=plan.attention,
        by_hand=_named_backend(block),
    )
    if any(map(moves_weights, block.modules())):
        return dataclasses.replace(bound, made_from=_state(block, plan, watched))
    qkv, out, ff = _linears(block)
    product = plan.product
    new_qkv: MergedLinear | OneDnnLinear | Int8Linear | ScaledLinear | None = None
    new_out: OneDnnLinear | Int8Linear | ScaledLinear | None = None
    new_ff: FeedForwardPair | BufferedFeedForward | Int8FeedForward | ScaledFeedForward | None = None
    hidden: torch.Tensor | None = None
    if product is Product.INT8:
        new_qkv, new_out, new_ff = _int8(qkv, out, ff, rows, buffer)
    elif product is Product.SCALED:
        new_qkv, new_out, new_ff = _scaled(qkv, out, ff, partly=plan.mixes)
    packs = product is Product.ONEDNN
    if new_ff is None and ff and _are_plain(*ff):
        if packs:
            new_ff = FeedForwardPair(_packed([ff[0]], rows, gelu=True), _packed([ff[1]], rows))
        elif product is Product.BUFFERED and ff[0].bias is not None and ff[0].weight.dtype == torch.float32:
            hidden = buffer((rows, ff[0].out_features), torch.float32)
            new_ff = BufferedFeedForward(ff[0], ff[1], hidden)
        elif product is Product.CUBLASLT and ff[0].bias is not None:
            first = CublasLtLinear(ff[0].weight.data, ff[0].bias.data)
            new_ff = FeedForwardPair(first, MergedLinear(*_parameters(ff[1])))
    if new_qkv is None and _are_plain(*qkv) and (packs or plan.merges):
        if packs:
            new_qkv = _packed(qkv, rows)
        else:
            weight = merged([linear.weight for linear in qkv])
            bias = None if qkv[0].bias is None else merged([linear.bias for linear in qkv])
            new_qkv = MergedLinear(weight, bias, hidden)
    if new_out is None and packs and _are_plain(out):
        new_out = _packed([out], rows)
    # Merging has moved weights: what they are is looked at afterwards.
    state = _state(block, plan, watched)
    return dataclasses.replace(bound, qkv=new_qkv, out=new_out, ff=new_ff, made_from=state)


def _int8(
    qkv: list[nn.Linear],
    out: nn.Linear,
    ff: list[nn.Linear],
    rows: int,
    buffer: Callable[[tuple[int, ...], torch.dtype], torch.Tensor],
) -> tuple[Int8Linear | None, Int8Linear | None, Int8FeedForward | None]:
    """Our products on a CPU for those that torchao made W8A8 int8."""
    taken = [part if part and multiplies_int8(*part) else [] for part in (qkv, [out], ff)]
    if not any(taken):
        return None, None, None
    sums = buffer((rows * max(len(linear.weight) for part in taken for linear in part),), torch.int32)
    first, second, third = (tuple(map(QuantizedWeight.of, part)) for part in taken)
    return (
        Int8Linear(first, sums) if first else None,
        Int8Linear(second, sums) if second else None,
        Int8FeedForward(third[0], third[1], sums) if third else None,
    )


def _scaled(
    qkv: list[nn.Linear], out: nn.Linear, ff: list[nn.Linear], partly: bool
) -> tuple[ScaledLinear | None, ScaledLinear | None, ScaledFeedForward | None]:
    """Our products on a GPU for those that torchao made W8A8.

    Args:
        partly: take those that can be ours; else all three or none. Norms write 8 bits for ours alone, so a block that
            is half torchao's would still write and read 16 bits between most of its products.
    """
    taken = [bool(part) and multiplies_scaled(part) for part in (qkv, [out], ff)]
    if not (any(taken) if partly else all(taken)):
        return None, None, None
    return (
        ScaledLinear.of(*qkv) if taken[0] else None,
        ScaledLinear.of(out) if taken[1] else None,
        ScaledFeedForward(*map(ScaledLinear.of, ff)) if taken[2] else None,
    )


def _has_our_formula(block: nn.Module) -> bool:
    """Whether the block is what diffusers makes it: both norms untouched, so that their parameters may be read."""
    from .block import FastCogVideoXBlock

    if type(block).forward is not FastCogVideoXBlock.forward or any(is_patched(cls, "forward") for cls in _REPLACED):
        return False
    norms: tuple[CogVideoXLayerNormZero, ...] = block.norm1, block.norm2
    return all(type(norm) is CogVideoXLayerNormZero and type(norm.norm) is nn.LayerNorm for norm in norms) and not any(
        is_hooked(module) for norm in norms for module in norm.modules()
    )


def _operations(block: CogVideoXBlock, planned: Implementation) -> Implementation:
    """The plan's implementation, where it takes what this block holds: norms and projections of a dtype that it has."""
    dtypes = {p.dtype for norm in (block.norm1.norm, block.norm2.norm) for p in norm.parameters()}
    dtypes.add(block.attn1.to_q.weight.dtype)
    if planned == "cpu":
        return planned if len(dtypes) == 1 and dtypes <= set(ops.CPU_DTYPES) else "torch"
    if planned == "triton":
        return planned if dtypes <= {torch.float16, torch.bfloat16, torch.float32} else "torch"
    return planned


def _linears(block: CogVideoXBlock) -> tuple[list[nn.Linear], nn.Linear, list[nn.Linear]]:
    """The projections to Q, K and V, that of the output, and the feed-forward's two, if that is linear, GELU, linear.

    Attention of another kind, and one that is hooked, is called: nothing of it is replaced then.
    """
    attention, net = block.attn1, block.ff.net if type(block.ff) is FeedForward else None
    feed_forward = []
    if (
        net is not None
        and getattr(net[0], "approximate", None) == "tanh"
        and not any(map(is_hooked, block.ff.modules()))
    ):
        feed_forward = [net[0].proj, net[2]]
    return [attention.to_q, attention.to_k, attention.to_v], attention.to_out[0], feed_forward


def takes_rows(block: nn.Module) -> bool:
    """Whether some rows of some samples are enough for a block: only its attention sees others, and that is ours.

    What hangs on it may look at all that it is given, unless it only brings weights.
    """
    from .block import FastCogVideoXBlock

    if type(block).forward is not FastCogVideoXBlock.forward or any(is_patched(cls, "forward") for cls in _REPLACED):
        return False
    attention: Any = block.attn1
    if type(attention) is not Attention or type(attention.processor) is not FastCogVideoXAttnProcessor:
        return False
    return not any(is_hooked(module) and not _brings_weights(module) for module in block.modules())


def _brings_weights(module: nn.Module) -> bool:
    return moves_weights(module) or aligns_devices(module) or isinstance(module, FSDPModule)


def attends_by_formula(attention: Attention) -> bool:
    """Whether our formula of attention may stand for a call of the module."""
    return (
        type(attention) is Attention
        and type(attention.processor) is FastCogVideoXAttnProcessor
        and not is_hooked(attention)
    )


def _named_backend(block: nn.Module) -> AttentionBackendName | None:
    processor = getattr(getattr(block, "attn1", None), "processor", None)
    return processor._attention_backend if isinstance(processor, FastCogVideoXAttnProcessor) else None


def _parameters(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    return linear.weight.data, None if linear.bias is None else linear.bias.data


def _are_plain(*linears: nn.Linear) -> bool:
    """Whether calling them is a product with their weights and nothing else: no adapter, no quantizer, no hook."""
    return all(
        type(linear) is nn.Linear
        and type(linear.weight) in (nn.Parameter, torch.Tensor)
        and linear.weight.device.type != "meta"
        and linear.weight.dtype == linears[0].weight.dtype
        and (linear.bias is None) == (linears[0].bias is None)
        and not is_hooked(linear)
        for linear in linears
    )


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0].data if len(tensors) == 1 else torch.cat([tensor.data for tensor in tensors])


def _packed(linears: list[nn.Linear], rows: int, gelu: bool = False) -> OneDnnLinear:
    weight = _joined([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else _joined([linear.bias for linear in linears])
    return OneDnnLinear(ops.pack_linear(weight, rows), bias, gelu)


def _name(form: object) -> str:
    """Of a form of a linear, as the report calls it."""
    if isinstance(form, ScaledLinear | ScaledFeedForward):
        return str(form.dtype).removeprefix("torch.")
    if isinstance(form, Int8Linear | Int8FeedForward):
        return "int8"
    return "plain"


def _packed_bytes(bound: BoundBlock) -> int:
    ff = (bound.ff.first, bound.ff.second) if isinstance(bound.ff, FeedForwardPair) else ()
    packed = [form.weight for form in (bound.qkv, bound.out, *ff) if isinstance(form, OneDnnLinear)]
    return sum(weight.numel() * weight.dtype.itemsize for weight in packed)


def _state(block: nn.Module, plan: EnginePlan, watched: bool) -> State:
    """Of what is replaced; its numbers are looked at where copies of them are used."""
    if not hasattr(block, "attn1") or not hasattr(block, "ff"):
        return State()
    qkv, out, ff = _linears(block)
    copies = plan.product in (Product.ONEDNN, Product.INT8)
    weights = State.of(*qkv, out, *ff, numbers=watched and copies)
    hooks = tuple(map(is_hooked, block.modules())) if watched else ()
    return State((*weights.marks, hooks), weights.tensors)
