"""Whatever is sent that the API's own page allows, or forbids, is answered: never by a failure of the server."""

import pytest
import schemathesis
from schemathesis import GenerationMode

from cogvx_fast import demo_checkpoint
from cogvx_fast.serving.api import build
from cogvx_fast.serving.context import Context, Limits
from cogvx_fast.serving.files import Files
from cogvx_fast.serving.models import Models
from cogvx_fast.serving.orders import Served
from cogvx_fast.serving.settings import Settings
from cogvx_fast.serving.store import Store

from .requests import ask, tracebacks

EXAMPLES = 8  # of each route, by what its schema allows and by what it does not; `make fuzz-api` for more


def api_in(folder):
    """The API of a server without workers, whose jobs lie in a folder."""
    place = Settings(demo_checkpoint(), f"sqlite:///{folder / 'jobs.sqlite'}", str(folder / "files"))
    models = Models([Served.of(demo_checkpoint(), "demo", None, None, "float32", "cpu")])
    context = Context(models, Store(place.store), Files(place.files), None, Limits(queued=10**6), place)
    return schemathesis.openapi.from_asgi("/openapi.json", build(context))


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    return api_in(tmp_path_factory.mktemp("property"))


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_makes_it_fail(api, mode):
    with tracebacks() as logged:
        counts = ask(api, mode, EXAMPLES)
    assert ("post", "/v1/videos") in counts and len(counts) > 8
    assert sum(found[400] for found in counts.values()) and not logged
