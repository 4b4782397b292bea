"""A block's quantized linears as our own products on a CPU, on the very memory of torchao's tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cogvx_kernels.cpu import int8
from torch import nn

from ..hooks import is_hooked


@dataclass(frozen=True)
class QuantizedWeight:
    """One linear: torchao's int8 values `(out, in)`, and in fp32 its scales and bias `(out,)`."""

    values: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(cls, linear: nn.Linear) -> QuantizedWeight:
        scales = linear.weight.scale.detach().float().flatten()
        bias = torch.zeros_like(scales) if linear.bias is None else linear.bias.detach().float()
        return cls(linear.weight.qdata, scales, bias)


@dataclass(frozen=True)
class Int8Linear:
    """Linears of one input, whose rows are rounded once for all of them; their outputs lie side by side.

    `buffer`: int32, where sums may lie; one for all blocks. It would be the largest allocation of a step otherwise.
    """

    weights: tuple[QuantizedWeight, ...]
    buffer: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = int8.quantize_rows(x.flatten(0, -2))
        output = x.new_empty(len(rows.values), sum(len(weight.scales) for weight in self.weights))
        for weight, part in zip(self.weights, output.split([len(w.scales) for w in self.weights], dim=1), strict=True):
            sums = int8.multiply(rows, weight.values, self.buffer)
            int8.dequantize(sums, rows.scales, weight.scales, weight.bias, part)
        return output.unflatten(0, x.shape[:-1])


@dataclass(frozen=True)
class Int8FeedForward:
    """A feed-forward of two int8 products: what GELU gives goes into int8 rows without being written in between."""

    first: QuantizedWeight
    second: QuantizedWeight
    buffer: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = int8.quantize_rows(x.flatten(0, -2))
        sums = int8.multiply(rows, self.first.values, self.buffer)
        hidden = int8.gelu_quantize_rows(sums, rows.scales, self.first.scales, self.first.bias)
        sums = int8.multiply(hidden, self.second.values, self.buffer)
        output = x.new_empty(len(sums), len(self.second.scales))
        int8.dequantize(sums, hidden.scales, self.second.scales, self.second.bias, output)
        return output.unflatten(0, x.shape[:-1])


def multiplied_dtype(module: nn.Module) -> torch.dtype | None:
    """`torch.int8` or `torch.float8_e4m3fn` if `module` is a linear that torchao made W8A8 of that type, by rows and
    symmetric, and nothing hangs on it."""
    weight = module._parameters.get("weight")
    if type(module) is not nn.Linear or type(weight) is nn.Parameter or is_hooked(module):
        return None
    from torchao.quantization import Float8Tensor, Int8Tensor, MappingType, PerRow

    if not isinstance(weight, Float8Tensor | Int8Tensor):
        return None
    kwargs = weight.act_quant_kwargs
    if kwargs is None or not isinstance(kwargs.granularity, PerRow) or weight.scale.numel() != len(weight):
        return None
    if isinstance(weight, Float8Tensor):
        bounds = kwargs.hp_value_lb, kwargs.hp_value_ub
        plain = {weight.qdata.dtype, kwargs.float8_dtype} == {torch.float8_e4m3fn} and bounds == (None, None)
        return torch.float8_e4m3fn if plain else None
    plain = kwargs.mapping_type is MappingType.SYMMETRIC and weight.act_quant_scale is weight.act_pre_scale is None
    return torch.int8 if plain else None


def multiplies_int8(*modules: nn.Module) -> bool:
    """Whether `Int8Linear` can do each: W8A8 int8 on a CPU."""
    return all(
        multiplied_dtype(module) is torch.int8
        and module.weight.qdata.device.type == "cpu"
        and module.weight.shape[1] <= int8.MAX_DIM
        and module.weight.dtype in int8.DTYPES
        for module in modules
    )
