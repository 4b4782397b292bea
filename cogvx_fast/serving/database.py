"""Opens the database of the jobs, and brings one of an earlier version up to date."""

from __future__ import annotations

import sqlite3
import time
from typing import Any

import sqlalchemy as sa

_WAIT = 30.0  # seconds for which a statement waits for others' to end
_PAUSE = 0.01  # seconds between tries of what does not wait by itself
# KiB of pages that each connection keeps: SQLite's 2,000 would fill as jobs come, and the system keeps them, too.
_CACHE = 256


def connect(url: str, durable: bool, tables: sa.MetaData) -> sa.Engine:
    """A database with these tables, as `store.Store` wants it.

    Raises:
        ValueError: for a URL that cannot be opened.
    """
    try:
        place = sa.make_url(url)
        is_sqlite = place.get_backend_name() == "sqlite"
        options: dict[str, Any] = {"connect_args": {"timeout": _WAIT}} if is_sqlite else {"pool_pre_ping": True}
        engine = sa.create_engine(place, **options)
        if is_sqlite:
            synchronous = "FULL" if durable else "NORMAL"
            sa.event.listen(engine, "connect", lambda connection, _: _set_up_sqlite(connection, synchronous))
        for table in tables.sorted_tables:
            _create(engine, table)
        if _missing(engine, tables.tables["jobs"]):
            _bring_up_to_date(engine, tables.tables["jobs"])
    except (sa.exc.SQLAlchemyError, ImportError) as error:
        reason = " ".join(str(error).split()).split(" (Background")[0]
        raise ValueError(
            f"store {url!r} cannot be opened ({reason}); must be sqlite:///PATH or postgresql://…"
        ) from error
    return engine


class Changes:
    """Whether anything was written to a database since it was last asked: much cheaper than a look at the jobs.

    SQLite counts what others than a connection have committed; of another database nobody knows.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._connection: Any = None
        if engine.dialect.name == "sqlite" and engine.url.database not in (None, "", ":memory:"):
            self._connection = engine.raw_connection()
            self._connection.detach()  # from the pool: on it nothing is ever written
        self._count = -1

    def __call__(self) -> bool | None:
        """None: nobody knows."""
        if self._connection is None:
            return None
        try:
            (count,) = self._connection.dbapi_connection.execute("PRAGMA data_version").fetchone()
        except sqlite3.Error:  # whoever looks finds out why
            return True
        changed, self._count = count != self._count, count
        return bool(changed)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _set_up_sqlite(connection: Any, synchronous: str) -> None:
    until = time.monotonic() + _WAIT
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:
            # Of several that change a new database's mode at once, SQLite refuses some without waiting.
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(_PAUSE)
    for pragma in (f"synchronous={synchronous}", f"cache_size=-{_CACHE}"):
        connection.execute(f"PRAGMA {pragma}")


def _create(engine: sa.Engine, table: sa.Table) -> None:
    try:
        table.create(engine, checkfirst=True)
    except sa.exc.DBAPIError as error:  # another process, which opens it at this moment, was quicker
        if "already exists" not in str(error.orig):
            raise


def _missing(engine: sa.Engine | sa.Connection, jobs: sa.Table) -> list[sa.Column[Any]]:
    """The columns that an earlier version did not have."""
    there = {column["name"] for column in sa.inspect(engine).get_columns(jobs.name)}
    return [column for column in jobs.columns if column.name not in there]


def _bring_up_to_date(engine: sa.Engine, jobs: sa.Table) -> None:
    """Add the columns that are missing, with their defaults, and what is known of them: all of it or nothing, and by
    one process at a time."""
    is_sqlite = engine.dialect.name == "sqlite"
    with engine.begin() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_sqlite else f"LOCK TABLE {jobs.name}")
        missing = _missing(connection, jobs)
        for column in missing:
            definition = sa.schema.CreateColumn(column).compile(dialect=engine.dialect)
            connection.exec_driver_sql(f"ALTER TABLE {jobs.name} ADD COLUMN {definition}")
        if jobs.c.model in missing:
            connection.execute(jobs.update().values(model=sa.func.coalesce(jobs.c.request["model"].as_string(), "")))
