import asyncio
import json

import pytest

from cogvx_fast.serving.ending import AnswersAtTheEnd


def broken_off(begins_answer, kind="http"):
    """What is sent for a request that is cancelled while it waits."""
    sent = []

    async def app(scope, receive, send):
        if begins_answer:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    async def cancelled():
        task = asyncio.create_task(AnswersAtTheEnd(app)({"type": kind}, None, send))
        await asyncio.sleep(0)
        task.cancel()
        await task

    try:
        asyncio.run(cancelled())
    except asyncio.CancelledError:
        sent.append("cancelled")
    return sent


def test_a_request_that_waits_is_told_that_the_server_ends():
    start, body = broken_off(begins_answer=False)
    assert start["status"] == 503 and (b"retry-after", b"5") in start["headers"]
    assert json.loads(body["body"])["error"]["code"] == "server_ending"


@pytest.mark.parametrize(("begins", "kind"), [(True, "http"), (False, "lifespan")])
def test_others_are_broken_off(begins, kind):
    sent = broken_off(begins, kind)
    assert sent[-1] == "cancelled" and len(sent) == 1 + begins
