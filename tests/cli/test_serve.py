import re
from pathlib import Path

import pytest
import torch

from cogvx_fast.serving.jobs import Job, new_id
from cogvx_fast.serving.store import Store

from .conftest import assert_usage_error


@pytest.fixture(autouse=True)
def _never_serves(monkeypatch):
    served = []
    monkeypatch.setattr("cogvx_fast.serving.logs.set_up", lambda: None)  # of the whole process
    monkeypatch.setattr("cogvx_fast.serving.server.serve", lambda *arguments: served.append(arguments))
    return served


def test_it_listens_where_it_says_it_does(run, checkpoint, _never_serves):
    result = run("serve", checkpoint, "--port", 0, "--name", "toy", "--device", "cpu", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    context, workers, listening, _ = _never_serves[0]
    host, port = listening.getsockname()
    listening.close()
    assert host == "127.0.0.1" and f"http://127.0.0.1:{port}" in result.stdout
    assert context.models.names == ["toy"] and context.keys is None
    assert [(worker.model, worker.name) for worker in workers] == [(str(checkpoint), "toy")] * 2
    assert {"cogvx-fast-server/jobs.sqlite", "cogvx-fast-server/videos"} <= set(result.files)


def test_several_models_share_a_cpu(run, checkpoint, _never_serves):
    result = run("serve", checkpoint, checkpoint, "--port", 0, "--name", "a", "--name", "b", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    context, workers, listening, _ = _never_serves[0]
    listening.close()
    assert "model 'a', cpu; model 'b', cpu" in result.stdout
    assert context.models.names == ["a", "b"] and context.models.first.name == "a"
    assert [(worker.name, worker.device) for worker in workers] == [("a", "cpu"), ("b", "cpu")]
    assert workers[0].threads == workers[1].threads == max(1, torch.get_num_threads() // 2)


def test_names_tell_models_apart(run, checkpoint):
    assert_usage_error(run("serve", checkpoint, checkpoint), "--name", repr(checkpoint.name), "two models")
    assert_usage_error(run("serve", checkpoint, checkpoint, "--name", "a"), "--name", "2 model(s)")
    assert_usage_error(run("serve", checkpoint, "--name", ""), "--name", "must not be empty")


def test_gpus_that_are_too_few_for_the_models_are_refused(run, checkpoint, monkeypatch):
    monkeypatch.setattr("cogvx_fast.cli.loading.choose_device", lambda device: device)
    names = ("--name", "a", "--name", "b", "--name", "c")
    result = run("serve", *[checkpoint] * 3, *names, "--device", "cuda:0", "--device", "cuda:1")
    assert_usage_error(result, "--device", "cuda:0, cuda:1", "too few for 3 models")


def test_jobs_of_a_model_that_is_not_served_any_more_are_told_of(run, checkpoint, _never_serves, caplog):
    Path("cogvx-fast-server").mkdir()
    store = Store("sqlite:///cogvx-fast-server/jobs.sqlite")
    store.add(Job(new_id(), "", {}, "old"))
    store.close()
    result = run("serve", checkpoint, "--port", 0)
    _never_serves[0][2].close()
    assert result.exit_code == 0 and "1 job(s) wait for model 'old', which is not served" in caplog.text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_others_are_let_in_by_keys_or_by_an_express_wish(run, checkpoint, host):
    result = run("serve", checkpoint, "--host", host)
    assert_usage_error(result, "--host", repr(host), "--api-keys-file", "--insecure")


@pytest.mark.parametrize("option", [("--insecure",), ("--api-keys-file", "keys.txt")])
def test_with_these_it_listens_to_others(run, checkpoint, _never_serves, option):
    key = run("serve-key", "anna").stdout.strip()
    result = run("serve", checkpoint, "--host", "0.0.0.0", "--port", 0, *option)
    assert result.exit_code == 0, result.stderr
    context, _, listening, _ = _never_serves[0]
    listening.close()
    assert (context.keys is None) == (option == ("--insecure",))
    if context.keys is not None:
        assert context.keys.owner(key) == "anna" and context.keys.owner(key + "x") is None


def test_keys_are_kept_as_hashes_and_names_once(run, tmp_path):
    first, second = run("serve-key", "anna"), run("serve-key", "ben")
    key = first.stdout.strip()
    assert key.startswith("cvx-") and len(key) > 40 and key != second.stdout.strip()
    text = Path("keys.txt").read_text()
    assert key not in text and text.count("sha256:") == 2
    again = run("serve-key", "anna")
    assert again.exit_code == 2 and "has a key already" in again.stderr
    assert run("serve-key", "no name!").exit_code == 2
    assert Path("keys.txt").read_text() == text


def test_how_high_the_priority_of_a_key_may_be(run):
    from cogvx_fast.serving.keys import Keys

    (
        run("serve-key", "anna"),
        run("serve-key", "ben", "--max-priority", 7),
        run("serve-key", "eve", "--max-priority", -5),
    )
    keys = Keys(Path("keys.txt"))
    assert [keys.max_priority(name) for name in ("anna", "ben", "eve", "nobody")] == [0, 7, -5, 0]
    for wrong in (101, -101):
        result = run("serve-key", "max", "--max-priority", wrong)
        assert result.exit_code == 2 and "must be -100 to 100" in result.stderr
    Path("keys.txt").write_text(Path("keys.txt").read_text().replace("max-priority=7", "max-priority=101"))
    with pytest.raises(ValueError, match="line 2"):
        Keys(Path("keys.txt"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--api-keys-file", "none.txt"), "none.txt"),
        (("--store", "nonsense"), "cannot be opened"),
        (("--files", "nosuch://x"), "cannot be reached"),
        (("--max-queue", 0), "--max-queue"),
        (("--lease-seconds", "nan"), "--lease-seconds"),
        (("--lease-seconds", "9" * 309), "--lease-seconds inf: must be 1 to 1e+07"),
        (("--checkpoint-seconds", "inf"), "--checkpoint-seconds inf: must be 0 to 1e+07"),
        (("--keep-days", "1e9"), "--keep-days 1000000000.0: must be 0 to 1e+06"),
        (("--keep-gib", "9" * 309), "--keep-gib inf: must be 0 to 1e+09"),
        (("--max-work", 0), "--max-work 0: must be at least 1"),
        (("--host", "localhost", "--port", 99999), "--port"),
        (("--engine", "fastest"), "--engine"),
        (("--device", "cuda:77"), "--device"),
        (("--callback-host", "a/b"), "--callback-host"),
        (("--callback-secret-file", "secret"), "has no effect without --callback-host"),
        (("--callback-host", "a", "--callback-secret-file", "/proc/none/secret"), "--callback-secret-file"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(run, checkpoint, options, expected):
    result = run("serve", checkpoint, *options)
    assert result.exit_code == 2 and expected in result.stderr and "Traceback" not in result.stderr


def test_a_broken_keys_file_is_refused(run, checkpoint, tmp_path):
    Path("keys.txt").write_text("anna plaintext-key\n")
    result = run("serve", checkpoint, "--api-keys-file", "keys.txt")
    assert result.exit_code == 2 and "line 1" in result.stderr and "plaintext-key" not in result.stderr


def test_webhooks_go_to_the_hosts_of_its_list_signed_with_a_secret_of_its_own(run, checkpoint, _never_serves):
    result = run("serve", checkpoint, "--port", 0, "--callback-host", "example.org", "--callback-host", "localhost:9")
    assert result.exit_code == 0, result.stderr
    context, _, listening, _ = _never_serves[0]
    listening.close()
    for url in ("https://example.org/", "http://localhost:9/"):
        context.callbacks.check(url)
    secret = Path("cogvx-fast-server/callback-secret")
    assert secret.read_text().startswith("whsec_") and secret.stat().st_mode & 0o777 == 0o600
    assert secret.read_text().strip() not in result.stdout + result.stderr
    assert run("serve", checkpoint, "--port", 0).exit_code == 0
    assert _never_serves[1][0].callbacks is None
    _never_serves[1][2].close()


@pytest.fixture
def opened(monkeypatch):
    """The addresses that browsers were told to open, on a machine with a screen."""
    addresses = []
    monkeypatch.setattr("webbrowser.open", lambda address: addresses.append(address) or True)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.delenv("BROWSER", raising=False)
    return addresses


def test_ui_opens_the_page_when_it_is_ready(run, checkpoint, monkeypatch, opened):
    monkeypatch.setattr("cogvx_fast.serving.server.serve", _serves_and_is_ready)
    result = run("ui", checkpoint, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    (address,) = opened
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9][0-9]*/", address) and f"page at {address}" in result.stdout


@pytest.mark.parametrize("command", [("ui",), ("serve", "--open", "--port", 0)])
def test_without_a_screen_it_says_where_the_page_is(run, checkpoint, monkeypatch, opened, command):
    monkeypatch.setattr("cogvx_fast.serving.server.serve", _serves_and_is_ready)
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    result = run(*command, checkpoint)
    assert not opened and "the page is at http://127.0.0.1:" in result.stderr


def test_serve_alone_opens_nothing(run, checkpoint, monkeypatch, opened):
    monkeypatch.setattr("cogvx_fast.serving.server.serve", _serves_and_is_ready)
    assert "page at http://127.0.0.1:" in run("serve", checkpoint, "--port", 0).stdout
    assert not opened


def _serves_and_is_ready(context, workers, listening, ready):
    listening.close()
    ready()


def test_web_sites_that_may_embed_the_page(run, checkpoint, _never_serves):
    site = "https://huggingface.co"
    assert run("serve", checkpoint, "--port", 0, "--embedded-in", site).exit_code == 0
    context, _, listening, _ = _never_serves[0]
    listening.close()
    assert context.embedded_in == (site,)
    refused = run("serve", checkpoint, "--embedded-in", "https://a.b; script-src *")
    assert refused.exit_code == 2 and "--embedded-in" in refused.stderr
