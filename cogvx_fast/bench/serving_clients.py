"""Servers under load: how each is asked for a video, and how those of this machine are started."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

START_SECONDS = 600.0  # that a server has until it answers
_END_SECONDS = 15.0  # that it has to end before it is killed


class RequestError(Exception):
    """A request for a video that came to none; says what was answered."""


class Call(Protocol):
    """One request on its way."""

    def make(self, asked: Mapping[str, Any], first: Callable[[], None]) -> bytes:
        """The MP4 that was asked for; `first` is called when something is heard of it.

        Raises:
            RequestError: if it was refused, failed, or was given up.
        """

    def give_up(self) -> None:
        """End it, from another thread."""


class _Connection:
    """One connection, kept for all that a request needs."""

    def __init__(self, url: str, key: str | None) -> None:
        place = urllib.parse.urlsplit(url)
        kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(place.hostname or "", place.port)
        self._path = place.path.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        self._headers |= {} if key is None else {"Authorization": f"Bearer {key}"}

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> http.client.HTTPResponse:
        """An answer of status 200, not read yet."""
        data = None if body is None else json.dumps(body).encode()
        self._connection.request(method, self._path + path, data, self._headers)
        answer = self._connection.getresponse()
        if answer.status != 200:
            raise RequestError(f"{method} {path} was answered {answer.status}: {answer.read(300)!r}")
        return answer

    def close(self) -> None:
        self._connection.close()

    def cut(self) -> None:
        """Ends what another thread reads."""
        there = self._connection.sock
        if there is not None:
            with contextlib.suppress(OSError):
                there.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _as_request_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
        # AttributeError: of http.client, where a connection is cut while it reads
        raise RequestError(f"the connection broke: {type(error).__name__}: {error}") from error


class OursCall:
    """A job of `cogvx-fast serve`, followed by its events; it is there when its file was fetched."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self._url, self._key = url, key
        self._connection = _Connection(url, key)
        self._id = ""

    def make(self, asked: Mapping[str, Any], first: Callable[[], None]) -> bytes:
        try:
            with _as_request_errors():
                self._id = json.loads(self._connection.ask("POST", "/v1/videos", asked).read())["id"]
                self._follow(first)
                return self._connection.ask("GET", f"/v1/videos/{self._id}/content").read()
        finally:
            self._connection.close()

    def _follow(self, first: Callable[[], None]) -> None:
        events, heard, name = self._connection.ask("GET", f"/v1/videos/{self._id}/events"), False, ""
        for line in iter(events.readline, b""):
            if not heard and line.startswith(b"event: "):
                first()
                heard = True
            if line.startswith(b"event: "):
                name = line[7:].strip().decode()
            elif name in ("failed", "deleted") and line.startswith(b"data: "):
                raise RequestError(f"the job {name}: {json.loads(line[6:]).get('error')}")
        events.read()  # nothing, but the connection is free then
        if name != "completed":
            raise RequestError(f"the events ended with {name or 'none'}")

    def answer(self) -> dict[str, Any]:
        """What the server says of the job."""
        connection = _Connection(self._url, self._key)
        with contextlib.closing(connection), _as_request_errors():
            return dict(json.loads(connection.ask("GET", f"/v1/videos/{self._id}").read()))

    def give_up(self) -> None:
        self._connection.cut()
        if self._id:
            connection = _Connection(self._url, self._key)
            with contextlib.closing(connection), contextlib.suppress(RequestError), _as_request_errors():
                connection.ask("DELETE", f"/v1/videos/{self._id}").read()


class PostCall:
    """A request to a server that answers with the MP4 when it is made: nothing is heard of it before."""

    def __init__(self, url: str) -> None:
        self._connection = _Connection(url, None)

    def make(self, asked: Mapping[str, Any], first: Callable[[], None]) -> bytes:
        try:
            with _as_request_errors():
                answer = self._connection.ask("POST", "/videos", asked)
                first()
                return answer.read()
        finally:
            self._connection.close()

    def give_up(self) -> None:
        self._connection.cut()


@contextlib.contextmanager
def ours(model: str, dtype: str, device: str) -> Iterator[str]:
    """A server of the engine in a process of its own; the URL at which it answers when a model is warm."""
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        command = [sys.executable, "-m", "cogvx_fast", "serve", model, "--port", str(port), "--folder", folder]
        command += ["--dtype", dtype, "--device", device, "--max-queue", "1000000"]
        with _process(command, Path(folder) / "log", f"http://127.0.0.1:{port}", "/readyz") as url:
            yield url


@contextlib.contextmanager
def by_hand(program: str | Path, model: str, dtype: str, device: str) -> Iterator[str]:
    """A server that is a program, started with model, dtype, device and port; the URL at which it answers."""
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        command = [sys.executable, str(program), model, dtype, device, str(port)]
        with _process(command, Path(folder) / "log", f"http://127.0.0.1:{port}", "/docs") as url:
            yield url


@contextlib.contextmanager
def _process(command: list[str], log: Path, url: str, path: str) -> Iterator[str]:
    """The URL of a server, once it answers 200 at `path`."""
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), root)))
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": paths}
        )
    try:
        until = time.monotonic() + START_SECONDS
        while not _answers(url, path):
            if process.poll() is not None or time.monotonic() > until:
                last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
                raise RequestError(f"{' '.join(command[:3])} did not come up: {last[0][:300]}")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str, path: str) -> bool:
    connection = _Connection(url, None)
    with contextlib.closing(connection), contextlib.suppress(RequestError), _as_request_errors():
        connection.ask("GET", path).read()
        return True
    return False


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
