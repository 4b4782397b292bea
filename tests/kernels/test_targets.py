"""One row a GPU: everything that depends on one is read from it, and a new one is a row more."""

import dataclasses

import pytest
import torch
from cogvx_kernels import targets
from cogvx_kernels._triton import why_unavailable
from cogvx_kernels.targets import TARGETS, Target

if why_unavailable() is not None:
    pytest.skip(why_unavailable(), allow_module_level=True)

from cogvx_kernels import aot
from cogvx_kernels._triton.tuned import TunedKernel
from cogvx_kernels.aot import models
from cogvx_kernels.inspect import inspection


def devices(monkeypatch, capability, name="NVIDIA Something"):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    return torch.device("cuda", 0)


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_every_kernel_has_configurations_for_every_target_or_says_why(target):
    kernels = TunedKernel.all()
    assert len(kernels) > 15
    for kernel in kernels:
        assert bool(kernel.for_target(target)) != (target.family in kernel.without), kernel.name
    assert all(family in {t.family for t in TARGETS.values()} for kernel in kernels for family in kernel.without)


def test_no_table_is_of_a_family_that_no_target_has():
    names = {name for target in TARGETS.values() for name in (target.name, target.family)} | {"everywhere"}
    assert all(set(kernel.configs) <= names for kernel in TunedKernel.all())


@pytest.mark.slow
def test_a_made_up_gpu_is_one_line(monkeypatch):
    # One that the tools of every Triton can read: those of 3.6 do not know 10.3.
    monkeypatch.setitem(TARGETS, "sm_87", dataclasses.replace(TARGETS["sm_86"], name="sm_87", capability=(8, 7)))

    new = TARGETS["sm_87"]
    with monkeypatch.context() as machine:
        assert targets.target_of(devices(machine, (8, 7))) is new
    launches = models.model_launches(1920, torch.float16) + models.quantized_launches(1920, torch.float16, torch.int8)
    assert all(launch.configs(new) for launch in launches)
    (compiled,) = aot.compile_all(launches[0], [new], first_only=True)
    assert not compiled.resources.problems(new)
    assert inspection.inspect(compiled).target == "sm_87"


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 1), "sm_120"),
    ],
)
def test_a_gpu_takes_the_nearest_target_below(monkeypatch, capability, name):
    for newer in TARGETS.keys() - {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}:
        monkeypatch.delitem(TARGETS, newer)
    assert targets.target_of(devices(monkeypatch, capability)) is TARGETS[name]
    reason = targets.why_not_e4m3(devices(monkeypatch, capability))
    assert (reason is None) == TARGETS[name].e4m3
    assert reason is None or "it needs 8.9" in reason


def test_a_gpu_older_than_all_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"need compute capability 8\.0, cuda:0 has 7\.5"):
        targets.target_of(devices(monkeypatch, (7, 5)))
    assert "8.0" in why_unavailable(torch.device("cuda", 0))


def test_rows_say_what_they_are():
    assert [target for target in TARGETS.values() if target.capability is None] == [TARGETS["gfx942"]]
    assert all(isinstance(target, Target) and target.name == name for name, target in TARGETS.items())
