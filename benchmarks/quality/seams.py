"""`python -m benchmarks.quality.seams`: where a step is predicted and by what, the ablation behind the engine's choice.

Every case computes the same steps, at even distances between the first five and the last three, in float32 on the demo
checkpoint. Two seams: the network's output, and the residual that the whole stack of blocks adds to the video rows. At
either, the last output is reused, or a polynomial through the last two or three is followed, in the number of the step
(the timesteps are evenly spaced, so that it is the same in those) or in log-SNR.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from cogvx_fast import FastCogVideoXPipeline, demo_checkpoint

from . import prompts
from .methods.method import forward_replaced
from .methods.periodic import even_steps

CASES = [("reuse", 0, "step"), *((f"order {n}", n, c) for n in (1, 2) for c in ("step", "log-SNR"))]
SEAMS = ("output", "stack")
STEPS = 50


def polynomial(kept: Sequence[tuple[float, torch.Tensor]], x: float) -> torch.Tensor:
    """The polynomial through `kept` (coordinate, value), Lagrange's form, at `x`."""
    total = torch.zeros_like(kept[0][1])
    for place, value in kept:
        others = [other for other, _ in kept if other != place]
        total += math.prod((x - other) / (place - other) for other in others) * value
    return total


@contextlib.contextmanager
def predicted(pipe: Any, seam: str, order: int, places: Sequence[float], computed: set[int]) -> Iterator[None]:
    """Within the block one generation of `pipe` predicts what is not in `computed`, at a seam.

    Args:
        places: of the steps, in the coordinate that is extrapolated in.
    """
    kept: list[tuple[float, torch.Tensor]] = []
    steps, model = itertools.count(), pipe.transformer

    def through(step: int, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if step not in computed:
            return polynomial(kept, places[step])
        kept.append((places[step], compute()))
        del kept[: -order - 1]
        return kept[-1][1]

    if seam == "output":
        inner = model.forward

        def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
            return (through(next(steps), lambda: inner(*args, **kwargs)[0]),)

        with forward_replaced(model, forward):
            yield
        return
    run = model._run

    def stack(session: Any, stream: torch.Tensor, norms: Any, bound: Any, step: Any) -> torch.Tensor:
        text = step.text_seq_length
        residual = through(next(steps), lambda: (run(session, stream, norms, bound, step) - stream)[:, text:])
        return torch.cat([stream[:, :text], stream[:, text:] + residual], dim=1)

    model._run = stack
    try:
        yield
    finally:
        del model._run


def main(clips: int = 8, evaluations: Sequence[int] = (25, 22, 17, 14)) -> None:
    """Print a table: PSNR in dB against all steps, mean over clips (worst), for each seam, predictor and number."""
    pipe: Any = FastCogVideoXPipeline.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    texts = prompts.chosen(None, True).first(clips).texts
    pipe.scheduler.set_timesteps(STEPS)
    cumulated = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].double().clamp(min=1e-8)
    coordinates = {"step": list(map(float, range(STEPS))), "log-SNR": (cumulated / (1 - cumulated)).log().tolist()}

    def frames() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(number) for number in range(clips)]
        return pipe(list(texts), num_inference_steps=STEPS, generator=generators, output_type="pt").frames

    reference = frames()
    print(f"| seam, predictor | {' | '.join(f'{n} evaluations' for n in evaluations)} |")
    print(f"|---{'|---' * len(evaluations)}|")
    for seam, (name, order, coordinate) in itertools.product(SEAMS, CASES):
        cells = []
        for number in evaluations:
            with predicted(pipe, seam, order, coordinates[coordinate], set(even_steps(number, STEPS))):
                error = (frames() - reference).double().square().flatten(1).mean(dim=1).clamp(min=1e-10)
            decibels = -10 * error.log10()
            cells.append(f"{decibels.mean():.1f} ({decibels.min():.1f})")
        print(f"| {seam}, {name}{f' in {coordinate}' if order else ''} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
