"""What a norm reads besides its frames is on the device already: a GPU waits for no copy."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cogvx_fast.vae import norms

from .conftest import randn, run_with


class Operations(TorchDispatchMode):
    """The names of all operations inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("budget", [0, 2**20])
def test_indices_are_made_once(fresh, monkeypatch, budget):
    run_with("torch", monkeypatch)
    fast = fresh[1]
    fast.memory_budget = budget
    latents, pixels = randn(1, 16, 5, 3, 4), randn(1, 3, 9, 24, 32)
    for call, given in ((fast.decode, latents), (fast.encode, pixels)):
        seen = []
        for _ in range(2):
            with torch.no_grad(), Operations() as operations:
                call(given)
            seen.append(operations.names)
        from_host = [{name: names.count(name) for name in ("lift_fresh", "arange")} for names in seen]
        # Only whether the frames are finite is asked.
        assert from_host[1] == {"lift_fresh": 0, "arange": 0}, from_host
        assert seen[1].count("_local_scalar_dense") + seen[1].count("is_nonzero") <= 1


@pytest.mark.parametrize(("time", "low"), [(1, 1), (2, 1), (3, 2), (9, 3), (8, 2), (5, 5), (4, 3)])
def test_nearest_is_interpolation(time, low):
    """As `CogVideoXSpatialNorm3D` has it: of several frames in odd number the first is interpolated apart."""
    frames = torch.arange(low, dtype=torch.float64).reshape(1, 1, low, 1, 1)

    def nearest(x, size):
        return torch.nn.functional.interpolate(x, size=(size, 1, 1))

    if time > 1 and time % 2 == 1 and low > 1:
        expected = torch.cat([frames[:, :, :1], nearest(frames[:, :, 1:], time - 1)], dim=2)
    else:
        expected = nearest(frames, time)
    cpu = torch.device("cpu")
    assert norms._nearest_frames(time, low, cpu).tolist() == expected.flatten().tolist()
    assert norms._nearest_frames(time, low, cpu) is norms._nearest_frames(time, low, cpu)
