"""In the test suite the same inputs every time; `make fuzz` takes others, and writes down what it counted."""

import json
import os
from pathlib import Path

from hypothesis import HealthCheck, settings

from . import harness

_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("suite", derandomize=True, **_COMMON)
settings.register_profile("long", derandomize=False, **_COMMON)
settings.load_profile("long" if harness.SCALE > 1 else "suite")


def pytest_sessionfinish():
    if path := os.environ.get("FUZZ_COUNTS"):
        Path(path).write_text(json.dumps(harness.COUNTS))
