"""`make fuzz MINUTES=30`: rounds of the fuzz tests, each with other inputs, and a table of what became of them.

    python -m tests.fuzz --minutes 30 [--seed 1] [--write docs/reliability.md]

A fault is kept, with the line that makes it again, in `out/fuzz/`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tests.sections import write

MARKERS = "<!-- fuzz: begin -->", "<!-- fuzz: end -->"
ROUND = 10  # times the inputs of the test suite


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None, help="of the first round; the next ones count on")
    parser.add_argument("--write", type=Path, default=None, help="a page whose section is replaced by the table")
    asked = parser.parse_args()
    seed = int(time.time()) if asked.seed is None else asked.seed
    started, counts, rounds = time.monotonic(), {}, 0
    folder = Path("out/fuzz")
    folder.mkdir(parents=True, exist_ok=True)
    while rounds == 0 or time.monotonic() - started < 60 * asked.minutes:
        for kind, outcomes in one_round(seed + rounds, folder).items():
            counts.setdefault(kind, Counter()).update(outcomes)
        rounds += 1
        print(f"round {rounds}, seed {seed + rounds - 1}: {summary(counts)}", flush=True)
    page = table(counts, rounds, seed, (time.monotonic() - started) / 60)
    print(page)
    if asked.write is not None:
        write(asked.write, page, MARKERS)
    return int(any(outcomes["fault"] for outcomes in counts.values()))


def one_round(seed: int, folder: Path) -> dict[str, Counter]:
    """What became of the inputs of one round; a round that ends by itself is a hang, which says where."""
    path, log = folder / "counts.json", folder / f"{seed}.log"
    path.unlink(missing_ok=True)
    environment = os.environ | {"FUZZ_SCALE": str(ROUND), "FUZZ_COUNTS": str(path.absolute())}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n0",
        "-p",
        "no:cacheprovider",
        "tests/fuzz",
        "--capture=sys",  # what says where a hang is comes from under Python
        f"--hypothesis-seed={seed}",
    ]
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    counts = (
        {kind: Counter(outcomes) for kind, outcomes in json.loads(path.read_text()).items()} if path.exists() else {}
    )
    if status == 0:
        log.unlink()
        return counts
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log.read_text(), re.MULTILINE) or [
        "a hang, or the end of the process"
    ]
    for name in failed:
        print(f"fault: {name}; see {log}", flush=True)
    counts.setdefault("faults", Counter())["fault"] += len(failed)
    return counts


def summary(counts: dict[str, Counter]) -> str:
    inputs = sum(number for outcomes in counts.values() for outcome, number in outcomes.items() if outcome != "fault")
    return f"{inputs} inputs, {sum(outcomes['fault'] for outcomes in counts.values())} faults"


def table(counts: dict[str, Counter], rounds: int, seed: int, minutes: float) -> str:
    day = datetime.datetime.now(datetime.UTC).date()
    head = (
        f"{day}, {minutes:.0f} minutes, {rounds} rounds from seed {seed}; shrinking repeats inputs, which count again."
    )
    lines = ["| inputs | number | done | clear error |", "|---|---|---|---|"]
    for kind in sorted(counts.keys() - {"faults"}):
        errors, total = counts[kind]["clear error"], sum(counts[kind].values())
        lines.append(f"| {kind} | {total:,} | {total - errors:,} | {errors:,} |")
    faults = counts.get("faults", Counter())["fault"]
    lines += ["", f"Tracebacks, hangs, leftovers and silent results: {faults}."]
    return "\n".join([head, "", *lines])


if __name__ == "__main__":
    sys.exit(main())
