"""A server whose processes, disk and clock can be harmed."""

import contextlib
import errno
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
DISK_MIB = 320  # of which the server wants 256 to be free
WAIT = 300.0  # seconds, for what takes ten where nobody else is at work


class Disk:
    """A small disk in memory, which can be full; a folder like any other where this user may not mount one."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "soak", str(folder)]
        self.is_small = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
        self._filler = folder / "filler"

    def fill(self):
        """To the last byte."""
        piece = DISK_MIB << 20
        with self._filler.open("wb") as file:
            length = 0
            while piece >= 4096:
                try:
                    os.posix_fallocate(file.fileno(), length, piece)
                    length += piece
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    piece //= 2

    def empty(self):
        self._filler.unlink(missing_ok=True)

    def remove(self):
        self.empty()
        if self.is_small:
            subprocess.run(["umount", "-l", str(self.folder)], capture_output=True, check=False)


class Clock:
    """What `clock/sitecustomize.py` adds to the time of the server and its workers."""

    def __init__(self, path):
        self.path = path
        self.jump(0.0)

    def jump(self, ahead):
        """To so many seconds before or behind the true time, at once for all of them."""
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.write(struct.pack("d", ahead))


class Server:
    """`cogvx-fast serve` of the demo model at one port, with workers that have a thread each."""

    def __init__(self, folder, disk, clock, workers=2):
        self.log = folder / "server.log"
        self.folder, self.port = disk.folder / "served", _free_port()
        self.clock, self._workers, self._process = clock, workers, None
        self.ready = threading.Event()

    def start(self):
        """Returns when a model is warm."""
        command = [sys.executable, "-c", "from cogvx_fast.cli import main; main()", "serve", "--port", str(self.port)]
        command += ["--folder", str(self.folder), "--checkpoint-seconds", "0", "--dtype", "float32"]
        command += ["--device", "cpu"] * self._workers
        paths = [ROOT / "tests" / "soak" / "clock", ROOT, ROOT / "kernels"]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "OMP_NUM_THREADS": "1",
            "SOAK_CLOCK": str(self.clock.path),
        }
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=self.log.parent
            )
        for line in self._process.stdout:
            if line.startswith("ready: "):
                self.ready.set()
                return
        raise RuntimeError(f"the server ended with {self._process.wait()}; see {self.log}")

    def end(self, number=signal.SIGTERM):
        """Send it a signal and wait for its end; the seconds that took."""
        self.ready.clear()
        started = time.monotonic()
        self._process.send_signal(number)
        self._process.wait(WAIT)
        self._process.stdout.close()
        return time.monotonic() - started

    def stop(self):
        """Whatever state it is in; its workers end when it is gone."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.end()
        if self._process is not None and self._process.poll() is None:
            self.end(signal.SIGKILL)

    def processes(self):
        """Ids of the server and of its workers, as far as they live."""
        if self._process is None or self._process.poll() is not None:
            return None, []
        return self._process.pid, [pid for pid in _children(self._process.pid) if _is_worker(pid)]


def memory(pid):
    """Resident bytes of a process; None: it is gone."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmRSS:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return None if found is None else 1024 * int(found[1])
    return None


def _children(pid):
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if int((folder / "stat").read_bytes().rpartition(b")")[2].split()[1]) == pid:
                    yield int(folder.name)


def _is_worker(pid):
    with contextlib.suppress(OSError):
        return b"cogvx_fast.serving.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
