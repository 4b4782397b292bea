"""What is measured, as data: a model (a checkpoint, or real layer sizes with random weights), a clip and its stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..family import PIXELS_PER_LATENT, SIZE_OF_1_5

DEMO = "demo"
PROMPTS = (
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
        gate_layers: the gate judges the first so many layers, with the same weights; None: all. For models of which a
            copy in a wider precision has no place, or takes no time that there is.
        one_call: whether a call takes minutes on a CPU: there the first is the only one, and rows say so.
        too_large: for which dtypes a CPU has no room for a reference in a wider precision, and why; then distances from
            diffusers, at the same precision, are stated and not judged. With `one_call` only. On a GPU it is tried.
        contenders: that are run if none are asked for, of those that the series has; None: all.
        warmup: calls of each contender before the first that is timed, the first and the gate's aside.
        dtypes: that are run if none is asked for.
        needs_cuda: why a CPU will not do, or None.
        toy: what `rehearsal` puts in the place of fields; without effect on anything else.
        is_rehearsal: whether the sizes are those of `toy`: a time then says nothing.
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
    gate_layers: int | None = None
    one_call: bool = False
    too_large: Mapping[str, str] = field(default_factory=dict)
    contenders: tuple[str, ...] | None = None
    warmup: int = 2
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    needs_cuda: str | None = None
    toy: Mapping[str, Any] = field(default_factory=dict, repr=False)
    is_rehearsal: bool = False
    prompts: tuple[str, ...] = field(default=PROMPTS, repr=False)

    def check(self, device: str) -> None:
        """Raise a ValueError that gives the reason if this workload cannot be run on `device`."""
        if self.needs_cuda is not None and not device.startswith("cuda"):
            raise ValueError(f"needs a CUDA device, not {device}: {self.needs_cuda}")

    def rehearsal(self) -> Workload:
        """The same stages, contenders and kind of model at a size for any CPU, under a name of its own.

        Raises:
            ValueError: for a workload that has no toy size.
        """
        if not self.toy:
            raise ValueError(f"{self.name} has no toy size; those that have: {', '.join(rehearsed())}")
        changes = {name: value for name, value in self.toy.items() if name not in ("transformer", "vae")}
        for name in ("transformer", "vae"):
            if name in self.toy:
                changes[name] = {**(getattr(self, name) or {}), **self.toy[name]}
        return dataclasses.replace(
            self,
            **changes,
            name=f"{self.name}-toy",
            summary=f"a rehearsal of {self.name} at toy size",
            layers_of=None,
            needs_cuda=None,
            toy={},
            is_rehearsal=True,
        )

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
# Its table of positions is larger than what it makes. The text has the pipeline's default length.
_1_5 = _5B | {"patch_size_t": 2, "patch_bias": False, "sample_frames": 81, "sample_height": 300, "sample_width": 300}
_SIZE_OF_1_5: dict[str, Any] = {
    "num_frames": 81,
    "height": SIZE_OF_1_5[0] * PIXELS_PER_LATENT,
    "width": SIZE_OF_1_5[1] * PIXELS_PER_LATENT,
}
_TOY_MODEL: dict[str, Any] = {
    "num_attention_heads": 2,
    "num_layers": 3,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
    "max_text_seq_length": 8,
}
_TOY_SAMPLE = {"sample_frames": 9, "sample_height": 4, "sample_width": 6}
_TOY_CLIP: dict[str, Any] = {"num_frames": 9, "height": 32, "width": 48, "steps": 6}
_TOY_STEP: dict[str, Any] = {"transformer": _TOY_MODEL | _TOY_SAMPLE, **_TOY_CLIP}
_TOY_VAE: dict[str, Any] = {
    "vae": {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2},
    "num_frames": 9,
    "height": 16,
    "width": 24,
}
# What a step on a GPU is compared with: by what it is made of, and by who computes its attention.
_BOUNDS = ("arithmetic", "products", "attention")
_ATTENTIONS = ("attention-cudnn", "attention-flash", "attention-efficient", "attention-triton")
_OURS = ("ours-eager", "ours", "ours-compile", "ours-triton")
# The second three beside other processes.
_BESIDE = ("diffusers", "ours", "ours-one-thread", "diffusers-busy", "ours-busy", "ours-busy-one-thread")
_SKIPPING = ("diffusers", "ours", "ours-turbo-25", "ours-turbo-17", "ours-balanced", "ours-balanced-turbo-17")
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
            name="demo-busy",
            summary="ten steps of the demo checkpoint, alone and beside two processes that want a core each",
            stages=("denoise",),
            checkpoint=DEMO,
            steps=10,
            gate_samples=1,
            warmup=1,
            contenders=_BESIDE,
        ),
        Workload(
            name="dit-2b-busy",
            summary="two steps of dit-2b, alone and beside two processes that want a core each",
            stages=("denoise",),
            transformer=_2B | _REDUCED_SAMPLE | {"num_layers": 3},
            layers_of=30,
            steps=2,
            gate_samples=1,
            warmup=1,
            dtypes=("bfloat16",),
            contenders=_BESIDE,
            **_REDUCED,
        ),
        Workload(
            name="demo-turbo",
            summary="the demo checkpoint's 50 steps with some of them left out",
            stages=("denoise", "generation"),
            checkpoint=DEMO,
            gate_samples=1,
            warmup=1,
            contenders=_SKIPPING,
        ),
        Workload(
            name="dit-2b-turbo",
            summary="50 steps of dit-2b with one of its layers, some of them left out",
            stages=("denoise",),
            transformer=_2B | _REDUCED_SAMPLE | {"num_layers": 1},
            layers_of=30,
            gate_samples=1,
            warmup=0,
            dtypes=("bfloat16",),
            contenders=_SKIPPING,
            **_REDUCED,
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
        # Times of the workloads of whole models are estimates by arithmetic, for an H200 at 450 TFLOP/s in bfloat16 and
        # 30 in float32; none was measured. A contender is called nine times, and one with a session three times more.
        #
        # 94 TFLOP in linears and 146 in attention: 0.5 s a step. Fourteen contenders: 75 s. The reference: 8 s.
        # Compiling 30 layers of diffusers', one block of ours and the Triton kernels: 150 s. In all 4 minutes.
        Workload(
            name="dit-2b-full",
            summary="CogVideoX-2b's layer sizes, random weights, all 30 layers; 49 frames of 480x720, 17,776 tokens",
            stages=("dit-step",),
            transformer=_2B | {"num_layers": 30},
            layers_of=30,
            dtypes=("bfloat16", "float16"),
            gate_samples=1,
            contenders=("diffusers", "diffusers-compile", *_OURS, *_BOUNDS, *_ATTENTIONS),
            needs_cuda="one step is 240 TFLOP, minutes on a CPU; the reduced clip is dit-2b",
            toy=_TOY_STEP,
            **_OWN_SIZE,
        ),
        # 338 TFLOP in linears and 326 in attention: 1.5 s a step. Nine contenders: 140 s. The reference, of 4 layers,
        # and every contender on those: 8 s. Weights, 11 GB, made where they stay: 2 s; each session of ours may hold
        # 2.4 GB of merged projections beside them. Compiling diffusers' 42 layers and again 4: 200 s. In all 6 minutes.
        Workload(
            name="dit-5b-full",
            summary="CogVideoX-5b's layer sizes, random weights, all 42 layers; 49 frames of 480x720, 17,776 tokens",
            stages=("dit-step",),
            transformer=_5B | {"num_layers": 42},
            layers_of=42,
            dtypes=("bfloat16",),
            gate_samples=1,
            gate_layers=4,
            contenders=("diffusers", "diffusers-compile", *_OURS, *_BOUNDS),
            needs_cuda="one step is 660 TFLOP, minutes on a CPU; the reduced clip is dit-5b",
            toy=_TOY_STEP | {"gate_layers": 2},
            **_OWN_SIZE,
        ),
        # 858 TFLOP in linears and 2,100 in attention: 6.6 s a step. Four contenders, warmed up once: 240 s. The
        # reference, of 2 layers: 5 s. In all 5 minutes. Compiling diffusers' and calling that would be 3 more.
        Workload(
            name="dit-1.5-full",
            summary="CogVideoX1.5-5B's layer sizes, random weights, 42 layers; 81 frames of 768x1360, 45,106 tokens",
            stages=("dit-step",),
            transformer=_1_5 | {"num_layers": 42},
            layers_of=42,
            dtypes=("bfloat16",),
            gate_samples=1,
            gate_layers=2,
            contenders=("diffusers", "ours", "ours-triton", "arithmetic"),
            warmup=1,
            needs_cuda="one step is 3,000 TFLOP, an hour on a CPU; the reduced clip of a 5b is dit-5b",
            toy=_TOY_STEP | {"gate_layers": 2},
            **_SIZE_OF_1_5,
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
            name="vae-tall",
            summary="the same, 9 frames of 192x96: what shares out bands has more rows in each",
            stages=("vae-decode", "vae-encode"),
            transformer=_SMALLEST,
            vae={},
            num_frames=9,
            height=192,
            width=96,
            gate_samples=1,
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
        # 290 TFLOP to decode and about half of that to encode: 3 s and 1.5 s for diffusers, whose convolutions are not
        # all that takes time. Four contenders, called nine times: 160 s. The references: 25 s. Compiling diffusers'
        # two halves, and trying out configurations of our convolutions: 150 s. In all 6 minutes.
        Workload(
            name="vae-full",
            summary="the family's VAE, all layers, random weights; 49 frames of 480x720, the family's own clip",
            stages=("vae-decode", "vae-encode"),
            transformer=_SMALLEST,
            vae={},
            dtypes=("bfloat16",),
            gate_samples=1,
            contenders=("diffusers", "diffusers-vae-compile", "ours", "ours-cudnn-conv"),
            needs_cuda="one decode is 290 TFLOP, an hour on a CPU; one chunk of it is vae-chunk",
            toy=_TOY_VAE,
            **_OWN_SIZE,
        ),
    )
}


def rehearsed() -> list[str]:
    """The workloads that have a toy size."""
    return [name for name, workload in WORKLOADS.items() if workload.toy]
