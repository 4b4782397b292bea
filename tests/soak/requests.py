"""`make fuzz-api`: ten thousand requests by the API's own page, other ones every time, and none that makes it fail.

python -m tests.soak.requests --requests 10000 [--seed 1] [--write docs/serving.md]
"""

import argparse
import contextlib
import datetime
import io
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from schemathesis import GenerationMode

from tests.sections import write
from tests.serving.requests import ask, tracebacks
from tests.serving.test_property import api_in

MARKERS = "<!-- fuzz-api: begin -->", "<!-- fuzz-api: end -->"
ROUND = 60  # examples of each route at a time


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.soak.requests", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--write", type=Path, default=None, help="a page whose section is replaced by the table")
    asked = parser.parse_args()
    seed = int(time.time()) if asked.seed is None else asked.seed
    counts, faults, rounds = {}, [], 0
    with tracebacks() as logged, tempfile.TemporaryDirectory() as folder:
        while total(counts) < asked.requests:
            # An empty database each time: pages of thousands of jobs would be most of the work.
            place = Path(folder) / str(rounds)
            place.mkdir()
            api = api_in(place)
            for mode in GenerationMode:
                faults += one_round(api, mode, seed + rounds, counts)
            rounds += 1
            print(f"round {rounds}: {total(counts):,} requests, {len(faults)} faults", flush=True)
    page = table(counts, faults, logged, seed)
    print(page)
    if asked.write is not None:
        write(asked.write, page, MARKERS)
    return int(bool(faults or logged))


def one_round(api, mode, number, counts):
    """Adds what was answered to `counts`; the faults that were found."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            ask(api, mode, ROUND, number, counts)
    except Exception as error:
        print(f"fault with seed {number}, {mode}:\n{said.getvalue()[-2000:]}", flush=True)
        traceback.print_exc()
        return [error]
    return []


def total(counts):
    return sum(sum(found.values()) for found in counts.values())


def table(counts, faults, logged, seed):
    day = datetime.datetime.now(datetime.UTC).date()
    classes = {route: Counter() for route in counts}
    for route, found in counts.items():
        for status, number in found.items():
            classes[route][status // 100] += number
    lines = [f"{day}, from seed {seed}: {total(counts):,} requests.", "", "| route | requests | 2xx | 4xx | 5xx |"]
    lines.append("|---|---|---|---|---|")
    for (method, path), found in sorted(classes.items(), key=lambda pair: pair[0][::-1]):
        numbers = " | ".join(f"{found[kind]:,}" for kind in (2, 4, 5))
        lines.append(f"| `{method.upper()} {path}` | {sum(found.values()):,} | {numbers} |")
    lines += ["", f"Failures: {len(faults)}; tracebacks in the log: {len(logged)}."]
    if classes.get(("get", "/readyz"), Counter())[5]:
        lines[-1] += " `/readyz` answers 503 here: no worker runs."
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
