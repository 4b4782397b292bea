from pathlib import Path

import pytest

from .conftest import assert_usage_error


@pytest.fixture(autouse=True)
def _never_serves(monkeypatch):
    served = []
    monkeypatch.setattr("cogvx_fast.serving.server.serve", lambda *arguments: served.append(arguments))
    return served


def test_it_listens_where_it_says_it_does(run, checkpoint, _never_serves):
    result = run("serve", checkpoint, "--port", 0, "--name", "toy", "--device", "cpu", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    context, workers, listening, _ = _never_serves[0]
    host, port = listening.getsockname()
    listening.close()
    assert host == "127.0.0.1" and f"http://127.0.0.1:{port}" in result.stdout
    assert context.served.name == "toy" and context.keys is None
    assert len(workers) == 2 and all(worker.model == str(checkpoint) for worker in workers)
    assert {"cogvx-fast-server/jobs.sqlite", "cogvx-fast-server/videos"} <= set(result.files)


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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--api-keys-file", "none.txt"), "none.txt"),
        (("--store", "nonsense"), "cannot be opened"),
        (("--files", "nosuch://x"), "cannot be reached"),
        (("--max-queue", 0), "--max-queue"),
        (("--lease-seconds", "nan"), "--lease-seconds"),
        (("--host", "localhost", "--port", 99999), "--port"),
        (("--engine", "fastest"), "--engine"),
        (("--device", "cuda:77"), "--device"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(run, checkpoint, options, expected):
    result = run("serve", checkpoint, *options)
    assert result.exit_code == 2 and expected in result.stderr and "Traceback" not in result.stderr


def test_a_broken_keys_file_is_refused(run, checkpoint, tmp_path):
    Path("keys.txt").write_text("anna plaintext-key\n")
    result = run("serve", checkpoint, "--api-keys-file", "keys.txt")
    assert result.exit_code == 2 and "line 1" in result.stderr and "plaintext-key" not in result.stderr
