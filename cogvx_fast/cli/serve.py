"""`cogvx-fast serve`: a video server at an address; `cogvx-fast serve-key` makes keys for it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import ipaddress
import math
import os
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import degrees
from .console import UsageError, exit_codes, messages, results, say
from .generate import Precision

if TYPE_CHECKING:
    from cogvx_fast.serving.callbacks import Callbacks
    from cogvx_fast.serving.orders import Served
    from cogvx_fast.serving.settings import Settings

_NEEDED = ("fastapi", "uvicorn", "sqlalchemy", "fsspec", "python_multipart", "prometheus_client")
_GIB = 2**30


def serve(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Folders or Hub ids of CogVideoX in diffusers format; a request that names none gets the first.",
            show_default="the demo",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.")] = 8000,
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="The name that requests call a model by; once for each model.",
            show_default="a folder's own, or the id",
        ),
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="Where jobs and videos are kept, unless --store and --files say otherwise.")
    ] = Path("cogvx-fast-server"),
    store: Annotated[
        str | None, typer.Option(help="Database of the jobs: sqlite:///PATH or postgresql://….", show_default=False)
    ] = None,
    files: Annotated[
        str | None, typer.Option(help="Where the videos are kept: a folder or a URL of fsspec.", show_default=False)
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="Where a worker runs: cpu, cuda:0, or cuda:0,cuda:1 for one that makes each video on both; once for"
            " each worker. Models get them in turn.",
            show_default="every GPU, or the CPU",
        ),
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option(help="How workers with several devices share out a video, as in `generate`.", show_default="auto"),
    ] = None,
    engine: Annotated[str | None, typer.Option(help="As in `generate`.", show_default="exact")] = None,
    memory_limit: Annotated[str | None, typer.Option(help="As in `generate`.", show_default=False)] = None,
    dtype: Annotated[Precision | None, typer.Option(help="As in `generate`.", show_default="the model's own")] = None,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(help="File of the keys that may ask, made by `cogvx-fast serve-key`.", show_default=False),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let everybody who reaches --host ask, without a key.")
    ] = False,
    callback_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A host that `callback_url` may name: HOST or https://HOST:PORT; may be repeated.", show_default=False
        ),
    ] = None,
    callback_secret_file: Annotated[
        Path | None,
        typer.Option(
            help="File of the secret that webhooks are signed with; made on first use.", show_default="in --folder"
        ),
    ] = None,
    max_queue: Annotated[int, typer.Option(help="The most unfinished jobs of one key.")] = 100,
    max_work: Annotated[
        int | None, typer.Option(help="The most work of one job: width x height x frames x steps.", show_default=False)
    ] = None,
    keep_days: Annotated[float, typer.Option(help="Days after which videos are removed.")] = 7.0,
    keep_gib: Annotated[float, typer.Option(help="The most GiB of all videos; the oldest go first.")] = 50.0,
    checkpoint_seconds: Annotated[float, typer.Option(help="Seconds between two checkpoints of a job.")] = 30.0,
    lease_seconds: Annotated[float, typer.Option(help="Seconds after which a silent worker counts as dead.")] = 30.0,
    embedded_in: Annotated[
        list[str] | None,
        typer.Option(help="A web site that may show the page in a frame: https://huggingface.co.", show_default="none"),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser when it is ready.")] = False,
) -> None:
    """Serve videos over HTTP, as OpenAI's Videos API does, and more; with a page to make and look at them.

    Jobs survive the server: they are in a database before a request is answered, and go on after a restart.
    """
    with exit_codes("jobs go on at the next start", _tell):
        _check_installed()
        from . import validate

        if not 0 <= port <= 65535:
            raise UsageError("--port", port, "must be 0 to 65535")
        _check_exposed(host, api_keys_file, insecure)
        from cogvx_fast.serving.context import MOST_DAYS, MOST_GIB, MOST_SECONDS, Context, Limits
        from cogvx_fast.serving.files import Files
        from cogvx_fast.serving.keys import Keys
        from cogvx_fast.serving.logs import logger, set_up
        from cogvx_fast.serving.models import Models, check_names, dealt, default_name
        from cogvx_fast.serving.orders import Served
        from cogvx_fast.serving.server import open_socket, serve
        from cogvx_fast.serving.settings import Settings
        from cogvx_fast.serving.store import Store
        from cogvx_fast.serving.ui import is_origin

        _check_range("--max-queue", max_queue, 1)
        _check_range("--max-work", 1 if max_work is None else max_work, 1)
        _check_range("--checkpoint-seconds", checkpoint_seconds, 0, MOST_SECONDS)
        _check_range("--lease-seconds", lease_seconds, 1, MOST_SECONDS)
        _check_range("--keep-days", keep_days, 0, MOST_DAYS)
        _check_range("--keep-gib", keep_gib, 0, MOST_GIB)

        for site in embedded_in or []:
            if not is_origin(site):
                raise UsageError(
                    "--embedded-in", repr(site), "must be a web site's address such as https://example.org"
                )
        sources = model or [validate.model_or_demo(None)]
        names = name or list(map(default_name, sources))
        check_names(names, len(sources), "--name")
        devices = dealt(_devices(device), len(sources), "--device")
        served = [
            Served.of(source, called, engine, memory_limit, dtype and dtype.value, of_model[0].split(",")[0])
            for source, called, of_model in zip(sources, names, devices, strict=True)
        ]
        _check_parallel(parallel, served, devices)
        limits = Limits(queued=max_queue, work=max_work, max_age=keep_days * 86400, max_bytes=int(keep_gib * _GIB))
        settings = [
            Settings(
                model=source,
                name=one.name,
                store=store or f"sqlite:///{folder.absolute() / 'jobs.sqlite'}",
                files=files or str(folder.absolute() / "videos"),
                dtype=one.dtype,
                engine=engine,
                memory_limit=memory_limit,
                parallel=parallel,
                checkpoint_seconds=checkpoint_seconds,
                lease_seconds=lease_seconds,
            )
            for source, one in zip(sources, served, strict=True)
        ]
        callbacks = _callbacks(callback_host, callback_secret_file, folder)
        try:
            keys = None if api_keys_file is None else Keys(api_keys_file)
            if store is None:
                folder.mkdir(parents=True, exist_ok=True)
            place = settings[0]
            context = Context(
                Models(served),
                Store(place.store),
                Files(place.files, limits.least_free),
                keys,
                limits,
                place,
                callbacks,
                tuple(embedded_in or ()),
                own_names_only=keys is None and not insecure,
            )
        except ValueError as error:
            raise UsageError("serve", None, str(error)) from None
        except OSError as error:
            raise UsageError("--folder", repr(str(folder)), f"cannot be written ({error.strerror})") from None
        try:
            listening = open_socket(host, port)
        except OSError as error:
            raise UsageError("--port", port, f"cannot listen at {host} ({error.strerror})") from None
        set_up()
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        for unserved, count in context.unserved().items():
            logger.warning("%d job(s) wait for model %r, which is not served: they go on when it is", count, unserved)
        on = "; ".join(f"model {one.name!r}, {', '.join(there)}" for one, there in zip(served, devices, strict=True))
        say(results, f"{address}  ({on}; loading)")
        results.file.flush()

        def ready() -> None:
            say(results, f"ready: {address}/v1/videos, page at {address}/, documentation at {address}/docs")
            results.file.flush()
            if open_page and not _open(f"{address}/"):
                say(messages, f"no browser opens here; the page is at {address}/")

        serve(context, _workers(settings, devices), listening, ready)


def _tell(text: str) -> None:
    """In the log, where that has begun."""
    from cogvx_fast.serving import logs

    if logs.is_set_up():
        logs.logger.info(text)
    else:
        say(messages, text, style="yellow")


def _open(address: str) -> bool:
    """Show a page in a browser, and whether there is one. None that would take over this terminal."""
    has_screen = sys.platform != "linux" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    return (has_screen or "BROWSER" in os.environ) and webbrowser.open(address)


def _workers(settings: Sequence[Settings], devices: Sequence[Sequence[str]]) -> list[Settings]:
    """Of each worker of each model: those of a CPU share its threads."""
    import torch

    processes = [device for of_model in devices for worker in of_model for device in worker.split(",")]
    threads = max(1, torch.get_num_threads() // max(1, processes.count("cpu")))
    return [
        dataclasses.replace(one, device=device, threads=threads)
        for one, of_model in zip(settings, devices, strict=True)
        for device in of_model
    ]


def _devices(asked: list[str] | None) -> list[str]:
    from . import loading

    if asked:
        return [_together(worker) for worker in asked]
    import torch

    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or [loading.choose_device(None)]


def _together(worker: str) -> str:
    """The devices of one worker, with commas between."""
    from . import loading

    devices = [loading.choose_device(device.strip()) for device in worker.split(",")]
    if len(devices) > 1:
        if len({device.partition(":")[0] for device in devices}) > 1:
            raise UsageError("--device", repr(worker), "must be devices of one kind")
        twice = next((device for device in devices if device != "cpu" and devices.count(device) > 1), None)
        if twice is not None or "cuda" in devices:
            raise UsageError("--device", repr(worker), "must name each GPU once, by its number: cuda:0,cuda:1")
    return ",".join(devices)


def _check_parallel(asked: str | None, served: Sequence[Served], devices: Sequence[Sequence[str]]) -> None:
    """Raise a UsageError for degrees that the devices of a worker, or a model, cannot be split by."""
    sizes = {
        (len(worker.split(",")), one.checkpoint.variant.num_attention_heads)
        for one, of_model in zip(served, devices, strict=True)
        for worker in of_model
    }
    several = [(size, heads) for size, heads in sizes if size > 1]
    if asked is not None and not several:
        words = "has no effect on workers with one device; name several with commas: --device cuda:0,cuda:1"
        raise UsageError("--parallel", repr(asked), words)
    for size, heads in several:
        degrees.parse(asked, size, heads)


def _check_installed() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError("serve", None, f"needs {', '.join(missing)}: pip install 'cogvx_fast[serve]'")


def _check_exposed(host: str, keys: Path | None, insecure: bool) -> None:
    """Others than this machine's own programs reach a server only by keys, or by somebody's express wish."""
    if keys is not None or insecure:
        return
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    if host != "localhost":
        raise UsageError(
            "--host",
            repr(host),
            "lets other machines in; give --api-keys-file, or --insecure if everybody there may use the server",
        )


def _callbacks(hosts: list[str] | None, secret_file: Path | None, folder: Path) -> Callbacks | None:
    from cogvx_fast.serving.callbacks import Callbacks, places, secret_in

    if not hosts:
        if secret_file is not None:
            raise UsageError("--callback-secret-file", repr(str(secret_file)), "has no effect without --callback-host")
        return None
    for host in hosts:
        try:
            places(host)
        except ValueError as error:
            raise UsageError("--callback-host", None, str(error)) from None
    path = secret_file or folder / "callback-secret"
    try:
        return Callbacks(hosts, secret_in(path))
    except ValueError as error:
        raise UsageError("--callback-secret-file", None, str(error)) from None
    except OSError as error:
        reason = f"cannot be read or written ({error.strerror})"
        raise UsageError("--callback-secret-file", repr(str(path)), reason) from None


def _check_range(argument: str, value: float, least: float, most: float = math.inf) -> None:
    if not least <= value <= most:  # written so that NaN fails
        what = f"at least {least:g}" if most == math.inf else f"{least:g} to {most:g}"
        raise UsageError(argument, value, f"must be {what}")


def serve_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is; videos belong to this name.")],
    api_keys_file: Annotated[Path, typer.Option(help="The file that `serve` is given.")] = Path("keys.txt"),
    max_priority: Annotated[int, typer.Option(help="The highest priority that its requests may ask for.")] = 0,
) -> None:
    """Make a key for a server, print it, and keep its hash. To revoke it, take its line out of the file."""
    with exit_codes():
        _check_installed()
        from cogvx_fast.serving.keys import PRIORITIES, add_key

        if max_priority not in PRIORITIES:
            raise UsageError("--max-priority", max_priority, f"must be {PRIORITIES[0]} to {PRIORITIES[-1]}")
        try:
            key = add_key(api_keys_file, name, max_priority)
        except ValueError as error:
            raise UsageError("NAME", repr(name), str(error)) from None
        except OSError as error:
            raise UsageError(
                "--api-keys-file", repr(str(api_keys_file)), f"cannot be written ({error.strerror})"
            ) from None
        say(messages, "the key is shown once:")
        say(results, key)
