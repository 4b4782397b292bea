"""`cogvx-fast bench serve`: how long people wait for videos of a server, by how many of them come."""

from __future__ import annotations

import math
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from cogvx_fast.quiet import quiet_imports

from .bench_files import RESULTS, check_out
from .console import OutputError, UsageError, exit_codes, messages, results, say
from .generate import Precision

if TYPE_CHECKING:
    from cogvx_fast.bench.rows import Row
    from cogvx_fast.bench.serving_run import ServingPlan

_MOST_REQUESTS = 100_000


def serve(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="What the server that is started serves.", show_default="the demo"),
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Requests a second, with commas between them.", show_default="by --load")
    ] = None,
    load: Annotated[
        str, typer.Option(help="Instead of --rate: parts of what the baseline, or else the server, can make.")
    ] = "0.2,0.5,0.8,1,1.3",
    duration: Annotated[float, typer.Option(help="Seconds for which requests come at each rate.")] = 60.0,
    patience: Annotated[
        float | None,
        typer.Option(help="Seconds to wait after that for what is not answered yet.", show_default="as --duration"),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="A server that runs already: http://….", show_default="one is started")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="The key for that server.", envvar="COGVX_FAST_API_KEY", show_envvar=True, show_default=False
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="Program that is started as another server and takes turns: benchmarks/serving/baseline.py.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of each video.")] = "128x128",
    frames: Annotated[int, typer.Option(help="Frames of each video.")] = 17,
    steps: Annotated[int, typer.Option(help="Denoising steps of each video.")] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance of each video; 1 turns it off.")] = 6.0,
    seed: Annotated[int, typer.Option(help="Of the moments of the requests, and of the videos.")] = 0,
    dtype: Annotated[Precision | None, typer.Option(help="As in `serve`.", show_default="the model's own")] = None,
    device: Annotated[
        str | None, typer.Option(help="Device of the server that is started.", show_default="the best there is")
    ] = None,
    out: Annotated[Path, typer.Option(help="File that the rows are added to.")] = RESULTS / "serving.jsonl",
) -> None:
    """Measure how long people wait for videos of a server, at one rate of requests after the other.

    A row for each rate is added to a file. Requests come at random moments (Poisson), whether or not others are
    answered. With --baseline each rate is also asked of another server, at the same moments, and both must make the
    same frames first; it exits with status 1 if they do not.
    """
    with exit_codes("rows of the rates that were finished are kept"):
        rates = None if rate is None else _numbers("--rate", rate)
        loads = _numbers("--load", load)
        for argument, value in (("--duration", duration), ("--patience", patience)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(argument, value, "must be a number of seconds above 0")
        if rates is not None and max(rates) * duration > _MOST_REQUESTS:
            raise UsageError("--rate", rate, f"is more than {_MOST_REQUESTS:,} requests in {duration:g} s")
        if url is not None and not url.startswith(("http://", "https://")):
            raise UsageError("--url", repr(url), "must begin with http:// or https://")
        if url is not None and (baseline is not None or model is not None):
            other = "--baseline" if baseline is not None else "MODEL"
            raise UsageError(other, None, "cannot be combined with --url, whose server has its own model and machine")
        if baseline is not None and not os.path.isfile(baseline):
            raise UsageError("--baseline", repr(str(baseline)), "is no file")
        check_out(out)
        options: dict[str, object] = {
            "--rate": rate,
            "--load": None if rate else load,
            "--duration": f"{duration:g}",
            "--url": url,
        }
        options |= {"--baseline": baseline, "--size": size, "--frames": frames, "--steps": steps}
        options |= {"--guidance": f"{guidance:g}", "--seed": seed, "--dtype": dtype and dtype.value}
        words = ["cogvx-fast", "bench", "serve", *([] if model is None else [model])]
        words += [str(word) for option, value in options.items() if value is not None for word in (option, value)]
        from cogvx_fast.bench.serving_run import ServingPlan

        place = _place(model, dtype and dtype.value, device, url)
        plan = ServingPlan(
            *place,
            shlex.join(words),
            _fields(size, frames, steps, guidance),
            rates,
            loads,
            duration,
            duration if patience is None else patience,
            seed,
            None if url is None else url.rstrip("/").removesuffix("/v1"),
            key,
            baseline,
        )
        made = _run(plan, out)
        say(results, f"added {len(made)} rows to {out}")
        red = [row.contender for row in made if row.gate == "red"]
        if red:
            raise OutputError(f"the correctness gate is red, no latency is stated, for: {', '.join(red)}")


def _place(model: str | None, dtype: str | None, device: str | None, url: str | None) -> tuple[str, str, str]:
    """Model, dtype and device of servers that are started."""
    if url is not None:
        return "", dtype or "as served", "cpu"
    from . import loading, validate
    from .checkpoint import read_checkpoint

    source = validate.model_or_demo(model)
    checkpoint = read_checkpoint(source)
    chosen = loading.choose_device(device)
    return str(source), loading.choose_dtype(dtype, chosen, checkpoint), chosen


def _fields(size: str, frames: int, steps: int, guidance: float) -> dict[str, Any]:
    width, _, height = size.partition("x")
    # Python refuses to make a number of thousands of digits.
    if not (width.isdecimal() and height.isdecimal() and len(size) < 100):
        raise UsageError("--size", repr(size), "must be WIDTHxHEIGHT in pixels, such as 128x128")
    for argument, value in (("--frames", frames), ("--steps", steps)):
        if value < 1:
            raise UsageError(argument, value, "must be at least 1")
    if not math.isfinite(guidance):
        raise UsageError("--guidance", guidance, "must be a number")
    numbers = {"width": int(width), "height": int(height), "num_frames": frames, "num_inference_steps": steps}
    return {**numbers, "guidance_scale": guidance, "fps": 8}


def _numbers(argument: str, text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(math.isfinite(number) and number > 0 for number in found):
        raise UsageError(argument, repr(text), "must be numbers above 0 with commas between them")
    return sorted(set(found))


def _run(plan: ServingPlan, out: Path) -> list[Row]:
    from cogvx_fast.bench.results import append
    from cogvx_fast.bench.serving import Serving
    from cogvx_fast.bench.serving_clients import RequestError

    with quiet_imports():
        from cogvx_fast.bench.serving_run import run

    from . import loading

    with loading.quiet_libraries(), messages.status(Text("serving")) as status:

        def sink(row: Row) -> None:
            try:
                append(out, row)
            except OSError as error:
                raise OutputError(f"{out}: the row could not be added: {error}") from error
            say(results, f"{row.stage:<10} {row.contender:<10} {Serving.line(row)}")

        try:
            made = run(plan, sink, lambda text: status.update(Text(text)))
        except RequestError as error:
            raise OutputError(str(error)) from None
    for line in Serving(made).remarks():
        say(results, line)
    return made
