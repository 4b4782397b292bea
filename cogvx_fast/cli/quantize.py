"""`cogvx-fast quantize`: write a checkpoint with 8-bit weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from cogvx_fast.quiet import quiet_imports

from .console import OutputError, UsageError, exit_codes, messages, results, say
from .generate import Precision


def quantize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a CogVideoX in diffusers format.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that the quantized checkpoint goes to.")],
    recipe: Annotated[str, typer.Option(help="How weights are stored: int8, int8-weight, fp8 or fp8-weight.")] = "int8",
    text_encoder: Annotated[
        str,
        typer.Option(
            help="The text encoder: auto (as the recipe has it), native (as it is), int8-weight or fp8-weight."
        ),
    ] = "auto",
    dtype: Annotated[
        Precision | None,
        typer.Option(help="Precision of what is not quantized.", show_default="what the model is stored in"),
    ] = None,
) -> None:
    """Quantize a checkpoint, shard by shard; an interrupted run goes on where it was.

    Use the folder like any other: generate --model OUT --engine balanced.
    """
    with exit_codes("files that were finished are kept; the same command goes on with the others"):
        from cogvx_fast.quantization import RECIPES, TEXT_ENCODER_SCHEMES

        from .checkpoint import within

        for argument, value, allowed in (
            ("--recipe", recipe, tuple(RECIPES)),
            ("--text-encoder", text_encoder, ("auto", "native", *map(str, TEXT_ENCODER_SCHEMES))),
        ):
            if value not in allowed:
                raise UsageError(argument, repr(value), f"is unknown; allowed: {', '.join(allowed)}")
        if not os.path.isdir(model):  # which takes a name that is too long for one that is not there
            raise UsageError("MODEL", repr(str(model)), "no such folder; must be a checkpoint in diffusers format")
        with messages.status("loading torch and torchao") as status:
            with quiet_imports():
                from cogvx_fast.quantization.convert import OutError, quantize_checkpoint

            try:
                manifest = quantize_checkpoint(
                    model,
                    out,
                    recipe,
                    text_encoder,
                    None if dtype is None else dtype.value,
                    tell=lambda text: status.update(Text(f"quantizing: {text}")),
                )
            except OutError as error:
                raise UsageError("OUT", repr(str(out)), str(error)) from None
            except ValueError as error:
                raise UsageError("MODEL", repr(str(model)), within(model, error)) from None
            except OSError as error:
                raise OutputError(f"{out} could not be written: {error.filename}: {error.strerror}") from error
        size = sum(file.size for file in manifest.files.values())
        say(results, f"wrote {out}: {len(manifest.files)} files, {size / 1e6:,.1f} MB ({recipe} in {manifest.dtype})")
