"""`--enhance`: what is said, made and kept, and what is refused before a weight is read."""

import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from cogvx_fast import FastCogVideoXPipeline, demo_checkpoint, metadata
from cogvx_fast.enhance import LocalModel, client
from cogvx_fast.video import write_video
from tests import toy
from tests.enhance.server import KEY, refuses_pictures, stand_in

from .conftest import assert_usage_error

FAST = ("--steps", 1, "--dtype", "float32")
BETTER = "A cat sits."


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (client.ADDRESS, client.KEY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between tries


@pytest.fixture
def server(monkeypatch):
    """Starts a stand-in that the environment names."""
    with ExitStack() as stack:

        def started(*answers):
            found = stack.enter_context(stand_in(*answers))
            monkeypatch.setenv(client.ADDRESS, found.url)
            monkeypatch.setenv(client.KEY, KEY)
            return found

        yield started


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(FastCogVideoXPipeline, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))


def flat(text):
    return " ".join(text.split())


@pytest.mark.slow
def test_the_video_is_that_of_the_enhanced_prompt_and_like_repeats_it_without_asking(run, checkpoint, server, calls):
    asked = server(f'"{BETTER}"')
    line = ("generate", "cat", "--model", checkpoint, *FAST, "-o", "a.gif")
    result = run(*line, "--enhance", "--sheet", "s.png")
    assert result.exit_code == 0, result.stderr
    assert f"enhanced: '{BETTER}'" in flat(result.stderr) and calls[0]["prompt"] == BETTER
    assert "'cat'" in result.stdout and BETTER not in result.stdout, "it is called by what was typed"
    kept = metadata.read("a.gif")
    assert (kept["prompt"], kept["original_prompt"]) == (BETTER, "cat")
    assert not [name for name in kept if name.startswith("enhance")] and KEY not in str(kept)
    assert len(asked.asked) == 1

    assert run("generate", "--like", "a.gif", "-o", "b.gif").exit_code == 0
    assert metadata.read("b.gif") == kept
    with Image.open("a.gif") as one, Image.open("b.gif") as other:
        assert one.tobytes() == other.tobytes()
    assert run("generate", BETTER, "--model", checkpoint, *FAST, "-o", "c.gif").exit_code == 0
    assert "original_prompt" not in metadata.read("c.gif")
    assert run("generate", "dog", "--like", "a.gif", "-o", "d.gif").exit_code == 0
    assert metadata.read("d.gif")["prompt"] == "dog" and "original_prompt" not in metadata.read("d.gif")
    assert len(asked.asked) == 1, "nothing was asked without --enhance"

    assert run("generate", "--like", "a.gif", "--enhance", "-o", "e.gif").exit_code == 0
    assert asked.said == ["cat", "cat"] and metadata.read("e.gif") == kept, "what was typed is enhanced, not its result"


@pytest.mark.slow
def test_each_prompt_is_asked_for_once(run, checkpoint, server, calls):
    asked = server(BETTER, "A dog runs.")
    Path("prompts.txt").write_text("cat\ndog\ncat\n")
    line = ("generate", "--prompt-file", "prompts.txt", "--model", checkpoint, *FAST, "-o", "a.gif")
    assert run(*line, "--num-videos", 2, "--enhance", "--enhance-model", "tiny").exit_code == 0
    assert asked.said == ["cat", "dog"] and {question["model"] for question in asked.asked} == {"tiny"}
    assert [call["prompt"] for call in calls] == [BETTER] * 2 + ["A dog runs."] * 2 + [BETTER] * 2
    assert metadata.read("a-3.gif")["original_prompt"] == "dog"


@pytest.mark.slow
def test_a_long_answer_is_cut_to_the_checkpoints_tokens(run, checkpoint, server, calls):
    server("A cat sits. A dog runs to it.")
    result = run("generate", "cat", "--model", checkpoint, *FAST, "-o", "a.gif", "--enhance")
    assert calls[0]["prompt"] == BETTER and "the answer had more than 16 tokens and was cut" in flat(result.stderr)
    assert "is longer than" not in result.stderr


@pytest.mark.slow
def test_where_nothing_answers_the_prompt_stays_with_a_warning(run, checkpoint, monkeypatch, calls):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv(client.ADDRESS, f"http://127.0.0.1:{held.getsockname()[1]}/v1")
    result = run(
        *("generate", "cat", "--model", checkpoint, *FAST, "-o", "a.gif", "--enhance", "--enhance-model", "tiny")
    )
    assert result.exit_code == 0 and calls[0]["prompt"] == "cat"
    assert "warning: not enhanced: http://127.0.0.1" in flat(result.stderr)
    assert "the prompt stays as given" in flat(result.stderr)
    assert metadata.read("a.gif")["prompt"] == "cat" and "original_prompt" not in metadata.read("a.gif")


@pytest.mark.slow
def test_what_was_answered_before_is_used(run, checkpoint, server, calls):
    server(BETTER, (503, {"error": {"message": "tired"}}))
    Path("prompts.txt").write_text("cat\ndog\nowl\n")
    line = ("generate", "--prompt-file", "prompts.txt", "--model", checkpoint, *FAST, "-o", "a.gif")
    result = run(*line, "--enhance")
    assert [call["prompt"] for call in calls] == [BETTER, "dog", "owl"]
    assert "status 503: tired; this prompt and those behind it stay as given" in flat(result.stderr)


@pytest.fixture(scope="module")
def image_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("i2v") / "checkpoint"
    toy.pipeline("5b-i2v").save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_picture_goes_along_or_not(run, image_checkpoint, server):
    Image.new("RGB", (90, 60), "red").save("red.png")
    line = ("generate", "cat", "--model", image_checkpoint, *FAST, "--enhance", "--image", "red.png")
    asked = server(BETTER)
    assert run(*line, "-o", "a.gif").exit_code == 0
    assert asked.asked[0]["messages"][-1]["content"][1]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert run(*line, "-o", "b.gif", "--no-enhance-pictures").exit_code == 0
    assert asked.asked[1]["messages"][-1]["content"] == "cat"
    server(refuses_pictures(400))
    result = run(*line, "-o", "c.gif")
    assert "takes no pictures and was asked without" in flat(result.stderr) and result.exit_code == 0


@pytest.mark.slow
def test_frames_of_a_video_go_along(run, checkpoint, server):
    write_video([Image.new("RGB", (32, 32), (index * 20, 0, 0)) for index in range(9)], "in.webp")
    asked = server(BETTER)
    result = run(
        *("generate", "cat", "--model", checkpoint, *FAST, "--enhance", "--video", "in.webp", "--strength", 1),
        *("-o", "a.gif"),
    )
    assert result.exit_code == 0, result.stderr
    assert [part["type"] for part in asked.asked[0]["messages"][-1]["content"]] == ["text"] + ["image_url"] * 3


@pytest.mark.slow
def test_a_model_that_runs_here(run, checkpoint, monkeypatch, calls, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    closed = []
    monkeypatch.setattr(LocalModel, "write", lambda self, messages: f"A {messages[-1]['content']} sits.")
    monkeypatch.setattr(LocalModel, "close", lambda self: closed.append(self.device))
    line = ("generate", "cat", "--model", checkpoint, *FAST, "-o", "a.gif", "--enhance")
    assert run(*line, "--enhance-local", tmp_path / "model").exit_code == 0
    assert calls[0]["prompt"] == BETTER and closed == ["cpu"]


@pytest.mark.parametrize(
    ("environment", "line", "words"),
    [
        ({}, ("--enhance",), ("--enhance: needs OPENAI_API_KEY", "--enhance-local")),
        ({client.ADDRESS: "here"}, ("--enhance",), ("OPENAI_BASE_URL is no address",)),
        ({client.KEY: f"{KEY}\x01"}, ("--enhance",), ("OPENAI_API_KEY holds a character",)),
        ({}, ("--enhance-model", "x"), ("--enhance-model 'x'", "has no effect without --enhance")),
        ({}, ("--enhance-local", "x"), ("--enhance-local 'x'", "has no effect without --enhance")),
        ({}, ("--no-enhance-pictures",), ("--no-enhance-pictures", "has no effect without --enhance")),
        ({}, ("--enhance", "--enhance-local", "x"), ("--enhance-local 'x'", "no such folder")),
        ({}, ("--enhance", "--enhance-local", "x", "--enhance-model", "y"), ("--enhance-model 'y'", "leave one")),
    ],
)
def test_what_cannot_work_is_refused(run, checkpoint, monkeypatch, no_weights, environment, line, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = run("generate", "cat", "--model", checkpoint, *line)
    assert_usage_error(result, *words)
    assert KEY not in result.stderr


def test_a_server_that_refuses_is_an_error_before_weights_are_read(run, checkpoint, server, no_weights):
    server((401, {"error": {"message": f"wrong key: {KEY}"}}))
    result = run("generate", "cat", "--model", checkpoint, "--enhance")
    assert_usage_error(result, "--enhance", "status 401: wrong key: ***")
    assert KEY not in result.stdout + result.stderr


def test_a_local_model_that_cannot_be_loaded_is_an_error_before_weights_are_read(run, checkpoint, no_weights, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    result = run("generate", "cat", "--model", checkpoint, "--enhance", "--enhance-local", tmp_path / "model")
    assert_usage_error(result, f"--enhance-local '{tmp_path / 'model'}': cannot be used")


@pytest.mark.parametrize("named", [(), ("--model", demo_checkpoint())])
def test_the_demo_checkpoint_refuses_it(run, server, no_weights, named):
    asked = server(BETTER)
    assert_usage_error(run("generate", "a red star", "--enhance", *named), "--enhance", "one kind of sentence only")
    assert asked.asked == []


def test_nothing_is_asked_without_the_option(run, checkpoint, server, monkeypatch):
    asked = server(BETTER)
    monkeypatch.setattr(
        "cogvx_fast.enhance.client.Endpoint.__init__", lambda *_: pytest.fail("an address was looked at")
    )
    result = run("generate", "cat", "--model", checkpoint, *FAST, "-o", "a.gif")
    assert result.exit_code == 0 and asked.asked == []
