"""Linear layers of a CPU in 16 and 32 bits, with what follows their products."""

from __future__ import annotations

from .cpu import PACKED_LINEAR_DTYPES, bias_gelu_, pack_linear, packed_linear

__all__ = ["PACKED_LINEAR_DTYPES", "bias_gelu_", "pack_linear", "packed_linear"]
