"""A PostgreSQL server of the test's own, where this machine has one installed."""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest


def _program(name):
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)  # where Debian puts them
    return next((str(place / name) for place in places if (place / name).exists()), None) or shutil.which(name)


def _runs_as():
    """It refuses to be root: then it is the user that its package made."""
    return {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}


@contextlib.contextmanager
def running():
    """Its URL for SQLAlchemy; skips the test where there is none."""
    if _program("initdb") is None or importlib.util.find_spec("psycopg") is None:
        pytest.skip("needs PostgreSQL's programs and psycopg")
    with tempfile.TemporaryDirectory(prefix="pg") as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        options, data = _runs_as(), Path(folder) / "data"
        if options:
            shutil.chown(folder, **options)

        def call(name, *arguments):
            command = [_program(name), *map(str, arguments)]
            try:
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, **options)
            except LookupError as error:
                pytest.skip(f"PostgreSQL does not run as root, and {error}")

        call("initdb", "-D", data, "-A", "trust", "-U", "test", "--no-sync")
        settings = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        call("pg_ctl", "-D", data, "-w", "-l", Path(folder) / "log", "-o", settings, "start")
        try:
            yield f"postgresql+psycopg://test@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "stop")
