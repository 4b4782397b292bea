"""The prompts of a comparison: the demo checkpoint's, VBench's, a list of our own, or a file of the user's."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from dataclasses import dataclass
from pathlib import Path

from tools.demo_model.data import HELD_OUT, Scene, describe
from tools.demo_model.recipes import PROMPTS

DEMO, VBENCH, SHIPPED = "demo", "vbench", "shipped"


@dataclass(frozen=True)
class Prompts:
    """Sentences in no order, and for the demo checkpoint what each describes. The place of each is its seed.

    The first of them stand for all, so that more can be asked for later; `digest` is that of the whole list.
    """

    name: str
    texts: tuple[str, ...]
    scenes: tuple[Scene, ...] | None = None
    digest: str = ""

    def __post_init__(self) -> None:
        if not self.digest:
            object.__setattr__(self, "digest", hashlib.sha256("\n".join(self.texts).encode()).hexdigest())

    def first(self, count: int) -> Prompts:
        """The first `count` of them.

        Raises:
            ValueError: if there are fewer.
        """
        if not 1 <= count <= len(self.texts):
            raise ValueError(f"--clips {count} must be 1 to {len(self.texts)}, the prompts of {self.name}")
        scenes = None if self.scenes is None else self.scenes[:count]
        return Prompts(self.name, self.texts[:count], scenes, self.digest)


def chosen(name: str | None, is_demo: bool) -> Prompts:
    """The prompts called `demo`, `vbench` or `shipped`, or a text file's lines.

    None: those of the demo checkpoint for it; for others VBench's where the package is installed, else our own.

    Raises:
        ValueError: for a file that cannot be read or has no prompt in it, and for what is not there.
    """
    if name == DEMO or (name is None and is_demo):
        rng = random.Random(60)  # as the quantization recipes are judged by
        scenes = HELD_OUT[:PROMPTS]
        return Prompts("the demo checkpoint's held-out prompts", tuple(describe(s, rng) for s in scenes), scenes)
    vbench = _vbench()
    if name == VBENCH or (name is None and vbench is not None):
        if vbench is None:
            raise ValueError("--prompts vbench needs the list of package vbench, which is not installed")
        texts = [entry["prompt_en"] for entry in json.loads(vbench.read_text(encoding="utf-8"))]
        random.Random(0).shuffle(texts)  # they are sorted by what they are meant to test
        return Prompts("VBench", tuple(texts))
    ours = name is None or name == SHIPPED
    path = Path(__file__).with_name("prompts.txt") if ours else Path(str(name))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--prompts {name} must be demo, vbench, shipped or a file of lines in UTF-8: {error}"
        ) from None
    texts = tuple(line.strip() for line in lines if line.strip())
    if not texts:
        raise ValueError(f"--prompts {name}: there is no prompt in it, one a line")
    return Prompts("the 32 shipped prompts" if ours else path.name, texts)


def _vbench() -> Path | None:
    """The list in the installed package, which is not imported: that would load its models' libraries."""
    found = importlib.util.find_spec("vbench")
    places = (
        [] if found is None else [Path(p) / "VBench_full_info.json" for p in found.submodule_search_locations or ()]
    )
    return next((place for place in places if place.is_file()), None)
