"""Whole servers: processes, HTTP, the unchanged client of OpenAI, and what may happen to them."""

import json
import os
import signal
import sys
import time
import urllib.request
from pathlib import Path

import openai
import pytest

from cogvx_fast import demo_checkpoint
from cogvx_fast.serving.files import PARKED
from cogvx_fast.serving.store import Store
from tests.serving.conftest import SMALL
from tests.serving.process import PROMPT, Server, until

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")]

LONG = {"num_inference_steps": 60, "seed": 3, **SMALL}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("server") / "folder")
    yield started
    started.end()


@pytest.fixture(scope="module")
def expected(server):
    """The video of `LONG`, made without a fault."""
    video_id = server.make(**LONG)
    assert server.wait(video_id).kills == 0
    return server.video(video_id)


def test_openais_client_does_all_that_it_does(server):
    client = server.client
    made = client.videos.create_and_poll(prompt=PROMPT, size="64x64", extra_body={"num_inference_steps": 4, "seed": 1})
    assert (made.status, made.progress, made.model, made.seconds) == ("completed", 100, "demo", "2")
    data = client.videos.download_content(made.id).read()
    assert data[4:8] == b"ftyp"
    assert b"WEBP" in client.videos.download_content(made.id, variant="thumbnail").read()[:16]
    remixed = client.videos.poll(client.videos.remix(made.id, prompt="a blue square").id)
    assert remixed.status == "completed" and remixed.remixed_from_video_id == made.id
    assert client.videos.download_content(remixed.id).read() != data
    again = client.videos.create_and_poll(
        prompt="a green square", input_reference=("v.mp4", data), extra_body={"num_inference_steps": 4, "strength": 0.5}
    )
    assert again.status == "completed", again.error
    assert {video.id for video in client.videos.list(limit=1)} >= {made.id, remixed.id, again.id}, "over all pages"
    assert client.videos.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(made.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(prompt=PROMPT, seconds="4", size="50x64")
    assert (caught.value.param, caught.value.code) == ("width", "invalid_value")
    assert [model.id for model in client.models.list()] == ["demo"]


def test_a_worker_that_is_killed_loses_nothing(server, expected):
    video_id = server.make(**LONG)
    server.kill_its_worker_in_the_middle_of(video_id, 30)
    assert server.files.size(video_id, PARKED), "it was saved on the way"
    assert server.wait(video_id).result["made_steps"] <= 31, "it goes on, at most a step before the last"
    assert server.video(video_id) == expected


def test_cancelling_stops_it_and_the_next_one_begins(server):
    video_id, next_id = server.make(**LONG), server.make(num_inference_steps=2, **SMALL)
    until(lambda: server.store.get(video_id).done >= 2 or server.store.get(next_id).ended)
    request = urllib.request.Request(f"{server.address}/v1/videos/{video_id}/cancel", method="POST")
    urllib.request.urlopen(request).close()
    cancelled = server.client.videos.poll(video_id)
    assert (cancelled.status, cancelled.error.code) == ("failed", "cancelled")
    assert server.wait(next_id).done == 2


def test_sigterm_parks_and_the_next_start_goes_on(server, expected):
    video_id, waiting = server.make(**LONG), server.make(num_inference_steps=2, priority=-1, **SMALL)
    until(lambda: server.store.get(video_id).done >= 10)
    before = time.monotonic()
    server.end()
    assert time.monotonic() - before < 10
    there = Store(f"sqlite:///{server.folder / 'jobs.sqlite'}")
    parked = there.get(video_id)
    assert (parked.status, parked.lease, parked.kills) == ("queued", None, 0) and parked.done >= 10
    there.close()
    server.start()
    assert server.wait(video_id).result["made_steps"] == 60, "none was made twice"
    assert server.video(video_id) == expected
    server.wait(waiting)


def test_a_server_that_is_killed_loses_nothing(server, expected):
    done_before = [video.id for video in server.client.videos.list()]
    video_id, waiting = server.make(**LONG), server.make(num_inference_steps=2, priority=-1, **SMALL)
    until(lambda: server.store.get(video_id).done >= 10)
    worker = server.worker()
    server.end(signal.SIGKILL)
    until(lambda: not Path(f"/proc/{worker}").exists())  # it notices that nobody is there
    server.start()
    server.wait(video_id), server.wait(waiting)
    assert server.video(video_id) == expected
    assert [video.id for video in server.client.videos.list()] == [waiting, video_id, *done_before]
    assert not [path for path in server.folder.rglob("*partial*")]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")
def test_what_answers_gives_way_to_what_makes_videos(server):
    def nice(process):
        return {os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir(f"/proc/{process}/task")}

    server.wait(server.make(num_inference_steps=1, **SMALL))
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, server.process.pid) == max(own, 10) and own in nice(server.process.pid)
    assert nice(server.worker()) == {own}
    worker = server.worker()
    os.kill(worker, signal.SIGKILL)
    until(lambda: server.worker() != worker)
    assert nice(server.worker()) == {own}, "of one that was started later, too"


def test_headers_have_a_limit(server):
    """Whatever parser of HTTP is installed beside it."""
    request = urllib.request.Request(f"{server.address}/healthz", headers={"X-Large": "x" * 2**17})
    with pytest.raises(OSError) as caught:
        urllib.request.urlopen(request, timeout=30).close()
    assert getattr(caught.value, "code", 400) == 400, "answered so, or cut off while it was sent"
    urllib.request.urlopen(f"{server.address}/healthz", timeout=30).close()


def test_several_models_at_one_address(tmp_path):
    models = ("--name", "one", "--name", "two", demo_checkpoint(), demo_checkpoint())
    started = Server(tmp_path / "folder", *models)
    try:
        assert [model.id for model in started.client.models.list()] == ["one", "two"]
        ids = [started.make(model=name, num_inference_steps=2, **SMALL) for name in ("two", "one", "two")]
        jobs = [started.wait(video_id) for video_id in ids]
        assert jobs[0].worker == jobs[2].worker != jobs[1].worker
        assert {about["model"] for about in started.store.workers(5).values()} == {"one", "two"}
    finally:
        started.end()


JUMPY = """
import pathlib, time
_real, _offset = time.time, pathlib.Path(__file__).with_name("offset")
time.time = lambda: _real() + float(_offset.read_text())
"""


def test_a_clock_that_jumps_loses_and_doubles_nothing(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(JUMPY)

    def set_clock(seconds):
        (tmp_path / "new").write_text(str(seconds))
        (tmp_path / "new").replace(tmp_path / "offset")

    set_clock(0)
    server = Server(tmp_path / "folder", "--lease-seconds", "3", "--device", "cpu", "--device", "cpu", paths=[tmp_path])
    try:
        longer = {**LONG, "num_inference_steps": 300}
        undisturbed = server.make(**longer)
        server.wait(undisturbed)
        video_id = server.make(**longer)
        for done, seconds in ((50, 3600), (150, -3600), (200, 86400 * 30)):
            until(lambda done=done: server.store.get(video_id).done >= done)
            set_clock(seconds)
        job = server.wait(video_id)
        assert (job.kills, job.result["made_steps"]) == (0, 300), "no other worker took it"
        assert server.video(video_id) == server.video(undisturbed), "nor is it old"
        later = server.make(num_inference_steps=2, **SMALL)
        set_clock(0)
        assert server.wait(later).kills == 0
        assert server.store.totals().get("requeued", 0) == 0
        assert {video.id for video in server.client.videos.list()} == {undisturbed, video_id, later}
    finally:
        server.end()


def test_the_log_has_a_json_object_a_line(server):
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]  # all: nothing writes plain text
    ended = [line for line in lines if line["message"] == "completed"]
    assert ended and all(line["job"].startswith("video_") and line["worker"] for line in ended)
    assert any(line["message"] == "Application startup complete." for line in lines), "uvicorn's, too"
    asked = [line for line in lines if line["message"] == "request"]
    assert any(line["path"] == "/v1/videos" and line["status"] == 200 and line["job"] for line in asked)
