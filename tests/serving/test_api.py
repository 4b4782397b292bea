"""The routes, without a worker: what is asked for, checked, queued and handed out."""

import base64
import dataclasses
import json
import threading
import time

import anyio
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from cogvx_fast import demo_checkpoint
from cogvx_fast.serving import references, schemas
from cogvx_fast.serving.api import build
from cogvx_fast.serving.context import Context, Limits
from cogvx_fast.serving.events import Listening, events
from cogvx_fast.serving.files import PREVIEW, REFERENCE, VIDEO
from cogvx_fast.serving.keys import Keys, add_key
from cogvx_fast.serving.models import Models
from cogvx_fast.serving.orders import Served
from cogvx_fast.serving.store import StorageFullError
from cogvx_fast.video import write_video

OF_OPENAI = {
    *("id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at", "prompt", "size"),
    *("seconds", "remixed_from_video_id", "error"),
}


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


def ask(client, **values):
    return client.post("/v1/videos", json={"prompt": "a red circle", **values})


def assert_error(response, status, code, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return error["message"]


def test_a_job_is_in_the_store_when_it_is_answered(client, store):
    video = ask(client, num_inference_steps=7, seed=5).json()
    assert set(video) >= OF_OPENAI
    assert (video["object"], video["status"], video["progress"], video["model"]) == ("video", "queued", 0, "demo")
    assert (video["size"], video["seconds"], video["queue_position"]) == ("64x64", "2", 0)
    assert video["eta_seconds"] > 0
    job = store.get(video["id"])
    assert (job.status, job.total, job.request["seed"]) == ("queued", 7, 5)


@pytest.mark.parametrize("how", ["json", "form", "multipart"])
def test_every_field_reaches_the_order_however_it_comes(client, store, how):
    fields = {
        "prompt": "a red circle",
        "negative_prompt": "a dog",
        "model": "demo",
        "num_inference_steps": 9,
        "guidance_scale": 2.5,
        "seed": 2**63 - 1,
        "num_frames": 9,
        "fps": 12,
        "width": 48,
        "height": 80,
        "engine": "exact",
        "scheduler": "dpm",
        "priority": -3,
    }
    if how == "json":
        response = client.post("/v1/videos", json=fields)
    elif how == "form":
        response = client.post("/v1/videos", data=fields)
    else:
        response = client.post("/v1/videos", files={name: (None, str(value)) for name, value in fields.items()})
    assert response.status_code == 200, response.text
    job = store.get(response.json()["id"])
    assert job.priority == fields.pop("priority")
    assert job.request == {**fields, "strength": None}
    assert {name: response.json()[name] for name in fields} == fields


def test_openais_ways_of_saying_size_and_length(client):
    video = ask(client, size="48x80", seconds="3").json()
    assert (video["width"], video["height"], video["num_frames"], video["seconds"]) == (48, 80, 25, "3")
    assert ask(client, seconds=3).json()["num_frames"] == 25
    assert_error(ask(client, size="48x80", width=64), 400, "invalid_value", "width")
    assert_error(ask(client, seconds="3", num_frames=17), 400, "invalid_value", "num_frames")


@pytest.mark.parametrize(
    ("values", "code", "param", "words"),
    [
        ({"prompt": "  "}, "invalid_value", "prompt", "is empty"),
        ({"prompt": "x" * 32001}, "invalid_value", "prompt", "at most 32000"),
        ({"prompt": "\ud800"}, "invalid_value", "prompt", "UTF-8"),
        ({"prompt": 5}, "invalid_type", "prompt", "string"),
        ({"num_inference_steps": 0}, "invalid_value", "num_inference_steps", "must be 1 to 1000"),
        ({"num_inference_steps": 2**70}, "invalid_type", "num_inference_steps", "less than"),
        ({"guidance_scale": 0.5}, "invalid_value", "guidance_scale", "1 (no guidance) to 30"),
        ({"guidance_scale": 1, "negative_prompt": "x"}, "invalid_value", "negative_prompt", "guidance_scale 1"),
        ({"seed": -1}, "invalid_value", "seed", "must be 0 to"),
        ({"num_frames": 10}, "invalid_value", "num_frames", "nearest: 9 or 17"),
        ({"seconds": "1.3"}, "invalid_value", "num_frames", "nearest"),
        ({"seconds": "abc"}, "invalid_value", "seconds", "number of seconds"),
        ({"width": 50}, "invalid_value", "width", "nearest: 48 or 64"),
        ({"size": "big"}, "invalid_value", "size", "WIDTHxHEIGHT"),
        ({"size": "99984x99984", "num_frames": 8001}, "invalid_value", "height", "what fits"),
        ({"fps": 51}, "invalid_value", "fps", "1 to 50"),
        ({"model": "sora-2"}, "invalid_value", "model", "must be 'demo'"),
        ({"engine": "balanced"}, "invalid_value", "engine", "must be 'exact'"),
        ({"scheduler": "euler"}, "invalid_value", "scheduler", "ddim or dpm"),
        ({"strength": 0.5}, "invalid_value", "strength", "without input_reference"),
        ({"priority": 101}, "invalid_type", "priority", "less than"),
        ({"n": 0}, "invalid_type", "n", "greater than"),
        ({"quality": "high"}, "unknown_parameter", "quality", "no parameter"),
    ],
)
def test_what_cannot_work_is_refused_before_it_is_queued(client, store, values, code, param, words):
    body = json.dumps({"prompt": "a red circle", **values})
    response = client.post("/v1/videos", content=body, headers={"content-type": "application/json"})
    assert words in assert_error(response, 400, code, param)
    assert store.ids() == set()


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"[" * 50_000, b"\xff\xfe"])
def test_a_body_that_is_none_is_refused(client, body):
    response = client.post("/v1/videos", content=body, headers={"content-type": "application/json"})
    assert_error(response, 400, "invalid_json")


def test_a_prompt_is_needed(client):
    assert_error(client.post("/v1/videos", json={}), 400, "missing_parameter", "prompt")


def test_several_at_once_have_seeds_behind_each_other(client, store):
    video = ask(client, n=3, seed=7).json()
    assert video["videos"][0] == video["id"] and len(set(video["videos"])) == 3
    assert [store.get(job_id).request["seed"] for job_id in video["videos"]] == [7, 8, 9]


def test_a_seed_that_is_not_given_is_another_each_time(client):
    assert ask(client).json()["seed"] != ask(client).json()["seed"]


def test_pages(client, add):
    ids = [add(created_at=float(number)).id for number in range(5)]
    first = client.get("/v1/videos?limit=2").json()
    assert [video["id"] for video in first["data"]] == ids[:2:-1]
    assert (first["object"], first["first_id"], first["last_id"]) == ("list", ids[4], ids[3]) and first["has_more"]
    rest = client.get(f"/v1/videos?after={ids[3]}&limit=10").json()
    assert [video["id"] for video in rest["data"]] == ids[2::-1] and not rest["has_more"]
    assert [v["id"] for v in client.get("/v1/videos?order=asc").json()["data"]] == ids
    assert client.get("/v1/videos?limit=0").json()["data"] == []
    assert_error(client.get("/v1/videos?limit=101"), 400, "invalid_type", "limit")
    assert_error(client.get("/v1/videos?order=up"), 400, "invalid_type", "order")
    assert_error(client.get("/v1/videos?after=video_x"), 404, "not_found", "video_id")


def test_a_completed_video(client, completed):
    job = completed()
    response = client.get(f"/v1/videos/{job.id}")
    video = response.json()
    assert (video["status"], video["progress"], video["eta_seconds"]) == ("completed", 100, None)
    assert video["expires_at"] == int(job.completed_at + 7 * 86400)
    assert video["stage_seconds"] == {"denoise": 2.0} and video["engine_report"] == "engine: exact"
    assert response.headers["openai-poll-after-ms"] == "500"
    assert_error(client.get("/v1/videos/video_x"), 404, "not_found", "video_id")


@pytest.mark.parametrize(
    ("variant", "media_type", "magic", "frames"),
    [
        ("video", "video/mp4", b"ftyp", 9),
        ("gif", "image/gif", b"GIF89a", 9),
        ("webp", "image/webp", b"WEBP", 9),
        ("thumbnail", "image/webp", b"WEBP", 1),
        ("spritesheet", "image/jpeg", b"JFIF", 1),
    ],
)
def test_variants(client, completed, store, files, variant, media_type, magic, frames, tmp_path):
    job = completed()
    for _ in range(2):
        response = client.get(f"/v1/videos/{job.id}/content", params={"variant": variant})
        assert response.status_code == 200 and response.headers["content-type"] == media_type
        assert magic in response.content[:16]
    assert store.get(job.id).bytes == files.sizes(job.id)
    if variant in ("gif", "webp", "thumbnail"):
        (tmp_path / "file").write_bytes(response.content)
        with Image.open(tmp_path / "file") as image:
            assert getattr(image, "n_frames", 1) == frames and image.size == (48, 32)
    if variant == "spritesheet":
        (tmp_path / "file").write_bytes(response.content)
        with Image.open(tmp_path / "file") as image:
            assert image.size == (4 * 48, 3 * 32)


def test_parts_of_a_file(client, completed):
    job = completed()
    url = f"/v1/videos/{job.id}/content"
    whole = client.get(url)
    data, etag = whole.content, whole.headers["etag"]
    assert whole.headers["accept-ranges"] == "bytes" and int(whole.headers["content-length"]) == len(data)
    for wanted, start, end in (("0-9", 0, 10), ("10-", 10, len(data)), ("-7", len(data) - 7, len(data))):
        part = client.get(url, headers={"range": f"bytes={wanted}"})
        assert part.status_code == 206 and part.content == data[start:end]
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{len(data)}"
    past_its_end = client.get(url, headers={"range": f"bytes=5-{10**9}"})
    assert past_its_end.status_code == 206 and past_its_end.content == data[5:]
    beyond = client.get(url, headers={"range": f"bytes={len(data)}-"})
    assert_error(beyond, 416, "invalid_range", "Range")
    assert beyond.headers["content-range"] == f"bytes */{len(data)}"
    for not_one_part in ("bytes=0-1,3-4", "lines=1-2", "bytes=-", "bytes=9-2"):
        assert client.get(url, headers={"range": not_one_part}).content == data
    assert client.get(url, headers={"if-none-match": f'"x", {etag}'}).status_code == 304
    assert client.get(url, headers={"range": "bytes=0-1", "if-range": '"other"'}).content == data
    head = client.head(url)
    assert head.status_code == 200 and head.content == b"" and head.headers["content-length"] == str(len(data))


def test_content_that_is_not_there(client, add, completed, files):
    assert_error(client.get(f"/v1/videos/{add().id}/content"), 409, "not_completed", "video_id")
    job = completed()
    assert_error(client.get(f"/v1/videos/{job.id}/content?variant=mov"), 400, "invalid_value", "variant")
    files.remove(job.id, VIDEO)
    for variant in ("video", "gif"):
        assert_error(client.get(f"/v1/videos/{job.id}/content?variant={variant}"), 404, "not_found", "video_id")


def test_deleting_takes_job_and_files(client, completed, files):
    job = completed()
    assert client.delete(f"/v1/videos/{job.id}").json() == {"id": job.id, "object": "video.deleted", "deleted": True}
    assert files.job_ids() == set()
    assert_error(client.get(f"/v1/videos/{job.id}"), 404, "not_found", "video_id")
    assert_error(client.delete(f"/v1/videos/{job.id}"), 404, "not_found", "video_id")


def test_cancelling(client, add, completed):
    video = client.post(f"/v1/videos/{add().id}/cancel").json()
    assert (video["status"], video["error"]["code"]) == ("failed", "cancelled"), "a client that polls must see its end"
    assert client.post(f"/v1/videos/{completed().id}/cancel").json()["status"] == "completed"


def test_a_remix_has_the_noise_and_settings_of_its_source(client, completed, store):
    job = completed(seed=11, scheduler="dpm", negative_prompt="a dog")
    video = client.post(f"/v1/videos/{job.id}/remix", json={"prompt": "a blue square"}).json()
    assert video["remixed_from_video_id"] == job.id
    assert store.get(video["id"]).request == {**job.request, "prompt": "a blue square"}


def test_a_remix_with_a_strength_is_made_of_the_video(client, completed, store, files):
    job = completed()
    video = client.post(f"/v1/videos/{job.id}/remix", json={"prompt": "a blue square", "strength": 0.5}).json()
    assert (video["strength"], store.get(video["id"]).total) == (0.5, 2)
    assert files.size(video["id"], REFERENCE) == files.size(job.id, VIDEO)


def test_what_cannot_be_remixed(client, add, completed):
    response = client.post(f"/v1/videos/{add().id}/remix", json={"prompt": "x"})
    assert_error(response, 409, "not_completed", "video_id")
    url = f"/v1/videos/{completed().id}/remix"
    assert_error(client.post(url, json={"prompt": " "}), 400, "invalid_value", "prompt")
    assert_error(client.post(url, json={"prompt": "x", "size": "1x1"}), 400, "unknown_parameter", "size")
    assert_error(client.post(url, content=b"{"), 400, "invalid_json")


def test_a_reference_is_an_upload_or_a_data_url(client, store, files, mp4):
    data = mp4()
    upload = {"input_reference": ("clip.mp4", data, "video/mp4")}
    url = "data:video/mp4;base64," + base64.b64encode(data).decode()
    responses = [
        client.post("/v1/videos", data={"prompt": "x", "strength": "0.5"}, files=upload),
        ask(client, strength=0.5, input_reference={"image_url": url}),
        client.post("/v1/videos", data={"prompt": "x", "strength": "0.5", "input_reference[video_url]": url}),
    ]
    for response in responses:
        assert response.status_code == 200, response.text
        job = store.get(response.json()["id"])
        assert job.request["strength"] == 0.5 and job.total == 25
        assert b"".join(files.pieces(job.id, REFERENCE, 0, 10**6)) == data


def test_references_that_are_refused_leave_nothing(client, store, files, mp4, monkeypatch):
    def refused(status=400, code="invalid_reference", param="input_reference", data=b"", **fields):
        upload = {"input_reference": ("clip.mp4", data, "video/mp4")}
        return assert_error(
            client.post("/v1/videos", data={"prompt": "x", **fields}, files=upload), status, code, param
        )

    assert "cannot be decoded" in refused(data=b"no video")
    assert "has 9 frames, 17 are to be made" in refused(code="invalid_value", data=mp4(9))
    assert "must be 0.02 to 1" in refused(code="invalid_value", param="strength", data=mp4(), strength="0")
    monkeypatch.setattr(references, "MAX_PIXELS", 63 * 48)
    assert "64x48 pixels" in refused(data=mp4())
    monkeypatch.setattr(references, "MAX_BYTES", 100)
    assert "at most" in refused(data=mp4())
    for url in (
        "http://169.254.169.254/",
        "file:///etc/passwd",
        "data:video/mp4;base64,!!",
        "data:text/html;base64,aa",
    ):
        assert_error(ask(client, input_reference={"image_url": url}), 400, "invalid_reference", "input_reference")
    assert_error(ask(client, input_reference={}), 400, "invalid_reference", "input_reference")
    wrong = client.post("/v1/videos", data={"prompt": "x"}, files={"other": ("a", b"x")})
    assert_error(wrong, 400, "unknown_parameter", "other")
    assert store.ids() == set() and files.job_ids() == set()


def test_limits(client, context, store, files, mp4):
    assert ask(client, n=5).status_code == 200
    full = ask(client)
    assert "at most 5" in assert_error(full, 429, "queue_full") and int(full.headers["retry-after"]) > 0
    for job_id in store.ids():
        store.cancel(job_id)
    context.limits = dataclasses.replace(context.limits, work=64 * 64 * 17 * 10)
    assert_error(ask(client, num_inference_steps=11), 400, "too_much_work", "num_inference_steps")
    assert ask(client, num_inference_steps=10).status_code == 200
    assert_error(client.post("/v1/videos", content=b"x" * 100_001), 413, "too_large")

    def endless():
        for _ in range(200):
            yield b" " * 1000

    assert_error(client.post("/v1/videos", content=endless()), 413, "too_large")


def test_a_full_disk_refuses_new_jobs_and_no_others(client, context, store, files, completed, monkeypatch):
    job = completed()
    monkeypatch.setattr(files, "_least_free", 2**60)
    response = ask(client)
    assert "no new videos" in assert_error(response, 507, "storage_full") and response.headers["retry-after"]
    assert client.get(f"/v1/videos/{job.id}/content").status_code == 200
    monkeypatch.setattr(files, "_least_free", 0)

    def full(*_):
        raise StorageFullError("there is no room")

    monkeypatch.setattr(store, "add", full)
    assert_error(ask(client), 507, "storage_full")
    assert files.job_ids() == {job.id}


def test_a_key_sees_only_its_own(context, store, tmp_path):
    path = tmp_path / "keys"
    anna, ben = add_key(path, "anna"), add_key(path, "ben")
    context.keys = Keys(path)
    client = TestClient(build(context))

    def of(key):
        return {"authorization": f"Bearer {key}"}

    video = client.post("/v1/videos", json={"prompt": "x"}, headers=of(anna)).json()
    assert store.get(video["id"]).owner == "anna"
    assert [v["id"] for v in client.get("/v1/videos", headers=of(anna)).json()["data"]] == [video["id"]]
    assert client.get("/v1/videos", headers=of(ben)).json()["data"] == []
    routes = [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("POST", "/remix"), ("GET", "/content")]
    for method, end in [*routes, ("GET", "/preview"), ("GET", "/events")]:
        response = client.request(method, f"/v1/videos/{video['id']}{end}", headers=of(ben), json={"prompt": "x"})
        assert_error(response, 404, "not_found", "video_id")
    assert_error(client.get(f"/v1/videos?after={video['id']}", headers=of(ben)), 404, "not_found", "video_id")
    for wrong in ({}, of("cvx-wrong"), {"authorization": f"Basic {anna}"}, of("")):
        for url in ("/v1/videos", "/v1/models", f"/v1/videos/{video['id']}"):
            response = client.get(url, headers=wrong)
            assert_error(response, 401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
    assert store.get(video["id"]).status == "queued"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if "anna" not in line))
    assert_error(client.get("/v1/videos", headers=of(anna)), 401, "invalid_api_key")
    assert client.get("/v1/videos", headers=of(ben)).status_code == 200


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


def test_a_preview(client, add, files):
    job = add()
    assert_error(client.get(f"/v1/videos/{job.id}/preview"), 404, "no_preview", "video_id")
    files.write(job.id, PREVIEW, lambda path: Image.new("RGB", (8, 8)).save(path))
    response = client.get(f"/v1/videos/{job.id}/preview")
    assert response.headers["content-type"] == "image/webp" and b"WEBP" in response.content


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


def test_a_request_that_ends_in_the_middle_is_no_failure(context, store):
    messages = [{"type": "http.request", "body": b'{"prom', "more_body": True}, {"type": "http.disconnect"}]
    sent = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", b"100")]
    scope = {"type": "http", "method": "POST", "path": "/v1/videos", "headers": headers, "query_string": b""}
    anyio.run(build(context), scope, receive, send)  # it raises nothing, which would be a traceback in the log
    assert sent[0]["status"] == 400 and store.queue_length() == 0


def test_what_fails_in_the_server_says_nothing_of_its_insides(client, store, monkeypatch):
    monkeypatch.setattr(store, "page", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("/secret")))
    message = assert_error(client.get("/v1/videos"), 500, "internal_error")
    assert "secret" not in message
    assert_error(client.get("/nowhere"), 404, "not_found")
    assert_error(client.put("/v1/videos"), 405, "method_not_allowed")


def test_the_page_of_the_api_is_whole(client):
    page = client.get("/openapi.json").json()
    names = page["components"]["schemas"]
    assert {"Create", "Upload", "Remix", "Video", "InputReference"} <= set(names)
    text = json.dumps(page)
    assert all(f'"#/components/schemas/{name}"' in text for name in ("Create", "Upload", "Remix", "InputReference"))
    assert set(schemas.Create.model_fields) == set(names["Create"]["properties"])
    assert set(schemas.Upload.model_fields) == set(schemas.Create.model_fields)
