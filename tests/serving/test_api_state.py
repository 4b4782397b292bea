"""What the server says of itself: models, health, figures, expected times, events."""

import json
import threading
import time

import anyio
import pytest
from PIL import Image

from cogvx_fast.serving.events import Listening, events
from cogvx_fast.serving.files import PREVIEW
from tests.serving.asking import ask, assert_error


def test_models(client):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["demo"]
    assert client.get("/v1/models/demo").json()["object"] == "model"
    assert_error(client.get("/v1/models/a/b"), 404, "model_not_found", "model")


def test_health_and_readiness(client, store):
    assert client.get("/healthz").text == "ok\n"
    assert client.get("/readyz").status_code == 503
    store.seen("w", {"ready": False, "model": "demo"})
    assert client.get("/readyz").status_code == 503
    store.seen("w", {"ready": True, "model": "demo"})
    assert client.get("/readyz").json() == {"ready": True, "workers": 1, "models": {"demo": True}}


def test_metrics(client, store, add, completed):
    add(), completed()
    store.cancel(add().id)
    store.seen("w", {"ready": True, "model": "demo", "device": "cuda:0", "memory": 7})
    store.count(steps=12, seconds_decode=1.5)
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'cogvx_jobs{model="demo",status="queued"} 1.0',
        'cogvx_jobs_ended_total{end="completed"} 1.0',
        'cogvx_jobs_ended_total{end="cancelled"} 1.0',
        "cogvx_steps_total 12.0",
        'cogvx_stage_seconds_total{stage="decode"} 1.5',
        'cogvx_workers{model="demo",state="ready"} 1.0',
        'cogvx_device_memory_bytes{device="cuda:0",model="demo",worker="w"} 7.0',
    ):
        assert line in lines
    assert any(line.startswith('cogvx_longest_wait_seconds{model="demo"} ') for line in lines)


def test_the_expected_time_is_learned_and_says_who_is_before(context, client, completed, add):
    completed()  # 9 frames of 48x32 in 0.5 s a step
    videos = {job.id: client.get(f"/v1/videos/{job.id}").json() for job in (add(), add(num_inference_steps=40))}
    short, long = videos.values()
    scale = 64 * 64 * 17 / (48 * 32 * 9)
    assert short["eta_seconds"] == pytest.approx(4 * 0.5 * scale, rel=0.01)
    assert long["eta_seconds"] == pytest.approx(44 * 0.5 * scale, rel=0.01)
    assert (short["queue_position"], long["queue_position"]) == (0, 1)


def test_the_first_request_has_a_time_from_the_warm_up(client, store):
    before = ask(client, num_inference_steps=50).json()["eta_seconds"]
    size = {"width": 128, "height": 128, "num_frames": 17, "guidance_scale": 6.0}
    warm = {"request": size, "stage_seconds": {"denoise": 0.5, "decode": 3.0}, "made_steps": 1}
    store.seen("w", {"ready": True, "model": "demo", "warm": warm})
    after = ask(client, num_inference_steps=4, priority=1).json()["eta_seconds"]
    assert after == pytest.approx(4 * 0.5 + 3.0) and after != before


def test_events_follow_a_job_to_its_end(client, add, store, files):
    job = add()

    def work():
        time.sleep(0.3)
        lease = store.take(job.id, "w", 10)
        for done in (1, 2, 3, 4):
            store.report(job.id, lease, 10, done=done)
            files.write(job.id, PREVIEW, lambda path, c=done: Image.new("RGB", (8, 8), (c, 0, 0)).save(path))
            time.sleep(0.4)
        store.complete(job.id, lease, {"stage_seconds": {}, "made_steps": 4}, 1)

    thread = threading.Thread(target=work)
    thread.start()
    with client.stream("GET", f"/v1/videos/{job.id}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        blocks = "".join(response.iter_text()).strip().split("\n\n")
    thread.join()
    found = [(block.split("\n")[0][7:], json.loads(block.split("\n")[1][6:])) for block in blocks]
    assert found[0][0] == "queued" and found[0][1]["queue_position"] == 0
    assert [data["done"] for name, data in found if name == "step"][-4:] == [1, 2, 3, 4]
    assert any(name == "preview" and data["image"].startswith("data:image/webp;base64,") for name, data in found)
    assert found[-1][0] == "completed" and found[-1][1]["id"] == job.id


def test_events_of_a_deleted_job_and_of_a_closing_server_end(client, add, context, store):
    job = add()
    threading.Timer(0.2, lambda: store.delete(job.id)).start()
    assert "event: deleted" in client.get(f"/v1/videos/{job.id}/events").text
    threading.Timer(0.2, context.closing.set).start()
    assert "event: queued" in client.get(f"/v1/videos/{add().id}/events").text


def test_many_who_listen_cost_the_store_no_more_than_one(context, add, store, monkeypatch):
    asked, listening, jobs = [], Listening(context), [add() for _ in range(4)]
    some, waiting = store.some, store.waiting
    monkeypatch.setattr(store, "some", lambda ids: asked.append(sorted(ids)) or some(ids))
    monkeypatch.setattr(store, "waiting", lambda: asked.append("waiting") or waiting())
    heard = {job.id: "" for job in jobs}

    async def listen(job):
        async for text in events(listening, job):
            heard[job.id] += text

    async def all_of_them():
        async with anyio.create_task_group() as group:
            for job in jobs:
                group.start_soon(listen, job)
            await anyio.sleep(0.3)
            lease = store.take(jobs[0].id, "w", 10)
            store.complete(jobs[0].id, lease, {}, 1)
            for job in jobs[1:]:
                store.delete(job.id)

    anyio.run(all_of_them)
    assert "event: completed" in heard.pop(jobs[0].id)
    assert all("event: queued" in text and text.count("event: deleted") == 1 for text in heard.values())
    assert asked.count("waiting") <= 2 and len(asked) < 20
    assert sorted(job.id for job in jobs) in asked and not listening._listeners and not listening._jobs
