"""Who may ask, and for how much; what a full disk or a fault is answered."""

import dataclasses

import anyio
import pytest
from fastapi.testclient import TestClient

from cogvx_fast.serving.api import build
from cogvx_fast.serving.jobs import StorageFullError
from cogvx_fast.serving.keys import Keys, add_key
from tests.serving.asking import ask, assert_error


def test_limits(client, context, store, files, mp4):
    assert ask(client, n=5).status_code == 200
    full = ask(client)
    assert "at most 5" in assert_error(full, 429, "queue_full") and int(full.headers["retry-after"]) > 0
    for job_id in store.ids():
        store.cancel(job_id)
    context.limits = dataclasses.replace(context.limits, work=128 * 128 * 17 * 10)
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

    def full(*_, **__):
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


def test_a_priority_is_limited_by_its_key(context, completed, store, tmp_path):
    path = tmp_path / "keys"
    anna, ben = ({"authorization": f"Bearer {add_key(path, name, most)}"} for name, most in (("anna", 0), ("ben", 5)))
    client = TestClient(build(context))
    assert ask(client, priority=100).status_code == 200, "without keys it is anybody's"
    context.keys, before = Keys(path), store.ids()

    def of(who, priority, url="/v1/videos"):
        return client.post(url, json={"prompt": "x", "priority": priority}, headers=who)

    for who, most in ((anna, 0), (ben, 5)):
        message = assert_error(of(who, most + 1), 403, "priority_not_allowed", "priority")
        assert f"priority {most + 1} is more" in message and f"at most {most}" in message
    assert store.ids() == before
    assert [of(who, n).json()["priority"] for who, n in ((anna, 0), (anna, -3), (ben, 5))] == [0, -3, 5]
    remix = f"/v1/videos/{completed(owner='anna').id}/remix"
    assert_error(of(anna, 1, remix), 403, "priority_not_allowed", "priority")
    assert of(anna, 0, remix).status_code == 200
    path.write_text(path.read_text().replace("max-priority=5", "max-priority=9"))
    assert of(ben, 9).status_code == 200, "the file is read again"


def test_what_fails_in_the_server_says_nothing_of_its_insides(client, store, monkeypatch):
    monkeypatch.setattr(store, "page", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("/secret")))
    message = assert_error(client.get("/v1/videos"), 500, "internal_error")
    assert "secret" not in message
    assert_error(client.get("/nowhere"), 404, "not_found")
    assert_error(client.put("/v1/videos"), 405, "method_not_allowed")


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


FOREIGN = "https://example.org"


@pytest.mark.parametrize(
    ("host", "origin", "method", "status"),
    [
        ("127.0.0.1:8000", None, "POST", 200),
        ("localhost:8000", "http://localhost:8000", "POST", 200),
        ("[::1]:8000", "http://[::1]:8000", "POST", 200),
        ("127.0.0.1:8000", FOREIGN, "GET", 200),  # a browser keeps what is answered from that page
        ("127.0.0.1:8000", FOREIGN, "POST", 403),
        ("127.0.0.1:8000", "null", "POST", 403),
        ("127.0.0.1:8000", "http://127.0.0.1:9000", "POST", 403),
        ("example.org:8000", "http://example.org:8000", "POST", 403),  # a name that points here
        ("example.org:8000", None, "GET", 403),
        ("127.0.0.1.example.org", None, "GET", 403),
    ],
)
def test_without_keys_other_web_sites_cannot_ask(context, host, origin, method, status):
    client = TestClient(build(dataclasses.replace(context, own_names_only=True)), base_url=f"http://{host}")
    headers = {} if origin is None else {"Origin": origin}
    if method == "GET":
        response = client.get("/v1/videos", headers=headers)
    else:
        response = client.post("/v1/videos", data={"prompt": "a red circle"}, headers=headers)
    assert response.status_code == status, response.text
    if status == 403:
        assert_error(response, 403, "foreign_origin")
