"""The routes, without a worker: what is asked for, checked and queued."""

import json

import pytest

from cogvx_fast.serving import schemas
from tests.serving.asking import ask, assert_error

OF_OPENAI = {
    *("id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at", "prompt", "size"),
    *("seconds", "remixed_from_video_id", "error"),
}


def test_a_job_is_in_the_store_when_it_is_answered(client, store):
    video = ask(client, num_inference_steps=7, seed=5).json()
    assert set(video) >= OF_OPENAI
    assert (video["object"], video["status"], video["progress"], video["model"]) == ("video", "queued", 0, "demo")
    assert (video["size"], video["seconds"], video["queue_position"]) == ("128x128", "2", 0)
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


def test_the_page_of_the_api_is_whole(client):
    page = client.get("/openapi.json").json()
    names = page["components"]["schemas"]
    assert {"Create", "Upload", "Remix", "Video", "InputReference"} <= set(names)
    text = json.dumps(page)
    assert all(f'"#/components/schemas/{name}"' in text for name in ("Create", "Upload", "Remix", "InputReference"))
    assert set(schemas.Create.model_fields) == set(names["Create"]["properties"])
    assert set(schemas.Upload.model_fields) == set(schemas.Create.model_fields)
