"""Where the command speaks: results to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console

results = Console()
messages = Console(stderr=True)


class UsageError(Exception):
    """An argument that cannot work. Names the argument, its value (if it has one) and what is allowed."""

    def __init__(self, argument: str, value: object, allowed: str) -> None:
        super().__init__(f"{argument}: {allowed}" if value is None else f"{argument} {value}: {allowed}")
        self.argument, self.value, self.allowed = argument, value, allowed

    def renamed(self, argument: str) -> UsageError:
        """The same of an argument that another command calls by another name."""
        return UsageError(argument, self.value, self.allowed)


class OutputError(Exception):
    """A result that could not be made or written, though all looked fine at the start."""


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print `text` as it is: brackets, colons and long paths in it are no markup and are not folded."""
    console.print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turn the errors a user can cause into one message and an exit status: usage 2, output 1, Ctrl-C 130."""
    try:
        yield
    except UsageError as error:
        say(messages, f"error: {error}", style="red")
        raise typer.Exit(2) from None
    except OutputError as error:
        say(messages, f"error: {error}", style="red")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        say(messages, "interrupted; videos that were finished are kept, nothing partial is left", style="yellow")
        raise typer.Exit(130) from None
