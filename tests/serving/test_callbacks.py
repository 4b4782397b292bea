"""Webhooks: where they may go, how they are signed, and that every end is said, once it is heard."""

import contextlib
import http.server
import json
import stat
import threading
import time

import openai
import pytest
from fastapi.testclient import TestClient

from cogvx_fast import demo_checkpoint
from cogvx_fast.serving import callbacks as module
from cogvx_fast.serving import deliveries
from cogvx_fast.serving.api import build
from cogvx_fast.serving.callbacks import BadAddressError, Callbacks, event, event_id, secret_in
from cogvx_fast.serving.context import Context, Limits
from cogvx_fast.serving.deliveries import PAUSES, Sender
from cogvx_fast.serving.files import VIDEO
from cogvx_fast.serving.models import Models
from cogvx_fast.serving.orders import Served
from cogvx_fast.serving.store import Store

SECRET = "whsec_" + "QUJD" * 10


@contextlib.contextmanager
def receiver(*statuses, pause=0.0, headers=None):
    """A server of webhooks that answers with these in turn, then with the last: its address, and what it was sent."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append((self.path, dict(self.headers.items()), body))
            ended.wait(pause)
            with contextlib.suppress(OSError):
                self.send_response(statuses[min(len(got), len(statuses)) - 1])
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()

        def log_message(self, *_):
            pass

    got, ended = [], threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", got
    finally:
        ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("allowed", "url"),
    [
        ("example.org", "https://example.org/hook?a=1"),
        ("example.org", "https://EXAMPLE.org:443/"),
        ("Example.ORG:8443", "https://example.org:8443"),
        ("https://example.org", "https://example.org/"),
        ("http://intra.example.org:8080", "http://intra.example.org:8080/x"),
        ("localhost", "http://localhost/x"),
        ("127.0.0.1:9000", "http://127.0.0.1:9000/"),
        ("127.0.0.1:9000", "https://127.0.0.1:9000/"),
        ("[::1]:9000", "http://[::1]:9000/"),
    ],
)
def test_what_is_allowed(allowed, url):
    Callbacks(["other.example", allowed], SECRET).check(url)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://evil.example/", "is not on this server's list: example.org (--callback-host)"),
        ("https://example.org.evil.example/", "not on"),
        ("https://sub.example.org/", "not on"),
        ("https://example.org./", "not on"),
        ("http://example.org/", "not on"),
        ("https://example.org:8443/", "not on"),
        ("https://169.254.169.254/", "not on"),
        ("https://localhost/", "not on"),
        ("https://user@example.org/", "no user"),
        ("https://example.org@evil.example/", "no user"),
        ("https://evil.example\\@example.org/", "no user"),
        ("https://example.org/#x", "fragment"),
        ("https://example.org:0/", "not on"),
        ("https://example.org:99999/", "is no address"),
        ("https://[::1", "is no address"),
        ("ftp://example.org/", "must begin with https://"),
        ("file:///etc/passwd", "must begin with https://"),
        ("example.org", "must begin with https://"),
        ("", "printable"),
        ("https://example.org/a b", "printable"),
        ("https://example.org/\r\nX: y", "printable"),
        ("https://ex\u00e4mple.org/", "printable"),
        ("https://example.org/" + "x" * 2048, "at most 2048"),
    ],
)
def test_what_is_not_allowed(url, words):
    with pytest.raises(BadAddressError) as caught:
        Callbacks(["example.org"], SECRET).check(url)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "host", ["", "*", "https://", "ftp://a", "a b", "a/b", "user@a", "a:0", "a:70000", "http://a:"]
)
def test_a_host_that_is_none(host):
    with pytest.raises(ValueError, match="must be HOST"):
        Callbacks([host], SECRET)


def test_openais_client_takes_it_for_what_it_is():
    client = openai.OpenAI(api_key="none", webhook_secret=SECRET)
    body = event("video_1", True, 1234.9)
    headers = Callbacks(["a"], SECRET).headers(event_id("video_1"), body)
    found = client.webhooks.unwrap(body, headers)
    assert (found.type, found.data.id, found.created_at) == ("video.completed", "video_1", 1234)
    assert (found.id, found.object) == (headers["webhook-id"], "event")
    assert json.loads(event("video_1", False, 0.0))["type"] == "video.failed"
    for other in (body + b" ", event("video_2", True, 1234.9)):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(other, headers)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        openai.OpenAI(api_key="none", webhook_secret="whsec_" + "QUJE" * 10).webhooks.unwrap(body, headers)


def test_the_secret_is_made_once_for_its_owners_eyes(tmp_path):
    path = tmp_path / "new" / "secret"
    secret = secret_in(path)
    assert secret.startswith("whsec_") and len(secret) == 50
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret_in(path) == secret != secret_in(tmp_path / "other")
    assert [found.name for found in path.parent.iterdir()] == ["secret"]
    for wrong in ("", "hello", "whsec_", "whsec_QUJD", "QUJD" * 10, "whsec_!!"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="no secret of webhooks") as caught:
            secret_in(path)
        assert "secret'" in str(caught.value)
        assert path.read_text() == wrong, "what is there is not written over"


def test_no_redirect_is_followed():
    with (
        receiver(200) as (elsewhere, strange),
        receiver(302, headers={"Location": f"http://{elsewhere}/"}) as (host, got),
    ):
        assert Callbacks([host, elsewhere], SECRET).send(f"http://{host}/", "evt_1", b"{}") == 302
    assert len(got) == 1 and not strange


def test_who_is_slow_is_hung_up_on(monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    with receiver(200, pause=30) as (host, _):
        started = time.monotonic()
        with pytest.raises(OSError):
            Callbacks([host], SECRET).send(f"http://{host}/", "evt_1", b"{}")
        assert time.monotonic() - started < 10


def test_who_sends_a_byte_now_and_then_is_hung_up_on(monkeypatch):
    import socket

    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip():
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\n")
                for _ in range(1000):
                    connection.sendall(b"x")
                    time.sleep(0.02)

        thread = threading.Thread(target=drip)
        thread.start()
        host = f"127.0.0.1:{listening.getsockname()[1]}"
        started = time.monotonic()
        with contextlib.suppress(Exception):
            Callbacks([host], SECRET).send(f"http://{host}/", "evt_1", b"{}")
        assert time.monotonic() - started < 10, "20 seconds of bytes"
        thread.join()


# What is still to be sent.


@pytest.fixture
def queued(add, store):
    """A job whose end is to be said at an address."""

    def make(url):
        job = add()
        with store._engine.begin() as connection:
            store.outbox.put(connection, [job.id], url)
        return job

    return make


def end(store, job):
    assert store.complete(job.id, store.take(job.id, "w", 60), {"stage_seconds": {}, "made_steps": 0}, 1)


@contextlib.contextmanager
def sending(store, *hosts, secret=SECRET):
    closing = threading.Event()
    thread = threading.Thread(target=Sender(store.outbox, Callbacks(hosts, secret), closing).run)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join()


def until(condition):
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(deliveries, "_LOOK_SECONDS", 0.02)


def test_an_end_is_said_once_also_by_two_servers(store, place, queued):
    with receiver(200) as (host, got):
        done, waits = queued(f"http://{host}/hook?x=1"), queued(f"http://{host}/")
        failed = queued(f"http://{host}/failed")
        store.cancel(failed.id)
        other = Store(place.store)
        with sending(store, host), sending(other, host):
            end(store, done)
            until(lambda: len(got) == 2 and not store.outbox.due())
            time.sleep(0.2)
        other.close()
    assert len(got) == 2
    by_path = {path: (headers, body) for path, headers, body in got}
    headers, body = by_path["/hook?x=1"]
    found = openai.OpenAI(api_key="none", webhook_secret=SECRET).webhooks.unwrap(body, headers)
    assert (found.type, found.data.id) == ("video.completed", done.id)
    assert json.loads(by_path["/failed"][1])["type"] == "video.failed"
    assert store.get(waits.id).status == "queued"


def test_it_is_tried_again_later_with_the_same_id_also_after_a_restart(store, place, queued, monkeypatch):
    now = time.time()
    monkeypatch.setattr(deliveries.time, "time", lambda: now)
    with receiver(500, 302, 200) as (host, got):
        job = queued(f"http://{host}/")
        end(store, job)
        for number, pause in enumerate(PAUSES[:2], start=1):
            with sending(store, host):
                until(lambda number=number: len(got) == number)
            until(lambda: not store.outbox.due())
            now += pause - 0.5
            assert store.outbox.due() == []
            now += 1
            opened = Store(place.store)
            (due,) = opened.outbox.due()
            opened.close()
            assert (due.job_id, due.tries) == (job.id, number)
        with sending(store, host):
            until(lambda: len(got) == 3)
            now += 1e6
            until(lambda: not store.outbox.due())
    assert len({headers["webhook-id"] for _, headers, _ in got}) == 1
    assert len({headers["webhook-timestamp"] for _, headers, _ in got}) == 3, "signed anew"


def test_it_is_given_up_after_eight_tries(store, queued, monkeypatch):
    monkeypatch.setattr(deliveries, "PAUSES", (0.0,) * 7)
    with receiver(500) as (host, got):
        end(store, queued(f"http://{host}/"))
        with sending(store, host):
            until(lambda: len(got) == 8 and not store.outbox.due())
            time.sleep(0.2)
    assert len(got) == 8


@pytest.mark.parametrize("why", ["gone", "not allowed any more", "deleted"])
def test_what_is_not_wanted_is_not_tried_again(store, queued, why):
    with receiver(410) as (host, got):
        job = queued(f"http://{host}/")
        end(store, job)
        if why == "deleted":
            store.delete(job.id)
            assert store.outbox.due() == []
        with sending(store, "other.example" if why == "not allowed any more" else host):
            until(lambda: not store.outbox.due())
            time.sleep(0.1)
        with store._engine.connect() as connection:
            assert connection.execute(store.outbox._callbacks.select()).all() == []
    assert len(got) == (1 if why == "gone" else 0)


def test_a_clock_that_is_set_back_holds_none(store, queued, monkeypatch):
    job = queued("http://127.0.0.1:1/")
    end(store, job)
    (due,) = store.outbox.due()
    assert store.outbox.claim(due) and not store.outbox.claim(due), "one makes a try"
    assert store.outbox.due() == []
    now = time.time()
    monkeypatch.setattr(deliveries.time, "time", lambda: now - 86400)
    assert [found.tries for found in store.outbox.due()] == [1]


def test_who_hangs_holds_up_no_other_and_no_job(store, queued):
    with receiver(200, pause=60) as (slow, stuck), receiver(200) as (quick, got):
        for _ in range(20):
            end(store, queued(f"http://{slow}/"))
        with sending(store, slow, quick):
            until(lambda: len(stuck) == 2)
            for _ in range(5):
                end(store, queued(f"http://{quick}/"))
            until(lambda: len(got) == 5)
            assert len(stuck) == 2, "two at once"


# Requests.


@pytest.fixture
def context(store, files, place):
    served = Served.of(demo_checkpoint(), "demo", None, None, "float32", "cpu")
    return Context(Models([served]), store, files, None, Limits(), place)


def ask(client, **fields):
    return client.post("/v1/videos", json={"prompt": "a red circle", **fields})


def test_addresses_of_requests_are_checked_before_they_are_queued(context, store, files):
    client, url = TestClient(build(context)), "https://example.org/hook"

    def refused(response):
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", "callback_url")
        return error["message"]

    assert "started without --callback-host" in refused(ask(client, callback_url=url))
    context.callbacks = Callbacks(["example.org"], SECRET)
    assert "is not on this server's list: example.org" in refused(ask(client, callback_url="https://evil.example/"))
    assert store.ids() == set()
    ids = ask(client, callback_url=url, n=2).json()["videos"]
    ask(client)
    for job_id in store.ids():
        store.cancel(job_id)
    assert {(due.job_id, due.url) for due in store.outbox.due()} == {(job_id, url) for job_id in ids}
    client.delete(f"/v1/videos/{ids[0]}")
    assert [due.job_id for due in store.outbox.due()] == [ids[1]]


def test_a_remix_may_have_one_too(context, store, files, add):
    client, job = TestClient(build(context)), add()
    end(store, job)
    files.write(job.id, VIDEO, lambda path: path.write_bytes(b"x"))
    remix = f"/v1/videos/{job.id}/remix"
    url = "https://example.org/"
    assert client.post(remix, json={"prompt": "x", "callback_url": url}).status_code == 400
    context.callbacks = Callbacks(["example.org"], SECRET)
    made = client.post(remix, json={"prompt": "x", "callback_url": url}).json()
    store.cancel(made["id"])
    assert [due.job_id for due in store.outbox.due()] == [made["id"]]
