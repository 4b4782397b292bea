"""A whole server in processes of its own, as the command starts it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai

from cogvx_fast.serving.files import Files
from cogvx_fast.serving.store import Store

ROOT = Path(__file__).parents[2]
PROMPT = "a red circle moves right"
WAIT = 120.0  # seconds: machines that test are busy


class Server:
    """`cogvx-fast serve` in a folder, of the demo model unless `options` name another.

    Args:
        store: URL of its database; None: a file in the folder.
        paths: of modules, before all others.
    """

    def __init__(self, folder, *options, store=None, paths=()):
        self.folder, self.options, self.paths = folder, options, [*map(str, paths), str(ROOT), str(ROOT / "kernels")]
        self.database = store or f"sqlite:///{folder / 'jobs.sqlite'}"
        self.start()

    def start(self):
        command = [sys.executable, "-c", "from cogvx_fast.cli import main; main()", "serve", "--port", "0"]
        command += ["--folder", str(self.folder), "--store", self.database, "--checkpoint-seconds", "0", *self.options]
        self.folder.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self.log.open("a"),
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(self.paths), "OMP_NUM_THREADS": "1"},
        )
        try:
            self.address = re.match(r"http://[0-9.]+:[0-9]+", self.process.stdout.readline())[0]
            assert self.process.stdout.readline().startswith(f"ready: {self.address}/v1/videos")
        except BaseException:
            self.process.kill()
            raise AssertionError(self.log.read_text()[-2000:]) from None
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)
        self.store = Store(self.database)
        self.files = Files(str(self.folder / "videos"))

    @property
    def log(self):
        return self.folder.parent / "log"

    def make(self, **fields):
        return self.client.videos.create(prompt=PROMPT, extra_body=fields).id

    def wait(self, video_id, status="completed"):
        return until(lambda: (job := self.store.get(video_id)).status == status and job)

    def video(self, video_id):
        return self.client.videos.download_content(video_id).read()

    def worker(self):
        """The process id of its worker."""
        return until(lambda: next((about["pid"] for about in self.store.workers(5).values() if about["ready"]), None))

    def kill_its_worker_in_the_middle_of(self, video_id, done):
        """With -9, when so many steps are made; waits until the server has seen it."""
        until(lambda: self.store.get(video_id).done >= done)
        os.kill(self.worker(), signal.SIGKILL)
        until(lambda: self.store.get(video_id).kills == 1)

    def end(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(WAIT)
        self.process.stdout.close()
        self.store.close()


def until(condition):
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError("it did not come to that")
