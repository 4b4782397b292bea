import dataclasses
import math
import sqlite3
import threading
import time

import pytest

from cogvx_fast.serving import store as module
from cogvx_fast.serving.jobs import Job, Signal, StorageFullError, new_id
from cogvx_fast.serving.store import Store


@pytest.fixture
def own():
    """The clock of a process, which nobody sets: it passes when the test says so."""

    class Own:
        now = 50.0

        def __call__(self):
            return self.now

    return Own()


@pytest.fixture
def store(url, own):
    with_jobs = Store(url, clock=own)
    yield with_jobs
    with_jobs.close()


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when the test says so."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(module.time, "time", lambda: Clock.now)
    return Clock


def queued(store, **values):
    job = Job(id=new_id(), **{"owner": "", "request": {"prompt": "a cat"}, **values})
    store.add(job)
    return job


def test_a_job_is_there_for_another_process_and_comes_back_as_it_was(store, url):
    job = queued(store, owner="anna", priority=3, remixed_from="video_1")
    assert Store(url).get(job.id) == job
    assert store.get("video_none") is None


def test_ids_cannot_be_guessed():
    ids = {new_id() for _ in range(100)}
    assert len(ids) == 100 and all(len(job_id) == len("video_") + 48 for job_id in ids)


def test_one_worker_gets_a_job(store, url):
    job = queued(store)
    stores, leases = [Store(url) for _ in range(8)], []
    barrier = threading.Barrier(len(stores))

    def take(own):
        barrier.wait()
        leases.append(own.take(job.id, "w", 10))

    workers = [threading.Thread(target=take, args=(own,)) for own in stores]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(leases) == 8 and sum(lease is not None for lease in leases) == 1
    assert store.waiting() == [] and [job.id for job in store.running()] == [job.id]


def test_who_lost_a_lease_changes_nothing(store, clock, own):
    job = queued(store)
    first = store.take(job.id, "a", 10)
    assert store.report(job.id, first, 10, done=1, total=4) is Signal.GO_ON
    for _ in range(4):
        assert store.reap() == 0
        own.now += 3
    assert store.reap() == 1
    second = store.take(job.id, "b", 10)
    assert store.report(job.id, first, 10, done=3) is Signal.LOST
    assert not store.complete(job.id, first, {}, 1)
    assert not store.fail(job.id, first, "code", "why")
    assert not store.give_back(job.id, first)
    there = store.get(job.id)
    assert (there.status, there.done, there.worker, there.kills) == ("in_progress", 1, "b", 1)
    assert store.complete(job.id, second, {"stage_seconds": {}}, 7)
    there = store.get(job.id)
    assert (there.status, there.bytes, there.completed_at) == ("completed", 7, clock.now) and there.ended
    assert store.reap() == 0


@pytest.mark.parametrize("jump", [3600.0, -3600.0, 1e9])
def test_a_clock_that_jumps_takes_no_lease(store, clock, own, jump):
    job = queued(store)
    lease = store.take(job.id, "a", 10)
    for _ in range(3):
        own.now += 6
        clock.now += jump
        assert store.reap() == 0
        assert store.report(job.id, lease, 10) is Signal.GO_ON
        assert store.waiting() == []
    there = store.get(job.id)
    assert (there.status, there.lease, there.kills, there.beats) == ("in_progress", lease, 0, 3)
    assert store.complete(job.id, lease, {}, 1)


@pytest.mark.parametrize("jump", [0.0, -3600.0])
def test_a_silent_lease_runs_out_whatever_the_clock_says(store, clock, own, jump):
    job = queued(store)
    store.take(job.id, "a", 10)
    assert store.reap() == 0
    clock.now += jump
    own.now += 6
    assert store.reap() == 0
    own.now += 6
    assert store.reap() == 1 and store.get(job.id).status == "queued"


def test_a_machine_that_stood_still_gives_workers_a_moment(store, own):
    job = queued(store)
    lease = store.take(job.id, "a", 10)
    assert store.reap() == 0
    own.now += 1000
    assert store.reap() == 0
    assert store.report(job.id, lease, 10) is Signal.GO_ON
    own.now += 1000
    assert store.reap() == 0, "it was kept since"
    own.now += 5
    assert store.reap() == 0
    own.now += 5
    assert store.reap() == 1


def test_a_worker_that_speaks_up_at_this_moment_keeps_its_lease(store, own, monkeypatch):
    job = queued(store)
    lease = store.take(job.id, "a", 10)
    run_out = store._leases.run_out

    def and_then(held):
        dead = run_out(held)
        assert store.report(job.id, lease, 10) is Signal.GO_ON
        return dead

    store.reap()
    own.now += 5
    store.reap()
    own.now += 5
    monkeypatch.setattr(store._leases, "run_out", and_then)
    assert store.reap() == 0 and store.get(job.id).kills == 0


def test_what_kills_three_workers_fails(store):
    job, other = queued(store), queued(store)
    store.take(other.id, "other", 60)
    for kills in (1, 2, 3):
        assert store.take(job.id, "w", 60)
        assert store.reap("w") == 1
        assert store.get(job.id).kills == kills
    there = store.get(job.id)
    assert (there.status, there.error_code) == ("failed", "worker_died")
    assert "died 3 times" in there.error_message
    assert store.get(other.id).status == "in_progress"
    assert store.totals() == {"requeued": 2, "failed": 1}


def test_giving_back_is_no_kill(store, clock):
    job = queued(store)
    for _ in range(4):
        lease = store.take(job.id, "w", 10)
        assert store.give_back(job.id, lease, after=5)
        assert store.waiting() == [] and store.take(job.id, "w", 10) is not None
        store.give_back(job.id, store.get(job.id).lease)
    assert store.get(job.id).kills == 0
    store.give_back(job.id, store.take(job.id, "w", 10), after=5)
    clock.now += 6
    assert [found.id for found in store.waiting()] == [job.id]


def test_a_clock_that_is_set_back_does_not_hold_a_job(store, clock):
    job = queued(store)
    store.give_back(job.id, store.take(job.id, "w", 10), after=10)
    assert store.waiting() == []
    clock.now -= 3600
    assert [found.id for found in store.waiting()] == [job.id]
    store.give_back(job.id, store.take(job.id, "w", 10), after=1e6)
    clock.now += 61
    assert [found.id for found in store.waiting()] == [job.id], "no pause is longer"


def test_cancelling(store):
    waits, runs, ended = queued(store), queued(store), queued(store)
    lease = store.take(runs.id, "w", 10)
    store.complete(ended.id, store.take(ended.id, "w", 10), {}, 1)
    for job in (waits, runs, ended):
        store.cancel(job.id)
    assert (store.get(waits.id).status, store.get(waits.id).error_code) == ("failed", "cancelled")
    assert store.get(runs.id).status == "in_progress"
    assert store.report(runs.id, lease, 10) is Signal.CANCEL
    assert store.fail(runs.id, lease, "cancelled", "it was cancelled")
    assert store.get(ended.id).status == "completed"
    assert store.totals() == {"completed": 1, "cancelled": 2}


def test_a_job_whose_worker_died_before_it_heard_of_its_end_is_cancelled(store):
    job = queued(store)
    store.take(job.id, "w", 10)
    store.cancel(job.id)
    store.reap("w")
    assert (store.get(job.id).status, store.get(job.id).error_code) == ("failed", "cancelled")


def test_the_worker_of_a_deleted_job_hears_that_it_is_lost(store):
    job = queued(store)
    lease = store.take(job.id, "w", 10)
    assert store.delete(job.id) and not store.delete(job.id)
    assert store.report(job.id, lease, 10) is Signal.LOST


def test_pages(store, clock):
    ids = []
    for number in range(7):
        clock.now += number % 2  # some come at the same time
        ids.append(queued(store, owner="anna").id)
    queued(store, owner="ben")
    pages, after = [], None
    while page := store.page("anna", after, 3):
        pages.append([job.id for job in page])
        after = page[-1]
    assert [len(page) for page in pages] == [3, 3, 1]
    assert sorted([*pages[0], *pages[1], *pages[2]]) == sorted(ids)
    ascending = [job.id for job in store.page("anna", None, 100, ascending=True)]
    assert ascending == [*pages[0], *pages[1], *pages[2]][::-1]


def test_what_is_old_or_too_much_goes(store, clock):
    def completed(size):
        clock.now += 1
        job = queued(store)
        store.complete(job.id, store.take(job.id, "w", 10), {}, size)
        return job.id

    old = completed(10)
    clock.now += 100
    waiting = queued(store)
    big, small, last = completed(50), completed(10), completed(30)

    def outdated(max_age, max_bytes):
        return set(store.outdated(max_age, max_bytes))

    assert outdated(math.inf, 1000) == set()
    assert outdated(50, 1000) == {old}
    assert outdated(1000, 95) == {old}
    assert outdated(1000, 45) == {old, big}
    assert outdated(1000, 35) == {old, big, small}
    assert outdated(0, 0) == {old, big, small, last} and waiting.id in store.ids()


def test_usage_and_queue_length_are_by_owner(store, clock):
    for owner, busy in (("anna", 3.0), ("anna", 4.0), ("ben", 1.0)):
        job = queued(store, owner=owner)
        lease = store.take(job.id, "w", 10)
        store.report(job.id, lease, 10, busy_seconds=busy)
        if busy == 3.0:
            store.complete(job.id, lease, {}, 1)
    assert store.usage(60) == {"anna": 7.0, "ben": 1.0}
    assert (store.queue_length("anna"), store.queue_length()) == (1, 2)
    clock.now += 61
    assert store.usage(60) == {"anna": 4.0, "ben": 1.0}, "what runs still counts"


def test_workers_are_those_seen_lately(store, clock):
    store.seen("a", {"device": "cpu"})
    store.seen("b", {"device": "cuda"})
    clock.now += 5
    store.seen("a", {"device": "cpu", "steps": 2})
    assert store.workers(3) == {"a": {"device": "cpu", "steps": 2}}
    store.gone("a")
    assert store.workers(3) == {} and set(store.workers(10)) == {"b"}


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_workers_are_there_whatever_the_clock_does(store, clock, own, jump):
    store.seen("a", {})
    store.seen("b", {})
    assert set(store.workers(10)) == {"a", "b"}
    clock.now += jump
    own.now += 2
    store.seen("a", {})
    assert set(store.workers(10)) == {"a", "b"}
    own.now += 9
    store.seen("a", {})
    assert set(store.workers(10)) == {"a"}


def test_a_full_disk_is_said_to_be_one_and_harms_nothing(tmp_path):
    store = Store(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    job = queued(store)
    store.close()
    module.sa.event.listen(store._engine, "connect", lambda c, _: c.execute("PRAGMA max_page_count=20"))
    with pytest.raises(StorageFullError, match="no room"):
        for _ in range(100):
            queued(store, request={"prompt": "x" * 4000})
    assert store.get(job.id) == job


def test_sqlite_writes_ahead_and_survives_a_loss_of_power(tmp_path):
    url = f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    for durable, expected in ((True, 2), (False, 1)):
        with Store(url, durable)._engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == expected
    assert sqlite3.connect(url.removeprefix("sqlite:///")).execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////proc/no/such/place", "oracle9://x"])
def test_a_store_that_cannot_be_opened_is_named(url):
    with pytest.raises(ValueError, match="cannot be opened") as caught:
        Store(url)
    assert repr(url) in str(caught.value)


def test_the_columns_are_the_fields():
    assert [column.name for column in module._jobs.columns] == [field.name for field in dataclasses.fields(Job)]
    assert time.time() - Job("", "", {}).created_at < 10
