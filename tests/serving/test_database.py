"""Databases of earlier versions, several processes that open one at the same moment, and who sees that one writes."""

import sqlite3
import threading

import pytest

from cogvx_fast.serving import database
from cogvx_fast.serving import store as module
from cogvx_fast.serving.jobs import Job, new_id
from cogvx_fast.serving.store import Store


def in_threads(opening, count=6):
    """What so many threads get that begin at the same moment."""
    barrier, found = threading.Barrier(count), []

    def run():
        barrier.wait()
        try:
            found.append(opening())
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def earlier(url):
    """A database as before jobs had a column for their model, with three jobs."""
    store = Store(url)
    jobs = [Job(new_id(), "", {"model": model, "prompt": "x"}, "lost") for model in ("demo", "THUDM/CogVideoX-2b")]
    jobs.append(Job(new_id(), "", {"prompt": "x"}, "lost"))
    store.add(*jobs)
    with store._engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs DROP COLUMN model")
    store.close()
    return jobs


def test_one_of_an_earlier_version_opens_and_its_jobs_have_their_models(url, earlier):
    for store in (Store(url), Store(url)):  # and nothing happens the second time
        assert [store.get(job.id).model for job in earlier] == ["demo", "THUDM/CogVideoX-2b", ""]
        assert [job.id for job in store.waiting("demo")] == [earlier[0].id]
        new = Job(new_id(), "", {"model": "demo"}, "demo")
        store.add(new)
        assert store.get(new.id) == new
        store.delete(new.id)
        store.close()


def test_its_table_is_as_that_of_a_new_one(url, earlier):
    def columns():
        store = Store(url)
        found = module.sa.inspect(store._engine).get_columns("jobs")
        store.close()
        return {column["name"]: (str(column["type"]), column["nullable"]) for column in found}

    brought_up = columns()
    engine = module.sa.create_engine(url)
    module._metadata.drop_all(engine)
    engine.dispose()
    assert columns() == brought_up


def test_several_bring_it_up_to_date_at_the_same_moment(url, earlier):
    stores = in_threads(lambda: Store(url))
    assert [type(store) for store in stores] == [Store] * len(stores), stores
    assert stores[0].get(earlier[0].id).model == "demo"
    for store in stores:
        store.close()


def test_several_make_it_at_the_same_moment(url):
    stores = in_threads(lambda: Store(url))
    assert [type(store) for store in stores] == [Store] * len(stores), stores
    for store in stores:
        store.add(Job(new_id(), "", {}, "demo"))
    assert len(stores[0].ids()) == len(stores)
    for store in stores:
        store.close()


def test_one_that_others_change_to_its_mode_is_waited_for():
    """SQLite refuses that at once, whatever its limit is."""
    said = []

    class Connection:
        def execute(self, statement):
            said.append(statement)
            if len(said) < 4:
                raise sqlite3.OperationalError("database is locked" if len(said) < 3 else "disk I/O error")

    with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
        database._set_up_sqlite(Connection(), "FULL")
    assert said == ["PRAGMA journal_mode=WAL"] * 3


def test_changes_of_others_are_seen_once(url):
    watching, writing = Store(url), Store(url)
    changes, others = watching.changes(), watching.changes()
    if not url.startswith("sqlite"):
        assert changes() is None and changes() is None
        return
    assert changes() is True, "nobody knows what was before"
    assert changes() is False and changes() is False
    job = Job(new_id(), "", {"prompt": "x"}, "demo")
    writing.add(job)
    assert changes() and changes() is False
    watching.take(job.id, "w", 10), writing.get(job.id)
    assert changes() and changes() is False, "its own store's writes, too, and no reading"
    assert others() and others() is False, "each has its own count"
    watching.close()
    assert changes() is None, "one that is closed does not know"
    writing.close()


def test_nobody_knows_of_a_database_in_memory():
    store = Store("sqlite://")
    assert store.changes()() is None
    store.close()


def test_a_place_that_is_said_as_a_uri_is_the_same_file(tmp_path):
    store = Store(f"sqlite:///file:{tmp_path / 'jobs.sqlite'}?uri=true")
    changes = store.changes()
    assert changes() and changes() is False
    store.add(Job(new_id(), "", {"prompt": "x"}, "demo"))
    assert changes() and sorted(path.name for path in tmp_path.iterdir())[0] == "jobs.sqlite"
    store.close()
