"""deploy/space: what a Hugging Face Space reads, and the command that its container runs."""

import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from cogvx_fast.serving.keys import add_key
from tests.cli.conftest import checkpoint, run  # noqa: F401 - fixtures

SPACE = Path(__file__).parents[2] / "deploy" / "space"


def dockerfile():
    """Its instructions, as (name, rest)."""
    text = (SPACE / "Dockerfile").read_text()
    return [tuple(line.split(" ", 1)) for line in text.splitlines() if line and not line.startswith("#")]


@pytest.fixture
def started(tmp_path, monkeypatch):
    """What start.sh hands to `cogvx-fast`, by the variables of a Space."""
    program = tmp_path / "bin" / "cogvx-fast"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    paths = f"{program.parent}:/usr/bin:/bin"

    def start(**variables):
        environment = {"PATH": paths, "HOME": str(tmp_path), **variables}
        command = [shutil.which("sh"), "start.sh"]
        done = subprocess.run(command, cwd=SPACE, env=environment, check=True, capture_output=True, text=True)
        return done.stdout.splitlines()

    return start


def test_its_settings_can_be_read():
    front = re.match(r"---\n(.*?)\n---\n", (SPACE / "README.md").read_text(), re.DOTALL)
    settings = yaml.safe_load(front[1])
    assert (settings["sdk"], settings["app_port"], settings["license"]) == ("docker", 7860, "apache-2.0")
    assert settings["title"] and settings["emoji"] and len(settings["short_description"]) <= 60
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}  # those that the Hub knows
    assert {settings["colorFrom"], settings["colorTo"]} <= colors


def test_the_container_runs_as_a_space_wants_it():
    instructions = dockerfile()
    assert instructions[-1] == ("CMD", '["sh", "start.sh"]') and ("EXPOSE", "7860") in instructions
    names = [name for name, _ in instructions]
    assert names.index("USER") < names.index("COPY") and "uid 1000" in " ".join(rest for _, rest in instructions)
    assert set(names) <= {"FROM", "RUN", "USER", "ENV", "WORKDIR", "COPY", "EXPOSE", "CMD"}
    assert "cogvx_fast[serve]" in (SPACE / "requirements.txt").read_text().splitlines()


def test_its_command_starts_a_server(started, run, checkpoint, monkeypatch, tmp_path):  # noqa: F811
    served = []
    monkeypatch.setattr("cogvx_fast.serving.server.serve", lambda *arguments: served.append(arguments))
    monkeypatch.setattr("cogvx_fast.serving.server.open_socket", _on_this_machine(tried := []))
    name, *options = started(MODEL=str(checkpoint), OPTIONS="--keep-days 1 --max-queue 7 --device cpu")
    result = run(name, *options)
    assert result.exit_code == 0, result.stderr
    context, workers, _, _ = served[0]
    assert tried == [("0.0.0.0", 7860)] and context.keys is None and workers[0].model == str(checkpoint)
    assert context.limits.queued == 7 and context.embedded_in == ("https://huggingface.co",)
    assert "--insecure" in options and started()[:2] == ["serve", "--host"], "without a model the demo"


def test_its_keys_are_those_of_its_secret(started, tmp_path):
    key = add_key(tmp_path / "made", "anna")
    options = started(API_KEYS=(tmp_path / "made").read_text())
    file = Path(options[options.index("--api-keys-file") + 1])
    assert "sha256:" in file.read_text() and key not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0 and "--insecure" not in options


def _on_this_machine(tried):
    """Notes where a server is to listen; tests open no port to others."""
    from cogvx_fast.serving.server import open_socket

    def listen(host, port):
        tried.append((host, port))
        socket = open_socket("127.0.0.1", 0)
        socket.close()
        return _Closed()

    return listen


class _Closed:
    @staticmethod
    def getsockname():
        return "0.0.0.0", 7860
