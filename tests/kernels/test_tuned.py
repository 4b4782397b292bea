"""How a kernel is launched on a GPU: on the tensors' device, in the fastest configuration, which is found once and in
place. A pretended GPU, on which each configuration takes as long as it is told to."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from cogvx_kernels._triton import why_unavailable

if why_unavailable() is not None:
    pytest.skip(why_unavailable(), allow_module_level=True)

import triton
from cogvx_kernels._triton import choice, tuned
from cogvx_kernels._triton.tuned import EVERYWHERE, TunedKernel
from torch._library.triton import set_wrap_triton_enabled, triton_ops_to_kernels
from triton.runtime.errors import OutOfResources

from tests.kernels.triton_operations import MODULES

FAST, SLOW, LARGE = (triton.Config({"BLOCK": block}, num_warps=4) for block in (16, 32, 64))
SECONDS = {16: 1.0, 32: 2.0, 64: 0.1}


class Kernel:
    """What stands for a function of triton's: it notes what it is launched with."""

    __name__ = "adding_kernel"
    cache_key = "0123456789abcdef0123"
    arg_names = ("x_ptr", "bias_ptr", "size", "BLOCK")

    def __init__(self, gpu):
        self.gpu = gpu

    def __getitem__(self, grid):
        def run(x, bias, size, BLOCK, **options):
            if BLOCK == 64:
                raise OutOfResources(1 << 20, 1 << 10, "shared memory")
            self.gpu.launches.append((self.gpu.current, BLOCK, x))
            self.gpu.clock += SECONDS[BLOCK]

        return run


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Two GPUs, of which the first is the current one; what was launched; an empty cache."""
    state = SimpleNamespace(current=0, launches=[], clock=0.0, capturing=False, cache=tmp_path / choice.FILE)

    @contextlib.contextmanager
    def device(wanted):
        before, state.current = state.current, wanted.index
        yield
        state.current = before

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = state.clock

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.time - self.time

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(tuned, "INTERPRETED", False)
    monkeypatch.setattr(TunedKernel, "_made", [])
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    forget(monkeypatch)
    with set_wrap_triton_enabled(False):  # as within an operation that is not being traced
        yield state


def forget(monkeypatch):
    """As a new process knows nothing."""
    monkeypatch.setattr(choice, "_known", {})
    monkeypatch.setattr(choice, "_read_from", set())


def kernel(gpu, *configs):
    return TunedKernel(Kernel(gpu), {EVERYWHERE: list(configs)}, key=("size",))


def launch(kernel, x="x", size=1000, index=0, **options):
    tuned.launch(kernel, torch.device("cuda", index), (1,), x, None, 7, size=size, **options)


def test_launches_go_to_the_device_of_the_tensors(gpu):
    one = kernel(gpu, FAST)
    launch(one, index=1)
    launch(one, index=0)
    assert [device for device, *_ in gpu.launches] == [1, 0] and gpu.current == 0


def test_the_fastest_is_found_once(gpu):
    several = kernel(gpu, SLOW, LARGE, FAST)  # the second cannot be launched
    launch(several)
    tried = len(gpu.launches)
    assert tried == 2 + choice.ROUNDS * choice.LAUNCHES * 2 + 1
    launch(several)
    assert [block for _, block, _ in gpu.launches[tried - 1 :]] == [16, 16]
    assert len(gpu.launches) == tried + 1


def test_a_toy_clip_does_not_decide_for_a_long_one(gpu, monkeypatch):
    several = kernel(gpu, SLOW, FAST)
    launch(several, size=300)
    monkeypatch.setitem(SECONDS, 32, 0.5)
    launch(several, size=17776)
    launch(several, size=300)
    launch(several, size=18000)  # of the same power of two
    assert [block for _, block, _ in gpu.launches[-3:]] == [32, 16, 32]
    assert len(json.loads(gpu.cache.read_text())) == 2


def test_a_choice_is_kept_on_disk(gpu, monkeypatch):
    launch(kernel(gpu, SLOW, FAST))
    (question,) = json.loads(gpu.cache.read_text())
    assert "NVIDIA_H100_80GB_HBM3" in question and "bias_ptr:none" in question and question.endswith("size<=1024")
    forget(monkeypatch)
    gpu.launches.clear()
    launch(kernel(gpu, SLOW, FAST))
    assert [block for _, block, _ in gpu.launches] == [16]


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', "\0"])
def test_a_file_that_says_nothing_is_replaced(gpu, content):
    gpu.cache.write_text(content)
    launch(kernel(gpu, SLOW, FAST))
    assert list(json.loads(gpu.cache.read_text()).values()) == [choice.describe(FAST)]
    assert [path.name for path in gpu.cache.parent.iterdir()] == [choice.FILE]


def test_a_cache_that_cannot_be_written_keeps_nothing(gpu, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(gpu.cache / "below a file"))
    gpu.cache.write_text("{}")
    launch(kernel(gpu, SLOW, FAST))
    assert gpu.launches[-1][1] == 16


def test_what_cannot_be_launched_twice_is_tried_beside(gpu):
    made = []

    def trial():
        made.append(None)
        return (1,), ("scratch", None, 7)

    several = kernel(gpu, SLOW, FAST)
    launch(several, trial=trial)
    launch(several, trial=trial)
    assert [x for *_, x in gpu.launches].count("x") == 2 and gpu.launches[-2][2] == gpu.launches[-1][2] == "x"
    assert len(made) == 1


def test_nothing_is_timed_while_a_graph_is_captured(gpu):
    several, gpu.capturing = kernel(gpu, SLOW, FAST), True
    launch(several)
    assert [block for _, block, _ in gpu.launches] == [32]
    gpu.capturing = False
    launch(several)
    assert gpu.launches[-1][1] == 16


def test_where_none_can_be_launched_it_says_why(gpu):
    with pytest.raises(OutOfResources, match="shared memory"):
        launch(kernel(gpu, LARGE, LARGE))


def test_a_gpu_that_does_not_run_a_kernel_is_told_why(gpu):
    one = TunedKernel(Kernel(gpu), {"rtx": [FAST]}, (), {"hopper": "it has no such instruction"})
    with pytest.raises(ValueError, match="adding does not run on sm_90: it has no such instruction"):
        launch(one)


def test_torch_knows_the_kernels_of_each_operation():
    """What it keeps of compiled graphs goes by their sources."""
    names = {f"cogvx_kernels::{name}_triton" for name in MODULES}
    assert names == {name for name in triton_ops_to_kernels if name.startswith("cogvx_kernels::")}
    told = {kernel for name in names for kernel in triton_ops_to_kernels[name]}
    assert told == {kernel.fn for kernel in TunedKernel.all()}
