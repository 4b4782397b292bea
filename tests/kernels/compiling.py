"""A cache of a test's own, and compilers that are shell scripts."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from cogvx_kernels._cpp import build, cache, native

GXX = next(filter(None, map(shutil.which, build.COMPILERS)), None)
needs_compiler = pytest.mark.skipif(GXX is None, reason="no C++ compiler found")


def forget() -> None:
    """What this process knows of libraries, compilers and CPU: from now on it is a new one."""
    for function in (build.load, cache._temporary, cache._say, native.cpu, native.resolved):
        function.cache_clear()
    build._slow.clear()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of libraries, empty; temporary ones are in the test's folder, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("CXX", raising=False)
    (tmp_path / "tmp").mkdir()
    forget()
    yield tmp_path / "cache" / "cogvx_kernels"
    forget()


def source(path: Path, number: int = 1) -> Path:
    """A C++ file whose function `number` returns it."""
    path.write_text(f'extern "C" int number() {{ return {number}; }}')
    return path


class Compiler:
    """`$CXX` is a script that counts its calls and does `body`; by default, what a compiler does."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, body: str = f'exec {GXX} "$@"') -> None:
        self._calls = folder / "calls"
        self.path = folder / "compiler"
        self.does(body)
        monkeypatch.setenv("CXX", str(self.path))

    def does(self, body: str) -> None:
        """From now on; it counts as another compiler."""
        self.path.write_text(f'#!/bin/sh\necho >> "{self._calls}"\n{body}\n')
        self.path.chmod(0o755)

    @property
    def calls(self) -> int:
        return len(self._calls.read_text().splitlines()) if self._calls.exists() else 0


def age(path: Path, seconds: float) -> None:
    """It was written so long ago."""
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))
