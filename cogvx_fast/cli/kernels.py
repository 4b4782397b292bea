"""`cogvx-fast kernels`: compile the GPU kernels without a GPU, and see what they need and what limits them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from .console import OutputError, UsageError, exit_codes, messages, results, say
from .generate import Precision
from .kernel_model import DIM, asked_checkpoint, inspected_model, model_of

if TYPE_CHECKING:
    from cogvx_kernels.aot import Compiled
    from cogvx_kernels.aot.farm import Job
    from cogvx_kernels.aot.models import Model
    from cogvx_kernels.inspect.inspection import Inspection

PAGE_TARGETS = "sm_80,sm_89,sm_90"
_INTERRUPTED = "what was compiled is kept and will not be compiled again"
_WIDE = 160  # characters, for tables
Result = TypeVar("Result")

app = typer.Typer(help="Compile the GPU kernels without a GPU, and see what limits them.", no_args_is_help=True)

Arch = Annotated[
    str, typer.Option("--arch", help="GPUs, with commas between them: sm_80 (A100), sm_89 (RTX 40), sm_90 (H100), ….")
]
CheckpointOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        help="Folder or Hub id of a CogVideoX in diffusers format; only its JSON files are read.",
        show_default="the demo checkpoint",
    ),
]
Jobs = Annotated[
    int | None, typer.Option("--jobs", help="How many processes compile.", show_default="one for each core")
]
Cache = Annotated[
    Path | None,
    typer.Option("--out", help="The cache's folder.", show_default="$TRITON_CACHE_DIR, else ~/.triton/cache"),
]
AsJson = Annotated[bool, typer.Option("--json", help="For machines: print JSON.")]


@app.command("inspect")
def inspect(
    arch: Arch = PAGE_TARGETS,
    kernel: Annotated[
        str | None, typer.Option(help="Kernels, with commas between them.", show_default="all of them")
    ] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option(help="Precision of what the kernels work on.", show_default="float16, or the checkpoint's"),
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(help="Width of the transformer, whose heads have 64.", show_default=f"{DIM}, CogVideoX-2b's"),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Instead of --dim: folder or Hub id of a checkpoint, at its own size.", show_default=False),
    ] = None,
    first: Annotated[bool, typer.Option("--first", help="Only the first configuration in each kernel's list.")] = False,
    jobs: Jobs = None,
    as_json: AsJson = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables in Markdown.")] = False,
    write: Annotated[
        Path | None, typer.Option(help="Rewrite the section between this page's markers.", show_default=False)
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            help="Write nothing; exit with status 1 if this page's section is out of date.", show_default=False
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw it, a .png.", show_default=False)] = None,
) -> None:
    """Show registers, spills, shared memory, and the cycles that each pipe needs for the inner loops.

    Everything is read from the machine code that Triton makes; nothing is timed.
    """
    with exit_codes(_INTERRUPTED):
        page = write or check
        text = _read_page(page) if page else ""
        _check_place("--write", write)
        targets = _targets(arch)
        _check_plot(plot, targets)
        model = inspected_model(checkpoint, dim, dtype)
        _check_tools(targets)
        from cogvx_kernels.aot import farm
        from cogvx_kernels.inspect import inspection, report

        wanted = farm.jobs(model, targets, _kernels(kernel, model), first)
        stamp = report.fingerprint(wanted) if page else ""
        if check:
            if report.stamp_of(text) != stamp:
                raise OutputError(f"{check} is out of date; run: cogvx-fast kernels inspect --write {check}")
            say(results, f"{check} is up to date")
            return
        found = _run(wanted, inspection.inspect, jobs, "inspecting")
        block = _block_kernels(model)
        if plot is not None:
            _write(plot, report.plot(found))
        if write is not None:
            section = f"{report.markdown(found)}\n\n{block}"
            _write(write, report.with_section(text, section, stamp).encode())
            say(results, f"wrote {write}: {len(found)} configurations")
        elif as_json:
            print(json.dumps(report.as_json(found), indent=1))
        elif as_markdown:
            print(f"{report.markdown(found)}\n\n{block}")
        else:
            _show(found)
            say(results, block)


@app.command("build")
def build(
    arch: Arch,
    checkpoint: CheckpointOption = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.", show_default="the model's")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.", show_default="the model's")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames.", show_default="the model's")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Precision.", show_default="the model's own")] = None,
    jobs: Jobs = None,
    out: Cache = None,
) -> None:
    """Compile every kernel that a checkpoint can need, into a cache that Triton finds on the GPU machine.

    What is in the cache already is not compiled again, so that an interrupted build goes on where it was.
    """
    with exit_codes(_INTERRUPTED):
        targets, cache = _targets(arch), _cache(out)
        model = model_of(*asked_checkpoint(checkpoint), height, width, frames, dtype)
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError("--out", repr(str(cache)), f"cannot be made: {error.strerror}") from None
        os.environ["TRITON_CACHE_DIR"] = str(cache.resolve())  # the processes that compile read it, too
        from cogvx_kernels.aot import farm, prebuilt

        _check_place("--out", cache / prebuilt.MANIFEST)
        entries = _run(farm.jobs(model, targets), prebuilt.entry, jobs, "compiling")
        made = prebuilt.Manifest.here(_version(), targets, [_described(model)], entries)
        with contextlib.suppress(prebuilt.ManifestError):
            made = made.merged(prebuilt.read(cache))
        _write(cache / prebuilt.MANIFEST, made.to_json().encode())
        say(results, f"{len(entries)} configurations for {', '.join(targets)} are in {cache}")
        say(results, f"on the GPU machine, at the same place: TRITON_CACHE_DIR={cache.resolve()}")


@app.command("check")
def check(
    out: Cache = None,
    relocate: Annotated[
        bool, typer.Option("--relocate", help="First mend the paths of a cache that was moved or copied.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """See whether Triton will find a cache that `build` made: same versions, nothing missing or damaged.

    Exits with status 1 if it will not find all of it.
    """
    with exit_codes("lists of files that were mended are kept"):
        cache = _cache(out)
        from cogvx_kernels.aot import prebuilt

        try:
            manifest = prebuilt.read(cache)
        except prebuilt.ManifestError as error:
            raise OutputError(str(error)) from None
        try:
            if relocate:
                for path, content in prebuilt.relocate(cache, manifest).items():
                    _write(path, content.encode())
            found = prebuilt.problems(cache, manifest, _version())
        except OSError as error:
            raise OutputError(f"{error.filename} cannot be read: {error.strerror}") from None
        if as_json:
            print(json.dumps({"cache": str(cache), "entries": len(manifest.entries), "problems": found}, indent=1))
        for problem in found:
            say(messages, problem, style="red")
        if found:
            raise OutputError(f"{cache}: {len(found)} problems; Triton would compile again what it does not find")
        if not as_json:
            say(results, f"{cache} is whole: {len(manifest.entries)} configurations for {', '.join(manifest.backends)}")


def _targets(arch: str) -> list[str]:
    _check_triton()
    from cogvx_kernels.targets import TARGETS

    names = [name.strip() for name in arch.split(",")]
    for name in names:
        if name not in TARGETS:
            raise UsageError("--arch", repr(name), f"is unknown; allowed: {', '.join(TARGETS)}")
    return list(dict.fromkeys(names))


def _check_triton() -> None:
    from cogvx_kernels import ops

    if (reason := ops.why_unavailable("attention", "triton")) is not None:
        raise OutputError(f"kernels cannot be compiled here: {reason}")
    with messages.status("loading torch and triton"):
        import cogvx_kernels.aot  # noqa: F401


def _check_tools(targets: list[str]) -> None:
    from cogvx_kernels.inspect import machine_code
    from cogvx_kernels.targets import TARGETS

    reason = machine_code.why_unavailable()
    if reason is not None and any(TARGETS[target].capability is not None for target in targets):
        raise OutputError(f"machine code cannot be read here: {reason}")


def _kernels(asked: str | None, model: Model) -> list[str] | None:
    from cogvx_kernels.aot import farm

    if asked is None:
        return None
    names, known = [name.strip() for name in asked.split(",")], farm.kernel_names(model)
    for name in names:
        if name not in known:
            raise UsageError("--kernel", repr(name), f"is not launched by this model; allowed: {', '.join(known)}")
    return names


def _block_kernels(model: Model) -> str:
    """What a block launches, in a sentence or two."""
    import torch

    from cogvx_fast import FastCogVideoXPipeline  # noqa: F401 - first, as it keeps the noise of imports away
    from cogvx_fast.attention import AttentionBackend
    from cogvx_fast.transformer.launches import MOST_KERNELS, block_kernels

    if model.dtype == "float32":
        return "In float32 attention is torch's own."
    of_model = (model.heads, model.head_dim, getattr(torch, model.dtype), model.rotary)
    names = block_kernels(*of_model)
    in_8_bits = block_kernels(*of_model, backend=AttentionBackend.TRITON_INT8, quantized=torch.int8)
    return (
        f"A transformer block launches {len(names)} kernels ({MOST_KERNELS} at most): {', '.join(names)}. In 8 bits"
        f" throughout it launches {len(in_8_bits)}: {', '.join(in_8_bits)}. The last is the next block's first norm."
    )


def _described(model: Model) -> dict[str, Any]:
    import dataclasses

    return json.loads(json.dumps(dataclasses.asdict(model)))  # as it is read back


def _version() -> str:
    from cogvx_fast import __version__

    return __version__


def _cache(out: Path | None) -> Path:
    return out or Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


def _run(wanted: list[Job], work: Callable[[Compiled], Result], jobs: int | None, what: str) -> list[Result]:
    """The result of each job, in their order, with a bar while they run."""
    from cogvx_kernels.aot import farm
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if jobs is not None and jobs < 1:
        raise UsageError("--jobs", jobs, "must be at least 1")
    made: dict[Job, Result] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=messages, transient=True) as progress:
        task = progress.add_task(what, total=len(wanted))
        try:
            for job, result in farm.run(wanted, work, jobs or len(os.sched_getaffinity(0))):
                made[job] = result
                progress.advance(task)
        except farm.CompileError as error:
            raise OutputError(f"does not compile: {error}") from None
    return [made[job] for job in wanted]


def _show(found: list[Inspection]) -> None:
    from cogvx_kernels.inspect import report
    from rich.console import Console
    from rich.table import Table

    # Columns that are cut off or folded say nothing: a narrow terminal folds the lines instead.
    wide = Console(file=results.file, width=max(results.width, _WIDE))
    for title, rows in (("Resources", report.resource_rows), ("Inner loops", report.loop_rows)):
        header, cells = rows(found)
        for name in dict.fromkeys(row[0] for row in cells):
            table = Table(*header[1:], title=f"{title} of {name}", title_justify="left")
            for row in cells:
                if row[0] == name:
                    table.add_row(*row[1:])
            wide.print(table)
    for note in dict.fromkeys(f"{one.target}: {one.note}" for one in found if one.note):
        say(results, note)


def _read_page(page: Path) -> str:
    from cogvx_kernels.inspect.report import with_section

    try:
        text = page.read_text(encoding="utf-8")
        with_section(text, "", "")  # refused before minutes of compiling
    except (OSError, ValueError) as error:
        raise UsageError("--write", repr(str(page)), getattr(error, "strerror", None) or str(error)) from None
    return text


def _check_place(argument: str, path: Path | None) -> None:
    """Refuse a place that cannot be written before minutes of compiling."""
    from cogvx_fast.files import try_place

    try:
        if path is not None:
            try_place(path)
    except OSError as error:
        raise UsageError(argument, repr(str(path)), f"cannot be written: {error.strerror}") from None


def _check_plot(path: Path | None, targets: list[str]) -> None:
    if path is None:
        return
    from cogvx_kernels.targets import TARGETS

    if all(TARGETS[target].rates is None for target in targets):
        raise UsageError("--plot", repr(str(path)), f"has nothing to show for {', '.join(targets)}: no pipes are known")
    if path.suffix != ".png":
        raise UsageError("--plot", repr(str(path)), "must end in .png")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("--plot", None, 'needs matplotlib: pip install "cogvx_fast[plots]"') from None
    _check_place("--plot", path)


def _write(path: Path, content: bytes) -> None:
    from cogvx_fast.files import write_whole

    try:
        write_whole(path, content)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror}") from error
