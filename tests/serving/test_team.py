"""A worker of two processes, each with a device: the same videos, and one that dies takes the worker with it."""

import os
import signal
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from cogvx_fast import demo_checkpoint
from cogvx_fast.cli import serve
from cogvx_fast.cli.console import UsageError
from cogvx_fast.serving import references
from cogvx_fast.serving.files import PARKED
from cogvx_fast.serving.orders import Served
from cogvx_fast.serving.team import Team
from tests.serving.process import Server, until

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

SIZE = {"width": 64, "height": 64, "num_frames": 9}
LONG = {"num_inference_steps": 40, "seed": 3, **SIZE}
EXACT = ("--dtype", "float32")  # a CPU with bf16 units would take bfloat16, in which the order of sums is seen


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("team") / "folder", "--device", "cpu,cpu", *EXACT)
    yield started
    started.end()


@pytest.fixture(scope="module")
def expected(server):
    """The video of `LONG`, made without a fault."""
    video_id = server.make(**LONG)
    assert server.wait(video_id).kills == 0
    return server.video(video_id)


def frames(data):
    return np.stack([np.asarray(frame, dtype=np.float32) for frame in references.frames(data)])


def member(server):
    """The process id of the worker's other process."""
    worker = server.worker()
    children = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    return next(int(pid) for pid in children if b"serving.member" in Path(f"/proc/{pid}/cmdline").read_bytes())


@pytest.mark.slow
def test_two_processes_make_the_video_of_one(server, tmp_path):
    asked = {"num_inference_steps": 6, "seed": 5, "width": 64, "height": 48, "num_frames": 17}
    together = server.make(**asked)
    report = server.wait(together).result["engine_report"]
    assert "2 processes: guidance 2, vae 2" in report
    alone = Server(tmp_path / "folder", *EXACT)
    try:
        one = alone.make(**asked)
        assert "2 processes" not in alone.wait(one).result["engine_report"]
        apart = np.abs(frames(server.video(together)) - frames(alone.video(one)))
    finally:
        alone.end()
    assert apart.mean() < 0.1 and apart.max() <= 8, "what rounding leaves, behind a lossy codec"


@pytest.mark.slow
def test_other_schedulers_sizes_and_videos_as_input(server):
    """Everything that the others are told of."""
    made = server.make(num_inference_steps=4, scheduler="dpm", guidance_scale=1.0, **SIZE)
    assert server.wait(made).status == "completed"
    data = server.video(made)
    again = server.client.videos.create_and_poll(
        prompt="a green square",
        input_reference=("v.mp4", data),
        extra_body={"num_inference_steps": 4, "strength": 0.5, **SIZE},
    )
    assert again.status == "completed", again.error
    assert "2 processes" in server.store.get(again.id).result["engine_report"]


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["the worker's", "another's"])
def test_a_process_that_is_killed_loses_nothing(server, expected, whose):
    video_id = server.make(**LONG)
    until(lambda: server.store.get(video_id).done >= 10)
    worker, other = server.worker(), member(server)
    os.kill(worker if whose == "the worker's" else other, signal.SIGKILL)
    done = server.wait(video_id)
    assert done.kills == 1 and done.result["made_steps"] < 40, "it went on from what was saved"
    assert server.video(video_id) == expected
    for process in (worker, other):  # neither is left behind
        until(lambda process=process: not os.path.exists(f"/proc/{process}"))


@pytest.mark.slow
def test_cancelling_and_deleting_stop_all_and_the_next_one_is_made(server, expected):
    worker = server.worker()
    for path, method in (("/cancel", "POST"), ("", "DELETE")):
        video_id = server.make(**LONG)
        until(lambda video_id=video_id: server.store.get(video_id).done >= 3)
        address = f"{server.address}/v1/videos/{video_id}{path}"
        urllib.request.urlopen(urllib.request.Request(address, method=method)).close()
    next_id = server.make(**LONG)
    assert server.wait(next_id).kills == 0
    assert server.video(next_id) == expected and server.worker() == worker, "the same processes went on"


@pytest.mark.slow
def test_sigterm_parks_and_the_next_start_goes_on(server, expected):
    video_id = server.make(**LONG)
    until(lambda: server.store.get(video_id).done >= 10)
    other = member(server)
    server.end()
    assert server.files.size(video_id, PARKED)
    until(lambda: not os.path.exists(f"/proc/{other}"))
    server.start()
    done = server.wait(video_id)
    assert (done.kills, done.result["made_steps"]) == (0, 40) and server.video(video_id) == expected


class Words:
    """A team of two whose words are noted in the place of sent; its first process alone is real."""

    def __init__(self, monkeypatch):
        self.said = []
        self.team = Team()
        self.team.size = 2
        monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda words, **_: self.said.append(words[0]))


@pytest.fixture
def words(monkeypatch):
    return Words(monkeypatch)


def test_the_others_hear_everything_to_the_end_of_a_video(words):
    with words.team.task("task"):
        assert not words.team.decide(lambda: False)
        words.team.done()
        assert list(words.team.in_turn(iter([1, 2]))) == [1, 2]
    assert words.said == ["task", False, False, False, False] and words.team.is_in_step


def test_what_the_first_leaves_early_the_others_leave_too(words):
    def cancelled():
        raise KeyError

    with words.team.task("one"):
        assert words.team.decide(lambda: True)
    assert words.said == ["one", True] and words.team.is_in_step
    with pytest.raises(KeyError), words.team.task("two"):
        words.team.decide(cancelled)
    assert words.said[2:] == ["two", True] and words.team.is_in_step
    with pytest.raises(OSError, match="full"), words.team.task("three"):
        words.team.done()
        for _ in words.team.in_turn(iter([1, 2])):
            raise OSError("full")
    assert words.said[4:] == ["three", False, True] and words.team.is_in_step


def test_what_goes_wrong_while_all_compute_is_no_end_that_the_others_hear(words):
    def broken():
        raise RuntimeError("a step")
        yield

    with pytest.raises(RuntimeError, match="a step"), words.team.task("task"):
        words.team.done()
        next(words.team.in_turn(broken()))
    assert words.said == ["task", False] and not words.team.is_in_step


def test_devices_of_one_worker_are_checked(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "GPU")
    assert serve._devices(["cuda:0,cuda:1"]) == ["cuda:0,cuda:1"]
    assert serve._devices(["cpu, cpu", "cuda:1"]) == ["cpu,cpu", "cuda:1"]
    for asked, words in (
        ("cuda:0,cpu", "devices of one kind"),
        ("cuda:0,cuda:0", "each GPU once"),
        ("cuda,cuda:1", "each GPU once"),
        ("cuda:0,cuda:7", "'cuda:7': is not there"),
    ):
        with pytest.raises(UsageError, match=words):
            serve._devices([asked])


def test_degrees_are_checked_before_anything_starts():
    demo = Served.of(demo_checkpoint(), "demo", None, None, "float32", "cpu")
    serve._check_parallel(None, [demo], [["cpu"]])
    serve._check_parallel("ulysses=2", [demo], [["cpu,cpu"]])
    with pytest.raises(UsageError, match="no effect on workers with one device"):
        serve._check_parallel("auto", [demo], [["cpu"]])
    with pytest.raises(UsageError, match="must be the number of processes, which is 2"):
        serve._check_parallel("guidance=2,ulysses=2", [demo], [["cpu,cpu"]])
