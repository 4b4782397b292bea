"""A real Ray on this machine: replicas that die and come, several models, the same bytes."""

import os
import signal
import socket
import tempfile
import time

import httpx
import pytest

from cogvx_fast import demo_checkpoint
from cogvx_fast.serving.files import PARKED, Files
from cogvx_fast.serving.store import Store
from tests.serving.conftest import SMALL

ray = pytest.importorskip("ray", reason="needs pip install 'cogvx_fast[ray]'")
from ray import serve  # noqa: E402

from cogvx_fast.serving import ray_app  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.servers, pytest.mark.filterwarnings("ignore")]  # of Ray's own

LONG = {"model": "one", "num_inference_steps": 50, "guidance_scale": 1.0, "seed": 3}
WAIT = 240.0  # seconds: machines that test are busy


def until(condition):
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come to that")


class Application:
    """Two models, of each one replica, or two when there are jobs for them; and two replicas of the API."""

    def __init__(self, folder, port):
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT)
        arguments = {
            "models": f"one={demo_checkpoint()},two={demo_checkpoint()}",
            "folder": str(folder),
            "gpus_per_replica": "0",
            "max_replicas": "2",
            "api_replicas": "2",
            "upscale_seconds": "0",
            "lease_seconds": "6",
            "checkpoint_seconds": "0.2",
        }
        serve.run(ray_app.build(arguments), name="cogvx", route_prefix="/")
        self.store, self.files = Store(f"sqlite:///{folder / 'jobs.sqlite'}"), Files(str(folder / "videos"))

    def make(self, **fields):
        answer = self.client.post("/v1/videos", json={"prompt": "a red circle moves right", **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def wait(self, video_id):
        job = until(lambda: (job := self.store.get(video_id)).ended and job)
        assert job.status == "completed", job.error_message
        return job

    def video(self, video_id):
        return self.client.get(f"/v1/videos/{video_id}/content").content

    def workers(self, model):
        """The process of each worker that has the model warm."""
        found = self.store.workers(5).items()
        return {worker: about["pid"] for worker, about in found if about["ready"] and about["model"] == model}


@pytest.fixture(scope="module")
def cluster():
    """A Ray of this test's own: the port of its HTTP. Nothing of it is left, and nothing leaves this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A short path: Ray has sockets in it.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(
                num_cpus=6,  # it only counts them
                num_gpus=0,
                object_store_memory=80 * 2**20,
                include_dashboard=False,
                _temp_dir=folder,
                _system_config={"enable_worker_prestart": False},
            )
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield port
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture(scope="module")
def application(cluster, tmp_path_factory):
    started = Application(tmp_path_factory.mktemp("ray"), cluster)
    yield started
    started.store.close()
    started.client.close()


@pytest.fixture(scope="module")
def expected(application):
    """The video of `LONG`, made without a fault."""
    video_id = application.make(**LONG)
    assert application.wait(video_id).kills == 0
    return application.video(video_id)


def test_it_is_the_same_api(application):
    client = application.client
    assert client.get("/readyz").json()["models"] == {"one": True, "two": True}
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["one", "two"]
    refused = client.post("/v1/videos", json={"prompt": "x", "size": "50x64"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "width")
    assert 'cogvx_workers{model="two",state="ready"} 1.0' in client.get("/metrics").text.splitlines()


def test_a_job_is_made_by_its_own_model(application):
    ids = {name: application.make(model=name, num_inference_steps=2, **SMALL) for name in ("two", "one")}
    for name, video_id in ids.items():
        assert application.wait(video_id).worker in application.workers(name)
    with application.client.stream("GET", f"/v1/videos/{ids['one']}/events") as events:
        assert "event: completed" in events.read().decode()


def test_a_queue_brings_replicas_and_one_that_is_killed_loses_nothing(application, expected):
    store, ids = application.store, []

    def two_workers():
        while store.queue_length(model="one") < 3:  # as long as the other has not come, these may all be made
            ids.append(application.make(**LONG))
        return len(found := application.workers("one")) == 2 and found

    def in_the_middle():
        running = [job for job in store.running() if job.done <= 40 and job.worker in workers]
        return next((job for job in running if application.files.size(job.id, PARKED)), None)

    assert len(application.workers("one")) == 1
    workers = until(two_workers)
    killed = until(in_the_middle)
    os.kill(workers[killed.worker], signal.SIGKILL)
    jobs = [application.wait(video_id) for video_id in ids]
    assert [job.kills for job in jobs] == [int(job.id == killed.id) for job in jobs]
    assert store.get(killed.id).result["made_steps"] < 50, "it went on from where it was"
    assert {application.video(video_id) for video_id in ids} == {expected}
    assert len(set(ids)) == len(ids) and store.totals()["requeued"] == 1
