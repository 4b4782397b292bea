"""What the first GPU has to answer, step by step: `python benchmarks/first_gpu.py STEP`; see docs/first-gpu.md.

Each step prints a short table last, adds rows to a file, can be repeated, and needs neither PyAV nor a network.
`--rehearse` runs the same code on a CPU at toy size: its times say nothing, and its rows say that they are a rehearsal.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from first_gpu_steps import STEPS
from first_gpu_steps.setting import Setting

ROWS = Path(__file__).with_name("results") / "first-gpu.jsonl"


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; 0 if every step that ran was right."""
    numbered = {str(number): name for number, name in enumerate(STEPS, 1)}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("step", help=f"list, all, or one of {', '.join(f'{n} ({s})' for n, s in numbered.items())}")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU at toy size, to see that it runs")
    parser.add_argument("--out", type=Path, help=f"rows, one JSON a line; default {ROWS}, for a rehearsal none")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which a step begins nothing more")
    given = parser.parse_args(arguments)
    step = numbered.get(given.step, given.step)
    if step == "list":
        for number, name in numbered.items():
            print(f"{number}  {name:10} {(STEPS[name].__doc__ or '').partition(chr(10))[0]}")
        return 0
    if step != "all" and step not in STEPS:
        parser.error(f"step={given.step!r} is unknown; allowed: list, all, {', '.join(STEPS)} or their numbers")
    if given.minutes <= 0:
        parser.error(f"--minutes={given.minutes} must be positive")
    out = given.out or (None if given.rehearse else ROWS)
    failed = []
    for name in STEPS if step == "all" else (step,):
        setting = Setting.make(name, given.device, given.rehearse, out, given.minutes)
        if isinstance(setting, str):
            parser.error(setting)
        right = STEPS[name](setting)
        setting.show()
        failed += [] if right else [name]
    if failed:
        print(f"not right: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
