"""C++ that is compiled at first use: once for each CPU, whatever becomes of the compiler and of what it made."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cogvx_kernels._cpp import build, native
from cogvx_kernels._cpp.build import Source

from tests.kernels.compiling import GXX, Compiler, folder, forget, needs_compiler, source

__all__ = ["folder"]
pytestmark = [needs_compiler, pytest.mark.slow]


@pytest.fixture
def compiler(folder, tmp_path, monkeypatch):
    return Compiler(tmp_path, monkeypatch)


def number(path):
    """As a new process finds it."""
    forget()
    return build.load(path, ()).number()


def remove_compilers(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)


def test_what_cannot_be_compiled_says_why(folder, tmp_path, monkeypatch):
    broken = tmp_path / "broken.cpp"
    broken.write_text("int f() { return nothing; }")
    with pytest.raises(build.BuildError, match=r"cannot compile broken.cpp: .*"):
        build.load(broken, ())
    assert not list(folder.iterdir())
    remove_compilers(monkeypatch)
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler found"):
        build.load(broken, ("-O1",))


def test_a_library_is_compiled_once(folder, compiler, tmp_path):
    assert [number(source(tmp_path / "one.cpp")) for _ in range(3)] == [1, 1, 1]
    assert compiler.calls == 1
    assert [path.suffix for path in folder.iterdir()] == [".so"]


def test_a_library_may_be_compiled_by_several_at_once(folder, tmp_path, monkeypatch):
    path = source(tmp_path / "two.cpp", 2)
    together, run = threading.Barrier(3), build._run

    def compile_together(*arguments):
        together.wait(60)  # none has found the library of another
        return run(*arguments)

    monkeypatch.setattr(build, "_run", compile_together)
    with ThreadPoolExecutor(3) as pool:
        assert [library.number() for library in pool.map(lambda _: build.load(path, ()), range(3))] == [2, 2, 2]
    assert [path.suffix for path in folder.iterdir()] == [".so"]


def test_another_cpu_has_a_library_of_its_own(compiler, tmp_path, monkeypatch):
    """A home that machines share, or an image that moved."""
    path, cpuinfo = source(tmp_path / "one.cpp"), tmp_path / "cpuinfo"
    monkeypatch.setattr(native, "_CPUINFO", cpuinfo)
    for calls, flags in ((1, "fpu avx2 avx512f"), (2, "fpu avx2"), (2, "fpu avx2 avx512f")):
        cpuinfo.write_text(f"model\t: 1\nflags\t: {flags}\n")
        assert number(path) == 1 and compiler.calls == calls


@pytest.mark.parametrize("another", ["-target-cpu znver4", "-target-cpu znver3"])
def test_where_the_kernel_does_not_show_the_cpu_the_compiler_is_asked(compiler, tmp_path, monkeypatch, another):
    path, answer = source(tmp_path / "one.cpp"), tmp_path / "answer"
    monkeypatch.setattr(native, "_CPUINFO", tmp_path / "missing")
    compiler.does(f'case "$*" in *-###*) cat {answer} >&2;; *) echo >> {tmp_path}/compiled; exec {GXX} "$@";; esac')
    for resolved in ("-target-cpu znver4", another):
        answer.write_text(resolved)
        assert number(path) == 1
    assert (tmp_path / "compiled").read_text().count("\n") == len({"-target-cpu znver4", another})
    remove_compilers(monkeypatch)
    with pytest.raises(build.BuildError, match="cannot be told which CPU this is"):
        number(path)


@pytest.mark.parametrize("damage", ["cut", "zeroed", "empty"])
def test_a_damaged_library_is_compiled_again(folder, compiler, tmp_path, damage):
    path = source(tmp_path / "one.cpp")
    number(path)
    (library,) = folder.iterdir()
    data = library.read_bytes()
    library.unlink()  # this process has it in memory
    library.write_bytes({"cut": data[: len(data) // 2], "zeroed": bytes(len(data)), "empty": b""}[damage])
    library.chmod(0o700)
    assert number(path) == 1 and compiler.calls == 2
    assert number(path) == 1 and compiler.calls == 2
    (again,) = folder.iterdir()
    assert again.read_bytes() == data


def test_a_damaged_library_without_a_compiler_is_left_alone(folder, compiler, tmp_path, monkeypatch):
    path = source(tmp_path / "one.cpp")
    number(path)
    (library,) = folder.iterdir()
    data = library.read_bytes()
    library.unlink()
    library.write_bytes(bytes(len(data)))
    library.chmod(0o600)
    remove_compilers(monkeypatch)
    forget()
    reason = Source(path, ()).why_unavailable()
    assert "no C++ compiler found" in reason and f"{library} is damaged" in reason


def test_a_library_needs_no_compiler_once_it_is_made(compiler, tmp_path, monkeypatch):
    path = source(tmp_path / "one.cpp")
    number(path)
    remove_compilers(monkeypatch)
    assert number(path) == 1
    with pytest.raises(
        build.BuildError, match=r"compiler found .*; what is kept of one is for another CPU or version$"
    ):
        build.load(path, ("-O1",))
    with pytest.raises(build.BuildError, match=r"c\+\+\)$"):
        build.load(source(tmp_path / "two.cpp"), ())


def test_what_another_compiler_made_stands_in_for_one_that_fails(compiler, tmp_path):
    path = source(tmp_path / "one.cpp")
    number(path)
    compiler.does("echo it is broken >&2; exit 1")
    assert number(path) == 1 and compiler.calls == 2
    with pytest.raises(build.BuildError, match=r"compiler cannot compile two.cpp: it is broken"):
        number(source(tmp_path / "two.cpp"))


@pytest.mark.parametrize("makes", ['echo text > "$out"', ': > "$out"', ":"])
def test_what_does_not_load_is_compiled_once_and_left_alone(compiler, tmp_path, makes):
    path = source(tmp_path / "one.cpp")
    compiler.does(f'while [ "$1" != -o ]; do shift; done; out=$2; {makes}')
    forget()
    reason = Source(path, ()).why_unavailable()
    assert ("cannot compile one.cpp" if makes == ":" else "does not load") in reason
    assert compiler.calls == 1
    with pytest.raises(build.BuildError):
        number(path)
    assert compiler.calls == 2  # a new process tries once


def test_a_compiler_that_hangs_is_stopped_with_what_it_started(folder, compiler, tmp_path, monkeypatch):
    child = tmp_path / "child"
    compiler.does(f"sleep 600 & echo $! > {child}; wait")
    monkeypatch.setattr(build, "LIMIT", 1.0)
    start = time.perf_counter()
    for name in ("one.cpp", "two.cpp", "three.cpp"):
        reason = Source(source(tmp_path / name), ()).why_unavailable()
        assert reason == f"{compiler.path} did not finish in 1 s"
    assert compiler.calls == 1 and time.perf_counter() - start < 5
    pid = child.read_text().strip()
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or " Z " in stat.read_text():
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the compiler's own process goes on")
    assert not list(folder.iterdir())


def test_a_compiler_that_cannot_be_run_says_so(compiler, tmp_path):
    compiler.path.write_bytes(b"\0not a program")
    with pytest.raises(build.BuildError, match="cannot be run: Exec format error"):
        number(source(tmp_path / "one.cpp"))


def test_a_full_disk_is_none_of_the_compilers_faults(folder, compiler, tmp_path, caplog):
    full = f'case "$*" in *{folder}*) echo "cannot write: No space left on device" >&2; exit 1;; esac'
    compiler.does(f'{full}; exec {GXX} "$@"')
    assert number(source(tmp_path / "one.cpp")) == 1
    assert f"{folder} cannot be written: No space left on device" in caplog.text
    assert number(source(tmp_path / "one.cpp")) == 1 and compiler.calls == 2  # not again by the next process
