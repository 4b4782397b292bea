"""The Triton kernels where no GPU is: refused on a CPU, unless they are interpreted, which `interpreted` tests."""

import pytest
import torch
from cogvx_kernels import ops
from cogvx_kernels._triton import why_unavailable


@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_tensors_on_a_cpu_are_refused():
    x, vectors = torch.zeros(1, 4, 8), torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match=r'gated_residual: impl="triton" takes tensors on a GPU, got cpu'):
        ops.gated_residual(x, x, vectors, 0, impl="triton")
