"""Every form that the linears of a block take: what replaces calls of the modules, on the modules' own weights.

A form is a callable over rows `(batch, sequence, features)`. Which one a block gets is the plan's `Product`; `binding`
makes them. Forms for 8 bits work on the very memory of torchao's tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cogvx_kernels import ops
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..hooks import is_hooked


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
class OneDnnLinear:
    """A linear, or several of one input, on a copy of the weights in oneDNN's own order."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    gelu: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ops.packed_linear(x, self.weight, self.bias, self.gelu)


@dataclass(frozen=True)
class CublasLtLinear:
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
class FeedForwardPair:
    """A feed-forward of two products, GELU in the first."""

    first: OneDnnLinear | CublasLtLinear
    second: OneDnnLinear | MergedLinear

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
        ops.bias_gelu_(hidden, self.first.bias)
        return self.second(hidden).view(*x.shape[:2], -1)


class QuantizedRows(NamedTuple):
    """8-bit numbers `(..., columns)`, and fp32 scales by row `(...)` or by group of columns `(..., groups)`."""

    numbers: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True)
class ScaledLinear:
    """One linear, or several of one input, whose outputs lie side by side.

    Attributes:
        weight: torchao's 8-bit values `(out, in)`; of several linears, the memory that theirs are views of.
        scales: of the output channels, fp32 `(out,)`.
        bias: `(out,)`, or None.
        out_dtype: of what is returned.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    out_dtype: torch.dtype

    @classmethod
    def of(cls, *linears: nn.Linear) -> ScaledLinear:
        weights = [_quantized(linear) for linear in linears]
        scales = torch.cat([weight.scale.data.float().flatten() for weight in weights])
        biases = [linear.bias for linear in linears]
        bias = None if biases[0] is None else torch.cat([bias.data for bias in biases])
        return cls(merged([weight.qdata for weight in weights]), scales, bias, weights[0].dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the numbers that it multiplies."""
        return self.weight.dtype

    def __call__(self, x: torch.Tensor | QuantizedRows) -> torch.Tensor:
        output: Any = self.multiply(x, None, self.out_dtype)  # a tensor alone, as that is no 8-bit dtype
        return output

    def multiply(
        self, x: torch.Tensor | QuantizedRows, activation: str | None, out_dtype: torch.dtype
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """`ops.scaled_linear` of rows that are in 8 bits already, or come to be here."""
        numbers, scales = ops.quantize_rows(x, self.dtype, impl="triton") if isinstance(x, torch.Tensor) else x
        weight = (self.weight, self.scales, self.bias)
        return ops.scaled_linear(numbers, scales, *weight, activation, out_dtype, "triton")


@dataclass(frozen=True)
class ScaledFeedForward:
    """A feed-forward of two 8-bit products: GELU and rounding to 8 bits are the end of the first."""

    first: ScaledLinear
    second: ScaledLinear

    @property
    def dtype(self) -> torch.dtype:
        return self.first.dtype

    def __call__(self, x: torch.Tensor | QuantizedRows) -> torch.Tensor:
        return self.second(QuantizedRows(*self.first.multiply(x, "gelu_tanh", self.dtype)))


def _quantized(linear: nn.Linear) -> Any:
    """Its weight as what torchao made of it, whose classes have no types."""
    return linear.weight


def multiplies_scaled(linears: list[nn.Linear]) -> bool:
    """Whether all are W8A8 of one 8-bit type, and all or none have a bias."""
    dtypes = {multiplied_dtype(linear) for linear in linears}
    if len(dtypes) > 1 or None in dtypes:
        return False
    alike = len({linear.bias is None for linear in linears}) == 1
    return alike and all(_quantized(linear).qdata.is_contiguous() for linear in linears)


@dataclass(frozen=True)
class QuantizedWeight:
    """One linear: torchao's int8 values `(out, in)`, and in fp32 its scales and bias `(out,)`."""

    values: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(cls, linear: nn.Linear) -> QuantizedWeight:
        weight = _quantized(linear)
        scales = weight.scale.data.float().flatten()
        bias = torch.zeros_like(scales) if linear.bias is None else linear.bias.data.float()
        return cls(weight.qdata, scales, bias)


@dataclass(frozen=True)
class Int8Linear:
    """Linears of one input, whose rows are rounded once for all of them; their outputs lie side by side.

    `buffer`: int32, where sums may lie; one for all blocks. It would be the largest allocation of a step otherwise.
    """

    weights: tuple[QuantizedWeight, ...]
    buffer: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        numbers, row_scales = ops.quantize_rows(x.flatten(0, -2), torch.int8, impl="cpu")
        output = x.new_empty(len(numbers), sum(len(weight.scales) for weight in self.weights))
        for weight, part in zip(self.weights, output.split([len(w.scales) for w in self.weights], dim=1), strict=True):
            sums = ops.int8_products(numbers, weight.values, self.buffer)
            ops.dequantize(sums, row_scales, weight.scales, weight.bias, part)
        return output.unflatten(0, x.shape[:-1])


@dataclass(frozen=True)
class Int8FeedForward:
    """A feed-forward of two int8 products: what GELU gives goes into int8 rows without being written in between."""

    first: QuantizedWeight
    second: QuantizedWeight
    buffer: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        numbers, row_scales = ops.quantize_rows(x.flatten(0, -2), torch.int8, impl="cpu")
        sums = ops.int8_products(numbers, self.first.values, self.buffer)
        hidden, row_scales = ops.gelu_quantize_rows(sums, row_scales, self.first.scales, self.first.bias)
        sums = ops.int8_products(hidden, self.second.values, self.buffer)
        output = x.new_empty(len(sums), len(self.second.scales))
        ops.dequantize(sums, row_scales, self.second.scales, self.second.bias, output)
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


def multiplies_int8(*linears: nn.Linear) -> bool:
    """Whether `Int8Linear` can do each: W8A8 int8 on a CPU."""
    return all(
        multiplied_dtype(linear) is torch.int8
        and _quantized(linear).qdata.device.type == "cpu"
        and linear.weight.shape[1] <= ops.MAX_INT8_DIM
        and linear.weight.dtype in ops.CPU_DTYPES
        for linear in linears
    )


# Of each first weight of several: the memory that they are views of. Between generations nothing else holds that.
_WHOLES = WeakTensorKeyDictionary()
_MERGING = threading.Lock()


def merged(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of all `parameters`, one after another along their first axis, of which each becomes a view.

    No copy is left, and each view is a storage of its own: saving one of them writes its own numbers alone. Views made
    before are found again.
    """
    first = parameters[0]
    with _MERGING:
        whole = _WHOLES.get(first)
        if whole is not None and _are_parts(parameters, whole):
            return whole
        # Not as inference tensors, whoever calls: these are the user's weights, which may be trained later.
        with torch.inference_mode(False), torch.no_grad():
            whole = torch.cat([parameter.data for parameter in parameters])
            for parameter, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
                parameter.data = torch.from_dlpack(part)
        _WHOLES[first] = whole
        return whole


def _are_parts(parameters: Sequence[torch.Tensor], whole: torch.Tensor) -> bool:
    """Whether `parameters` lie in `whole` one after another and are all of it."""
    address = whole.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != address or parameter.dtype != whole.dtype:
            return False
        address += parameter.nbytes
    return address == whole.data_ptr() + whole.nbytes
