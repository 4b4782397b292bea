"""What numbers are computed and stored in: the formulas' fp32, and the 8-bit formats."""

from __future__ import annotations

import torch

# The largest number that each 8-bit type holds.
QUANTIZED_MAXIMUM = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}

# Columns that share a scale where a row has several: what one tile of a GEMM has of its row.
GROUP = 128

# No scale is of a smaller maximum than this, 2^-100: the inverse of a scale, and its product with another, stay normal
# numbers of fp32.
SMALLEST_MAXIMUM = 2.0**-100


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def wide_or_none(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else wide(tensor)
