"""How a block runs during one generation: its linears merged or packed, and who does what is between them.

Made at the generation's first forward pass, when offloading hooks have put the weights where they run, and dropped
when it ends: between generations nothing but the user's own modules exists, under their own names, so saving,
LoRA, quantizing and moving need not know of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from cogvx_kernels.cpu import int8
from cogvx_kernels.cpu import linear as onednn
from cogvx_kernels.cpu import stream as cpu_stream
from cogvx_kernels.triton import why_not as why_not_triton
from torch import nn

from ..config import EngineConfig, QuantizedGemm
from ..hooks import is_hooked, moves_weights
from .quantized import Int8FeedForward, Int8Linear, QuantizedWeight, multiplies_int8
from .scaled import ScaledFeedForward, ScaledLinear, scaled_products
from .views import as_views


@dataclass(frozen=True)
class MergedLinear:
    """Several linears of one input as one product; `weight` is the memory that their own weights are views of.

    `hidden`: memory that the feed-forward needs later, where the result may lie until then.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    hidden: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows, width = x.flatten(0, 1), self.weight.shape[0]
        if self.hidden is None or self.bias is None or len(rows) * width > self.hidden.numel():
            return F.linear(x, self.weight, self.bias)
        output = self.hidden.view(-1)[: len(rows) * width].view(len(rows), width)
        torch.addmm(self.bias, rows, self.weight.t(), out=output)
        return output.view(*x.shape[:2], width)


@dataclass(frozen=True)
class PackedLinear:
    """A linear, or several of one input, on a copy of the weights in oneDNN's own order."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    gelu: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return onednn.linear(x, self.weight, self.bias, self.gelu)


@dataclass(frozen=True)
class GeluLinear:
    """A linear and the tanh form of GELU as one product on a GPU, where cuBLASLt has both in its epilogue.

    The GELU is of the sums before they are rounded. `_addmm_activation` is torch's name for that call: it takes the
    tanh form on CUDA (and the exact one on a CPU, where this is not used). `weight` and `bias` are the linear's own.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.t(), use_gelu=True)
        return rows.unflatten(0, x.shape[:-1])


@dataclass(frozen=True)
class FusedFeedForward:
    """A feed-forward of two products, GELU in the first."""

    first: PackedLinear | GeluLinear
    second: PackedLinear | MergedLinear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@dataclass(frozen=True)
class BufferedFeedForward:
    """A feed-forward in fp32 on the modules' own weights, whose wide activation is one buffer for all blocks.

    It is the largest tensor of a step, four times the stream: the allocator would give it back to the operating
    system after each block and have its pages cleared for the next.
    """

    first: nn.Linear
    second: nn.Linear
    hidden: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1)
        fits = len(rows) <= len(self.hidden)  # caches call with parts of a batch; who calls with more gets memory anew
        hidden = self.hidden[: len(rows)] if fits else self.hidden.new_empty(len(rows), self.hidden.shape[1])
        torch.mm(rows, self.first.weight.t(), out=hidden)
        cpu_stream.bias_gelu_(hidden, self.first.bias)
        return self.second(hidden).view(*x.shape[:2], -1)


@dataclass(frozen=True)
class BlockPlan:
    """What replaces calls of a block's own modules; None: they are called.

    Attributes:
        impl: of the operations between the products, as `cogvx_kernels.ops` names it.
        qkv: the three projections of attention in one. A `ScaledLinear` or `ScaledFeedForward` takes the norm before it
            in 8 bits.
        out: attention's output projection.
        ff: the feed-forward.
        hooked: a caching, casting or offloading hook hangs on the block or in it: modules must be called, and dynamo
            cannot take it whole.
        packed_bytes: of the copies that this plan holds.
        made_from: the linears and where their weights were, to see whether that is still so.
    """

    impl: str = "torch"
    qkv: MergedLinear | PackedLinear | Int8Linear | ScaledLinear | None = None
    out: PackedLinear | Int8Linear | ScaledLinear | None = None
    ff: FusedFeedForward | BufferedFeedForward | Int8FeedForward | ScaledFeedForward | None = None
    hooked: bool = False
    packed_bytes: int = 0
    made_from: tuple[tuple[nn.Module, int], ...] = field(default=(), repr=False)

    @property
    def chains(self) -> bool:
        """Whether the block can leave its last addition to the norm of the next: one read of the stream less.

        Not in torch's form, which a compiler takes whole, and not past a hook, which wants the stream itself.
        """
        return self.impl != "torch" and not self.hooked

    def is_current(self, block: nn.Module) -> bool:
        """Whether the block still has the linears, and they the memory, that the plan was made from."""
        return self.made_from == _state(block)


UNPLANNED = BlockPlan()


def plan_blocks(blocks: Sequence[nn.Module], config: EngineConfig, rows: int, compiled: bool) -> list[BlockPlan]:
    """A plan for each block; they share their buffers."""
    buffers: dict[tuple, torch.Tensor] = {}
    return [plan_block(block, config, rows, compiled, buffers) for block in blocks]


def plan_block(
    block: nn.Module, config: EngineConfig, rows: int, compiled: bool, buffers: dict[tuple, torch.Tensor]
) -> BlockPlan:
    """The plan of a `FastCogVideoXBlock` whose inputs have `rows` rows in all, where its weights are now.

    A linear that is more than a linear (LoRA beside it, quantized or on another device until it is called) is left as
    it is and called. `compiled`: inductor fuses what is between the products better from its torch form.
    """
    hooked = any(map(is_hooked, block.modules()))
    if any(map(moves_weights, block.modules())):
        return BlockPlan(hooked=hooked, made_from=_state(block))
    qkv, out, ff = _linears(block)
    device, dtype = _place(block)
    on_cpu = device.type == "cpu"
    packs = on_cpu and config.pack_weights and dtype in onednn.DTYPES and onednn.why_not() is None
    on_gpu = device.type == "cuda" and config.fuse_operations
    native = on_cpu and config.fuse_operations and not compiled and can_run_on_cpu(block)
    merged = packed_out = feed_forward = hidden = None
    if ff is not None and _are_plain(*ff) and not any(map(is_hooked, block.ff.modules())):
        if packs:
            feed_forward = FusedFeedForward(_pack([ff[0]], rows, gelu=True), _pack([ff[1]], rows))
        elif native and dtype == torch.float32 and ff[0].bias is not None:
            shape = (rows, ff[0].out_features)
            hidden = buffers.setdefault(shape, torch.empty(shape, dtype=dtype))
            feed_forward = BufferedFeedForward(*ff, hidden)
        elif on_gpu and ff[0].bias is not None:
            feed_forward = FusedFeedForward(GeluLinear(*_parameters(ff[0])), MergedLinear(*_parameters(ff[1])))
    if _are_plain(*qkv) and (packs or config.fuse_projections):
        merged = _pack(qkv, rows) if packs else MergedLinear(*_merge(qkv), hidden)
    if packs and _are_plain(out):
        packed_out = _pack([out], rows)
    if on_cpu and not compiled and config.gemm is not QuantizedGemm.TORCHAO and int8.why_not() is None:
        merged, packed_out, feed_forward = _int8_products(block, rows, buffers, (merged, packed_out, feed_forward))
    if device.type == "cuda" and config.gemm is not QuantizedGemm.TORCHAO and why_not_triton(device) is None:
        free = None if any(map(is_hooked, block.ff.modules())) else ff
        products = scaled_products(qkv, out, free, partly=config.gemm is QuantizedGemm.NATIVE)
        others = (merged, packed_out, feed_forward)
        merged, packed_out, feed_forward = (own or other for own, other in zip(products, others, strict=True))
    impl = "cpu" if native else "triton" if on_gpu and can_run_on_gpu(block) else "torch"
    linears = [merged, packed_out]
    if isinstance(feed_forward, FusedFeedForward):
        linears += [feed_forward.first, feed_forward.second]
    size = sum(linear.weight.numel() * dtype.itemsize for linear in linears if isinstance(linear, PackedLinear))
    return BlockPlan(impl, merged, packed_out, feed_forward, hooked, size, _state(block))


def _int8_products(block: nn.Module, rows: int, buffers: dict[tuple, torch.Tensor], others: tuple) -> tuple:
    """Our products in the place of `others`, those of Q, K and V, of the output and of the feed-forward, where the
    linears are W8A8 int8."""
    qkv, out, ff = _linears(block)
    parts = [qkv, [out], ff if ff is not None and not any(map(is_hooked, block.ff.modules())) else None]
    taken = [part is not None and multiplies_int8(*part) for part in parts]
    if not any(taken):
        return others
    width = max(len(linear.weight) for part, takes in zip(parts, taken, strict=True) if takes for linear in part)
    buffer = buffers.setdefault(("int8", rows, width), torch.empty(rows * width, dtype=torch.int32))
    weights = [tuple(map(QuantizedWeight.of, part)) if takes else () for part, takes in zip(parts, taken, strict=True)]
    kinds = (Int8Linear, Int8Linear, lambda pair, buffer: Int8FeedForward(*pair, buffer))
    return tuple(
        kind(part, buffer) if part else other for kind, part, other in zip(kinds, weights, others, strict=True)
    )


def can_run_on_cpu(block: nn.Module) -> bool:
    """Whether the C++ operations work here on what this block's norms hold."""
    weights = [p for norm in (block.norm1.norm, block.norm2.norm) for p in norm.parameters()]
    dtypes = {p.dtype for p in weights} | {block.attn1.to_q.weight.dtype}
    return len(dtypes) == 1 and dtypes <= set(cpu_stream.DTYPES) and cpu_stream.why_not() is None


def can_run_on_gpu(block: nn.Module) -> bool:
    """Whether the Triton operations take what this block has: half precision or fp32, a head dim that is 2^n."""
    dtypes = {p.dtype for norm in (block.norm1.norm, block.norm2.norm) for p in norm.parameters()}
    dtypes.add(block.attn1.to_q.weight.dtype)
    head_dim = block.attn1.to_q.out_features // block.attn1.heads
    known = {torch.float16, torch.bfloat16, torch.float32}
    return why_not_triton(_place(block)[0]) is None and dtypes <= known and head_dim & (head_dim - 1) == 0


def _linears(block: nn.Module) -> tuple[list[nn.Module], nn.Module, list[nn.Module] | None]:
    attention, net = block.attn1, block.ff.net
    feed_forward = [net[0].proj, net[2]] if getattr(net[0], "approximate", None) == "tanh" else None
    return [attention.to_q, attention.to_k, attention.to_v], attention.to_out[0], feed_forward


def _parameters(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()


def _place(block: nn.Module) -> tuple[torch.device, torch.dtype]:
    weight = block.attn1.to_q.weight
    return weight.device, weight.dtype


def _are_plain(*linears: nn.Module) -> bool:
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


def _joined(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    if tensors[0] is None:
        return None
    return tensors[0].detach() if len(tensors) == 1 else torch.cat([tensor.detach() for tensor in tensors])


def _pack(linears: list[nn.Module], rows: int, gelu: bool = False) -> PackedLinear:
    weight = _joined([linear.weight for linear in linears])
    return PackedLinear(onednn.pack(weight, rows), _joined([linear.bias for linear in linears]), gelu)


def _merge(linears: list[nn.Module]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights and biases in one piece of memory each, of which the linears' own become views: no copy is left."""
    return tuple(as_views([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))


def _state(block: nn.Module) -> tuple[tuple[nn.Module, int], ...]:
    qkv, out, ff = _linears(block)
    return tuple((linear, _address(linear)) for linear in (*qkv, out, *(ff or ())))


def _address(linear: nn.Module) -> int:
    weight = getattr(linear, "weight", None)
    weight = getattr(weight, "qdata", weight)  # of a quantized one
    return weight.data_ptr() if type(weight) in (nn.Parameter, torch.Tensor) else 0
