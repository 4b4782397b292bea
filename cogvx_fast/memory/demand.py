"""What a generation takes at its worst moment, run by a plan, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..family import PIXELS_PER_LATENT
from ..plan import EnginePlan, Offload, VaePlan
from ..vae.chunks import Spans, size_in_words
from ..vae.slicing import plan_decode, plan_encode
from .request import Request
from .step import StepMemory, Tokens, step_memory
from .weights import Models, text_encoder_bytes, text_encoding_bytes, transformer_bytes, vae_bytes

CHUNK = 12  # frames at most that three latent frames, the longest chunk, become


@dataclass(frozen=True)
class Demand:
    """The bytes that a generation takes, stage by stage.

    Attributes:
        text_encoder, transformer, vae: weights.
        encoding_text: the peak beside the weights of encoding a prompt.
        step: likewise of the transformer.
        encode, decode: likewise of the autoencoder, before the first step and after the last.
        offloads: whether a model leaves the device when the next one comes.
        denoises: whether there are stages before the decoding.
    """

    text_encoder: int
    transformer: int
    vae: int
    encoding_text: int
    step: StepMemory
    encode: int
    decode: int
    offloads: bool = False
    denoises: bool = True

    @property
    def weights(self) -> int:
        """The bytes of the weights of all models."""
        return self.text_encoder + self.transformer + self.vae

    @property
    def held(self) -> dict[str, int]:
        """The weights on the device in each stage, by its name.

        A model that was offloaded leaves when the one behind it in the order text encoder, transformer, autoencoder
        runs. The autoencoder that has encoded stays for the steps, and the text encoder for that.
        """
        before = ["text", *(["encode"] if self.encode else []), "step"] if self.denoises else []
        stages = [*before, "decode"]
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
        own = self.activations
        return {stage: held + own[stage] for stage, held in self.held.items()}

    @property
    def activations(self) -> dict[str, int]:
        """What each stage takes beside the weights."""
        own = {"text": self.encoding_text, "encode": self.encode, "step": self.step.total, "decode": self.decode}
        return {stage: own[stage] for stage in self.held}

    @property
    def peak(self) -> int:
        """The bytes that the worst stage takes."""
        return max(self.stages.values())

    def room_for_frames(self, limit: int) -> int:
        """What a limit leaves for the autoencoder's frames."""
        return limit - max(held for stage, held in self.held.items() if stage in ("encode", "decode"))

    def parts(self) -> str:
        """The worst moment, in words."""
        stage = max(self.stages, key=lambda name: self.stages[name])
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


@dataclass(frozen=True)
class Predictor:
    """Predicts what `request` takes of `models`, for any plan."""

    models: Models
    request: Request
    _frames: dict[tuple[VaePlan, int], tuple[int, int]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def demand(self, plan: EnginePlan) -> Demand:
        """What the generation takes if it is run by `plan`.

        Raises:
            BudgetError: for a budget of the autoencoder that is too small.
            ValueError: where diffusers' own code runs it.
        """
        models, dtype, text_tokens = self.models, plan.dtype, self.request.text_tokens
        encode, decode = self.frames(plan.vae, plan.parallel.vae or 1)
        return Demand(
            text_encoder=text_encoder_bytes(models, plan.text_encoder, dtype),
            transformer=transformer_bytes(models, plan.recipe, dtype),
            vae=vae_bytes(models, dtype),
            encoding_text=text_encoding_bytes(models, text_tokens, dtype, plan.text_encoder),
            step=self.step(plan),
            encode=encode,
            decode=decode,
            offloads=plan.offload is Offload.MODELS,
            denoises=self.request.steps > 0,
        )

    def step(self, plan: EnginePlan) -> StepMemory:
        """What a step takes beside the weights."""
        return step_memory(self.models.variant, self._tokens(plan), plan, mapped=plan.device.type == "cpu")

    def _tokens(self, plan: EnginePlan) -> Tokens:
        request, variant = self.request, self.models.variant
        patches = getattr(self.models.transformer, "patch_embed", None)
        table = getattr(patches, "pos_embedding", None)
        return Tokens(
            text=request.text_tokens,
            video=variant.video_tokens(request.num_frames, request.height, request.width),
            batch=request.videos * (2 if request.guided else 1),
            steps=request.steps,
            reads_positions=request.has_size_of(variant) and table is not None and table.dtype == plan.dtype,
        )

    def frames(self, plan: VaePlan, bands: int = 1) -> tuple[int, int]:
        """The peaks of encoding and decoding, 0 for what is not done.

        Args:
            bands: over how many processes the rows are shared out.

        Raises:
            BudgetError: for a budget that is too small.
            ValueError: where diffusers' own code runs, whose frames are not planned.
        """
        vae, request = self.models.vae, self.request
        if vae is None:
            return 0, 0
        if not plan.ours:
            raise ValueError(f"memory_limit: no plan for this autoencoder: {plan.why}")
        bands = bands if bands <= request.latents[1] else 1
        if (plan, bands) not in self._frames:
            encode = 0
            if request.encodes:
                height = request.height if bands == 1 else -(-request.latents[1] // bands) * PIXELS_PER_LATENT
                pixels = (1, vae.config.in_channels, request.encodes, height, request.width)
                encode = plan_encode(vae, pixels, Spans(pixels[2], vae.num_sample_frames_batch_size), plan).peak
            time, height, width = request.latents
            latents = (request.videos, vae.config.latent_channels, time, -(-height // bands), width)
            spans = Spans(latents[2], vae.num_latent_frames_batch_size)
            decode = plan_decode(vae, latents, spans, plan, keeps_output=not request.streams).peak
            if bands > 1:  # the pixels of all bands, as they come and in order
                frames = min(request.num_frames, CHUNK) if request.streams else request.num_frames
                numbers = request.videos * 3 * frames * request.height * request.width
                decode += 2 * numbers * plan.dtype.itemsize
            self._frames[plan, bands] = encode, decode
        return self._frames[plan, bands]
