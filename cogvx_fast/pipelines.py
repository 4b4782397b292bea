"""The four fast pipelines: diffusers' own, with the engine around their denoising loop.

Nothing of the parents' code is copied. `__call__` opens an engine session and calls the parent, whose
loop then runs our transformer.
"""

import contextlib
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXFunControlPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
    DiffusionPipeline,
)
from diffusers.utils.torch_utils import is_compiled_module
from transformers import T5EncoderModel, T5Tokenizer

from .config import EngineConfig
from .fit.pipeline import check_checkpoint
from .fit.request import Request
from .limited import MemoryLimitMixin
from .lowering import (
    EngineReport,
    adopt_vae,
    check_precision,
    check_quantization,
    choose_attention,
    choose_compile,
    exact_fallback,
    lower,
    report_projections,
    report_vae,
)
from .quantization.checkpoint import check_dtype, load_text_encoder, load_transformer
from .quantization.hub import hub_arguments, quantized_folder
from .quantization.manifest import check_files, is_quantized_checkpoint, read_manifest, text_encoder_scheme
from .quantization.pipeline import check_engine
from .quantization.recipes import RECIPES
from .transformer import EngineSession, FastCogVideoXTransformer3DModel
from .vae import FastAutoencoderKLCogVideoX

_MODELS = ("transformer", "text_encoder", "vae")


class FastPipelineMixin(MemoryLimitMixin):
    """What the four pipelines have in common; `_reference` is the diffusers class each one is."""

    _reference: ClassVar[type[DiffusionPipeline]]

    def __init__(
        self,
        tokenizer: T5Tokenizer,
        text_encoder: T5EncoderModel,
        # Both kinds are named, so that `from_pipe` takes the models of either kind of pipeline.
        vae: AutoencoderKLCogVideoX | FastAutoencoderKLCogVideoX,
        transformer: CogVideoXTransformer3DModel | FastCogVideoXTransformer3DModel,
        scheduler: CogVideoXDDIMScheduler | CogVideoXDPMScheduler,
        engine: str | EngineConfig = "exact",
    ):
        self._asked_config = EngineConfig.from_name(engine)
        super().__init__(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.stage_seconds: dict[str, float] = {}
        self._lower()

    def _lower(self) -> None:
        self._report = lower(self, self._asked_config)
        self._engine_config = self._report.config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "FastPipelineMixin":
        """As in diffusers, with `engine=`: a preset's name or an `EngineConfig`, checked before anything is loaded.

        A folder that `cogvx-fast quantize` wrote, or the Hub id of one, gives a quantized pipeline, without its
        full-precision weights ever being in memory. Its files are checked first.

        Raises:
            ValueError: for an engine that cannot work, or a quantized checkpoint that is of another torchao, broken,
                or changed since it was written.
        """
        if "torch_dtype" in kwargs:
            # The name that all published examples use; diffusers has begun to warn of it.
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        config = EngineConfig.from_name(kwargs.get("engine", "exact"))
        hub = hub_arguments(kwargs)
        if not is_quantized_checkpoint(pretrained_model_name_or_path):
            config.check_machine()
        folder = quantized_folder(pretrained_model_name_or_path, hub)
        if folder is not None:
            pretrained_model_name_or_path = folder
            kwargs |= _quantized_parts(folder, cls._reference, kwargs)
        elif config.memory_limit is not None and kwargs.keys().isdisjoint(_MODELS):
            dtype = kwargs["dtype"] if isinstance(kwargs.get("dtype"), torch.dtype) else None
            check_checkpoint(pretrained_model_name_or_path, cls._reference, config, dtype, hub)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers.

        Raises:
            ValueError: for a quantized pipeline: `cogvx-fast quantize` writes its checkpoint from the original one.
        """
        if self.transformer.recipe is not None:
            raise ValueError(
                f"the weights are quantized ({self.transformer.recipe}); `cogvx-fast quantize MODEL OUT --recipe"
                f" {self.transformer.recipe}` writes such a checkpoint from the full-precision one"
            )
        super().save_pretrained(*args, **kwargs)

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers.

        Raises:
            ValueError: for a quantized pipeline, whose weights have no room for an adapter's: it runs beside them.
        """
        if self.transformer.recipe is not None:
            raise ValueError(
                f"the weights are quantized ({self.transformer.recipe}): adapters run beside them in full precision; to"
                " fuse, call load_lora_weights() and fuse_lora() on the exact pipeline, then accelerate(pipeline,"
                " engine='balanced')"
            )
        super().fuse_lora(*args, **kwargs)

    def engine_report(self) -> EngineReport:
        """What the engine does to this pipeline, what it leaves out, and why."""
        return self._report

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with self._stage("text"):
            return super().encode_prompt(*args, **kwargs)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        _check_latents(latents)
        self._leave_loop()
        with self._stage("decode"):
            frames = super().decode_latents(latents)
        self._note_decoding(latents)
        return frames

    def decode_stream(self, latents: torch.Tensor, num_frames: int | None = None) -> Iterator[torch.Tensor]:
        """What `decode_latents` gives, a few frames at a time as they are ready.

        Args:
            latents: `(batch, time, channels, height, width)`, as a pipeline with `output_type="latent"` returns them.
            num_frames: of the video. CogVideoX 1.5 denoises frames of padding in front, which a pipeline leaves on
                latents that it returns: those beyond `num_frames` are dropped. None: all are decoded.

        Returns:
            An iterator over pixels `(batch, 3, frames, 8 * height, 8 * width)`, without gradients: 9 frames or fewer,
            then 8 at a time.
            All at once where the autoencoder goes by other pieces: with tiling, with slicing of a batch, and with
            `EngineConfig(fast_vae=False)`.

        Raises:
            ValueError: at the call, for latents that do not fit, and for NaN or infinite ones.
        """
        _check_latents(latents)
        if num_frames is not None:
            needed = (num_frames - 1) // self.vae_scale_factor_temporal + 1
            if not 1 <= needed <= latents.shape[1]:
                most = (latents.shape[1] - 1) * self.vae_scale_factor_temporal + 1
                raise ValueError(f"num_frames={num_frames} must lie in 1..{most}, what these latents hold")
            latents = latents[:, latents.shape[1] - needed :]
        if not isinstance(self.vae, FastAutoencoderKLCogVideoX):
            return self._decoded_at_once(latents)
        self._note_decoding(latents)
        return self.vae.decode_stream(1 / self.vae_scaling_factor_image * latents.permute(0, 2, 1, 3, 4))

    def _decoded_at_once(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        with torch.no_grad():
            frames = self.decode_latents(latents)
        yield frames

    def _note_decoding(self, latents: torch.Tensor) -> None:
        if isinstance(self.vae, FastAutoencoderKLCogVideoX):
            batch, time, *rest = latents.shape
            self._report = self._report.with_line(report_vae(self.vae, (batch, rest[0], time, *rest[1:])))

    def to_json_string(self) -> str:
        # What this pipeline saves is a plain checkpoint: it names the classes that everyone has.
        config = json.loads(super().to_json_string())
        config["_class_name"] = self._reference.__name__
        if config.get("transformer"):
            config["transformer"] = ["diffusers", CogVideoXTransformer3DModel.__name__]
        if isinstance(self.vae, FastAutoencoderKLCogVideoX):
            config["vae"] = ["diffusers", AutoencoderKLCogVideoX.__name__]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def _leave_loop(self) -> None:
        """After the last step, and not in a callback's preview: what the steps kept need not lie beside the frames."""
        session = getattr(self.transformer, "_session", None)
        if session is None or self._current_timestep is not None:
            return
        if session.block_plans:
            self._report = self._report.with_line(report_projections(session))
        session.release()

    @contextlib.contextmanager
    def engine_session(self, request: Request | None = None) -> Iterator[None]:
        """An engine session for one call of the parent, and the time each stage of it takes.

        Args:
            request: the size of what is made; None: the model's own.

        Raises:
            ValueError: for an engine that cannot work where the pipeline is now, or a limit in which nothing fits.
        """
        transformer = self.transformer._orig_mod if is_compiled_module(self.transformer) else self.transformer
        if not isinstance(transformer, FastCogVideoXTransformer3DModel):
            # The user put another transformer in place since.
            self._lower()
            transformer = self.transformer
        config = self._fitted(request)
        check_quantization(self, config)
        compiles, line = choose_compile(self, config)
        lines = (choose_attention(self, config), line, check_precision(self, config), adopt_vae(self, config))
        for line in lines:
            self._report = self._report.with_line(line)
        self.stage_seconds.clear()
        started = time.perf_counter()
        session = EngineSession(config, self.scheduler, compiles, exact_fallback(self))
        try:
            with transformer.session(session):
                yield
        finally:
            if session.block_plans:
                self._report = self._report.with_line(report_projections(session))
        seconds = self.stage_seconds
        elapsed = time.perf_counter() - started
        seconds["denoise"] = elapsed - seconds.get("text", 0.0) - seconds.get("decode", 0.0)

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self._synchronize()
        started = time.perf_counter()
        yield
        self._synchronize()
        self.stage_seconds[name] = self.stage_seconds.get(name, 0.0) + time.perf_counter() - started

    def _synchronize(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


class FastCogVideoXPipeline(FastPipelineMixin, CogVideoXPipeline):
    """Text to video. Every call of `diffusers.CogVideoXPipeline`, faster."""

    _reference = CogVideoXPipeline

    @functools.wraps(CogVideoXPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.engine_session(self._request(*args, **kwargs)):
            return super().__call__(*args, **kwargs)


class FastCogVideoXImageToVideoPipeline(FastPipelineMixin, CogVideoXImageToVideoPipeline):
    """Image to video. Every call of `diffusers.CogVideoXImageToVideoPipeline`, faster."""

    _reference = CogVideoXImageToVideoPipeline

    @functools.wraps(CogVideoXImageToVideoPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.engine_session(self._request(*args, **kwargs)):
            return super().__call__(*args, **kwargs)


class FastCogVideoXVideoToVideoPipeline(FastPipelineMixin, CogVideoXVideoToVideoPipeline):
    """Video to video. Every call of `diffusers.CogVideoXVideoToVideoPipeline`, faster."""

    _reference = CogVideoXVideoToVideoPipeline

    @functools.wraps(CogVideoXVideoToVideoPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.engine_session(self._request(*args, **kwargs)):
            return super().__call__(*args, **kwargs)


class FastCogVideoXFunControlPipeline(FastPipelineMixin, CogVideoXFunControlPipeline):
    """Control video to video (CogVideoX-Fun). Every call of `diffusers.CogVideoXFunControlPipeline`, faster."""

    _reference = CogVideoXFunControlPipeline

    @functools.wraps(CogVideoXFunControlPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.engine_session(self._request(*args, **kwargs)):
            return super().__call__(*args, **kwargs)


def _quantized_parts(folder: Path, pipeline_class: type, asked: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make `from_pretrained` take the quantized models of `folder`."""
    manifest = read_manifest(folder)
    own = {"recipe": manifest.recipe, "text_encoder": manifest.text_encoder or "native"}
    config = EngineConfig.from_name(asked.get("engine", EngineConfig(**own)))
    check_engine(config, manifest.recipe)
    check_dtype(manifest, folder, asked.get("dtype"))
    if config.memory_limit is not None:
        quantized = RECIPES[manifest.recipe], text_encoder_scheme(manifest)
        check_checkpoint(folder, pipeline_class, config, getattr(torch, manifest.dtype), {}, quantized)
    check_files(folder, manifest)
    parts: dict[str, Any] = {"engine": config, "dtype": getattr(torch, manifest.dtype)}
    if "transformer" not in asked:
        parts["transformer"] = load_transformer(folder, manifest)
    if "text_encoder" not in asked:
        parts["text_encoder"] = load_text_encoder(folder, manifest)
    return parts


def _check_latents(latents: torch.Tensor) -> None:
    if latents.ndim != 5:
        raise ValueError(
            f"latents must be (batch, time, channels, height, width), got {latents.ndim} axes: {tuple(latents.shape)}"
        )


_FAST = (
    FastCogVideoXPipeline,
    FastCogVideoXImageToVideoPipeline,
    FastCogVideoXVideoToVideoPipeline,
    FastCogVideoXFunControlPipeline,
)


def accelerate(pipeline: DiffusionPipeline, engine: str | EngineConfig = "exact") -> FastPipelineMixin:
    """A fast pipeline that shares weights, scheduler and tokenizer with `pipeline`, which goes on working.

    Args:
        pipeline: one of diffusers' four CogVideoX pipelines, or a subclass of one.
        engine: a preset's name or an `EngineConfig`.

    Raises:
        TypeError: for any other pipeline.
        ValueError: for an engine that cannot work, or a pipeline with offloading already on.
    """
    config = EngineConfig.from_name(engine)
    for fast in _FAST:
        if isinstance(pipeline, fast._reference):
            accelerated = fast(**pipeline.components, engine=config)
            accelerated.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
            return accelerated
    allowed = ", ".join(fast._reference.__name__ for fast in _FAST)
    raise TypeError(f"pipeline is a {type(pipeline).__name__}, which is no CogVideoX pipeline; allowed: {allowed}")
