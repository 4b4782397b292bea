import asyncio
import json

import pytest

from cogvx_fast.serving.limits import BodyLimits


def ask(chunks, headers=(), pause=0.0, max_seconds=5.0):
    """The status and error code that a request with a body in these chunks is answered; (200, None) if it arrives."""
    left, sent = list(chunks), []

    async def app(scope, receive, send):
        more = True
        while more:
            message = await receive()
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def receive():
        await asyncio.sleep(pause)
        body = left.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(left)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "headers": list(headers), "method": "POST", "path": "/"}
    asyncio.run(BodyLimits(app, 100, max_seconds)(scope, receive, send))
    body = json.loads(b"".join(message.get("body", b"") for message in sent[1:]))
    return sent[0]["status"], body.get("error", {}).get("code")


def test_a_body_within_the_limits_arrives():
    assert ask([b"x" * 50, b"x" * 50]) == (200, None)


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"3")]])
def test_what_comes_is_counted_whatever_it_says_of_itself(headers):
    assert ask([b"x" * 50, b"x" * 51], headers) == (413, "too_large")


@pytest.mark.parametrize("length", [b"101", b"-1", b"many"])
def test_what_says_that_it_is_too_long_is_not_read(length):
    assert ask([], [(b"content-length", length)]) == (413, "too_large")


def test_a_client_that_is_slow_is_not_waited_for():
    assert ask([b"x"] * 50, pause=0.01, max_seconds=0.1) == (408, "too_slow")
