"""Which events are still to be sent, and the thread of the server that sends them.

Where a job's end is to be said lies in the store since the job came, in the same transaction. That the job has ended is
what makes it due: there is no moment at which an end could be lost between two writes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

import sqlalchemy as sa

from .callbacks import BadAddressError, Callbacks, event, event_id
from .logs import logger

# Seconds between tries: eight in close to four hours.
PAUSES = (5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0, 7200.0)
_GONE = 410  # "do not ask again"
_LOOK_SECONDS = 1.0
_AT_ONCE, _AT_ONE_HOST = 8, 2
_MOST = 200  # looked at at once


@dataclass(frozen=True)
class Delivery:
    """An event that is due. `tries` were made, `ended_at` is a time of day."""

    job_id: str
    url: str
    host: str
    tries: int
    completed: bool
    ended_at: float


def table(metadata: sa.MetaData) -> sa.Table:
    """The table of jobs whose end is to be told to an address."""
    return sa.Table(
        "callbacks",
        metadata,
        sa.Column("job_id", sa.String(64), primary_key=True),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("not_before", sa.Float, nullable=False),
    )


class Outbox:
    """The deliveries in a database.

    Args:
        callbacks, jobs: the tables.
    """

    def __init__(self, engine: sa.Engine, callbacks: sa.Table, jobs: sa.Table) -> None:
        self._engine, self._callbacks, self._jobs = engine, callbacks, jobs

    def put(self, connection: sa.Connection, job_ids: Iterable[str], url: str) -> None:
        """Note where the ends of new jobs are to be said, in the transaction that adds them."""
        place = {"url": url, "host": urlsplit(url).netloc.lower(), "tries": 0, "not_before": 0.0}
        connection.execute(self._callbacks.insert(), [{"job_id": job_id, **place} for job_id in job_ids])

    def forget(self, connection: sa.Connection, job_id: str) -> None:
        connection.execute(self._callbacks.delete().where(self._callbacks.c.job_id == job_id))

    def due(self, without: Collection[str] = ()) -> list[Delivery]:
        """The events that are due now, but for those to the hosts in `without`."""
        mine, jobs, now = self._callbacks.c, self._jobs.c, time.time()
        # What is further ahead than any pause was written before somebody set the clock back.
        ready = (mine.not_before <= now) | (mine.not_before > now + max(PAUSES))
        query = (
            sa.select(mine.job_id, mine.url, mine.host, mine.tries, jobs.status, jobs.completed_at)
            .join(self._jobs, jobs.id == mine.job_id)
            .where(ready, jobs.completed_at.is_not(None), mine.host.not_in(without))
            .order_by(mine.not_before)
            .limit(_MOST)
        )
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return [Delivery(r.job_id, r.url, r.host, r.tries, r.status == "completed", r.completed_at) for r in rows]

    def claim(self, delivery: Delivery) -> bool:
        """Count a try, before it is made; False: another server makes it."""
        mine = self._callbacks.c
        pause = PAUSES[min(delivery.tries, len(PAUSES) - 1)]
        statement = (
            self._callbacks.update()
            .where(mine.job_id == delivery.job_id, mine.tries == delivery.tries)
            .values(tries=delivery.tries + 1, not_before=time.time() + pause)
        )
        with self._engine.begin() as connection:
            return bool(connection.execute(statement).rowcount)

    def close(self, job_id: str) -> None:
        """It was delivered, or is given up."""
        with self._engine.begin() as connection:
            self.forget(connection, job_id)


class Sender:
    """Sends what is due, in threads of its own: whoever is slow to hear holds up no job, and no other host."""

    def __init__(self, outbox: Outbox, callbacks: Callbacks, closing: threading.Event) -> None:
        self._outbox, self._callbacks, self._closing = outbox, callbacks, closing
        self._lock, self._sending = threading.Lock(), dict[str, str]()  # the hosts of those on their way, by job

    def run(self) -> None:
        """Until `closing`; what is on its way then is tried again after the next start."""
        while not self._closing.is_set():
            try:
                for delivery in self._outbox.due(without=self._busy()):
                    if self._takes(delivery):
                        # Not one of a pool, for whose threads the process would wait at its end.
                        threading.Thread(target=self._send, args=(delivery,), daemon=True).start()
            except Exception:
                logger.exception("webhooks: the store cannot be reached")
            self._closing.wait(_LOOK_SECONDS)

    def _busy(self) -> list[str]:
        """The hosts that hear as much at once as they may."""
        with self._lock:
            hosts = list(self._sending.values())
        return [host for host in set(hosts) if hosts.count(host) >= _AT_ONE_HOST]

    def _takes(self, delivery: Delivery) -> bool:
        with self._lock:
            hosts = list(self._sending.values())
            if delivery.job_id in self._sending or len(hosts) >= _AT_ONCE:
                return False
            if hosts.count(delivery.host) >= _AT_ONE_HOST:
                return False
            self._sending[delivery.job_id] = delivery.host
            return True

    def _send(self, delivery: Delivery) -> None:
        about = {"job": delivery.job_id}
        try:
            if not self._outbox.claim(delivery):
                return
            body = event(delivery.job_id, delivery.completed, delivery.ended_at)
            try:
                status = self._callbacks.send(delivery.url, event_id(delivery.job_id), body)
                why = f"it answered {status}"
            except BadAddressError as error:
                status, why = _GONE, str(error)
            except Exception as error:  # whatever goes wrong on the way to somebody else's machine
                status, why = 0, f"{type(error).__name__}: {error}"
            if 200 <= status < 300:
                self._outbox.close(delivery.job_id)
                logger.info("webhook delivered", extra=about)
            elif status == _GONE or delivery.tries >= len(PAUSES):
                self._outbox.close(delivery.job_id)
                logger.warning("webhook given up after %d tries: %s", delivery.tries + 1, why, extra=about)
            else:
                logger.warning("webhook not delivered, try %d: %s", delivery.tries + 1, why, extra=about)
        except Exception:
            logger.exception("webhooks: the store cannot be reached", extra=about)
        finally:
            with self._lock:
                self._sending.pop(delivery.job_id, None)
