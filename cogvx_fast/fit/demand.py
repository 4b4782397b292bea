"""What a generation takes at its worst moment, for one way of running it, from shapes alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ..config import EngineConfig
from ..quantization.memory import Models, text_encoder_bytes, text_encoding_bytes, transformer_bytes, vae_bytes
from ..quantization.recipes import Recipe, Scheme
from ..transformer.memory import Clip, StepMemory, Way, step_memory
from ..vae import FastAutoencoderKLCogVideoX, why_not_adopted
from ..vae.memory import size_in_words
from ..vae.place import Place
from .request import Request


@dataclass(frozen=True)
class Option:
    """One way of running a generation.

    Attributes:
        recipe: of the transformer; None: as it is.
        text_encoder: its scheme; None: as it is.
        offloads: whether a model is on the device only while it runs.
        packs: whether a CPU holds copies of plain weights in oneDNN's order.
    """

    recipe: Recipe | None = None
    text_encoder: Scheme | None = None
    offloads: bool = False
    packs: bool = True

    def __str__(self) -> str:
        parts = ["transformer as it is" if self.recipe is None else f"transformer {self.recipe.name}"]
        parts.append("text encoder as it is" if self.text_encoder is None else f"text encoder {self.text_encoder}")
        parts += ["each model on the device only while it runs"] if self.offloads else []
        parts += [] if self.packs else ["no packed weights"]
        return ", ".join(parts)


@dataclass(frozen=True)
class Demand:
    """Bytes of a generation.

    Attributes:
        text_encoder, transformer, vae: weights.
        encoding_text: the peak beside the weights of encoding a prompt.
        step: likewise of the transformer.
        encode, decode: likewise of the autoencoder, before the first step and after the last.
        offloads: whether a model leaves the device when the next one comes.
    """

    text_encoder: int
    transformer: int
    vae: int
    encoding_text: int
    step: StepMemory
    encode: int
    decode: int
    offloads: bool = False

    @property
    def weights(self) -> int:
        return self.text_encoder + self.transformer + self.vae

    @property
    def held(self) -> dict[str, int]:
        """The weights on the device in each stage, by its name.

        A model that was offloaded leaves when the one behind it in the order text encoder, transformer, autoencoder
        runs. The autoencoder that has encoded stays for the steps, and the text encoder for that.
        """
        stages = ["text", *(["encode"] if self.encode else []), "step", "decode"]
        if not self.offloads:
            return dict.fromkeys(stages, self.weights)
        held = {
            "text": self.text_encoder,
            "encode": self.text_encoder + self.vae,
            "step": self.transformer + (self.vae if self.encode else 0),
            "decode": self.vae,
        }
        return {stage: held[stage] for stage in stages}

    @property
    def stages(self) -> dict[str, int]:
        """What each stage takes, weights included."""
        own = {"text": self.encoding_text, "encode": self.encode, "step": self.step.total, "decode": self.decode}
        return {stage: held + own[stage] for stage, held in self.held.items()}

    @property
    def peak(self) -> int:
        return max(self.stages.values())

    def room_for_frames(self, limit: int) -> int:
        """What a limit leaves for the autoencoder's frames."""
        return limit - max(held for stage, held in self.held.items() if stage in ("encode", "decode"))

    def parts(self) -> str:
        """The worst moment, in words."""
        stage = max(self.stages, key=self.stages.get)
        held = {"text encoder": self.text_encoder, "transformer": self.transformer, "autoencoder": self.vae}
        if self.offloads:
            there = {
                "text": ("text encoder",),
                "encode": ("text encoder", "autoencoder"),
                "step": ("transformer", *(("autoencoder",) if self.encode else ())),
                "decode": ("autoencoder",),
            }
            held = {name: size for name, size in held.items() if name in there[stage]}
        own = {
            "text": {"activations": self.encoding_text},
            "encode": {"frames": self.encode},
            "step": {"copies of weights": self.step.packed, "tables": self.step.kept, "activations": self.step.peak},
            "decode": {"frames": self.decode},
        }
        sizes = [f"{name} {size_in_words(size)}" for name, size in (held | own[stage]).items() if size]
        return f"{size_in_words(self.peak)} in stage {stage!r}: {', '.join(sizes)}"


class Predictor:
    """Predicts for one device, dtype and size; what the options have in common is computed once.

    Args:
        place: of the autoencoder; None: the best on `device`.

    Raises:
        ValueError: for an autoencoder that is planned by nobody.
    """

    def __init__(
        self,
        models: Models,
        request: Request,
        device: torch.device,
        dtype: torch.dtype,
        config: EngineConfig,
        place: Place | None = None,
    ):
        self.models, self.request, self.device, self.dtype, self.config = models, request, device, dtype, config
        self.vae, self._plans = None, {}
        if models.vae is not None:
            reason = why_not_adopted(models.vae)
            if reason is not None:
                raise ValueError(f"memory_limit: no plan for this autoencoder: {reason}")
            self.vae = FastAutoencoderKLCogVideoX.adopt(models.vae)
            self.place = place or Place.of(device, dtype)

    def demand(self, option: Option) -> Demand:
        """Of one way, with frames that have the budget that the user gave them, or take what costs no time."""
        config, request, dtype = dict(self.models.transformer.config), self.request, self.dtype
        table = getattr(self.models.transformer.patch_embed, "pos_embedding", None)
        clip = Clip(
            text_tokens=request.text_tokens,
            video_tokens=request.video_tokens(config["patch_size"], config["patch_size_t"]),
            batch=request.videos * (2 if request.guided else 1),
            steps=request.steps,
            reads_positions=request.has_size_of(config) and table is not None and table.dtype == dtype,
        )
        engine = dataclasses.replace(self.config, pack_weights=option.packs)
        way = Way.of(self.device, dtype, engine, option.recipe)
        encode, decode = self.frames(self.config.vae_memory)
        return Demand(
            text_encoder=text_encoder_bytes(self.models, option.text_encoder, dtype),
            transformer=transformer_bytes(self.models, option.recipe, dtype),
            vae=vae_bytes(self.models, dtype),
            encoding_text=text_encoding_bytes(self.models, request.text_tokens, dtype, option.text_encoder),
            step=step_memory(config, clip, dtype, way, engine, mapped=self.device.type == "cpu"),
            encode=encode,
            decode=decode,
            offloads=option.offloads,
        )

    def frames(self, budget: int | None) -> tuple[int, int]:
        """The peaks of encoding and decoding within a budget.

        Raises:
            BudgetError: for one that is too small.
        """
        if self.vae is None:
            return 0, 0
        if budget not in self._plans:
            self.vae.memory_budget = budget
            request, (frames, height, width) = self.request, self.request.latents
            latents = (1, self.vae.config.latent_channels, frames, height, width)
            encode = 0
            if request.encodes:
                pixels = (1, self.vae.config.in_channels, request.encodes, request.height, request.width)
                encode = self.vae.plan_encode(pixels, self.place).peak
            latents = (request.videos, *latents[1:])
            self._plans[budget] = encode, self.vae.plan_decode(latents, not request.streams, self.place).peak
        return self._plans[budget]
