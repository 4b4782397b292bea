"""A generation on a CPU takes the cores that are free, says so where they are not, and gives torch's number back."""

import os
import subprocess
import sys

import pytest
import torch

from cogvx_fast import EngineConfig, FastCogVideoXPipeline, threads
from tests import toy


class Kernel:
    """What the kernel tells: threads that run, this one among them, and how busy each core is."""

    def __init__(self, monkeypatch, tmp_path, busy):
        self.busy, self.jiffies = busy, 0
        self.loadavg, self.stat = tmp_path / "loadavg", tmp_path / "stat"
        self.write(1 + round(sum(busy)))
        monkeypatch.setattr(threads, "_recent", threads._Recent())
        monkeypatch.setattr(threads, "_LOADAVG", self.loadavg)
        monkeypatch.setattr(threads, "_STAT", self.stat)
        monkeypatch.setattr(threads, "_cores", lambda: list(range(len(busy))))
        monkeypatch.setattr(threads.time, "sleep", self.sleep)

    def write(self, running):
        self.loadavg.write_text(f"1.00 1.00 1.00 {running}/200 4711\n")
        lines = [f"cpu  {self.jiffies} 0 0 0 0 0 0 0 0 0"]
        for number, part in enumerate(self.busy):
            spent = round(self.jiffies * part)
            lines.append(f"cpu{number} {spent} 0 0 {self.jiffies - spent} 0 0 0 0 0 0")
        self.stat.write_text("\n".join([*lines, "intr 1 2 3"]))

    def sleep(self, seconds):
        self.jiffies += round(1000 * seconds)
        self.write(1 + round(sum(self.busy)))


@pytest.mark.parametrize(
    ("busy", "wanted", "chosen"),
    [
        ([0, 0], 2, 2),
        ([1, 1], 2, 1),
        ([1, 0], 2, 1),
        ([1, 1, 0, 0], 2, 2),  # both find a core
        ([1, 1] + [0] * 14, 16, 14),
        ([1] * 16, 16, 1),
        ([0.1] * 16, 16, 14),
        ([1, 1], 1, 1),
    ],
)
def test_no_more_threads_than_cores_that_are_free(monkeypatch, tmp_path, busy, wanted, chosen):
    Kernel(monkeypatch, tmp_path, busy)
    number, why = threads.choose(wanted)
    assert number == chosen and bool(why) == (chosen < wanted)
    if why:
        assert why == f"other processes had {sum(busy):.1f} of {len(busy)} cores"


def test_within_a_fixed_number_nobody_else_counts(monkeypatch, tmp_path):
    Kernel(monkeypatch, tmp_path, [1, 1])
    with threads.fixed(2):
        assert threads.choose(2) == threads.choose(1) == (2, "")
    assert threads.choose(2)[0] == 1


def test_what_was_seen_counts_for_a_while_unless_glances_see_less(monkeypatch, tmp_path):
    kernel, looked = Kernel(monkeypatch, tmp_path, [1, 1]), []
    look = threads._free
    monkeypatch.setattr(threads, "_free", lambda cores: looked.append(1) or look(cores))
    assert [threads.choose(2)[0] for _ in range(3)] == [1, 1, 1] and len(looked) == 1
    kernel.busy = [0, 0]
    kernel.write(1)
    assert threads.choose(2) == (2, "") and len(looked) == 1
    kernel.busy = [1, 0]
    kernel.write(2)
    threads._recent.at -= threads._FRESH
    assert threads.choose(2)[0] == 1 and len(looked) == 2


@pytest.mark.parametrize("content", [None, "", "1 2", "a b c d/e", "1.0 1.0 1.0 /"])
@pytest.mark.parametrize("file", ["loadavg", "stat"])
def test_where_the_kernel_does_not_tell_it_is_all(monkeypatch, tmp_path, file, content):
    kernel = Kernel(monkeypatch, tmp_path, [1, 1])
    monkeypatch.setattr(kernel, "write", lambda running: None)
    path = getattr(kernel, file)
    path.unlink() if content is None else path.write_text(content)
    assert threads.choose(2) == (2, "")


def test_a_system_without_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert threads.choose(8) == (8, "")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seen(monkeypatch):
    """Torch's threads in each part of a generation."""
    found = {}

    def record(part):
        def hook(*arguments, **options):
            found.setdefault(part, set()).add(torch.get_num_threads())

        return hook

    pipe = FastCogVideoXPipeline(**toy.pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.register_forward_pre_hook(record("text"))
    pipe.transformer.transformer_blocks[0].attn1.register_forward_pre_hook(record("step"))
    decode = type(pipe.vae).decode_stream, type(pipe.vae).decode
    monkeypatch.setattr(
        type(pipe.vae), "decode", lambda self, *a, **k: (record("decode")(), decode[1](self, *a, **k))[1]
    )
    return pipe, found


def test_all_of_a_generation_takes_them_and_the_report_says_why(monkeypatch, two_threads, seen):
    pipe, found = seen
    monkeypatch.setattr(threads, "choose", lambda wanted: (1, "other processes had 2.0 of 2 cores"))
    pipe(**toy.inputs(num_steps=2))
    assert found == {"text": {1}, "step": {1}, "decode": {1}} and torch.get_num_threads() == 2
    line = pipe.engine_report().line("threads")
    assert not line.applied
    assert line.detail == "1 in this generation: at its start other processes had 2.0 of 2 cores"
    monkeypatch.setattr(threads, "choose", lambda wanted: (wanted, ""))
    found.clear()
    pipe(**toy.inputs(num_steps=1))
    assert found == {"text": {2}, "step": {2}, "decode": {2}}
    assert all(line.name != "threads" for line in pipe.engine_report().lines)


def test_pieces_of_a_stream_take_them_and_what_comes_between_does_not(monkeypatch, two_threads, seen):
    pipe, _ = seen
    monkeypatch.setattr(threads, "choose", lambda wanted: (1, "busy"))
    within, plain = [], type(pipe.vae)._decoded

    def decoded(self, *arguments, **options):
        for frames in plain(self, *arguments, **options):
            within.append(torch.get_num_threads())
            yield frames

    monkeypatch.setattr(type(pipe.vae), "_decoded", decoded)
    between = [torch.get_num_threads() for _ in pipe.decode_stream(torch.zeros(1, 5, 16, 4, 4))]
    assert set(within) == {1} and set(between) == {2} and len(between) == 2


def test_a_number_that_is_set_within_stays(two_threads):
    with threads.at_most(1):
        torch.set_num_threads(3)
    assert torch.get_num_threads() == 3
    with pytest.raises(RuntimeError), threads.at_most(1):
        raise RuntimeError
    assert torch.get_num_threads() == 3


def test_what_inductor_compiled_keeps_its_number(monkeypatch):
    pipe = FastCogVideoXPipeline(**toy.pipeline().components, engine=EngineConfig(compile="blocks"))
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(threads, "choose", lambda wanted: pytest.fail("asked"))
    with pipe.engine_session() as session:
        assert session.ran.threads is None
    assert all(line.name != "threads" for line in pipe.engine_report().lines)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) > 8, reason="Linux, few cores")
def test_busy_processes_are_seen():
    """With the real kernel: a process for each core that does nothing but run."""
    cores = len(os.sched_getaffinity(0))
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        number, why = max(threads.choose(cores) for _ in range(3))
        assert (number, bool(why)) == (1, cores > 1)
    finally:
        for process in busy:
            process.kill()
            process.wait()
