"""Jobs, in a database: who wants which video, who is making it, and what became of it.

A job is *queued*, then *in progress* under the lease of one worker, then *completed* or *failed*. Whoever writes about
a job in progress names its lease: a worker that lost it, because it was taken for dead, changes nothing any more. Every
change is one statement, so that there is no moment at which a killed process leaves it half made.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from . import deliveries, totals
from .clocks import Clock, Leases, Presence
from .database import Changes, connect
from .jobs import CANCELLED, COMPLETED, FAILED, IN_PROGRESS, QUEUED, Job, Signal, StorageFullError

MAX_KILLS = 3
_CANCELLED = "it was cancelled"
_LONGEST_PAUSE = 60.0  # seconds, until a job is tried again
_LEASE = 30.0  # seconds, of one that an earlier version gave

_metadata = sa.MetaData()
_jobs = sa.Table(
    "jobs",
    _metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("owner", sa.String(64), nullable=False),
    sa.Column("request", sa.JSON, nullable=False),
    sa.Column("model", sa.Text, nullable=False, server_default=""),
    sa.Column("status", sa.String(16), nullable=False, index=True),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False, index=True),
    sa.Column("started_at", sa.Float),
    sa.Column("completed_at", sa.Float),
    sa.Column("not_before", sa.Float, nullable=False),
    sa.Column("done", sa.Integer, nullable=False),
    sa.Column("total", sa.Integer, nullable=False),
    sa.Column("kills", sa.Integer, nullable=False),
    sa.Column("worker", sa.String(64)),
    sa.Column("lease", sa.String(64)),
    sa.Column("lease_seconds", sa.Float),
    sa.Column("beats", sa.Integer, nullable=False, server_default="0"),
    sa.Column("cancel", sa.Boolean, nullable=False),
    sa.Column("busy_seconds", sa.Float, nullable=False),
    sa.Column("error_code", sa.String(64)),
    sa.Column("error_message", sa.Text),
    sa.Column("result", sa.JSON, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("remixed_from", sa.String(64)),
)
_workers = sa.Table(
    "workers",
    _metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("seen_at", sa.Float, nullable=False),
    sa.Column("about", sa.JSON, nullable=False),
)
_totals = totals.table(_metadata)
_callbacks = deliveries.table(_metadata)


class Store:
    """The jobs in one database.

    Args:
        url: of SQLAlchemy: `sqlite:///path`, `postgresql://…`.
        durable: whether a statement returns only when a loss of power cannot undo it; what a worker writes is made
            again, to the same bits, if it is lost.
        clock: of this process, which nobody sets.

    Attributes:
        outbox: what is to be said of jobs that ended.

    Raises:
        ValueError: for a URL that cannot be opened.
    """

    def __init__(self, url: str, durable: bool = True, clock: Clock = time.monotonic) -> None:
        self._leases, self._presence = Leases(clock), Presence(clock)
        self._engine = connect(url, durable, _metadata)
        self._handed_out: list[Changes] = []
        self.outbox = deliveries.Outbox(self._engine, _callbacks, _jobs)

    def close(self) -> None:
        self._engine.dispose()
        for changes in self._handed_out:
            changes.close()

    def changes(self) -> Changes:
        """Tells one who looks at the jobs again and again whether it is worth it."""
        self._handed_out.append(Changes(self._engine))
        return self._handed_out[-1]

    # Clients of the server.

    def add(self, *jobs: Job, callback_url: str | None = None) -> None:
        """Put new jobs into the queue, all or none; their ends are to be said at an address, if there is one.

        Raises:
            StorageFullError: if there is no room for them.
        """
        with self._writing() as connection:
            connection.execute(_jobs.insert(), [dict(vars(job)) for job in jobs])
            if callback_url is not None:
                self.outbox.put(connection, [job.id for job in jobs], callback_url)

    def get(self, job_id: str) -> Job | None:
        found = self._read(sa.select(_jobs).where(_jobs.c.id == job_id))
        return found[0] if found else None

    def some(self, job_ids: Iterable[str]) -> dict[str, Job]:
        """The jobs with these ids, as far as there are any, by id."""
        return {job.id: job for job in self._read(sa.select(_jobs).where(_jobs.c.id.in_(list(job_ids))))}

    def page(self, owner: str, after: Job | None, limit: int, ascending: bool = False) -> list[Job]:
        """Jobs of `owner` in the order in which they came, at most `limit`, from the one behind `after`."""
        place = sa.tuple_(_jobs.c.created_at, _jobs.c.id)
        query = sa.select(_jobs).where(_jobs.c.owner == owner).limit(limit)
        if after is not None:
            mark = sa.tuple_(sa.literal(after.created_at), sa.literal(after.id))
            query = query.where(place > mark if ascending else place < mark)
        columns = (_jobs.c.created_at, _jobs.c.id)
        return self._read(query.order_by(*(column.asc() if ascending else column.desc() for column in columns)))

    def cancel(self, job_id: str) -> None:
        """End a job that is queued; tell its worker to, if it has one."""
        is_queued = _jobs.c.status == QUEUED
        ended = {"status": FAILED, "error_code": CANCELLED, "error_message": _CANCELLED, "completed_at": time.time()}
        statement = (
            _jobs.update()
            .where(_jobs.c.id == job_id, _jobs.c.status.in_((QUEUED, IN_PROGRESS)))
            .values(cancel=True, **{n: sa.case((is_queued, value), else_=_jobs.c[n]) for n, value in ended.items()})
            .returning(_jobs.c.status)
        )
        with self._writing() as connection:
            if connection.scalar(statement) == FAILED:
                totals.add(connection, _totals, CANCELLED)

    def delete(self, job_id: str) -> bool:
        """Forget a job, whatever its state; its worker hears that it is lost. False: there was none."""
        with self._writing() as connection:
            self.outbox.forget(connection, job_id)
            return bool(connection.execute(_jobs.delete().where(_jobs.c.id == job_id)).rowcount)

    def set_bytes(self, job_id: str, size: int) -> None:
        with self._writing() as connection:
            connection.execute(_jobs.update().where(_jobs.c.id == job_id).values(bytes=size))

    # Workers.

    def waiting(self, model: str | None = None) -> list[Job]:
        """The jobs that may be taken now, of `model` or of all."""
        now = time.time()
        # What is further ahead than any pause was written before somebody set the clock back.
        due = (_jobs.c.not_before <= now) | (_jobs.c.not_before > now + _LONGEST_PAUSE)
        query = sa.select(_jobs).where(_jobs.c.status == QUEUED, due).order_by(_jobs.c.created_at)
        return self._read(query if model is None else query.where(_jobs.c.model == model))

    def running(self) -> list[Job]:
        return self._read(sa.select(_jobs).where(_jobs.c.status == IN_PROGRESS))

    def take(self, job_id: str, worker: str, seconds: float) -> str | None:
        """A lease of a queued job for so many seconds; None: another was quicker."""
        lease = secrets.token_hex(16)
        with self._writing() as connection:
            taken = connection.execute(
                _jobs.update()
                .where(_jobs.c.id == job_id, _jobs.c.status == QUEUED)
                .values(
                    status=IN_PROGRESS,
                    worker=worker,
                    lease=lease,
                    lease_seconds=seconds,
                    beats=0,
                    started_at=sa.func.coalesce(_jobs.c.started_at, time.time()),
                )
            )
        return lease if taken.rowcount else None

    def report(self, job_id: str, lease: str, seconds: float, **values: Any) -> Signal:
        """Keep a lease for so many seconds from now, note `values` (`done`, `total`, …) and hear what to do."""
        statement = (
            _jobs.update()
            .where(_jobs.c.id == job_id, _jobs.c.lease == lease)
            .values(lease_seconds=seconds, beats=_jobs.c.beats + 1, **values)
            .returning(_jobs.c.cancel)
        )
        with self._writing() as connection:
            row = connection.execute(statement).first()
        if row is None:
            return Signal.LOST
        return Signal.CANCEL if row.cancel else Signal.GO_ON

    def give_back(self, job_id: str, lease: str, after: float = 0.0, **values: Any) -> bool:
        """Put a job back into the queue, to be taken `after` seconds, at most a minute; False: the lease was lost."""
        not_before = time.time() + min(after, _LONGEST_PAUSE) if after else 0.0
        return self._end_lease(job_id, lease, None, status=QUEUED, worker=None, not_before=not_before, **values)

    def complete(self, job_id: str, lease: str, result: Mapping[str, Any], size: int, **more: Any) -> bool:
        """Note that a video is there, with `size` bytes; False: the lease was lost."""
        values = {"status": COMPLETED, "result": dict(result), "bytes": size, **more}
        return self._end_lease(job_id, lease, COMPLETED, **values, completed_at=time.time())

    def fail(self, job_id: str, lease: str, code: str, message: str) -> bool:
        """Note why there is no video; False: the lease was lost."""
        values = {"status": FAILED, "error_code": code, "error_message": message, "completed_at": time.time()}
        return self._end_lease(job_id, lease, CANCELLED if code == CANCELLED else FAILED, **values)

    def _end_lease(self, job_id: str, lease: str, end: str | None, **values: Any) -> bool:
        with self._writing() as connection:
            where = _jobs.c.id == job_id, _jobs.c.lease == lease
            statement = _jobs.update().where(*where).values(**values, lease=None, lease_seconds=None)
            done = connection.execute(statement).rowcount
            if done and end is not None:
                totals.add(connection, _totals, end)
            return bool(done)

    def reap(self, worker: str | None = None) -> int:
        """Put the jobs of dead workers back into the queue; those that killed `MAX_KILLS` of them fail.

        Args:
            worker: that is known to be dead; None: all whose lease has run out, as this store has seen in all calls.

        Returns:
            How many jobs these were.
        """
        if worker is not None:
            return self._reap(_jobs.c.worker == worker)
        held = {job.id: job for job in self.running()}
        signs = {job.id: ((job.lease, job.beats), job.lease_seconds or _LEASE) for job in held.values()}
        dead = [held[job_id] for job_id in self._leases.run_out(signs)]
        # Not one whose worker says something at this moment.
        return sum(self._reap((_jobs.c.lease == job.lease) & (_jobs.c.beats == job.beats)) for job in dead)

    def _reap(self, dead: sa.ColumnElement[bool]) -> int:
        where = _jobs.c.status == IN_PROGRESS, dead
        message = f"its worker died {MAX_KILLS} times while it made this video"
        free = {"worker": None, "lease": None, "lease_seconds": None, "kills": _jobs.c.kills + 1}
        ended = {**free, "status": FAILED, "completed_at": time.time()}
        ends: list[tuple[Any, str, dict[str, Any]]] = [
            # One that was to be cancelled has nobody left who would hear it.
            (_jobs.c.cancel, CANCELLED, {**ended, "error_code": CANCELLED, "error_message": _CANCELLED}),
            (
                _jobs.c.kills + 1 >= MAX_KILLS,
                FAILED,
                {**ended, "error_code": "worker_died", "error_message": message},
            ),
            (sa.true(), "requeued", {**free, "status": QUEUED}),
        ]
        found = 0
        with self._writing() as connection:
            for which, name, values in ends:
                changed = connection.execute(_jobs.update().where(*where, which).values(**values)).rowcount
                if changed:
                    totals.add(connection, _totals, name, changed)
                found += changed
        return found

    # What is learned, kept and counted.

    def finished(self, limit: int, model: str) -> list[Job]:
        """The jobs of a model that were completed last, the last one first."""
        done = sa.select(_jobs).where(_jobs.c.status == COMPLETED, _jobs.c.model == model)
        return self._read(done.order_by(_jobs.c.completed_at.desc()).limit(limit))

    def usage(self, seconds: float) -> dict[str, float]:
        """Seconds of a device that each owner has had, of jobs that were not ended before the last so many seconds."""
        recent = _jobs.c.completed_at.is_(None) | (_jobs.c.completed_at > time.time() - seconds)
        query = sa.select(_jobs.c.owner, sa.func.sum(_jobs.c.busy_seconds)).where(recent).group_by(_jobs.c.owner)
        with self._engine.connect() as connection:
            return {owner: float(busy) for owner, busy in connection.execute(query)}

    def outdated(self, max_age: float, max_bytes: int) -> list[str]:
        """The ids of ended jobs that are older than so many seconds, and of the oldest of those that take more than so
        many bytes: found by the database, as all jobs that are kept would be much to read every minute."""
        with_newer = sa.func.sum(_jobs.c.bytes).over(order_by=(_jobs.c.completed_at.desc(), _jobs.c.id))
        ended = (
            sa.select(_jobs.c.id, _jobs.c.completed_at, with_newer.label("bytes"))
            .where(_jobs.c.status.in_((COMPLETED, FAILED)))
            .subquery()
        )
        old = sa.func.coalesce(ended.c.completed_at, 0.0) < time.time() - max_age
        query = sa.select(ended.c.id).where(old | (ended.c.bytes > max_bytes))
        with self._engine.connect() as connection:
            return list(connection.scalars(query.order_by(ended.c.completed_at)))

    def ids(self) -> set[str]:
        with self._engine.connect() as connection:
            return set(connection.scalars(sa.select(_jobs.c.id)))

    def queue_length(self, owner: str | None = None, model: str | None = None) -> int:
        """Jobs that have not ended, of `owner` and of `model`, or of all."""
        query = sa.select(sa.func.count()).where(_jobs.c.status.in_((QUEUED, IN_PROGRESS)))
        for column, wanted in ((_jobs.c.owner, owner), (_jobs.c.model, model)):
            query = query if wanted is None else query.where(column == wanted)
        with self._engine.connect() as connection:
            return connection.scalar(query) or 0

    def seen(self, worker: str, about: Mapping[str, Any]) -> None:
        """Note that a worker lives, and what it says of itself."""
        with self._writing() as connection:
            values = {"seen_at": time.time(), "about": dict(about)}
            if not connection.execute(_workers.update().where(_workers.c.id == worker).values(**values)).rowcount:
                connection.execute(_workers.insert().values(id=worker, **values))

    def gone(self, worker: str) -> None:
        with self._writing() as connection:
            connection.execute(_workers.delete().where(_workers.c.id == worker))

    def workers(self, seconds: float) -> dict[str, dict[str, Any]]:
        """What workers say of themselves that were seen in the last so many seconds, by their ids."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(_workers)).all()
        ago = self._presence.seconds({row.id: row.seen_at for row in rows})
        return {row.id: row.about for row in rows if ago[row.id] < seconds}

    def totals(self) -> dict[str, float]:
        """How many jobs ended how since the database was made, were queued again, and what else was counted."""
        with self._engine.connect() as connection:
            return {row.name: row.value for row in connection.execute(sa.select(_totals))}

    def count(self, **amounts: float) -> None:
        with self._writing() as connection:
            for name, amount in amounts.items():
                totals.add(connection, _totals, name, amount)

    def _read(self, query: sa.Select[Any]) -> list[Job]:
        with self._engine.connect() as connection:
            return [Job(**row) for row in connection.execute(query).mappings()]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except OperationalError as error:
            # SQLite: "database or disk is full"; PostgreSQL's code of it.
            if "full" in str(error.orig) or getattr(error.orig, "sqlstate", None) == "53100":
                raise StorageFullError("there is no room for the jobs' database") from error
            raise
