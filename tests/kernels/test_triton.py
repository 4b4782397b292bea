"""The Triton kernels where no GPU is: interpreted in a process of their own, and refused on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cogvx_kernels import ops
from cogvx_kernels.triton import why_not

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = sorted(path.name for path in Path(__file__).with_name("interpreted").glob("test_*.py"))
needs_triton = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def interpret(path, *options):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, f"tests/kernels/interpreted/{path}"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@needs_triton
@pytest.mark.parametrize("module", INTERPRETED)
def test_interpreted(module):
    interpret(module)


@needs_triton
@pytest.mark.kernels_all
def test_what_takes_long_to_interpret():
    interpret("", "-m", "kernels_all")


@needs_triton
def test_tensors_on_a_cpu_are_refused():
    x, vectors = torch.zeros(1, 4, 8), torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match=r'gated_residual: impl="triton" takes tensors on a GPU, got cpu'):
        ops.gated_residual(x, x, vectors, 0, impl="triton")
