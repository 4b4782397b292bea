"""The command line: `python -m benchmarks.quality MODEL --work FOLDER`, and `plot ROWS --out PNG`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from cogvx_fast import demo_checkpoint
from cogvx_fast.bench import results
from cogvx_fast.bench.provenance import collect
from cogvx_fast.bench.rows import RowError
from cogvx_fast.bench.skipping import Skipping
from cogvx_fast.files import write_whole

from . import prompts
from .making_rows import row
from .methods import FAST, METHODS, REFERENCES
from .runs import Runs, Wanted
from .setting import Setting, check_evaluations

DEMO = "demo"
_DEMO_BATCH = 10


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what is wrong with it is said in one line, with exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _plot_parser() if given[:1] == ["plot"] else _parser()
    asked = parser.parse_args(given[1:] if given[:1] == ["plot"] else given)
    try:
        asked.run(asked)
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="Methods that skip steps, at equal numbers of network evaluations. Stop and repeat to resume. The"
        " subcommand plot draws rows.",
    )
    parser.set_defaults(run=_compare)
    parser.add_argument("model", help=f"folder or Hub id of a text-to-video CogVideoX, or {DEMO!r}")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is generated and measured")
    parser.add_argument("--prompts", help="demo, vbench, shipped, or a file with one a line")
    parser.add_argument("--clips", type=int, help="only the first so many of the prompts; more can follow")
    parser.add_argument("--methods", type=_names, default=list(METHODS), help="names, with commas between; default all")
    parser.add_argument("--evaluations", type=_numbers, default=[25, 21, 17, 14, 12, 10], help="25,21,17,14,12,10")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--batch", type=int, help=f"clips of one generation: {_DEMO_BATCH} for the demo, else 1")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--schedule", help="file that `cogvx-fast calibrate` wrote, for turbo; default the shipped one")
    parser.add_argument("--rows", type=Path, help="JSONL file that the result rows are added to")
    return parser


def _plot_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality plot", description="Distance over evaluations.")
    parser.set_defaults(run=_plot)
    parser.add_argument("rows", type=Path, help="JSONL file of result rows; of several runs the newest is drawn")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    return parser


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown; allowed: {', '.join(METHODS)}")
    return names


def _numbers(text: str) -> list[int]:
    try:
        return sorted({int(number) for number in text.split(",")}, reverse=True)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between") from None


def setting_of(asked: argparse.Namespace) -> Setting:
    """What is asked for, checked as far as that needs no checkpoint.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    check_evaluations(asked.evaluations, asked.steps)
    if asked.batch is not None and asked.batch < 1:
        raise ValueError(f"--batch {asked.batch} must be at least 1")
    model = demo_checkpoint() if asked.model == DEMO else asked.model
    is_demo = Path(model).exists() and Path(model).resolve() == Path(demo_checkpoint()).resolve()
    listed = prompts.chosen(asked.prompts, is_demo)
    return Setting(
        model=model,
        workload=DEMO if is_demo else Path(model).name,
        prompts=listed if asked.clips is None else listed.first(asked.clips),
        dtype=asked.dtype,
        device=asked.device,
        steps=asked.steps,
        guidance=asked.guidance,
        batch=asked.batch or (_DEMO_BATCH if is_demo else 1),
        schedule=asked.schedule,
    )


def _compare(asked: argparse.Namespace) -> None:
    setting = setting_of(asked)
    runs = Runs(setting, asked.work)
    runs.pipeline(FAST)  # a checkpoint that is none is refused here, from its headers
    run = setting.claim(asked.work)
    methods = [METHODS[name] for name in asked.methods]
    references: list[Wanted] = [
        (reference, setting.steps)
        for base, reference in REFERENCES.items()
        if base == FAST or any(method.base == base for method in methods)
    ]
    wanted = references + [(method, evaluations) for method in methods for evaluations in asked.evaluations]
    missing = runs.missing(wanted)
    if missing:
        tqdm.write(
            f"{len(missing)} batches of up to {setting.batch} clips to make, about {runs.hours(missing):.2f} hours, and"
            " more where a threshold is found by trying",
            file=sys.stderr,
        )
    runs.make(wanted)
    provenance = collect(setting.device)
    command = shlex.join(["python", "-m", "benchmarks.quality", asked.model, "--work", "FOLDER", *_options(asked)])
    rows = [row(runs, setting, one, run, command, provenance) for one in wanted]
    print(Skipping(rows).table([]))
    if asked.rows is not None:
        there = results.read(asked.rows) if asked.rows.exists() else []
        known = {(r.run, r.contender, r.extras.get("evaluations_asked")) for r in there}
        for one in rows:
            if (one.run, one.contender, one.extras["evaluations_asked"]) not in known:
                results.append(asked.rows, one)


def _options(asked: argparse.Namespace) -> list[str]:
    """What decides a row, as it is typed again."""
    options = ["--steps", str(asked.steps), "--dtype", asked.dtype, "--rows", "FILE"]
    options += [] if asked.schedule is None else ["--schedule", "FILE"]
    options += [] if asked.prompts is None else ["--prompts", asked.prompts]
    return options + ([] if asked.clips is None else ["--clips", str(asked.clips)])


def _plot(asked: argparse.Namespace) -> None:
    found = [series for series in results.latest(results.read(asked.rows)) if isinstance(series, Skipping)]
    if not found:
        raise RowError(f"{asked.rows}: there is no row of series {Skipping.name} in it")
    newest = max(found, key=lambda series: max(one.time for one in series.rows))
    write_whole(asked.out, newest.plot(found))
