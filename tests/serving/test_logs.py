"""The log: a JSON object a line, whoever writes it."""

import json
import logging
import subprocess
import sys

import pytest
from fastapi.testclient import TestClient

from cogvx_fast import demo_checkpoint
from cogvx_fast.serving.api import build
from cogvx_fast.serving.context import Context, Limits
from cogvx_fast.serving.keys import Keys, add_key
from cogvx_fast.serving.logs import logger
from cogvx_fast.serving.models import Models
from cogvx_fast.serving.orders import Served


@pytest.fixture(scope="module")
def served():
    return Served.of(demo_checkpoint(), "demo", None, None, "float32", "cpu")


@pytest.fixture
def context(served, store, files, place):
    return Context(Models([served]), store, files, None, Limits(body_bytes=1000), place)


@pytest.fixture
def said(monkeypatch):
    """What is said of requests."""

    class Handler(logging.Handler):
        def emit(self, record):
            if record.getMessage() == "request":
                names = ("method", "path", "status", "seconds", "key", "job")
                found.append({name: getattr(record, name) for name in names if hasattr(record, name)})

    found, handler, level = [], Handler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_each_request_is_a_line(context, said, tmp_path):
    key = add_key(tmp_path / "keys", "anna")
    context.keys = Keys(tmp_path / "keys")
    client = TestClient(build(context), headers={"authorization": f"Bearer {key}"})
    video_id = client.post("/v1/videos?secret=1", json={"prompt": "a secret"}).json()["id"]
    client.get(f"/v1/videos/{video_id}/content")
    client.get("/v1/videos", headers={"authorization": "Bearer cvx-wrong"})
    client.post("/v1/videos", content=b"x" * 1001)
    client.get("/nowhere/" + "x" * 600)
    for path in ("/healthz", "/metrics", "/readyz"):
        client.get(path)
    assert all(line.pop("seconds") >= 0 for line in said)
    assert said == [
        {"method": "POST", "path": "/v1/videos", "status": 200, "key": "anna", "job": video_id},
        {"method": "GET", "path": f"/v1/videos/{video_id}/content", "status": 409, "key": "anna", "job": video_id},
        {"method": "GET", "path": "/v1/videos", "status": 401},
        {"method": "POST", "path": "/v1/videos", "status": 413},
        {"method": "GET", "path": "/nowhere/" + "x" * 491, "status": 404},
        {"method": "GET", "path": "/readyz", "status": 503},
    ]
    assert "secret" not in json.dumps(said) and key not in json.dumps(said)


def test_what_fails_in_the_server_is_a_line(context, said, store, monkeypatch):
    monkeypatch.setattr(store, "page", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("broken")))
    TestClient(build(context), raise_server_exceptions=False).get("/v1/videos")
    assert [line["status"] for line in said] == [500]


WRITES = """
import logging, threading, warnings
import diffusers.utils.logging, transformers.utils.logging
from cogvx_fast.serving.logs import logger, set_up
diffusers.utils.logging.get_logger("diffusers.x"), transformers.utils.logging.get_logger("transformers.x")
set_up()
logger.info("ours", extra={"job": "video_1", "other": 1})
logging.getLogger("uvicorn.error").info("of uvicorn")
logging.getLogger("sqlalchemy.pool").warning("of another")
logging.getLogger("sqlalchemy.pool").info("not this")
for library in ("diffusers", "transformers"):
    logging.getLogger(library + ".x").warning("of " + library)
warnings.warn("a warning")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start(), thread.join()
raise KeyError("the end")
"""


@pytest.mark.slow
def test_whoever_writes_writes_json():
    done = subprocess.run([sys.executable, "-c", WRITES], capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    messages = [line["message"] for line in lines]
    assert lines[0]["job"] == "video_1" and "other" not in lines[0] and lines[0]["level"] == "info"
    assert messages[:5] == ["ours", "of uvicorn", "of another", "of diffusers", "of transformers"]
    assert "a warning" in messages[5]
    assert messages[6:] == ["ended by ZeroDivisionError", "ended by KeyError"]
    assert "1 / 0" in lines[6]["exception"] or "ZeroDivisionError" in lines[6]["exception"]
    assert done.stdout == "" and done.returncode == 1
