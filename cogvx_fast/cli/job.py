"""An order for videos that was checked: what the command makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogvx_fast import EngineConfig

    from . import enhancing
    from .checkpoint import Checkpoint
    from .graphics import Graphics
    from .lora import Lora
    from .tasks import Task


@dataclass(frozen=True)
class Job:
    """A checked order: everything `making.run` needs to know. Sizes in pixels, `fps` in frames per second.

    Attributes:
        prompts, outputs, seeds: of each video.
        originals: of each video what its prompt was before it was enhanced; None: it was not.
        enhancing: by whom prompts are yet to be enhanced; None: they are taken as they are.
        inputs: of the pipeline's call, by its own names: pictures, and what goes with them.
        made_steps: of the network; of a video that is made anew less than `steps`.
        text_length: tokens that a prompt is padded to.
        graphics: by which previews are shown in the terminal; None: they are not.
        offload: "model" or "sequential"; None: all is on the device.
        settings: kept in the file beside prompt and seed; None: nothing is.
        says_seed: whether the seed was drawn, and must be said.
    """

    prompts: list[str]
    originals: list[str | None]
    enhancing: enhancing.Enhancing | None
    outputs: list[Path]
    sheet: Path | None
    preview: Path | None
    graphics: Graphics | None
    checkpoint: Checkpoint
    task: Task
    inputs: dict[str, Any]
    loras: list[Lora]
    height: int
    width: int
    num_frames: int
    steps: int
    made_steps: int
    guidance: float
    dynamic_guidance: bool
    negative: str | None
    text_length: int
    seeds: list[int]
    fps: int
    zoom: int
    engine: EngineConfig
    offload: str | None
    dtype: str
    device: str
    scheduler: str | None
    settings: dict[str, Any] | None
    says_seed: bool = False

    @property
    def titles(self) -> list[str]:
        """What each video is called where people read it: its prompt as somebody wrote it."""
        return [original or prompt for original, prompt in zip(self.originals, self.prompts, strict=True)]
