"""A script that changes torch's default dtype gets what it gets from diffusers."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# In a process of its own: the default is global, and what was made under it would stay in caches.
SCRIPT = """
import sys
import torch
from cogvx_fast import accelerate
from tests import toy
from tests.dropin.generations import relative


def generate(pipe):
    try:
        return pipe(**toy.inputs(num_steps=2)).frames
    except Exception as error:
        return error


def check(default, weights, from_the_start):
    exact = generate(toy.pipeline("5b"))
    reference, fast = (toy.pipeline("5b").to(dtype=weights) for _ in range(2))
    torch.set_default_dtype(default if from_the_start else torch.float32)
    fast = accelerate(fast)
    torch.set_default_dtype(default)
    expected, output = map(generate, (reference, fast))
    torch.set_default_dtype(torch.float32)
    where = f"default {default}, weights of {weights}"
    if isinstance(expected, Exception):
        assert isinstance(output, Exception), f"{where}: diffusers raises {expected!r}, ours does not"
        return print(where, "both raise", expected)
    assert not isinstance(output, Exception), f"{where}: {output!r}"
    assert output.dtype == expected.dtype, f"{where}: {output.dtype}, not {expected.dtype}"
    own, error = relative(expected, exact), relative(output, exact)
    assert error < max(1.5 * own, 1e-4), f"{where}: error {error:.1e}, diffusers' own is {own:.1e}"
    print(where, error, own)


for name in sys.argv[1:]:
    for weights in (torch.float32, torch.bfloat16):
        for from_the_start in (False, True):
            check(getattr(torch, name), weights, from_the_start)
"""


def test_a_default_dtype_around_a_generation():
    names = ("bfloat16", "float16", "float64")
    command = [sys.executable, "-c", SCRIPT, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    said = (done.stderr.strip() or "nothing").splitlines()[-1]
    assert done.returncode == 0, f"exit status {done.returncode} after {done.stdout!r}: {said}"
    assert done.stdout.count("weights of") == 4 * len(names)
