"""Those who want videos: each asks, waits, fetches, changes its mind or loses its connection, and never gives up."""

import json
import threading
import time
from collections import Counter
from dataclasses import dataclass

from . import client
from .client import Unreachable
from .pool import digest_of
from .server import WAIT

# What becomes of one job in so many of a hundred; of the others nothing but that they are awaited and fetched.
ACTS = {
    "cancelled": 8,
    "deleted early": 6,
    "deleted when done": 6,
    "events cut": 6,
    "events followed": 14,
    "download cut": 8,
    "request cut": 4,
    "another variant": 6,
}
FAULTS = ("events cut", "download cut", "request cut")
VARIANTS = ("gif", "webp", "thumbnail", "spritesheet")
_AGAIN, _LONGEST = 0.1, 1.0  # seconds between two tries, first and at most


@dataclass
class Record:
    """What a user knows of a job that was accepted: the digest of its video when it was fetched, and how it ended."""

    setting: object
    act: str
    end: str = ""
    digest: str = ""


class Ledger:
    """What all users know."""

    def __init__(self, settings):
        self.settings = settings
        self.jobs, self.counts, self.problems = {}, Counter(), []
        self.begun = self.ended = 0
        self._lock = threading.Lock()

    def begin(self):
        with self._lock:
            self.begun += 1

    def end(self):
        with self._lock:
            self.ended += 1

    def count(self, what):
        with self._lock:
            self.counts[what] += 1

    def problem(self, text):
        with self._lock:
            self.problems.append(text)
        print(f"fault: {text}", flush=True)

    def accept(self, video_id, setting, act):
        with self._lock:
            if video_id in self.jobs:
                raise AssertionError(f"{video_id} was given to two requests")
            self.jobs[video_id] = Record(setting, act)


class User:
    """Speaks to one server, through its deaths; an answer that no fault explains is a problem of the ledger."""

    def __init__(self, server, ledger):
        self._server, self._port, self._ledger = server, server.port, ledger

    def patience(self):
        """Turns for `WAIT` seconds in which a model was warm: how long a start takes is not what is asked here."""
        left, before = WAIT, time.monotonic()
        while left > 0:
            yield
            now = time.monotonic()
            left -= (now - before) * self._server.ready.is_set()
            before = now

    def ask(self, method, path, body=None, headers=()):
        """Status and body of the first answer that is one: not those of a server that ends, has no room or no queue."""
        pause = _AGAIN
        for _ in self.patience():
            try:
                status, data = client.request(self._port, method, path, body, headers)
            except Unreachable:
                self._ledger.count("not answered")
            else:
                if status not in (429, 503, 507):  # no queue, a server that ends, no room
                    if status >= 500:
                        self._ledger.problem(f"{method} {path} was answered {status} {data[:300]!r}")
                    return status, data
                self._ledger.count(f"answered {status}")
            time.sleep(pause)
            pause = min(_LONGEST, 1.5 * pause)
        raise TimeoutError(f"{method} {path} was not answered in {WAIT:g} s")

    def create(self, setting):
        status, data = self.ask("POST", setting.path, setting.body)
        if status != 200:
            raise RuntimeError(f"{setting.fields} was answered {status} {data[:300]!r}")
        return json.loads(data)["id"]

    def look(self, video_id):
        """The job; None: there is none."""
        status, data = self.ask("GET", f"/v1/videos/{video_id}")
        return json.loads(data) if status == 200 else None

    def wait(self, video_id):
        """The job when it has ended; None: it is gone, or does not end."""
        for _ in self.patience():
            job = self.look(video_id)
            if job is None or job["status"] in ("completed", "failed"):
                return job
            time.sleep(_AGAIN)
        self._ledger.problem(f"{video_id} did not end in {WAIT:g} s: {job}")
        return None

    def download(self, video_id):
        return self.ask("GET", f"/v1/videos/{video_id}/content")[1]

    def make(self, setting, act, chance):
        """One job from its request to its end; `chance`: of what is left to it."""
        self._ledger.begin()
        if act == "request cut":
            try:
                client.cut_request(self._port, setting.path, setting.body)
            except Unreachable:
                self._ledger.count("not answered")
        video_id = self.create(setting)
        self._ledger.accept(video_id, setting, act)
        record = self._ledger.jobs[video_id]
        if act == "cancelled":
            time.sleep(chance.uniform(0, 0.5))
            self.ask("POST", f"/v1/videos/{video_id}/cancel")
        elif act == "deleted early":
            time.sleep(chance.uniform(0, 0.5))
            self.delete(video_id, record)
        elif act in ("events cut", "events followed"):
            self.follow(video_id, chance.randint(1, 3) if act == "events cut" else None)
        if record.end != "deleted":
            self.end(video_id, record, act, chance)
        self._ledger.count(act)
        self._ledger.end()

    def end(self, video_id, record, act, chance):
        job = self.wait(video_id)
        if job is None:
            record.end = "lost"
            self._ledger.problem(f"{video_id} was accepted and is gone")
            return
        record.end = job["status"] if job["error"] is None else job["error"]["code"]
        if record.end not in ("completed", "cancelled") or (record.end == "cancelled" and act != "cancelled"):
            self._ledger.problem(f"{video_id} ended as {job['status']}: {job['error']}")
        if record.end != "completed":
            return
        data = self.in_pieces(video_id, chance) if act == "download cut" else self.download(video_id)
        record.digest = digest_of(data)
        if act == "another variant":
            variant = chance.choice(VARIANTS)
            status, data = self.ask("GET", f"/v1/videos/{video_id}/content?variant={variant}")
            if status != 200:
                self._ledger.problem(f"{variant} of {video_id} was answered {status} {data[:300]!r}")
        elif act == "deleted when done":
            self.delete(video_id, record)

    def delete(self, video_id, record):
        """A request that died may have been heard: then there is nothing left to delete."""
        record.end = "deleted"
        self.ask("DELETE", f"/v1/videos/{video_id}")
        if self.look(video_id) is not None:
            self._ledger.problem(f"{video_id} was deleted and is there")

    def follow(self, video_id, most):
        """By its events, to its end or up to a cut."""
        for _ in self.patience():
            try:
                for name, _ in client.events(self._port, f"/v1/videos/{video_id}/events", most):
                    if name in ("completed", "failed", "deleted"):
                        return
            except Unreachable:
                self._ledger.count("not answered")
            if most is not None:
                return
            time.sleep(_AGAIN)
        self._ledger.problem(f"the events of {video_id} did not end in {WAIT:g} s")

    def in_pieces(self, video_id, chance):
        """A download that is cut, and the rest of it."""
        path = f"/v1/videos/{video_id}/content"
        try:
            first = client.cut_download(self._port, path, chance.randint(1, 2000))
        except Unreachable:
            return self.download(video_id)
        status, rest = self.ask("GET", path, headers={"Range": f"bytes={len(first)}-"}.items())
        if status == 416:  # the cut came after its end
            return first
        if status != 206:
            self._ledger.problem(f"the rest of {video_id} was answered {status}")
        return first + rest
