"""The models of a server: their names, which of them a request means, and which devices make whose videos."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cogvx_fast.cli.console import UsageError

from .orders import Order, Served


class Models:
    """The models of a server, at least one. A request that names none means the first."""

    def __init__(self, served: Sequence[Served]) -> None:
        self._served = {model.name: model for model in served}
        self.first = served[0]

    def __iter__(self) -> Iterator[Served]:
        return iter(self._served.values())

    def __contains__(self, name: str) -> bool:
        return name in self._served

    @property
    def names(self) -> list[str]:
        return list(self._served)

    def meant(self, asked: Mapping[str, Any]) -> Served:
        """The model that a request means.

        Raises:
            UsageError: if it is not served here.
        """
        name = asked.get("model", self.first.name)
        if name not in self:
            raise UsageError("model", repr(name), f"is not served here; must be {' or '.join(map(repr, self.names))}")
        return self._served[name]

    def order(self, asked: Mapping[str, Any]) -> Order:
        """The order of a request, as `Served.order`.

        Raises:
            UsageError: of a parameter of the request that cannot work.
        """
        return self.meant(asked).order(asked)


def default_name(source: str) -> str:
    """The name by which a model is known if nobody says otherwise."""
    return Path(source).name if os.path.isdir(source) else source


def check_names(names: Sequence[str], models: int, argument: str) -> None:
    """Raise a UsageError for names that are no names, or that do not tell `models` models apart."""
    if len(names) != models:
        raise UsageError(argument, ", ".join(map(repr, names)), f"must be given once for each of {models} model(s)")
    for name in names:
        if not name.strip():
            raise UsageError(argument, repr(name), "must not be empty")
        if names.count(name) > 1:
            raise UsageError(argument, repr(name), f"is the name of two models; give {argument} once for each")


def dealt(devices: Sequence[str], models: int, argument: str) -> list[list[str]]:
    """The devices of each model, a worker on each of them.

    They are dealt in turn: the first device to the first model, the second to the second, and after the last model to
    the first again. A CPU takes several models, so it goes to all for which nothing is left.

    Raises:
        UsageError: if there are too few, as a GPU that is named once takes one model.
    """
    hands: list[list[str]] = [[] for _ in range(models)]
    for device, hand in zip(devices, itertools.cycle(hands), strict=False):
        hand.append(device)
    if not all(hands):
        if "cpu" not in devices:
            raise UsageError(
                argument,
                ", ".join(devices),
                f"are too few for {models} models, of which each needs one; name more, or cpu, or a GPU once for each"
                " model that it has the memory for",
            )
        hands = [hand or ["cpu"] for hand in hands]
    return hands
