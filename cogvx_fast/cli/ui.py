"""`cogvx-fast ui`: the page of a server for whoever sits at this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .serve import serve


def ui(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Folder or Hub id of a CogVideoX in diffusers format.", show_default="the demo"
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Port to listen at, on this machine alone; 0 takes a free one.")] = 0,
    folder: Annotated[Path, typer.Option(help="Where jobs and videos are kept.")] = Path("cogvx-fast-server"),
    device: Annotated[
        list[str] | None,
        typer.Option(help="As in `serve`: cpu, cuda:0.", show_default="every GPU, or the CPU"),
    ] = None,
    engine: Annotated[str | None, typer.Option(help="As in `generate`.", show_default="exact")] = None,
    memory_limit: Annotated[str | None, typer.Option(help="As in `generate`.", show_default=False)] = None,
) -> None:
    """Open a page to make and look at videos, in the browser. It is `serve --open` at a free port."""
    serve(
        None if model is None else [model],
        port=port,
        folder=folder,
        device=device,
        engine=engine,
        memory_limit=memory_limit,
        open_page=True,
    )
