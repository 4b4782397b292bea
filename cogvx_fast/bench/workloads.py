"""What is measured, as data: a model (a checkpoint, or real layer sizes with random weights), a clip and its stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DEMO = "demo"
_PROMPTS = (
    "a red circle moves right on a white background",
    "a blue square moves up on a gray background",
    "a yellow star stays still on a black background",
    "a green triangle moves left on a pink background",
)


@dataclass(frozen=True)
class Workload:
    """A model, a clip and what of it is timed.

    Attributes:
        summary: in one line, for people.
        stages: names of `reference.STAGES`, in order.
        checkpoint: a folder or Hub id in diffusers format, or `DEMO` for the one that ships; None: random weights.
        transformer, vae: configuration of the model with random weights, as diffusers' classes take it; None for a
            part that no stage needs. Without effect on a checkpoint.
        layers_of: how many layers the real model has, where `transformer` has fewer.
        num_frames, height, width: of the clip in frames and pixels; None: the checkpoint's own.
        steps: denoising steps of a whole generation, and of the schedule that a single step is taken from.
        gate_samples: inputs that the correctness gate averages over.
        one_call: whether a call takes minutes: then the first is the only one, and rows say so.
        too_large: for which dtypes there is no reference in a wider precision, and why; then distances from diffusers,
            at the same precision, are stated and not judged. With `one_call` only.
        dtypes: that are run if none is asked for.
        needs_cuda: why a CPU will not do, or None.
    """

    name: str
    summary: str
    stages: tuple[str, ...]
    checkpoint: str | None = None
    transformer: Mapping[str, Any] | None = None
    vae: Mapping[str, Any] | None = None
    layers_of: int | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int = 50
    gate_samples: int = 3
    one_call: bool = False
    too_large: Mapping[str, str] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    needs_cuda: str | None = None
    prompts: tuple[str, ...] = field(default=_PROMPTS, repr=False)

    def check(self, device: str) -> None:
        """Raise a ValueError that gives the reason if this workload cannot be run on `device`."""
        if self.needs_cuda is not None and not device.startswith("cuda"):
            raise ValueError(f"needs a CUDA device, not {device}: {self.needs_cuda}")

    def checkpoint_path(self) -> str:
        """The folder or Hub id of the checkpoint.

        Raises:
            ValueError: for a workload with random weights.
            FileNotFoundError: if it is the demo checkpoint and that is missing from this installation.
        """
        from .. import demo_checkpoint

        if self.checkpoint is None:
            raise ValueError(f"{self.name} has random weights and no checkpoint")
        return demo_checkpoint() if self.checkpoint == DEMO else self.checkpoint


# The reduced clip. The positions are made for its size, as a checkpoint's are for its default size; otherwise diffusers
# would compute them anew in each step, which it does not do at a model's own size.
_REDUCED: dict[str, Any] = {"num_frames": 9, "height": 240, "width": 352}
_REDUCED_SAMPLE = {"sample_frames": 9, "sample_height": 240 // 8, "sample_width": 352 // 8}
_OWN_SIZE: dict[str, Any] = {"num_frames": 49, "height": 480, "width": 720}  # the family's
_2B: dict[str, Any] = {"num_attention_heads": 30}
_5B: dict[str, Any] = {"num_attention_heads": 48, "use_rotary_positional_embeddings": True}
# A pipeline has a transformer, also where only its VAE is measured.
_SMALLEST = {"num_attention_heads": 1, "num_layers": 1, "text_embed_dim": 64}

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload(
            name=DEMO,
            summary="the demo checkpoint: text, DiT step, VAE decode and encode, whole generation",
            stages=("text", "dit-step", "vae-decode", "vae-encode", "generation"),
            checkpoint=DEMO,
            gate_samples=4,
        ),
        Workload(
            name="demo-cold",
            summary="the demo checkpoint's first generation in a fresh process, nothing compiled",
            stages=("cold-start",),
            checkpoint=DEMO,
            gate_samples=1,
        ),
        Workload(
            name="dit-2b",
            summary="CogVideoX-2b's layer sizes, random weights, 3 of 30 layers; 9 frames of 240x352, 1,216 tokens",
            stages=("dit-step",),
            transformer=_2B | _REDUCED_SAMPLE | {"num_layers": 3},
            layers_of=30,
            **_REDUCED,
        ),
        Workload(
            name="dit-5b",
            summary="CogVideoX-5b's layer sizes, random weights, 3 of 42 layers; 9 frames of 240x352, 1,216 tokens",
            stages=("dit-step",),
            transformer=_5B | _REDUCED_SAMPLE | {"num_layers": 3},
            layers_of=42,
            **_REDUCED,
        ),
        Workload(
            name="dit-2b-layer",
            summary="CogVideoX-2b's layer sizes, random weights, 1 of 30 layers; 49 frames of 480x720, 17,776 tokens",
            stages=("dit-step",),
            transformer=_2B | {"num_layers": 1},
            layers_of=30,
            dtypes=("bfloat16",),
            gate_samples=1,
            **_OWN_SIZE,
        ),
        Workload(
            name="dit-2b-full",
            summary="CogVideoX-2b's layer sizes, random weights, all 30 layers; 49 frames of 480x720, 17,776 tokens",
            stages=("dit-step",),
            transformer=_2B | {"num_layers": 30},
            layers_of=30,
            dtypes=("bfloat16", "float16"),
            gate_samples=1,
            needs_cuda="one step is 240 TFLOP, minutes on a CPU; the reduced clip is dit-2b",
            **_OWN_SIZE,
        ),
        Workload(
            name="vae",
            summary="the family's VAE, all layers, random weights; 9 frames of 64x96",
            stages=("vae-decode", "vae-encode"),
            transformer=_SMALLEST,
            vae={},
            num_frames=9,
            height=64,
            width=96,
            gate_samples=2,
        ),
        Workload(
            name="vae-clip",
            summary="the same, 9 frames of 240x352: the clip of dit-2b",
            stages=("vae-decode", "vae-encode"),
            transformer=_SMALLEST,
            vae={},
            gate_samples=1,
            one_call=True,
            too_large={"float32": "diffusers' decoder asks for 42 GB at once in float64"},
            **_REDUCED,
        ),
        Workload(
            name="vae-chunk",
            summary="the same, 9 frames of 480x720: the largest chunk of the family's default size",
            stages=("vae-decode", "vae-encode"),
            transformer=_SMALLEST,
            vae={},
            num_frames=9,
            height=480,
            width=720,
            gate_samples=1,
            one_call=True,
            too_large={"bfloat16": "diffusers' decoder takes more than 24 GB for it in float32"},
            dtypes=("bfloat16",),
        ),
    )
}
