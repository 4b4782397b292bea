import errno
import os
import threading
import uuid

import pytest

from cogvx_fast.serving.files import Files
from cogvx_fast.serving.jobs import Job, StorageFullError
from cogvx_fast.serving.retention import Retention, remove
from cogvx_fast.serving.store import Store


@pytest.fixture(params=["folder", "memory"])
def files(request, tmp_path):
    return Files(str(tmp_path / "files") if request.param == "folder" else f"memory://{uuid.uuid4().hex}")


def put(files, job_id, name, data):
    return files.write(job_id, name, lambda path: path.write_bytes(data))


def test_what_is_written_can_be_read_in_pieces(files):
    data = os.urandom(3 * 2**20 + 5)
    assert put(files, "a", "video.mp4", data) == len(data)
    assert files.size("a", "video.mp4") == len(data) == files.sizes("a")
    assert b"".join(files.pieces("a", "video.mp4", 0, len(data))) == data
    assert b"".join(files.pieces("a", "video.mp4", 7, 2**20 + 9)) == data[7 : 2**20 + 9]
    with files.local("a", "video.mp4") as path:
        assert path.read_bytes() == data and path.suffix == ".mp4"
    assert files.job_ids() == {"a"}


def test_what_is_not_there_is_said_so(files):
    assert files.size("a", "video.mp4") is None and files.sizes("a") == 0
    with pytest.raises(FileNotFoundError), files.local("a", "video.mp4"):
        pass
    files.remove("a")
    files.remove("a", "video.mp4")


def test_files_go_alone_or_all_together(files):
    for name in ("video.mp4", "parked.safetensors"):
        put(files, "a", name, b"x")
    files.remove("a", "parked.safetensors", "preview.webp")
    assert files.size("a", "parked.safetensors") is None and files.size("a", "video.mp4") == 1
    files.remove("a")
    assert files.size("a", "video.mp4") is None


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(files, tmp_path):
    put(files, "a", "video.mp4", b"first")

    def fail(path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write("a", "video.mp4", fail)
    assert b"".join(files.pieces("a", "video.mp4", 0, 5)) == b"first"
    assert files.job_ids() == {"a"} and files.sizes("a") == 5
    assert not [path for path in tmp_path.rglob("*partial*")]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_has_a_name(files, number):
    def fail(path):
        raise OSError(number, os.strerror(number))

    with pytest.raises(StorageFullError, match=r"no room for video\.mp4"):
        files.write("a", "video.mp4", fail)
    with pytest.raises(OSError, match="Permission") as caught:
        files.write("a", "video.mp4", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert not isinstance(caught.value, StorageFullError)


def test_deleting_while_another_writes_harms_neither(tmp_path):
    files, stop, failed = Files(str(tmp_path)), threading.Event(), []

    def write():
        try:
            while not stop.is_set():
                put(files, "a", "parked.safetensors", b"x")
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    for _ in range(300):
        files.remove("a")
    stop.set()
    thread.join()
    assert not failed
    files.remove("a")
    assert files.job_ids() == set() and not list(tmp_path.iterdir())


def test_a_folder_that_goes_when_it_was_found_is_made_again(tmp_path, monkeypatch):
    files, make, found = Files(str(tmp_path)), os.mkdir, []

    def find_it_there_once(path, *arguments):
        if os.path.basename(path) == "a" and not found:
            found.append(path)  # the job's owner deletes it before anyone can look
            raise FileExistsError(errno.EEXIST, "File exists", path)
        make(path, *arguments)

    monkeypatch.setattr(os, "mkdir", find_it_there_once)
    put(files, "a", "video.mp4", b"x")
    assert found and files.size("a", "video.mp4") == 1


def test_room_is_kept_free(tmp_path):
    Files(str(tmp_path), least_free=1).check_room()
    with pytest.raises(StorageFullError, match="MiB are free"):
        Files(str(tmp_path), least_free=2**60).check_room()


def test_what_a_killed_process_left_goes(tmp_path):
    from cogvx_fast import temporary

    left = temporary.temporary_beside(tmp_path / "writing")
    left = left.rename(left) if left.exists() else left
    dead = left.with_name(left.name.replace(f"-{os.getpid()}-", "-999999999-"))
    (dead / "inside").mkdir(parents=True)
    assert Files(str(tmp_path)).job_ids() == set()
    assert not dead.exists()


def test_a_place_that_cannot_be_reached_is_named():
    with pytest.raises(ValueError, match="nosuch://x"):
        Files("nosuch://x")


def test_retention_takes_jobs_and_files_together(tmp_path):
    store, files = Store(f"sqlite:///{tmp_path / 'jobs'}"), Files(str(tmp_path / "files"))
    jobs = [Job(f"video_{number}", "", {}, created_at=float(number)) for number in range(3)]
    store.add(*jobs)
    for job in jobs:
        put(files, job.id, "video.mp4", b"x" * 10)
    put(files, "video_nobody", "reference", b"x")
    for job in jobs[:2]:
        store.complete(job.id, store.take(job.id, "w", 10), {}, 10)
    retention = Retention(store, files, max_age=1000, max_bytes=15)
    assert retention.sweep() == ["video_0"]
    assert files.job_ids() == {"video_1", "video_2", "video_nobody"}, "its job may be about to come"
    assert retention.sweep() == []
    assert files.job_ids() == {"video_1", "video_2"} == store.ids()
    assert remove(store, files, "video_2") and not remove(store, files, "video_2")
    assert files.job_ids() == {"video_1"}
