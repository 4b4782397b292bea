"""How a block runs during one generation: its linears merged or packed, and who does what is between them.

Made at the generation's first forward pass, when offloading hooks have put the weights where they run, and dropped
when it ends: between generations nothing but the user's own modules exists, under their own names, so saving,
LoRA, quantizing and moving need not know of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from cogvx_kernels.cpu import linear as onednn
from cogvx_kernels.cpu import stream as cpu_stream
from torch import nn

from ..config import EngineConfig
from ..hooks import is_hooked, moves_weights


@dataclass(frozen=True)
class MergedLinear:
    """Several linears of one input as one product; `weight` is the memory that their own weights are views of."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class PackedLinear:
    """A linear, or several of one input, on a copy of the weights in oneDNN's own order."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    gelu: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return onednn.linear(x, self.weight, self.bias, self.gelu)


@dataclass(frozen=True)
class BlockPlan:
    """What replaces calls of a block's own modules; None: they are called.

    Attributes:
        impl: of the operations between the products, as `cogvx_kernels.ops` names it.
        qkv: the three projections of attention in one.
        out: attention's output projection.
        ff: the feed-forward's two linears, the first with its GELU.
        hooked: a caching, casting or offloading hook hangs on the block or in it: modules must be called, and dynamo
            cannot take it whole.
        packed_bytes: of the copies that this plan holds.
        made_from: the linears and where their weights were, to see whether that is still so.
    """

    impl: str = "torch"
    qkv: MergedLinear | PackedLinear | None = None
    out: PackedLinear | None = None
    ff: tuple[PackedLinear, PackedLinear] | None = None
    hooked: bool = False
    packed_bytes: int = 0
    made_from: tuple[tuple[nn.Module, int], ...] = field(default=(), repr=False)

    def is_current(self, block: nn.Module) -> bool:
        """Whether the block still has the linears, and they the memory, that the plan was made from."""
        return self.made_from == _state(block)


UNPLANNED = BlockPlan()


def plan_block(block: nn.Module, config: EngineConfig, rows: int, compiled: bool) -> BlockPlan:
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
    native = on_cpu and config.fuse_operations and not compiled and can_run_on_cpu(block)
    merged = packed_out = packed_ff = None
    if _are_plain(*qkv) and (packs or config.fuse_projections):
        merged = _pack(qkv, rows) if packs else MergedLinear(*_merge(qkv))
    if packs and _are_plain(out):
        packed_out = _pack([out], rows)
    if packs and ff is not None and _are_plain(*ff):
        packed_ff = _pack([ff[0]], rows, gelu=True), _pack([ff[1]], rows)
    packed = [linear for linear in (merged, packed_out, *(packed_ff or ())) if isinstance(linear, PackedLinear)]
    size = sum(linear.weight.numel() * dtype.itemsize for linear in packed)
    return BlockPlan("cpu" if native else "torch", merged, packed_out, packed_ff, hooked, size, _state(block))


def can_run_on_cpu(block: nn.Module) -> bool:
    """Whether the C++ operations work here on what this block's norms hold."""
    weights = [p for norm in (block.norm1.norm, block.norm2.norm) for p in norm.parameters()]
    dtypes = {p.dtype for p in weights} | {block.attn1.to_q.weight.dtype}
    return len(dtypes) == 1 and dtypes <= set(cpu_stream.DTYPES) and cpu_stream.why_not() is None


def _linears(block: nn.Module) -> tuple[list[nn.Module], nn.Module, list[nn.Module] | None]:
    attention, net = block.attn1, block.ff.net
    feed_forward = [net[0].proj, net[2]] if getattr(net[0], "approximate", None) == "tanh" else None
    return [attention.to_q, attention.to_k, attention.to_v], attention.to_out[0], feed_forward


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
    return tuple(_as_views([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))


@torch.no_grad()
def _as_views(parameters: list[nn.Parameter | None]) -> torch.Tensor | None:
    if parameters[0] is None:
        return None
    first, size = parameters[0], parameters[0].numel() * parameters[0].element_size()
    places = [p.data_ptr() for p in parameters]
    same_memory = len({p.untyped_storage().data_ptr() for p in parameters}) == 1
    if same_memory and places == [places[0] + i * size for i in range(len(parameters))]:
        rows = sum(p.shape[0] for p in parameters)
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
    whole = torch.cat([p.detach() for p in parameters])
    for parameter, part in zip(parameters, whole.split([p.shape[0] for p in parameters]), strict=True):
        parameter.data = part
    return whole


def _state(block: nn.Module) -> tuple[tuple[nn.Module, int], ...]:
    qkv, out, ff = _linears(block)
    return tuple((linear, _address(linear)) for linear in (*qkv, out, *(ff or ())))


def _address(linear: nn.Module) -> int:
    weight = getattr(linear, "weight", None)
    return weight.data_ptr() if type(weight) in (nn.Parameter, torch.Tensor) else 0
