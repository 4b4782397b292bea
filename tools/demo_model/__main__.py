"""Makes the demo checkpoints from nothing: `python -m tools.demo_model --work FOLDER`. Resumes where it was stopped."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import dit, vae
from .drawn import CLIPS, WHOLE_CLIPS, DrawnCache, WholeCache
from .evaluate import main as evaluate
from .evaluate_inpaint import main as evaluate_inpaint
from .export import export, load_vae

ASSETS = Path(__file__).resolve().parents[2] / "cogvx_fast" / "assets" / "demo"
REPORT = Path(__file__).with_name("scores.json")
STAGES = (
    *("vae", "dit", "enlarge-vae", "enlarge-dit", "guide", "sharpen-vae", "follow", "fine", "finer", "settle"),
    *("settle-vae", "steady", "rest", "rest-vae", "snap", "clear-vae", "inpaint"),
    *("export", "evaluate", "export-inpaint", "evaluate-inpaint"),
)


def drawn_clips(work: Path, stage: dit.Stage = dit.FINER) -> DrawnCache:
    """Of training clips, what the stage before `stage` leaves of them."""
    autoencoder = load_vae(work, vae.SHARPEN)
    if stage.whole:
        drawn: DrawnCache = WholeCache(autoencoder, work, stage.after)
    else:
        drawn = DrawnCache(autoencoder, work, stage.after, stage.starts)
    drawn.grow(WHOLE_CLIPS if stage.whole else CLIPS)
    drawn.save()
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for training checkpoints and cached latents")
    parser.add_argument(
        "--out", type=Path, default=ASSETS, help="folder of the finished checkpoint; the second beside it"
    )
    parser.add_argument("--report", type=Path, default=REPORT, help="JSON file for the scores; a PNG goes beside it")
    parser.add_argument("--only", choices=STAGES, help="one stage alone; without it, all in this order")
    arguments = parser.parse_args()
    second = arguments.out.with_name(f"{arguments.out.name}-inpaint")
    report = arguments.report.with_stem(f"{arguments.report.stem}_inpaint")
    work = arguments.work
    stages = {
        "vae": lambda: vae.train(work),
        "dit": lambda: dit.train(work, load_vae(work, vae.TRAIN)),
        "enlarge-vae": lambda: vae.train(work, vae.ENLARGE),
        "enlarge-dit": lambda: dit.train(work, load_vae(work, vae.TRAIN), dit.ENLARGE),
        "guide": lambda: dit.train(work, load_vae(work, vae.TRAIN), dit.GUIDED),
        "sharpen-vae": lambda: vae.train(work, vae.SHARPEN),
        "follow": lambda: dit.train(work, load_vae(work, vae.SHARPEN), dit.FOLLOW),
        "fine": lambda: dit.train(work, load_vae(work, vae.SHARPEN), dit.FINE),
        "finer": lambda: dit.train(work, load_vae(work, vae.SHARPEN), dit.FINER, drawn_clips(work)),
        "settle": lambda: dit.train(work, load_vae(work, vae.SHARPEN), dit.SETTLE),
        "settle-vae": lambda: vae.train(work, vae.SETTLE, drawn_clips(work, dit.STEADY)),
        "steady": lambda: dit.train(work, load_vae(work, vae.SHARPEN), dit.STEADY, drawn_clips(work, dit.STEADY)),
        "rest": lambda: dit.train(work, load_vae(work, vae.SHARPEN), dit.REST, drawn_clips(work, dit.REST)),
        "rest-vae": lambda: vae.train(work, vae.REST, drawn_clips(work, dit.REST)),
        "snap": lambda: dit.train(work, load_vae(work, vae.SHARPEN), dit.SNAP, drawn_clips(work, dit.SNAP)),
        "clear-vae": lambda: vae.train(work, vae.CLEAR),
        "inpaint": lambda: dit.train(work, load_vae(work, vae.SHARPEN), dit.INPAINT, drawn_clips(work)),
        "export": lambda: export(work, arguments.out),
        "evaluate": lambda: evaluate(str(arguments.out), str(arguments.report)),
        "export-inpaint": lambda: export(work, second, dit.INPAINT),
        "evaluate-inpaint": lambda: evaluate_inpaint(str(second), str(report)),
    }
    for name, run in stages.items():
        if arguments.only in (None, name):
            run()


if __name__ == "__main__":
    main()
