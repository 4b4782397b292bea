"""Requests that the API's own page allows, and such that it forbids, and what they are answered."""

import contextlib
import logging
from collections import Counter

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.errors import Unsatisfiable

from cogvx_fast.serving.logs import logger


class Tracebacks(logging.Handler):
    """Collects what the server logged with a traceback."""

    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        if record.exc_info:
            self.found.append(f"{record.getMessage()}: {record.exc_info[1]!r}")


@contextlib.contextmanager
def tracebacks():
    handler = Tracebacks()
    logger.addHandler(handler)
    try:
        yield handler.found
    finally:
        logger.removeHandler(handler)


def ask(api, mode, examples, number=None, counts=None):
    """How many requests were answered by which status, by method and path of the route.

    Args:
        mode: of schemathesis: by what the schema allows, or by what it does not.
        examples: of each route.
        number: of the random ones; None: the same every time.
        counts: to which they are added.

    Raises:
        AssertionError: for an answer that is a failure, or an error without OpenAI's body.
    """
    counts = {} if counts is None else counts
    for result in api.get_all_operations():
        operation = result.ok()
        if operation.path.endswith("/events"):  # which end when the job does
            continue
        found = counts.setdefault((operation.method, operation.path), Counter())
        check = _checking(operation.as_strategy(generation_mode=mode), examples, number, found)
        with contextlib.suppress(Unsatisfiable):  # of routes of which nothing can be wrong
            check()
    return counts


def _checking(strategy, examples, number, found):
    """A test of one route, which counts what is answered in `found`."""

    @given(case=strategy)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=number is None,
        suppress_health_check=list(HealthCheck),
    )
    def check(case):
        response = case.call()
        found[response.status_code] += 1
        assert response.status_code < 500 or case.path == "/readyz", response.text
        if response.status_code >= 400 and case.path != "/readyz":
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    return check if number is None else seed(number)(check)
