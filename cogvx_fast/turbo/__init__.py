"""Step skipping: which denoising steps the network computes, found before the first one, and what stands in for it."""

from .choice import Source, choose_source
from .schedule import LEAST_EVALUATIONS, SPEEDS, Distance, ScheduleError, StepSchedule
from .skipping import StepSkipping

__all__ = [
    "LEAST_EVALUATIONS",
    "SPEEDS",
    "Distance",
    "ScheduleError",
    "Source",
    "StepSchedule",
    "StepSkipping",
    "choose_source",
]
