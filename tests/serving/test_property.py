"""Whatever is sent that the API's own page allows, or forbids, is answered: never by a failure of the server."""

import contextlib
import os

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from cogvx_fast import demo_checkpoint
from cogvx_fast.serving.api import build
from cogvx_fast.serving.context import Context, Limits
from cogvx_fast.serving.files import Files
from cogvx_fast.serving.models import Models
from cogvx_fast.serving.orders import Served
from cogvx_fast.serving.settings import Settings
from cogvx_fast.serving.store import Store

# Of each route, by what its schema allows and by what it does not; more by hand.
EXAMPLES = int(os.environ.get("COGVX_API_EXAMPLES", "8"))


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    folder = tmp_path_factory.mktemp("property")
    place = Settings(demo_checkpoint(), f"sqlite:///{folder / 'jobs.sqlite'}", str(folder / "files"))
    models = Models([Served.of(demo_checkpoint(), "demo", None, None, "float32", "cpu")])
    context = Context(models, Store(place.store), Files(place.files), None, Limits(queued=10**6), place)
    return schemathesis.openapi.from_asgi("/openapi.json", build(context))


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_makes_it_fail(api, mode):
    asked, answers = set(), []
    for result in api.get_all_operations():
        operation = result.ok()
        if operation.path.endswith("/events"):  # which end when the job does
            continue

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def check(case):
            response = case.call()
            answers.append(response.status_code)
            assert response.status_code < 500 or case.path == "/readyz", response.text
            if response.status_code >= 400 and case.path != "/readyz":
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        with contextlib.suppress(Unsatisfiable):  # of routes of which nothing can be wrong
            check()
        asked.add((operation.method, operation.path))
    assert ("post", "/v1/videos") in asked and len(asked) > 8
    print(len(answers), "requests:", {status: answers.count(status) for status in set(answers)})
    assert 400 in answers
