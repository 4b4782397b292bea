"""How micro-benchmarks are timed on a GPU, with one that a test makes up; and their inputs."""

import contextlib

import pytest
import torch
from cogvx_kernels.targets import TARGETS

from benchmarks.kernels import roofline, timing

SECOND = torch.device("cuda", 1)


class Gpu:
    """Stands for `torch.cuda`: each call takes `seconds`, and what is asked for is written down."""

    def __init__(self, monkeypatch, seconds=0.001, l2_bytes=1000):
        self.asked, self.now, self.seconds, self.current = [], 0.0, seconds, None
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing and gpu.current == SECOND

            def record(self):
                gpu.asked.append("event")
                self.at = gpu.now

            def elapsed_time(self, end):
                return (end.at - self.at) * 1000

        @contextlib.contextmanager
        def current(device):
            self.current = device
            yield
            self.current = None

        properties = type("Properties", (), {"L2_cache_size": l2_bytes})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "device", current)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.asked.append(f"wait for {device}"))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.asked.append("busy"))

    def call(self, x, other=None):
        self.asked.append(x.data_ptr())
        self.now += self.seconds


@pytest.fixture
def fresh_clock(monkeypatch):
    clock = timing.GpuClock()
    monkeypatch.setattr(timing, "clock", clock)
    return clock


def test_many_calls_are_queued_between_two_events_and_waited_for_once(monkeypatch, fresh_clock):
    gpu = Gpu(monkeypatch)
    queue = timing.Queue(gpu.call, {"x": torch.zeros(100), "other": None}, SECOND)
    assert queue.calls == 20  # 20 ms
    gpu.asked.clear()
    queue.run()
    assert gpu.asked[:2] == ["busy", "event"] and gpu.asked[-2:] == ["event", "wait for cuda:1"]
    calls = gpu.asked[2:-2]
    assert len(calls) == 20 and all(isinstance(one, int) for one in calls)
    assert fresh_clock() == pytest.approx(0.001)
    queue.run()
    assert fresh_clock() == pytest.approx(0.002)  # what pytest-benchmark takes the difference of


def test_no_call_reads_what_the_one_before_has_left_in_l2(monkeypatch, fresh_clock):
    gpu = Gpu(monkeypatch, l2_bytes=1000)
    queue = timing.Queue(gpu.call, {"x": torch.arange(100.0)}, SECOND)  # 400 bytes
    assert len(queue.copies) == 5
    assert all(torch.equal(copy["x"], torch.arange(100.0)) for copy in queue.copies)
    gpu.asked.clear()
    queue.run()
    calls = gpu.asked[2:-2]
    assert len(set(calls[:5])) == 5 and calls[:5] == calls[5:10]
    large = timing.Queue(gpu.call, {"x": torch.zeros(600)}, SECOND)
    assert len(large.copies) == 1


def test_a_long_call_is_queued_a_few_times_and_a_short_one_not_without_end(monkeypatch, fresh_clock):
    given = {"x": torch.zeros(1000)}
    assert timing.Queue(Gpu(monkeypatch, seconds=1.0).call, given, SECOND).calls == 3
    assert timing.Queue(Gpu(monkeypatch, seconds=1e-6).call, given, SECOND).calls == 50


def test_copies_are_of_all_tensors_and_of_nothing_else():
    values = {"x": torch.ones(2), "pair": (torch.zeros(1), 3), "text_length": 5}
    copies = timing.clone(values)
    assert copies["text_length"] == 5 and copies["pair"][1] == 3 and torch.equal(copies["x"], values["x"])
    assert copies["x"].data_ptr() != values["x"].data_ptr() != copies["pair"][0].data_ptr()
    assert timing.tensor_bytes(values) == 12


def test_on_a_gpu_the_stream_is_that_of_a_whole_clip():
    assert timing.stream("5b", SECOND) == (2, 17776, 3072) and timing.stream("2b", torch.device("cpu"))[1] == 1216


def test_random_numbers_are_made_where_they_are_used():
    with torch.device("meta"):  # a factory that names no device would make them there
        x = timing.randn(3, 4, generator=timing.generator(0, torch.device("cpu")), dtype=torch.bfloat16)
    assert (x.device.type, x.dtype, x.shape) == ("cpu", torch.bfloat16, (3, 4))


def test_the_bound_is_that_of_the_devices_own_board(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", {SECOND: "NVIDIA A100-SXM4-80GB"}.get)
    board = TARGETS["sm_80"].boards[0]
    done = roofline.roofline(1.0, board.bandwidth * 1e9, 0, SECOND)
    assert done["bound_seconds"] == pytest.approx(1) and done["share_of_roofline"] == pytest.approx(1)
    assert "bound_seconds" not in roofline.roofline(1.0, 100, 0, torch.device("cpu"))
