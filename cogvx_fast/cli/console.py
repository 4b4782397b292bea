"""Where the command speaks: results to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console

from .interruption import raised_signals


class UsageError(Exception):
    """An argument that cannot work. Names the argument, its value (if it has one) and what is allowed."""

    def __init__(self, argument: str, value: object, allowed: str) -> None:
        super().__init__(f"{argument}: {allowed}" if value is None else f"{argument} {value}: {allowed}")
        self.argument, self.value, self.allowed = argument, value, allowed

    def renamed(self, argument: str) -> UsageError:
        """This error for a command that calls the argument by another name."""
        return UsageError(argument, self.value, self.allowed)


class OutputError(Exception):
    """A result that could not be made or written, though all looked fine at the start."""


class _Results(Console):
    """Says so when nothing can be written there, as on a full disk; a reader that has gone ends the command quietly."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:
            raise OutputError(f"standard output could not be written: {error.strerror}") from error


results = _Results()
messages = Console(stderr=True)


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print `text` as it is: brackets, colons and long paths in it are no markup and are not folded."""
    console.print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


@contextlib.contextmanager
def exit_codes(interrupted: str = "nothing was written", tell: Callable[[str], object] | None = None) -> Iterator[None]:
    """Turn what can end a command into one message and an exit status: usage 2, output 1, a signal 128 + its number.

    Args:
        interrupted: what to say of the work when Ctrl-C, SIGTERM or SIGHUP breaks it off.
        tell: says that, where standard error is not for people.
    """
    with raised_signals() as received:
        try:
            yield
        except BaseException as error:
            # After a signal whatever comes is its consequence: a library made another error of it, or a terminal that
            # was closed cannot be written to.
            if received or isinstance(error, KeyboardInterrupt):
                (tell or _say_while_it_is_heard)(f"interrupted; {interrupted}")
                raise typer.Exit(128 + (received[0] if received else signal.SIGINT)) from None
            if isinstance(error, UsageError | OutputError):
                say(messages, f"error: {error}", style="red")
                raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None
            raise


def _say_while_it_is_heard(text: str) -> None:
    try:
        say(messages, text, style="yellow")
        results.file.flush()
    except OSError:
        # What is left in buffers would fail again at the end of the process and change its exit status.
        silence = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(silence, number)
        os.close(silence)
