"""`make soak`: a thousand jobs on a server that is killed, cut off, filled up and told the wrong time; nothing is lost.

    python -m tests.soak --jobs 1000 [--seed 1] [--write docs/serving.md] [--keep out/soak]

The videos are compared with those that the same server made before the first fault. The disk is full only where this
user may mount a small one. Exits with status 1 if a fault was found; it is described where it is found.
"""

import argparse
import datetime
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

from tests.sections import write

from . import checks, faults, memory, pool
from .server import Clock, Disk, Server
from .users import ACTS, FAULTS, Ledger, User

MARKERS = "<!-- soak: begin -->", "<!-- soak: end -->"
MARKERS_IN_PEACE = "<!-- soak in peace: begin -->", "<!-- soak in peace: end -->"
USERS, WORKERS, SETTINGS = 8, 2, 40


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--write", type=Path, default=None, help="a page whose section is replaced by the table")
    parser.add_argument("--keep", type=Path, default=None, help="a folder for the server's log")
    parser.add_argument(
        "--in-peace", action="store_true", help="without faults, so that memory is looked at over all of the jobs"
    )
    parser.add_argument("--true-clock", action="store_true", help="leave out that the clock is moved")
    asked = parser.parse_args()
    seed = int(time.time()) if asked.seed is None else asked.seed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # by way of what is cleaned up
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        disk = Disk(Path(folder) / "disk")
        server = Server(Path(folder), disk, Clock(Path(folder) / "clock"), WORKERS)
        try:
            run = Run(asked.jobs, seed, server, disk, not asked.true_clock, asked.in_peace)
            run.go()
        finally:
            server.stop()
            disk.remove()
            if asked.keep is not None:
                asked.keep.mkdir(parents=True, exist_ok=True)
                shutil.copy(server.log, asked.keep)
    page = run.table()
    print(page)
    if asked.write is not None:
        write(asked.write, page, MARKERS_IN_PEACE if asked.in_peace else MARKERS)
    return int(run.has_faults)


class Run:
    """One server from its first job to what is left in its folder."""

    def __init__(self, jobs, seed, server, disk, moves_clock, in_peace=False):
        self.jobs, self.seed, self.server = jobs, seed, server
        self.left_out = [] if disk.is_small else ["full disk"]
        self.left_out += [] if moves_clock else ["clock moved"]
        self.left_out = list(faults.PER_THOUSAND) if in_peace else self.left_out
        kinds = [name for name in faults.PER_THOUSAND if name not in self.left_out]
        self.planned = faults.schedule(jobs, seed, kinds)
        self.ledger = Ledger(pool.settings(min(SETTINGS, 10 * max(1, jobs // 25)), seed))
        self.user = User(server, self.ledger)
        self.faults = faults.Faults(server, disk, self.ledger, seed, self._say)
        self.found, self.growth = Counter(), []
        self._started = time.monotonic()

    def _say(self, text):
        print(f"{time.monotonic() - self._started:6.0f} s: {text}", flush=True)

    def go(self):
        self.server.start()
        self._say(f"seed {self.seed}: {len(self.ledger.settings)} settings without a fault")
        pool.make(self.ledger.settings, self.user)
        self._say("faults begin")
        watch = memory.Watch(self.server, self.ledger)
        self._ask()
        self.growth = watch.end()
        self._say("all have ended; what is there is looked at")
        found, self.ends, self.unheard = checks.of_the_answers(self.user, self.ledger)
        self.found.update(found)
        self.server.end()
        found, self.swept = checks.of_the_folder(self.server.folder, self.ledger, self.ends)
        self.found.update(found)
        self.errors = checks.of_the_log(self.server.log)
        self.minutes = (time.monotonic() - self._started) / 60

    def _ask(self):
        """All jobs, by several users at once, beside what happens to the server."""
        chance = random.Random(f"{self.seed}/acts")
        acts = [act for act, part in ACTS.items() for _ in range(max(1, round(part * self.jobs / 100)))]
        acts = (acts + ["fetched"] * max(0, self.jobs - len(acts)))[: self.jobs]
        chance.shuffle(acts)
        settings = [chance.choice(self.ledger.settings) for _ in acts]
        numbers, lock = iter(range(self.jobs)), threading.Lock()

        def use():
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                try:
                    own = random.Random(f"{self.seed}/{number}")
                    self.user.make(settings[number], acts[number], own)
                except Exception as error:
                    self.ledger.problem(f"job {number}, {acts[number]}: {type(error).__name__}: {error}")
                    traceback.print_exc()

        users = [threading.Thread(target=use, daemon=True) for _ in range(USERS)]
        harm = threading.Thread(target=self._harm, args=(users,), daemon=True)
        for thread in [*users, harm]:
            thread.start()
        said = 0
        while any(thread.is_alive() for thread in users):
            time.sleep(0.1)
            if self.ledger.ended - said >= max(10, self.jobs // 20):
                said = self.ledger.ended
                self._say(f"{said} of {self.jobs} jobs, {len(self.ledger.problems)} problems")
        harm.join()

    def _harm(self, users):
        try:
            self.faults.run(self.planned, lambda: not any(thread.is_alive() for thread in users))
        except Exception as error:
            self.ledger.problem(f"a fault could not be made: {type(error).__name__}: {error}")
            traceback.print_exc()

    @property
    def has_faults(self):
        is_growing = any(growth.verdict == "GROWS" for growth in self.growth)
        return bool(self.ledger.problems or is_growing or sum(self.found.values()))

    def table(self):
        day = datetime.datetime.now(datetime.UTC).date()
        counts, ended = self.ledger.counts, Counter(record.end for record in self.ledger.jobs.values())
        head = f"{day}, seed {self.seed}, {self.minutes:.0f} minutes: {self.jobs:,} jobs of {pool.STEPS} steps by"
        head += f" {USERS} users, {len(self.ledger.settings)} settings, {WORKERS} workers of one thread."
        lines = [head, "", "| what happened | times |", "|---|---|"]
        lines += [f"| {name} | {number} |" for name, number in self.faults.counts.items()]
        lines += [f"| {name} | {counts[name]} |" for name in FAULTS]
        refused = [name for name in counts if name.startswith("answered")]
        lines += [f"| requests {name}, asked again | {counts[name]} |" for name in ("not answered", *sorted(refused))]
        lines += ["", "| what became of it | jobs |", "|---|---|"]
        lines += [f"| {end} | {ended[end]} |" for end in sorted(ended)]
        lines += [f"| accepted, but the answer was cut off | {self.unheard} |"]
        lines += [f"| {name} | {number} |" for name, number in self.swept.items()]
        lines += [f"| **{kind}** | **{self.found[kind]}** |" for kind in checks.KINDS]
        lines += [f"| **other problems** | **{len(self.ledger.problems)}** |", ""]
        lines += [self._memory()]
        if self.errors:
            lines += ["", "Errors in the log:", ""]
            lines += [f"- {number} x {text}" for text, number in self.errors.most_common()]
        if self.left_out:
            lines += ["", f"Left out: {', '.join(self.left_out)}."]
        return "\n".join(lines)

    def _memory(self):
        if not self.growth:
            return f"Memory: no process lived for {memory.SHOWN_JOBS} jobs, so it is not judged."
        parts = [
            f"{one.what} {one.bytes / 2**20:.0f} MiB, {one.a_job / 1024:+.1f} KiB a job over {one.jobs} jobs"
            f" ({one.verdict})"
            for one in self.growth
        ]
        rule = f"flat: at most {memory.MOST:.0%} of it in 1,000 jobs, by a line through all looks but the first third"
        return f"Memory: {'; '.join(parts)} ({rule})."


if __name__ == "__main__":
    sys.exit(main())
