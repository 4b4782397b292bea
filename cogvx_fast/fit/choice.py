"""Chooses, of the ways to run a generation, the most exact that a memory limit allows. Knows predictions only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..config import EngineConfig
from ..quantization.recipes import BALANCED, NATIVE, RECIPES, Recipe, Scheme, Target, best, why_not
from ..vae.memory import BudgetError, size_in_words
from .demand import Demand, Option

# By the PSNR of the demo checkpoint's videos against exact: `tools.demo_model.recipes`, where fp8 is emulated.
BY_QUALITY = (Scheme.INT8_WEIGHT, Scheme.INT8, Scheme.FP8_WEIGHT, Scheme.FP8)


@dataclass(frozen=True)
class Choice:
    """
    Attributes:
        demand: of the option; `decode` and `encode` within `vae_memory`.
        vae_memory: the budget of the autoencoder's frames; None: they take what costs no time.
        rejected: the options before it, with what each takes at least.
    """

    option: Option
    demand: Demand
    vae_memory: int | None
    rejected: tuple[tuple[Option, Demand], ...]

    def __str__(self) -> str:
        frames = "" if self.vae_memory is None else f", frames within {size_in_words(self.vae_memory)}"
        text = f"{self.option}{frames}: predicted {self.demand.parts()}"
        # The first of each precision says enough: what else there is of it was tried, too.
        least: dict[tuple, tuple[Option, Demand]] = {}
        for option, demand in self.rejected:
            key = option.recipe, option.text_encoder
            if key not in least or demand.peak < least[key][1].peak:
                least[key] = option, demand
        least.pop((self.option.recipe, self.option.text_encoder), None)
        return text + "".join(f"; not {option}: {size_in_words(d.peak)}" for option, d in least.values())


class LimitError(ValueError):
    """Nothing fits.

    Attributes:
        smallest: the option that takes least, and what that is.
        num_frames: the most frames of this size that do fit; 0 for none, or where that was not looked for.
    """

    def __init__(
        self, limit: int, what: str, smallest: tuple[Option, Demand], num_frames: int = 0, other: Option | None = None
    ):
        option, demand = smallest
        fits = [f"a pipeline of another precision: {other}"] if other is not None else []
        fits += [f"{num_frames} frames of this size"] if num_frames else []
        super().__init__(
            f"memory_limit={size_in_words(limit)} is too small for {what}: the smallest possible is"
            f" {size_in_words(demand.peak)} ({demand.peak} bytes), with {option}: {demand.parts()}; what fits: that"
            f" limit, or {', or '.join(fits or ['fewer frames or pixels'])}"
        )
        self.limit, self.what, self.smallest, self.num_frames = limit, what, smallest, num_frames

    def with_advice(self, num_frames: int, other: Option | None) -> LimitError:
        """The same, saying what else would fit."""
        return LimitError(self.limit, self.what, self.smallest, num_frames, other)


def choose(
    limit: int,
    options: Sequence[Option],
    demand_of: Callable[[Option], Demand],
    frames_within: Callable[[int], tuple[int, int]] | None,
    what: str,
) -> Choice:
    """The first of `options` that fits.

    Args:
        demand_of: with the frames as they would be without a limit.
        frames_within: the peaks of encoding and decoding within a budget, or a `BudgetError`; None: they stay.
        what: is made, and where, in words.

    Raises:
        LimitError: if none does.
    """
    rejected = []
    for option in options:
        demand, vae_memory = demand_of(option), None
        if demand.peak > limit and frames_within is not None:
            room = demand.room_for_frames(limit)
            demand, vae_memory = _within(demand, room, frames_within)
        if demand.peak <= limit:
            return Choice(option, demand, vae_memory, tuple(rejected))
        rejected.append((option, demand))
    raise LimitError(limit, what, min(rejected, key=lambda pair: pair[1].peak))


def _within(demand: Demand, room: int, frames_within: Callable[[int], tuple[int, int]]) -> tuple[Demand, int | None]:
    """`demand` with frames in `room`, or where that is too little in the smallest possible."""
    if max(demand.encode, demand.decode) <= room:
        return demand, None
    try:
        encode, decode = frames_within(max(1, room))
        return replace(demand, encode=encode, decode=decode), room
    except BudgetError as error:
        return replace(demand, encode=min(demand.encode, error.smallest), decode=error.smallest), None


def options(
    config: EngineConfig,
    target: Target,
    dtype: torch.dtype,
    quantized: Recipe | None = None,
    quantized_text: Scheme | None = None,
    may_offload: bool | None = None,
) -> Iterator[Option]:
    """What `config` leaves open on `target`, the most exact first, and of what is equally exact the fastest.

    Args:
        quantized, quantized_text: what the transformer and the text encoder are quantized by already.
        may_offload: None: where there is a host to go to, that is on a GPU. On a CPU nothing leaves: where else to?
    """
    may_offload = target.device != "cpu" if may_offload is None else may_offload
    for recipe, schemes in _precisions(config, target, dtype, quantized):
        for scheme in schemes if quantized_text is None else [quantized_text]:
            yield from variants(config, target, recipe, scheme, may_offload)


def variants(
    config: EngineConfig, target: Target, recipe: Recipe | None, scheme: Scheme | None, may_offload: bool
) -> Iterator[Option]:
    """The options of one precision, the fastest first."""
    yield Option(recipe, scheme, packs=config.pack_weights)
    if target.device == "cpu" and config.pack_weights and recipe is None:
        yield Option(recipe, scheme, packs=False)
    if may_offload:
        yield Option(recipe, scheme, offloads=True, packs=config.pack_weights)


def _precisions(
    config: EngineConfig, target: Target, dtype: torch.dtype, quantized: Recipe | None
) -> Iterator[tuple[Recipe | None, list[Scheme | None]]]:
    """Recipes, and with each the schemes of the text encoder."""
    by_quality = [RECIPES[name] for name in BY_QUALITY if why_not(RECIPES[name], target, dtype) is None]
    named = None if config.text_encoder == "auto" else config.text_encoder
    schemes = None if named is None else [None if named == "native" else Scheme(named)]
    if quantized is not None:
        yield quantized, schemes or [None, quantized.text_encoder]
    elif config.tier == "exact":
        yield None, [None]
    elif config.recipe == NATIVE:
        yield None, schemes or [None]
    elif config.recipe == BALANCED:
        first = best(target, dtype)
        for recipe in [first, *(r for r in by_quality if r is not first)]:
            yield recipe, schemes or [None if recipe is None else recipe.text_encoder]
    elif config.recipe is not None:
        recipe = RECIPES[config.recipe]
        yield recipe, schemes or [recipe.text_encoder]
    else:
        yield None, schemes or [None, Scheme.INT8_WEIGHT]
        for recipe in by_quality:
            yield recipe, schemes or [None, recipe.text_encoder]
