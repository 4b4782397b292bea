"""Generations of every method, a file for each batch: stopped at any time, a run goes on where it was."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from cogvx_fast import FastCogVideoXPipeline
from cogvx_fast.files import complete_or_absent, write_whole

from . import metrics
from .methods import FAST, REFERENCES, Job, Method, Unreachable
from .setting import Setting

Wanted = tuple[Method, int]  # a method and its number of evaluations


class Runs:
    """What a setting's methods give, generated where it is not in the folder `work` yet."""

    def __init__(self, setting: Setting, work: Path) -> None:
        self.setting, self.work = setting, work
        self._loaded: tuple[str, Any] | None = None  # one pipeline at a time: a real one fills a GPU
        self._job_known: dict[str, Any] = self._read(self._known) or {}

    # What is there

    @property
    def _known(self) -> Path:
        return self.work / "known.json"

    def _path(self, wanted: Wanted, ending: str) -> Path:
        name = "".join(c if c.isalnum() else "-" for c in wanted[0].name.lower())
        return self.work / f"{'-'.join(filter(None, name.split('-')))}-{wanted[1]}-{ending}"

    def _measured(self, wanted: Wanted, batch: range) -> Path:
        return self._path(wanted, f"clips-{batch[0]:04}-{batch[-1]:04}.json")

    def _frames(self, base: str, batch: range) -> Path:
        return self.work / f"frames-{base}-{batch[0]:04}-{batch[-1]:04}.safetensors"

    @staticmethod
    def _read(path: Path) -> Any:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def parameters(self, wanted: Wanted) -> dict[str, Any] | None:
        """What the method found for this number, `{"unreachable": why}` among it; None before."""
        return self._read(self._path(wanted, "parameters.json"))

    def missing(self, wanted: Sequence[Wanted]) -> list[tuple[Wanted, range]]:
        """The batches that are still to be generated."""
        return [
            (one, batch)
            for one in wanted
            if "unreachable" not in (self.parameters(one) or {})
            for batch in self.setting.batches
            if not self._measured(one, batch).exists()
        ]

    def clips(self, wanted: Wanted) -> list[dict[str, Any]] | None:
        """What was measured of every clip, in order; None for a method that does not reach its number."""
        if "unreachable" in (self.parameters(wanted) or {}):
            return None
        return [clip for batch in self.setting.batches for clip in self._read(self._measured(wanted, batch))]

    # What is made

    def pipeline(self, base: str) -> Any:
        """The pipeline of this kind, ready on the device; the other is let go.

        Raises:
            ValueError, OSError: for a checkpoint that is none; before a weight is read.
        """
        if self._loaded is None or self._loaded[0] != base:
            self._loaded = None
            gc.collect()
            arguments = {"torch_dtype": getattr(torch, self.setting.dtype)}
            if base == FAST:
                pipe: Any = FastCogVideoXPipeline.from_pretrained(self.setting.model, engine="exact", **arguments)
            else:
                pipe = CogVideoXPipeline.from_pretrained(self.setting.model, **arguments)
            pipe.set_progress_bar_config(disable=True)
            self._loaded = base, pipe.to(self.setting.device)
        return self._loaded[1]

    def hours(self, missing: Sequence[tuple[Wanted, range]]) -> float:
        """About how long they will take: from a generation of two steps and one of six, and from measuring a clip.

        Searches for thresholds by generations are not in it.
        """
        pipe = self.pipeline(FAST)
        taken = []
        for steps in (2, 2, 6):  # the first warms up
            begin = time.perf_counter()
            frames = self._generate(pipe, self.setting.batches[0], {"num_inference_steps": steps})
            taken.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        self._measure(0, frames[0], frames[0])
        measuring = (time.perf_counter() - begin) * len(frames)
        step = max(taken[2] - taken[1], 0) / 4
        rest = max(taken[1] - 2 * step, 0) + measuring
        return sum(evaluations * step + rest for (_, evaluations), _ in missing) / 3600

    def make(self, wanted: Sequence[Wanted], progress: bool = True) -> None:
        """Generate all that is missing, those of one pipeline together, the references first."""
        missing = self.missing(wanted)
        with tqdm(
            total=sum(evaluations for (_, evaluations), _ in missing), unit="evaluation", disable=not progress
        ) as bar:
            for one, batch in sorted(missing, key=lambda item: item[0][0].base != FAST):
                bar.set_postfix_str(f"{one[0].name}, {one[1]}")
                if "unreachable" not in self._found(one):
                    self._try_batch(one, batch)
                bar.update(one[1])

    def _found(self, wanted: Wanted) -> dict[str, Any]:
        method, evaluations = wanted
        parameters = self.parameters(wanted)
        if parameters is None:
            pipe = self.pipeline(method.base)
            try:
                parameters = method.find(pipe, self.job(evaluations))
            except Unreachable as reason:
                parameters = {"unreachable": str(reason)}
            self._write(self._known, self._job_known)
            self._write(self._path(wanted, "parameters.json"), parameters)
        return parameters

    def job(self, evaluations: int) -> Job:
        def sample(pipe: Any, **arguments: Any) -> None:
            self._generate(pipe, range(1), {"output_type": "latent", **arguments})

        def trial(pipe: Any, **arguments: Any) -> None:
            self._generate(pipe, self.setting.batches[0], {"output_type": "latent", **arguments})

        return Job(evaluations, self.setting.steps, sample, trial, self.setting.schedule, self._job_known)

    def _try_batch(self, wanted: Wanted, batch: range) -> None:
        """Make a batch. A method whose cache does not fit into the device's memory says so in its row, and no more."""
        try:
            self._make_batch(wanted, batch)
        except torch.OutOfMemoryError:
            if wanted[0] in REFERENCES.values():
                raise
            why = f"{wanted[0].name} does not fit into the memory of {self.setting.device}, batch {self.setting.batch}"
            self._write(self._path(wanted, "parameters.json"), {"unreachable": why})

    def _make_batch(self, wanted: Wanted, batch: range) -> None:
        (method, evaluations), parameters = wanted, self._found(wanted)
        pipe = self.pipeline(method.base)
        with method.count(pipe) as counter, method.apply(pipe, self.job(evaluations), parameters) as ready:
            frames = self._generate(ready.pipe, batch, ready.arguments)
        if method in REFERENCES.values():
            with complete_or_absent(self._frames(method.base, batch)) as temporary:
                save_file({"frames": frames}, temporary)
        # The references are judged by the engine's own: by itself, and by how far diffusers' is from it.
        judge = FAST if method in REFERENCES.values() else method.base
        expected = load_file(self._frames(judge, batch))["frames"]
        clips = [
            {"evaluations": counter.evaluations, **self._measure(number, clip, other)}
            for number, clip, other in zip(batch, frames, expected, strict=True)
        ]
        self._write(self._measured(wanted, batch), clips)

    def _measure(self, number: int, frames: torch.Tensor, expected: torch.Tensor) -> dict[str, Any]:
        measured: dict[str, Any] = metrics.distance(frames, expected)
        if self.setting.prompts.scenes is not None:
            measured["shows"] = metrics.shows(frames, self.setting.prompts.scenes[number])
        return measured

    def _generate(self, pipe: Any, batch: range, arguments: dict[str, Any]) -> torch.Tensor:
        """Frames `(clips, frames, 3, height, width)` in [0, 1] on the CPU, in the pipeline's dtype."""
        texts = [self.setting.prompts.texts[number] for number in batch]
        generators = [torch.Generator().manual_seed(number) for number in batch]
        given = {"guidance_scale": self.setting.guidance, "output_type": "pt", **arguments}
        return pipe(texts, generator=generators, **given).frames.cpu().contiguous()

    @staticmethod
    def _write(path: Path, content: Any) -> None:
        write_whole(path, json.dumps(content).encode())
