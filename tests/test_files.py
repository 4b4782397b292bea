"""Files that are whole or not at all, what killed processes leave of them, and places tried before the work."""

import contextlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from cogvx_fast import files, temporary

ROOT = Path(__file__).parents[1]
SOME_USER = 65534
WRITES = """
import sys, time
from pathlib import Path
from cogvx_fast.files import complete_or_absent
with complete_or_absent(Path(sys.argv[1])) as path:
    path.mkdir() if "." not in sys.argv[1] else path.write_text("half")
    print("at work", flush=True)
    time.sleep(600)
"""


def kinds(folder):
    return sorted(path.suffix for path in folder.iterdir())


@contextlib.contextmanager
def writer(path):
    """A process that is writing `path`."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITES, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "at work\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("name", ["a.txt", "frames"])
def test_what_a_killed_process_left_goes_with_the_next_write_there(tmp_path, name):
    with writer(tmp_path / name):
        files.write_whole(tmp_path / "b.txt", b"whole")
        assert kinds(tmp_path) == [".partial", ".txt"], "the process is alive"
    assert kinds(tmp_path) == [".partial", ".txt"]
    files.write_whole(tmp_path / "b.txt", b"whole")
    assert kinds(tmp_path) == [".txt"]


def test_a_process_that_has_ended_and_was_not_asked_for_is_gone(tmp_path):
    with writer(tmp_path / "a.txt") as process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie
        files.try_place(tmp_path / "b.txt")
        assert not kinds(tmp_path)


def test_only_what_is_ours_and_of_a_process_that_is_gone_is_swept(tmp_path, monkeypatch):
    own = temporary.temporary_beside(tmp_path / "a")
    where, pid, start, random = own.name.removeprefix(".cogvx-").removesuffix(".partial").split("-")
    assert int(pid) == os.getpid()
    gone = tmp_path / f".cogvx-{where}-{pid}-{int(start) + 1}-{random}.partial"  # the number was used again
    elsewhere = tmp_path / f".cogvx-{'0' * 8}-{pid}-{int(start) + 1}-{random}.partial"
    others = [tmp_path / name for name in (".cogvx-1.partial", "x.partial", f"{gone.name}.mp4", f"a{gone.name}")]
    for path in (own, gone, elsewhere, *others):
        path.write_text("")
    target = tmp_path / "target"
    target.write_text("")
    link = tmp_path / gone.name.replace(random, "0" * 8)
    link.symlink_to(target)
    temporary.sweep(tmp_path)
    assert set(tmp_path.iterdir()) == {own, elsewhere, link, target, *others}
    gone.write_text("")
    with monkeypatch.context() as patched:
        patched.setattr(temporary, "_PROC", tmp_path / "none")  # a system that does not show processes
        temporary.sweep(tmp_path)
        patched.undo()
        patched.setattr(os, "geteuid", lambda: gone.stat().st_uid + 1)
        temporary.sweep(tmp_path)
    assert gone.exists()
    temporary.sweep(tmp_path)
    assert not gone.exists()


def test_another_machine_is_told_from_this_one(monkeypatch):
    here = temporary._where()
    temporary._where.cache_clear()
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    assert temporary._where() != here
    temporary._where.cache_clear()


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    files.write_whole(tmp_path / ("x" * 255), b"whole")
    assert (tmp_path / ("x" * 255)).read_bytes() == b"whole"


@contextlib.contextmanager
def another_user():
    os.seteuid(SOME_USER)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("is_folder", [False, True])
def test_what_another_user_has_in_a_sticky_folder_is_refused(tmp_path, is_folder):
    shared = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    try:
        shared.chmod(0o1777)
        theirs, own = shared / "theirs", shared / "own"
        theirs.mkdir() if is_folder else theirs.touch()
        with another_user():
            own.mkdir() if is_folder else own.touch()
            files.try_place(own, is_folder)
            files.try_place(shared / "free", is_folder)
            with pytest.raises(PermissionError):
                files.try_place(theirs, is_folder)
        assert set(shared.iterdir()) == {theirs, own}
    finally:
        subprocess.run(["rm", "-r", str(shared)], check=True)


@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode != 0,
    reason="nothing can be mounted here",
)
@pytest.mark.parametrize("is_folder", [False, True])
def test_what_is_mounted_there_cannot_be_replaced(tmp_path, is_folder):
    for name in ("volume", "a place"):
        (tmp_path / name).mkdir() if is_folder else (tmp_path / name).touch()
    code = "import sys; from cogvx_fast.files import try_place; try_place(sys.argv[1], sys.argv[2] == 'True')"
    script = 'mount --bind "$1" "$2" && exec "$3" -c "$4" "$2" "$5"'
    words = [str(tmp_path / "volume"), str(tmp_path / "a place"), sys.executable, code, str(is_folder)]
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stderr.splitlines()[-1].startswith("OSError: [Errno 16] something is mounted there:")


@pytest.mark.parametrize(("there", "is_folder"), [("folder", False), ("file", True), ("full", True), ("link", True)])
def test_another_kind_of_thing_is_refused(tmp_path, there, is_folder):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "full" / "x").mkdir(parents=True)
    (tmp_path / "link").symlink_to("folder")
    with pytest.raises(OSError) as caught:
        files.try_place(tmp_path / there, is_folder)
    assert caught.value.filename == str(tmp_path / there)


def test_a_place_that_is_tried_keeps_what_is_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    files.try_place(path)
    files.try_place(tmp_path / "new" / "folder" / "a.txt")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_folders_that_were_made_for_a_file_that_fails_go_again(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.complete_or_absent(tmp_path / "new" / "a.txt") as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
