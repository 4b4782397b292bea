import dataclasses
import threading

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from cogvx_fast import demo_checkpoint
from cogvx_fast.serving.api import build
from cogvx_fast.serving.context import Context, Limits
from cogvx_fast.serving.files import VIDEO, Files
from cogvx_fast.serving.jobs import Job, new_id
from cogvx_fast.serving.making import Maker
from cogvx_fast.serving.models import Models
from cogvx_fast.serving.orders import Order, Served
from cogvx_fast.serving.settings import Settings
from cogvx_fast.serving.store import Store
from cogvx_fast.serving.worker import Worker
from cogvx_fast.video import write_video
from tests.serving import postgres

ORDER = Order("demo", "a red circle moves right", None, 64, 64, 17, 4, 1.5, 0, 8, "exact")
# Of many steps that take no time.
SMALL = {"width": 32, "height": 32, "num_frames": 9, "guidance_scale": 1.0}


@pytest.fixture(scope="session")
def maker(tmp_path_factory):
    """The demo model, loaded and warm."""
    settings = Settings(demo_checkpoint(), "", "", threads=torch.get_num_threads(), preview_seconds=0.0)
    return Maker(dataclasses.replace(settings, checkpoint_seconds=0.0))


@pytest.fixture
def place(tmp_path):
    """Settings of workers that share a store and files in an empty folder."""
    return Settings(
        demo_checkpoint(),
        f"sqlite:///{tmp_path / 'jobs.sqlite'}",
        str(tmp_path / "files"),
        name="demo",
        lease_seconds=5.0,
        poll_seconds=0.01,
        checkpoint_seconds=0.0,
    )


@pytest.fixture
def store(place):
    opened = Store(place.store)
    yield opened
    opened.close()


@pytest.fixture
def files(place):
    return Files(place.files)


@pytest.fixture
def add(store):
    """Puts a job into the queue: `add(num_inference_steps=8)`; what is no field of an order is one of the job."""

    def put(**values):
        fields = {field.name for field in dataclasses.fields(Order)}
        order = dataclasses.replace(ORDER, **{name: value for name, value in values.items() if name in fields})
        others = {name: value for name, value in values.items() if name not in fields}
        given = {
            "owner": "",
            "request": dataclasses.asdict(order),
            "model": order.model,
            "total": order.steps,
            **others,
        }
        job = Job(new_id(), **given)
        store.add(job)
        return job

    return put


@pytest.fixture
def work(place, maker):
    """Runs a worker in this thread until `until()` is true, or everything has ended."""

    def run(until=None, worker=None):
        worker = worker or Worker(place)
        store = Store(place.store)

        def watch():
            try:
                while not done.is_set() and not (until() if until is not None else not store.queue_length()):
                    done.wait(0.005)
            except Exception as error:
                failed.append(error)
            finally:
                worker.end()

        done, failed = threading.Event(), []
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        worker.work(maker)
        done.set()
        thread.join()
        store.close()
        if failed:
            raise failed[0]

    return run


@pytest.fixture(scope="session")
def served():
    return Served.of(demo_checkpoint(), "demo", None, None, "float32", "cpu")


@pytest.fixture
def context(served, store, files, place):
    return Context(Models([served]), store, files, None, Limits(queued=5, body_bytes=100_000, body_seconds=5.0), place)


@pytest.fixture
def client(context):
    return TestClient(build(context), raise_server_exceptions=False)


@pytest.fixture
def completed(add, store, files):
    """A job whose video is there: 9 frames, 48x32, from black to white."""

    def make(**values):
        job = add(num_frames=9, width=48, height=32, **values)
        frames = [Image.fromarray(np.full((32, 48, 3), 28 * number, np.uint8)) for number in range(9)]
        size = files.write(job.id, VIDEO, lambda path: write_video(frames, path, 8))
        lease = store.take(job.id, "w", 10)
        result = {"stage_seconds": {"denoise": 2.0}, "made_steps": 4, "engine_report": "engine: exact", "warnings": []}
        store.complete(job.id, lease, result, size)
        return store.get(job.id)

    return make


@pytest.fixture
def mp4(tmp_path):
    """The bytes of a video of so many frames."""

    def make(frames=17, size=(64, 48)):
        images = [Image.new("RGB", size, (10 * number, 0, 0)) for number in range(frames)]
        return write_video(images, tmp_path / "upload.mp4", 8).read_bytes()

    return make


@pytest.fixture(scope="module")
def postgresql():
    with postgres.running() as address:
        yield address


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request, tmp_path):
    """Of a database without tables, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    address = request.getfixturevalue("postgresql")
    from cogvx_fast.serving import store

    engine = store.sa.create_engine(address)
    store._metadata.drop_all(engine)
    engine.dispose()
    return address
