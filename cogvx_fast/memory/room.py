"""Whether a generation fits into the memory that is free, before anything is loaded, and what fits if it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..plan import EnginePlan
from ..vae.chunks import size_in_words
from .demand import Predictor
from .request import Request


class RoomError(ValueError):
    """A generation that needs more memory than is free.

    Attributes:
        needed, free: bytes.
        fits: what would fit, in words; empty where nothing does.
    """

    def __init__(self, what: str, needed: int, free: int, fits: list[str]):
        instead = f"what fits: {', or '.join(fits)}" if fits else "not one frame fits"
        super().__init__(f"needs {size_in_words(needed)} for {what}, {size_in_words(free)} are free; {instead}")
        self.needed, self.free, self.fits = needed, free, fits


def check_room(free: int, plan: EnginePlan, predictor: Predictor, kept_per_frame: int = 0) -> None:
    """Raise unless what `predictor` predicts of `plan` fits into `free` bytes of its device.

    On a CPU weights do not count: they lie in files that are mapped, and give way.

    Args:
        kept_per_frame: bytes for each pixel of a frame that stay until all frames are there.

    Raises:
        RoomError: if it does not fit; with as many frames, and as large ones, as do.
    """
    request, variant = predictor.request, predictor.models.variant

    def needed(request: Request) -> int:
        kept = request.num_frames * request.height * request.width * kept_per_frame
        return kept + _needed(plan, replace(predictor, request=request), free)

    def fits(request: Request) -> bool:
        return needed(request) <= free

    if fits(request):
        return
    instead = []
    if not variant.use_learned_positional_embeddings:
        period, multiple = variant.frame_period, variant.pixels_per_token

        def of_side(number: int) -> Request:
            side = number * multiple
            return replace(request, height=min(request.height, side), width=min(request.width, side))

        frames = most((request.num_frames - 1) // period + 1, lambda n: fits(request.of_frames((n - 1) * period + 1)))
        side = most(max(request.height, request.width) // multiple, lambda number: fits(of_side(number)))
        instead += [f"{(frames - 1) * period + 1} frames of this size"] if frames else []
        instead += [str(of_side(side))] if side else []
    where = "" if plan.device.type != "cpu" else " beside the weights"
    dtype = str(plan.dtype).removeprefix("torch.")
    raise RoomError(f"{request} in {dtype} on {plan.device}{where}", needed(request), free, instead)


def most(number: int, fits: Callable[[int], bool]) -> int:
    """The largest of 1 to `number` that fits, where all below one that fits do, too; 0 if none does."""
    low, high = 0, 1  # `high` is the first that may not fit, found by doubling: numbers that do are small ones
    while high <= number and fits(high):
        low, high = high, 2 * high
    high = min(high, number + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _needed(plan: EnginePlan, predictor: Predictor, free: int) -> int:
    """What the worst stage takes; where the steps, or the pixels alone, take more than is `free`, no more is looked at:
    frames of any length and size would have to be planned."""
    request = predictor.request
    pixels = 3 * request.videos * request.num_frames * request.height * request.width * plan.dtype.itemsize
    least = max(predictor.step(plan).total if request.steps else 0, 0 if request.streams else pixels)
    if least > free:
        return least
    try:
        demand = predictor.demand(plan)
    except ValueError:  # diffusers' own code decodes, whose frames nobody plans
        return least
    return max(demand.activations.values()) if plan.device.type == "cpu" else demand.peak
