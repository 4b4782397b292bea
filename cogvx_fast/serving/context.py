"""What the routes of the API share, and what they ask of it."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from .callbacks import BadAddressError, Callbacks
from .clocks import Waits
from .errors import ApiError
from .estimate import REMEMBERED, Estimator
from .files import Files
from .jobs import QUEUED, Job
from .keys import Keys
from .models import Models
from .orders import Order
from .scheduler import Candidate, in_order
from .schemas import Video
from .settings import Settings
from .store import Store
from .worker import USAGE_SECONDS

_LEARN_SECONDS = 10.0
_ALIVE_SECONDS = 10.0  # since a worker said something
_RETRY_SECONDS = 30
# What is longer or larger means nothing, and clocks do not count that far.
MOST_SECONDS, MOST_DAYS, MOST_GIB = 1e7, 1e6, 1e9


@dataclass(frozen=True)
class Limits:
    """What one key may ask for; times in seconds.

    Attributes:
        queued: jobs that have not ended.
        work: of one job, pixels of all frames times steps; None: what the device can make.
        body_bytes, body_seconds: of a request, and that it may take to come.
        max_age, max_bytes: after which ended jobs go, and of all files together.
        least_free: bytes of the disk below which no job is taken.
    """

    queued: int = 100
    work: int | None = None
    body_bytes: int = 30 * 2**20
    body_seconds: float = 60.0
    max_age: float = 7 * 86400.0
    max_bytes: int = 50 * 2**30
    least_free: int = 256 * 2**20


@dataclass(frozen=True)
class Prospect:
    """Where a job stands in the queue, from 0 for the next or one that runs, and seconds until it is there."""

    position: int
    seconds: float


@dataclass
class Context:
    """A server: its models, its jobs, its files, who may use it.

    Attributes:
        settings: of its workers.
        keys: None: anybody may.
        callbacks: None: it says nothing of ends.
        embedded_in: web sites that may show the page in a frame of theirs.
        own_names_only: whether it answers by names of this machine alone, and no other site's pages.
        closing: set when open answers are to end.
    """

    models: Models
    store: Store
    files: Files
    keys: Keys | None
    limits: Limits
    settings: Settings
    callbacks: Callbacks | None = None
    embedded_in: tuple[str, ...] = ()
    own_names_only: bool = False
    started_at: float = field(default_factory=time.time)
    closing: threading.Event = field(default_factory=threading.Event)
    adding: threading.Lock = field(default_factory=threading.Lock)
    _waits: Waits = field(default_factory=Waits)
    _estimators: defaultdict[str, Estimator] = field(default_factory=lambda: defaultdict(Estimator))
    _learned_at: dict[str, float] = field(default_factory=dict)

    def owner(self, authorization: str | None) -> str:
        """Whose request it is, by its header; "" where there are no keys.

        Raises:
            ApiError: 401.
        """
        if self.keys is None:
            return ""
        kind, _, key = (authorization or "").partition(" ")
        owner = self.keys.owner(key.strip()) if kind.lower() == "bearer" else None
        if owner is None:
            message = "a key of this server is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return owner

    def job(self, job_id: str, owner: str) -> Job:
        """A job of `owner`. Raises an ApiError, 404: another's is not there for whoever asks."""
        job = self.store.get(job_id)
        if job is None or job.owner != owner:
            raise ApiError(404, f"there is no video {job_id[:80]!r}", "not_found", "video_id")
        return job

    def check_order(self, order: Order) -> None:
        """Raise an ApiError for an order beyond this server's limit."""
        most = self.limits.work
        if most is not None and order.work > most:
            message = f"width x height x num_frames x steps is {order.work}; must be at most {most} on this server"
            raise ApiError(400, message, "too_much_work", "num_inference_steps")

    def check_priority(self, owner: str, priority: int) -> None:
        """Raise an ApiError for a priority beyond that of a key; without keys everybody may have any."""
        most = priority if self.keys is None else self.keys.max_priority(owner)
        if priority > most:
            message = f"priority {priority} is more than this key may have; must be at most {most}"
            raise ApiError(403, message, "priority_not_allowed", "priority")

    def check_callback(self, url: str | None) -> None:
        """Raise an ApiError for an address at which this server does not say that a video ended."""
        reason = "is not taken here: this server was started without --callback-host"
        if url is None:
            return
        if self.callbacks is not None:
            try:
                self.callbacks.check(url)
            except BadAddressError as error:
                reason = str(error)
            else:
                return
        raise ApiError(400, f"callback_url {reason}", "invalid_value", "callback_url")

    def add(self, jobs: list[Job], callback_url: str | None = None) -> None:
        """Put the jobs of one request into the queue.

        Raises:
            ApiError: 429, if their owner has too many there.
            StorageFullError: if there is no room for them, or for what they make.
        """
        self.files.check_room()
        with self.adding:
            there = self.store.queue_length(jobs[0].owner)
            if there + len(jobs) > self.limits.queued:
                message = f"{there} videos wait or are made already; at most {self.limits.queued} at a time"
                raise ApiError(429, message, "queue_full", headers={"Retry-After": str(_RETRY_SECONDS)})
            self.store.add(*jobs, callback_url=callback_url)

    def workers(self) -> dict[str, dict]:
        """What those say of themselves that live, by their ids; they may be of other servers on the same store."""
        return self.store.workers(_ALIVE_SECONDS)

    def warm_models(self) -> dict[str, bool]:
        """Whether a worker has each model loaded and warm, by the models' names."""
        warm = {about.get("model") for about in self.workers().values() if about.get("ready")}
        return {name: name in warm for name in self.models.names}

    def is_ready(self) -> bool:
        """Whether every model is warm."""
        return all(self.warm_models().values())

    def prospects(self) -> dict[str, Prospect]:
        """The places of all jobs that have not ended, if no other comes; without those of models that nobody serves."""
        running, waiting = defaultdict(list), defaultdict(list)
        for job in self.store.running():
            running[job.model].append(job)
        for job in self.store.waiting():
            waiting[job.model].append(job)
        workers = Counter(about.get("model") for about in self.workers().values())
        names = running.keys() | waiting.keys()
        self._learn(names)
        usage = self.store.usage(USAGE_SECONDS)
        found: dict[str, Prospect] = {}
        for name in names:
            devices = workers[name] or int(name in self.models)
            found |= self._prospects(running[name], waiting[name] if devices else [], max(1, devices), usage)
        return found

    def _prospects(
        self, running: list[Job], waiting: list[Job], devices: int, usage: dict[str, float]
    ) -> dict[str, Prospect]:
        """Of the jobs of one model, which has so many devices."""
        found = {job.id: Prospect(0, self._expected(job)) for job in running}
        # Devices that are free come first; a job takes the one that is free next.
        free_at = sorted(prospect.seconds for prospect in found.values())
        free_at = [0.0] * (devices - len(free_at)) + free_at[:devices]
        candidates = [
            Candidate(job.id, job.owner, job.priority, self._waits.seconds(job.id, job.created_at), self._expected(job))
            for job in waiting
        ]
        for position, candidate in enumerate(in_order(candidates, usage, self.settings.patience)):
            done_at = min(free_at) + candidate.expected
            free_at[free_at.index(min(free_at))] = done_at
            found[candidate.id] = Prospect(position, done_at)
        return found

    def _learn(self, names: Iterable[str]) -> None:
        """Of models that there are jobs of."""
        for name in names:
            estimator, learned_at = self._estimators[name], self._learned_at.get(name, float("-inf"))
            if not estimator.knows or time.monotonic() - learned_at > _LEARN_SECONDS:
                workers = [about for about in self.workers().values() if about.get("model") == name]
                warm = [about["warm"] for about in workers if "warm" in about]
                estimator.learn_from(self.store.finished(REMEMBERED, name), warm)
                self._learned_at[name] = time.monotonic()

    def _expected(self, job: Job) -> float:
        return self._estimators[job.model].seconds(job.request, max(0, job.total - job.done))

    def unserved(self) -> dict[str, int]:
        """How many jobs wait for models that nobody serves, by the models' names."""
        served = {about.get("model") for about in self.workers().values()}.union(self.models.names)
        return dict(Counter(job.model for job in self.store.waiting() if job.model not in served))

    def video(self, job: Job, ids: list[str] | None = None, prospects: dict[str, Prospect] | None = None) -> Video:
        """The answer about a job."""
        prospect = None
        if not job.ended:
            prospect = (self.prospects() if prospects is None else prospects).get(job.id)
        position, seconds = (None, None) if prospect is None else (prospect.position, prospect.seconds)
        video = Video.of(job, self.limits.max_age, position if job.status == QUEUED else None, seconds, ids)
        if job.status == QUEUED and prospect is None and job.model not in self.models:
            video.warnings.append(f"model {job.model!r} is not served now: the video waits until it is")
        return video
