"""What a generation takes, predicted from shapes alone, and the way of running it that a memory limit allows.

`Request` is the size of a generation, `EnginePlan` says how it runs; `Predictor` makes a `Demand` of both. `fit`,
`fit_new` and `fit_generation` take the most exact plan whose demand fits a limit; `check_room` looks whether so much is
free.
"""

from .choice import LimitError, choose, fit, fit_generation, fit_new
from .demand import Demand, Predictor
from .options import Option, options
from .request import Request, is_guided
from .room import RoomError, check_room
from .weights import Models

__all__ = [
    "Demand",
    "LimitError",
    "Models",
    "Option",
    "Predictor",
    "Request",
    "RoomError",
    "check_room",
    "choose",
    "fit",
    "fit_generation",
    "fit_new",
    "is_guided",
    "options",
]
