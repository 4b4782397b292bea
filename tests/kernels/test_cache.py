"""Where compiled libraries are kept: the user's alone, whole, and somewhere else where there is no home."""

import os
import pwd
import stat
from pathlib import Path

import pytest
from cogvx_kernels._cpp import cache

from tests.kernels.compiling import age, folder, forget

__all__ = ["folder"]
DATA = b"what a compiler made"


def keep(prefix="one-1"):
    return cache.keep(prefix, lambda path: path.write_bytes(DATA) and None)


@pytest.fixture
def library(folder):
    return keep()


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def lines(caplog):
    return [record.getMessage() for record in caplog.records]


def test_a_library_is_found_by_the_start_of_its_name(library, folder, caplog):
    assert library.parent == folder and mode(folder) == mode(library) == 0o700
    assert cache.find("one-1") == cache.find("one") == library
    assert cache.find("two") is None and cache.find("on") is None
    assert not lines(caplog) and [path.name for path in folder.iterdir()] == [library.name]


def test_the_newest_comes_first(library, folder):
    age(library, 60)
    newer = cache.keep("one-2", lambda path: path.write_bytes(b"newer") and None)
    assert cache.find("one") == newer
    newer.write_bytes(b"newe")
    assert cache.find("one") == library and cache.refused("one") == [f"{newer} is damaged"]


def test_it_is_on_the_disk_before_it_has_its_name(folder, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("replace"), replace(old, new)))
    keep()
    assert events[0].endswith("library.so") and events[1:] == ["replace", str(folder)]


@pytest.mark.parametrize("writable", [0o020, 0o002])
def test_what_others_can_write_to_is_not_loaded(library, folder, writable):
    library.chmod(0o700 | writable)
    assert cache.find("one") is None and "can be written by other users" in cache.refused("one")[0]
    library.chmod(0o700)
    folder.chmod(0o700 | writable)
    assert cache.find("one") is None and "can be written by other users" in cache.refused("one")[0]
    folder.chmod(0o755)
    assert cache.find("one") == library


def test_what_belongs_to_somebody_else_is_not_loaded(library, monkeypatch):
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert cache.find("one") is None
    assert cache.refused("one") == [f"{library.parent} belongs to another user ({user})"]


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_is_not_loaded(library, tmp_path, kind):
    library.rename(tmp_path / "elsewhere.so")
    if kind == "link":
        library.symlink_to(tmp_path / "elsewhere.so")
    elif kind == "pipe":
        os.mkfifo(library, 0o600)
    else:
        library.mkdir()
    assert cache.find("one") is None and len(cache.refused("one")) == 1


def test_what_killed_builds_left_goes_and_running_ones_stay(library, folder):
    for name, seconds in (("build-old", 7200), ("tmpold", 7200), ("build-new", 10), ("mine", 7200)):
        (folder / name).mkdir()
        (folder / name / "library.so").write_bytes(DATA)
        age(folder / name, seconds)
    keep("two")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["build-new", "mine"]
    assert cache.find("one") == library


def test_what_is_there_already_is_left_in_place(library, folder):
    """On a home that machines share, one may have it in memory."""
    inode = library.stat().st_ino
    assert keep() == library and library.stat().st_ino == inode
    library.write_bytes(DATA[1:])
    assert keep() == library and cache.find("one") == library
    assert [path.name for path in folder.iterdir()] == [library.name]


def test_a_build_that_fails_leaves_nothing(folder):
    def fail(path):
        path.write_bytes(DATA)
        raise ValueError

    with pytest.raises(ValueError):
        cache.keep("one", fail)
    assert not list(folder.iterdir())


def no_home(monkeypatch, tmp_path):
    def nobody(user):
        raise KeyError(user)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)


def home_that_is_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


def home_out_of_reach(monkeypatch, tmp_path):
    def refuses(function):
        def refuse(path, *arguments, **keywords):
            if not isinstance(path, int) and "cache" in Path(path).parts:
                raise PermissionError(13, "Permission denied")
            return function(path, *arguments, **keywords)

        return refuse

    for name in ("stat", "scandir", "mkdir"):
        monkeypatch.setattr(os, name, refuses(getattr(os, name)))


def home_of_others(monkeypatch, tmp_path):
    (tmp_path / "cache" / "cogvx_kernels").mkdir(parents=True)
    (tmp_path / "cache" / "cogvx_kernels").chmod(0o777)


def home_to_read(monkeypatch, tmp_path):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, *a: "cache" not in Path(path).parts and access(path, *a))


def home_that_is_full(monkeypatch, tmp_path):
    make = cache.tempfile.mkdtemp

    def mkdtemp(suffix=None, prefix=None, dir=None):
        if dir is not None and "cache" in Path(dir).parts:
            raise OSError(28, "No space left on device")
        return make(suffix, prefix, dir)

    monkeypatch.setattr(cache.tempfile, "mkdtemp", mkdtemp)


HOMES = {
    no_home: "there is no home folder",
    home_that_is_a_file: "cannot be made: Not a directory",
    home_out_of_reach: "cannot be made: Permission denied",
    home_of_others: "can be written by other users (mode 777)",
    home_to_read: "cannot be written",
    home_that_is_full: "cannot be written: No space left on device",
}


@pytest.mark.parametrize("home", HOMES, ids=lambda home: home.__name__)
def test_without_a_home_there_is_a_private_temporary_folder(home, folder, tmp_path, monkeypatch, caplog):
    home(monkeypatch, tmp_path)
    temporary = tmp_path / "tmp" / f"cogvx_kernels-{os.geteuid()}"
    library = keep()
    assert library.parent == temporary and mode(temporary) == 0o700
    keep("two")
    (line,) = lines(caplog)
    assert line.startswith(f"compiled C++ is kept in {temporary}: ") and HOMES[home] in line and "\n" not in line
    forget()  # as a new process, which has nothing to compile, and nothing to say
    assert cache.find("one") == library and len(lines(caplog)) == 1


@pytest.mark.parametrize("taken", ["link", "writable", "file", "other"])
def test_a_temporary_name_that_is_taken_is_not_used(folder, tmp_path, monkeypatch, taken):
    no_home(monkeypatch, tmp_path)
    name = tmp_path / "tmp" / f"cogvx_kernels-{os.geteuid()}"
    if taken == "link":
        (tmp_path / "target").mkdir(mode=0o700)
        name.symlink_to(tmp_path / "target")
    elif taken == "file":
        name.write_text("")
    else:
        name.mkdir()
        name.chmod(0o777)
    if taken == "other":
        name.chmod(0o700)
        why = cache._why_others
        problem = f"{name} belongs to another user"
        monkeypatch.setattr(cache, "_why_others", lambda path, status: problem if path == name else why(path, status))
    library = keep()
    assert library.parent != name and library.parent.name.startswith("cogvx_kernels-")
    assert mode(library.parent) == 0o700 and keep("two").parent == library.parent
    assert name.is_file() or not list(name.iterdir())


@pytest.mark.parametrize(("variable", "value"), [("XDG_CACHE_HOME", "relative"), ("XDG_CACHE_HOME", "")])
def test_a_relative_folder_counts_as_none(folder, tmp_path, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert keep().parent == tmp_path / "home" / ".cache" / "cogvx_kernels"
    monkeypatch.setenv("HOME", "relative")
    assert keep().parent.parent == tmp_path / "tmp"


def test_a_cache_that_is_a_link_of_the_users_is_used(folder, tmp_path):
    (tmp_path / "scratch").mkdir(mode=0o700)
    folder.parent.mkdir()
    folder.symlink_to(tmp_path / "scratch")
    assert keep().parent == folder and cache.find("one") is not None


def test_with_no_folder_at_all_it_says_so(folder, tmp_path, monkeypatch):
    no_home(monkeypatch, tmp_path)
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: (_ for _ in ()).throw(FileNotFoundError(2, "none")))
    assert cache.find("one") is None
    with pytest.raises(OSError):
        keep()


def test_a_folder_of_a_umask_of_002_is_made_the_users_alone(folder):
    folder.mkdir(parents=True)
    folder.chmod(0o775)
    assert keep().parent == folder and stat.S_IMODE(folder.stat().st_mode) == 0o755
