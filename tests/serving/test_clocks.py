"""Clocks that jump: how long is waited, and what is old."""

import time

import pytest

from cogvx_fast.serving import clocks
from cogvx_fast.serving.clocks import Presence, Steadiness, Waits
from cogvx_fast.serving.retention import Retention


@pytest.fixture
def times(monkeypatch):
    """The time of day, and this process's own clock, which `pass_` moves together."""

    class Times:
        day, own = 1e9, 50.0

        def pass_(self, seconds):
            self.day, self.own = self.day + seconds, self.own + seconds

    found = Times()
    monkeypatch.setattr(time, "time", lambda: found.day)
    return found


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_waiting_goes_on_as_it_did(times, jump):
    waits = Waits(lambda: times.own)
    times.pass_(5)
    assert waits.seconds("a", times.day - 5) == 5
    times.day += jump
    times.pass_(7)
    assert waits.seconds("a", 1e9) == 12
    assert waits.seconds("b", times.day + 1000) == 0, "of one that came before the clock was set back"


def test_what_is_remembered_of_waiting_is_bounded(times, monkeypatch):
    monkeypatch.setattr(clocks, "_REMEMBERED", 3)
    waits = Waits(lambda: times.own)
    for name in "abcde":
        waits.seconds(name, times.day)
    assert list(waits._began) == ["c", "d", "e"]


def test_a_note_of_a_run_before_is_judged_by_its_date(times):
    presence = Presence(lambda: times.own)
    times.pass_(1)
    assert presence.seconds({"old": times.day - 500, "new": times.day - 1, "ahead": times.day + 300}) == {
        "old": 500,
        "new": 1,
        "ahead": 300,
    }


def test_a_note_that_changed_unseen_is_not_taken_for_new(times):
    presence = Presence(lambda: times.own)
    presence.seconds({"a": times.day})
    noted = times.day + 10
    times.pass_(500)
    assert presence.seconds({"a": noted}) == {"a": 490}


def test_a_clock_that_is_set_forward_makes_nothing_old_for_a_day(times, store, files, add):
    def completed():
        job = add()
        store.complete(job.id, store.take(job.id, "w", 10), {}, 10)
        return job.id

    retention = Retention(store, files, 7 * 86400.0, 25, lambda: times.own)
    first = completed()
    assert retention.sweep() == []
    times.day += 30 * 86400
    for _ in range(23):
        times.pass_(3600)
        assert retention.sweep() == []
    others = completed(), completed()
    assert retention.sweep() == [first], "size still counts"
    times.pass_(2 * 3600)
    assert retention.sweep() == []
    times.pass_(8 * 86400)
    assert set(retention.sweep()) == set(others), "a day later it is believed"


def test_a_clock_that_comes_back_harms_nothing(times):
    steadiness = Steadiness(lambda: times.own)
    times.day += 86400 * 365
    assert not steadiness.is_steady()
    times.pass_(Steadiness.HOLD / 2)
    times.day -= 86400 * 365
    assert steadiness.is_steady()
    times.day += 86400 * 365
    times.pass_(Steadiness.HOLD * 0.75)
    assert not steadiness.is_steady(), "it is a jump of its own"
    for _ in range(100):
        times.pass_(60)
        times.day += 1  # as clocks drift
    assert Steadiness(lambda: times.own).is_steady()
