"""The kernels behind torch's `scaled_dot_product_attention`: which one it takes, and two of them by themselves.

Torch chooses among them by an order of its own, which depends on the GPU and its version: cuDNN's kernel comes first on
9.0 and 10.0, flash-attention 2 elsewhere. Two are called here by their operations, as `scaled_dot_product_attention`
calls them. Its own switch, `torch.nn.attention.sdpa_kernel`, sets flags of the whole process: another thread that
generates at that moment would be switched, too. And within `torch.compile` it looks for a GPU while a graph is traced,
which an operation does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend

from .. import devices

_IN_WORDS = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN's kernel",
    SDPBackend.FLASH_ATTENTION: "the flash kernel",
    SDPBackend.EFFICIENT_ATTENTION: "the memory-efficient kernel",
    SDPBackend.MATH: "no kernel of its own, products and a softmax",
    SDPBackend.OVERRIDEABLE: "the device's own kernel",
    SDPBackend.ERROR: "none can run",
}
_Params: Any = torch.backends.cuda.SDPAParams  # these two have stubs that name no arguments
_Backend: Any = SDPBackend
_NO_DEVICE = (AssertionError, RuntimeError)  # of a torch without CUDA, or of one that finds no driver
_CAN_USE = {
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
}


def chosen(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The kernel that torch takes for attention of a block, in words; empty where torch cannot say, as there is no such
    device here.

    Torch is asked, with tensors of this dtype and head dim on this device and the switches as they are now.
    """
    try:
        # The order of kernels is made for the current GPU at the first question.
        with devices.current(device), torch.no_grad():
            query, key, value = _operands(device, dtype, head_dim)
            return _IN_WORDS.get(_Backend(torch._fused_sdp_choice(query, key, value)), "")
    except _NO_DEVICE:
        return ""


def why_not(kernel: SDPBackend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps a kernel from running attention of this dtype and head dim on a GPU; None: nothing."""
    ask = _CAN_USE[kernel]
    try:
        with devices.current(device):
            query, key, value = _operands(device, dtype, head_dim)
            can = ask(_Params(query, key, value, None, 0.0, False, False))
    except _NO_DEVICE as error:
        return f"torch cannot use the GPU: {str(error).splitlines()[0]}"
    # Torch prints its reasons past Python's warnings.
    return None if can else f"torch refuses it; torch.backends.cuda.{ask.__name__}(..., debug=True) prints why"


def cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention `(batch, sequence, heads, head_dim)` by cuDNN, on a GPU and without gradients."""
    # No mask, and no sums of exponentials, which a backward pass would need.
    operation = torch.ops.aten._scaled_dot_product_cudnn_attention
    return operation(*(x.transpose(1, 2) for x in (query, key, value)), None, False)[0].transpose(1, 2)


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention `(batch, sequence, heads, head_dim)` by the flash kernel that torch has, on a GPU."""
    operation = torch.ops.aten._scaled_dot_product_flash_attention
    return operation(*(x.transpose(1, 2) for x in (query, key, value)))[0].transpose(1, 2)


def with_sums(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention `(batch, sequence, heads, head_dim)`, and the logarithm of each row's sum of exponentials.

    By the kernels that torch has for it: the flash kernel, on a GPU in fp32 the memory-efficient one.

    Args:
        key, value: of any number of rows.

    Returns:
        Attended values, and fp32 `(batch, sequence, heads)`.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if query.device.type == "cpu":
        output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    elif query.dtype == torch.float32:
        output, sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)
        sums = sums.narrow(2, 0, query.shape[2])  # its rows are padded
    else:
        output, sums, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
    return output.transpose(1, 2), sums.transpose(1, 2)


def _operands(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[torch.Tensor]:
    """Query, key and value as a block has them: heads before the sequence, cut out of one projection."""
    packed = torch.empty(1, 128, 3, 2, head_dim, dtype=dtype, device=device)
    return [x.transpose(1, 2) for x in packed.unbind(2)]
