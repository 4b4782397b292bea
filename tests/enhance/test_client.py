"""The client of addresses: what it sends, when it tries again, and that its messages hold no key."""

import socket

import openai
import pytest

from cogvx_fast.enhance import Endpoint, RefusedError, UnansweredError, client

from .server import KEY, stand_in

ASKED = [{"role": "user", "content": "a cat"}]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (client.ADDRESS, client.KEY):
        monkeypatch.delenv(name, raising=False)


def nowhere():
    """An address where nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{held.getsockname()[1]}/v1"


def test_it_asks_what_it_is_told_and_nothing_more():
    with stand_in("A cat.") as server:
        assert Endpoint("tiny", server.url, KEY).write(ASKED) == "A cat."
    (asked,) = server.asked
    headers, path = asked.pop("headers"), asked.pop("path")
    assert asked == {"model": "tiny", "messages": ASKED} and path == "/v1/chat/completions"
    assert headers["authorization"] == f"Bearer {KEY}"


def test_the_environment_names_address_and_key(monkeypatch):
    with stand_in("A cat.") as server:
        monkeypatch.setenv(client.ADDRESS, server.url)
        monkeypatch.setenv(client.KEY, f" {KEY}\n")  # as `$(cat file)` in some shells
        assert Endpoint().write(ASKED) == "A cat."
    assert server.asked[0]["model"] == "only-model" and server.asked[0]["headers"]["authorization"] == f"Bearer {KEY}"


def test_of_several_models_one_must_be_named():
    with stand_in("A cat.") as server:
        for models, words in ((["a", "b"], "has 2 models, name one: a, b"), ([], "has 0 models, name one")):
            server.models = models
            with pytest.raises(RefusedError, match=words):
                Endpoint(base_url=server.url).write(ASKED)
    assert server.asked == []


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_errors_that_can_pass_are_tried_again(status):
    with stand_in((status, {"error": {"message": "busy"}}), "A cat.") as server:
        assert Endpoint("tiny", server.url).write(ASKED) == "A cat."
    assert len(server.asked) == 2


def test_it_waits_between_tries(monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(UnansweredError, match="cannot be reached"):
        Endpoint("tiny", nowhere()).write(ASKED)
    assert len(waited) == client.RETRIES and all(seconds > 0.1 for seconds in waited)


def test_after_all_tries_it_says_what_the_server_said():
    words = "answers with status 503: the model is loading"
    with (
        stand_in((503, {"error": {"message": "the model is\nloading"}})) as server,
        pytest.raises(UnansweredError, match=words) as caught,
    ):
        Endpoint("tiny", server.url).write(ASKED)
    assert caught.value.status == 503 and len(server.asked) == 1 + client.RETRIES


def test_a_slow_answer_is_none(monkeypatch):
    monkeypatch.setattr(client, "_ANSWER", 0.05)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(UnansweredError, match="does not answer in time"),
    ):
        Endpoint("tiny", f"http://127.0.0.1:{silent.getsockname()[1]}/v1", retries=0).write(ASKED)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_other_errors_are_refused_at_once(status):
    words = rf"status {status}: no: \*\*\* is wrong"
    with (
        stand_in((status, {"error": {"message": f"no: {KEY} is wrong"}})) as server,
        pytest.raises(RefusedError, match=words) as caught,
    ):
        Endpoint("tiny", server.url, KEY).write(ASKED)
    assert caught.value.status == status and len(server.asked) == 1


@pytest.mark.parametrize("body", [b"<html>hello", {}, {"choices": []}, {"choices": [{}]}, [1]])
def test_what_is_no_chat_completion_is_refused(body, monkeypatch):
    with stand_in("unused") as server:
        server.next = lambda _: (201, body)
        with pytest.raises(RefusedError, match="something else than OpenAI's API"):
            Endpoint("tiny", server.url).write(ASKED)


def test_no_text_is_an_empty_one():
    with stand_in((200, None)) as server:
        assert Endpoint("tiny", server.url).write(ASKED) == ""


@pytest.mark.parametrize(
    ("url", "key", "words"),
    [
        (None, None, "needs OPENAI_API_KEY, or OPENAI_BASE_URL"),
        (client.OPENAI, "", "needs OPENAI_API_KEY"),
        ("localhost:11434", KEY, "is no address"),
        ("ftp://localhost", KEY, "is no address"),
        ("http://[", KEY, "is no address"),
        ("http://host:port", KEY, "is no address"),
        ("http://localhost", f"{KEY}é", "OPENAI_API_KEY holds a character"),
        ("http://localhost", f"{KEY}\nX-Other: 1", "OPENAI_API_KEY holds a character"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_asked(url, key, words):
    with pytest.raises(RefusedError, match=words) as caught:
        Endpoint("tiny", url, key)
    assert KEY not in str(caught.value)


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(RefusedError, match=r"pip install 'cogvx_fast\[enhance\]'"):
        Endpoint("tiny", "http://localhost", KEY)


def test_openai_itself_has_a_default():
    assert Endpoint(api_key=KEY).model == client.DEFAULT_MODEL
    assert Endpoint(base_url=f"{client.OPENAI}/", api_key=KEY).model == client.DEFAULT_MODEL
    assert Endpoint("other", api_key=KEY).model == "other"


def test_no_message_holds_a_key_or_a_password():
    """Whatever is told: the address without its password, the server's words without what it was sent."""
    with stand_in((400, {"error": {"message": f"{KEY} pass-word some=query"}})) as server:
        host = server.url.removeprefix("http://")
        endpoint = Endpoint("tiny", f"http://me-myself:pass-word@{host}?some=query", KEY)
        with pytest.raises(RefusedError) as caught:
            endpoint.write(ASKED)
    for secret in (KEY, "pass-word", "me-myself", "some=query"):
        assert secret not in str(caught.value) and secret not in endpoint.address
    assert caught.value.__suppress_context__ and host in str(caught.value)


def test_the_stand_in_is_what_the_client_believes_it_is():
    """The client as a user would call it gets a whole answer of the stand-in."""
    with stand_in("A cat.") as server:
        made = openai.OpenAI(base_url=server.url, api_key="-").chat.completions.create(model="tiny", messages=ASKED)
    assert (made.choices[0].finish_reason, made.model) == ("stop", "tiny")
