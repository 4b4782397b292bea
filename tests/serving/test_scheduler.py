import random

import pytest

from cogvx_fast.serving.scheduler import Candidate, in_order, preempts


def candidate(name, expected=10.0, waited=0.0, priority=0, owner="anna"):
    return Candidate(name, owner, priority, waited, expected)


def names(order):
    return [candidate.id for candidate in order]


def test_the_shortest_goes_first():
    assert names(in_order([candidate("long", 60), candidate("short", 5), candidate("middle", 20)])) == [
        "short",
        "middle",
        "long",
    ]


def test_who_has_waited_overtakes_what_is_a_little_shorter():
    assert names(in_order([candidate("new", 10), candidate("old", 20, waited=30)])) == ["old", "new"]
    assert names(in_order([candidate("new", 1, waited=3), candidate("old", 100, waited=30)])) == ["new", "old"]


def test_priorities_go_before_lengths():
    order = in_order([candidate("short", 1), candidate("high", 100, priority=2), candidate("low", 1, priority=-1)])
    assert names(order) == ["high", "short", "low"]


def test_keys_take_turns():
    many = [candidate(f"anna{number}", 5) for number in range(3)]
    few = [candidate("ben0", 9, owner="ben"), candidate("ben1", 9, owner="ben")]
    assert names(in_order(many + few)) == ["anna0", "ben0", "anna1", "ben1", "anna2"]
    assert names(in_order(many + few, {"anna": 100.0})) == ["ben0", "ben1", "anna0", "anna1", "anna2"]


def test_who_is_overdue_goes_before_every_priority_the_oldest_first():
    jobs = [candidate("high", priority=9), candidate("b", 99, waited=700), candidate("a", 9, waited=600)]
    assert names(in_order(jobs, patience=600)) == ["b", "a", "high"]


def test_nothing_else_takes_it_twice():
    assert in_order([]) == []
    jobs = [candidate(str(number), waited=number) for number in range(50)]
    assert sorted(names(in_order(jobs))) == sorted(names(jobs))


@pytest.mark.parametrize("seed", range(5))
def test_no_job_starves(seed):
    """One device; short jobs of high priority by many owners come faster than they can be made, for ever.

    The long job of low priority waits for `patience`, what runs then, and who was there before it: nobody.
    """
    rng, patience, longest = random.Random(seed), 100.0, 8.0
    now, waiting, number = 0.0, [("victim", "zoe", -5, 0.0, 50.0)], 0
    while now < 10 * patience:
        for _ in range(rng.randint(1, 3)):
            waiting.append((f"n{number}", f"o{number % 7}", rng.randint(0, 9), now, rng.uniform(1, longest)))
            number += 1
        jobs = [Candidate(i, owner, priority, now - came, expected) for i, owner, priority, came, expected in waiting]
        first = in_order(jobs, patience=patience)[0]
        if first.id == "victim":
            break
        waiting = [job for job in waiting if job[0] != first.id]
        now += first.expected
    assert patience * 0.9 <= now <= patience + longest


def test_a_short_job_is_worth_parking_a_long_one():
    running = candidate("runs", expected=100, waited=20)
    assert preempts(running, [candidate("short", 10)])
    assert not preempts(running, [candidate("as long", 60)])
    assert not preempts(running, [])


def test_priorities_and_parking():
    running = candidate("runs", expected=100, waited=20, priority=1)
    assert preempts(running, [candidate("urgent", 500, priority=2)])
    assert not preempts(running, [candidate("short", 1, priority=0)])


def test_who_has_waited_long_is_not_put_off_again():
    running = candidate("runs", expected=100, waited=600)
    assert not preempts(running, [candidate("urgent", 1, priority=9)], patience=600)
    fresh = candidate("runs", expected=100, waited=1)
    assert not preempts(fresh, [candidate("overdue", 1, waited=601)], patience=600), "it is next, that is enough"
