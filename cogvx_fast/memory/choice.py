"""Chooses, of the ways to run a generation, the most exact that a memory limit allows. Knows predictions only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from ..config import EngineConfig
from ..plan import UNLIMITED, EnginePlan, Offload
from ..quantization.recipes import Target
from ..vae.chunks import size_in_words
from ..vae.slicing import BudgetError
from .demand import Demand, Predictor
from .options import Option, offload_of, options, same_precision
from .request import Request
from .room import most
from .weights import Models

# Everything else of a generation decided, where these are.
PlanOf = Callable[[Option], EnginePlan]
NOT_PLANNED = "offloading finer than whole models, turned on by hand, is not planned"


class LimitError(ValueError):
    """No way of running a generation fits into the memory limit.

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
        """This error, which also says what else would fit."""
        return LimitError(self.limit, self.what, self.smallest, num_frames, other)


def fit(
    config: EngineConfig,
    models: Models,
    request: Request,
    target: Target,
    dtype: torch.dtype,
    plan_of: PlanOf,
    what: str = "",
) -> EnginePlan:
    """The plan of what makes `request` with models whose precision is open, as far as `config` leaves it so.

    Args:
        models: which need not be loaded.
        target: where they will run, in `dtype`; `plan_of` plans for the same.
        what: is made, in words; its size where that is left out.

    Raises:
        LimitError: if nothing fits, with what would.
        ValueError: for an autoencoder whose frames nobody can plan.
    """
    left = list(options(config, target, dtype, models.recipe, models.text_scheme))
    others = [] if config.tier is None else _of_any_precision(config, models, target, dtype)
    return choose(_limit(config), left, plan_of, Predictor(models, request), what, others)


def fit_new(
    config: EngineConfig, models: Models, request: Request, target: Target, dtype: torch.dtype, plan_of: PlanOf
) -> EnginePlan:
    """The plan of a pipeline that is being made, or of a checkpoint before it is loaded, by the size that it makes.

    Where that does not fit, by as many of its frames as do, or by one: a generation of more is refused when it is asked
    for.

    Args: as `fit`.

    Raises:
        LimitError: if nothing fits, not one frame.
        ValueError: for an autoencoder whose frames nobody can plan.
    """
    try:
        return fit(config, models, request, target, dtype, plan_of, "the model's own size")
    except LimitError as error:
        fewer = request.of_frames(error.num_frames) if error.num_frames else request.least
        what = f"{fewer}, as the model's own {request.num_frames} do not fit"
        with contextlib.suppress(LimitError):
            return fit(config, models, fewer, target, dtype, plan_of, what)
        raise


def fit_generation(
    config: EngineConfig, models: Models, request: Request, target: Target, dtype: torch.dtype, plan_of: PlanOf
) -> EnginePlan:
    """The plan of one generation: precision is as it was chosen when the pipeline was made, and `models` have it.

    Offloading that was turned on by hand stays; finer than whole models it is known to no prediction: then there is no
    choice, and the plan says so.

    Args, raises: as `fit`.
    """
    left = list(same_precision(config, target, models.recipe, models.text_scheme))
    offload = offload_of(models)
    if offload is not Offload.NONE:
        left = [replace(left[0], offload=offload)]
    if offload is Offload.BY_HAND:
        return replace(plan_of(left[0]), memory_limit=_limit(config), memory=NOT_PLANNED)
    others = _of_any_precision(config, models, target, dtype)
    return choose(_limit(config), left, plan_of, Predictor(models, request), others=others)


def choose(
    limit: int,
    left: Sequence[Option],
    plan_of: PlanOf,
    predictor: Predictor,
    what: str = "",
    others: Iterable[Option] = (),
) -> EnginePlan:
    """The plan of the first option that fits, with its budget for frames, `memory_limit` and `memory`.

    Args:
        left: what is open, the most exact first.
        what: is made, in words; its size where that is left out.
        others: of which a refusal names the first that would fit.

    Raises:
        LimitError: if none does; with how many frames it would.
    """
    try:
        return _first_that_fits(limit, left, plan_of, predictor, what)
    except LimitError as error:
        refusal = error
    request, other = predictor.request, None
    for option in others:
        with contextlib.suppress(LimitError):
            _first_that_fits(limit, [option], plan_of, predictor)
            other = option
            break
    period = predictor.models.variant.frame_period

    def fits(periods: int) -> bool:
        fewer = request.of_frames((periods - 1) * period + 1)
        try:
            _first_that_fits(limit, left, plan_of, replace(predictor, request=fewer))
        except LimitError:
            return False
        return True

    periods = most((request.num_frames + period - 2) // period, fits)
    raise refusal.with_advice((periods - 1) * period + 1 if periods else 0, other)


def _first_that_fits(
    limit: int, left: Iterable[Option], plan_of: PlanOf, predictor: Predictor, what: str = ""
) -> EnginePlan:
    """As `choose`, whose refusal gives advice."""
    rejected: list[tuple[Option, Demand]] = []
    for option in left:
        asked = plan_of(option)
        plan, demand = _with_frames_fitted(asked, predictor, limit)
        if demand.peak <= limit:
            words = f"{size_in_words(limit)} for {what or predictor.request}: {option}"
            if plan.vae.budget != asked.vae.budget:
                words += f", frames within {size_in_words(plan.vae.budget)}"
            words += f": predicted {demand.parts()}{_rejected_in_words(option, rejected)}"
            return replace(plan, memory_limit=limit, memory=words)
        rejected.append((option, demand))
    where = f"{str(plan.dtype).removeprefix('torch.')} on {plan.device}"
    raise LimitError(limit, f"{predictor.request} in {where}", min(rejected, key=lambda pair: pair[1].peak))


def _with_frames_fitted(plan: EnginePlan, predictor: Predictor, limit: int) -> tuple[EnginePlan, Demand]:
    """`plan` with as much for the autoencoder's frames as `limit` leaves, where that is less than costs no time.

    A budget that the user gave stays. Where even the smallest does not fit, the demand has that.
    """
    demand = predictor.demand(plan)
    room = max(1, demand.room_for_frames(limit))
    if demand.peak <= limit or plan.vae.budget != UNLIMITED or max(demand.encode, demand.decode) <= room:
        return plan, demand
    within = replace(plan, vae=replace(plan.vae, budget=room))
    try:
        return within, predictor.demand(within)
    except BudgetError as error:
        return plan, replace(demand, encode=min(demand.encode, error.smallest), decode=error.smallest)


def _rejected_in_words(chosen: Option, rejected: Iterable[tuple[Option, Demand]]) -> str:
    """What the options before take at least, by precision: the rest that there was of one was tried, too."""
    least: dict[tuple[str, str], tuple[Option, Demand]] = {}
    for option, demand in rejected:
        key = option.recipe.name, option.text_encoder
        if key not in least or demand.peak < least[key][1].peak:
            least[key] = option, demand
    least.pop((chosen.recipe.name, chosen.text_encoder), None)
    return "".join(f"; not {option}: {size_in_words(demand.peak)}" for option, demand in least.values())


def _limit(config: EngineConfig) -> int:
    if not isinstance(config.memory_limit, int):
        raise ValueError(f"EngineConfig.memory_limit={config.memory_limit!r} must be set: there is nothing to fit into")
    return config.memory_limit


def _of_any_precision(config: EngineConfig, models: Models, target: Target, dtype: torch.dtype) -> Iterable[Option]:
    """What would be tried if the precision were left open, when the pipeline is made."""
    left_open = replace(config, tier=None, recipe=None, text_encoder="auto", speed=2.0, schedule=None)
    return options(left_open, target, dtype, models.recipe, models.text_scheme)
