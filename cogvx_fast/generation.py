"""One generation of a fast pipeline: its plan, its session, its stages, around diffusers' own loop.

Nothing of the parents' code is copied. A call resolves the plan of a generation, opens its session and calls the
parent, whose loop then runs our models.
"""

import contextlib
import dataclasses
import inspect
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import DiffusionPipeline

from . import devices, lowering, preview, threads
from .callbacks import CALLBACK, with_callback
from .checkpoint.kinds import why_not
from .config import CompileMode, EngineConfig
from .family import FRAMES_PER_LATENT, PIXELS_PER_LATENT, latent_frames
from .hooks import moves_weights, unwrapped
from .memory import Models, Request, is_guided
from .parallel import agreement
from .parallel.ranks import ranks_of
from .parallel.weights import share_out
from .plan import EnginePlan, Offload
from .resolve import resolve
from .session import EngineSession, Ran, current
from .transformer import FastCogVideoXTransformer3DModel, why_not_adopted
from .transformer.attention import default_of_diffusers
from .turbo import Source, StepSchedule, StepSkipping
from .turbo.skipping import watched_callback
from .vae import FastAutoencoderKLCogVideoX, choose_vae
from .vae.checks import check_frames, check_latents, check_num_frames

# Locks of objects that keep the state of a call on themselves: not lying there, as those may be copied.
_LOCKS: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()
_MAKING_LOCKS = threading.Lock()
DEFAULT_STEPS = 50  # of every pipeline of the family
# The pipeline that a fast one was made from, while that is there.
_ORIGINS: "weakref.WeakKeyDictionary[Any, weakref.ref[DiffusionPipeline]]" = weakref.WeakKeyDictionary()


def lock_of(owner: Any) -> Any:
    """A lock for `owner` that one thread may take several times."""
    with _MAKING_LOCKS:
        return _LOCKS.setdefault(owner, threading.RLock())


if TYPE_CHECKING:
    # What the mixins stand before: the methods that `super()` calls are its.
    from diffusers import DiffusionPipeline as _Behind
else:
    _Behind = object


class GenerationMixin(_Behind):
    """What a fast pipeline does when it is called: a plan, a session, and the parent's loop inside.

    Attributes:
        stage_seconds: what each stage of the last generation took.
    """

    _reference: ClassVar[type[DiffusionPipeline]]  # the class that it stands before
    tokenizer: Any  # these and all that is not here are of that class
    text_encoder: Any
    vae: Any
    transformer: Any
    scheduler: Any
    _config: EngineConfig
    _plan: EnginePlan | None = None  # of the last generation
    _schedules: Source | None = None  # None: all steps are computed
    _ran: Ran | None = None
    stage_seconds: dict[str, float]

    def _made_from(self, pipeline: DiffusionPipeline) -> None:
        _ORIGINS[self] = weakref.ref(pipeline)

    @property
    def _current_timestep(self) -> Any:
        return self.__dict__.get("_current_timestep")

    @_current_timestep.setter
    def _current_timestep(self, value: Any) -> None:
        self.__dict__["_current_timestep"] = value
        origin = _ORIGINS[self]() if self in _ORIGINS else None
        if origin is not None and getattr(unwrapped(self.transformer), "is_cache_enabled", False):
            origin._current_timestep = value  # caches ask the pipeline that they were configured with

    def _fast_call(self, *args: Any, **kwargs: Any) -> Any:
        call = self._reference.__call__
        wanted = preview.is_wanted(call, kwargs)
        arguments = _bound_arguments(call, self, args, kwargs)
        self._check_call(arguments)
        watched = arguments.get("callback_on_step_end") is not None
        schedule = self._schedule_of(arguments)
        pictures = preview.StepPreviews(self, call, arguments) if wanted else None
        request, guided = self._request(arguments), is_guided(arguments)
        with self.engine_session(request, watched=watched, schedule=schedule, guided=guided) as session:
            if session.ranks is not None:
                # Pictures are of a map that all of them fit together, on the autoencoder's bands.
                agreement.check_alike({**arguments, "preview": wanted})
                if arguments.get("generator") is None:
                    agreement.share_noise(session.plan.device)
            if pictures is not None:
                with self._stage("preview"):
                    args, kwargs = pictures.start(session, args, kwargs)
            if watched and session.skipping is not None:
                # With pictures the callback is theirs by now.
                before = _bound_arguments(call, self, args, kwargs)[CALLBACK]
                after = watched_callback(before, session.skipping)
                args, kwargs = with_callback(call, args, kwargs, before, after)
            return super().__call__(*args, **kwargs)

    def _schedule_of(self, arguments: Mapping[str, Any]) -> StepSchedule | None:
        """Which steps of a call with these arguments are computed; None: all."""
        steps = arguments.get("num_inference_steps", DEFAULT_STEPS)
        if self._schedules is None or not isinstance(steps, int) or steps < 1:
            return None  # upstream says so
        self._check_skipping()
        return self._schedules.schedule(self.scheduler, self._config.speed, steps, arguments.get("timesteps"))

    def _check_skipping(self) -> None:
        """Raise a ValueError where something stands in the way of skipping steps, or skips them itself."""
        transformer: Any = unwrapped(self.transformer)
        reason = None
        if transformer is not self.transformer or getattr(transformer, "_compiled_call_impl", None) is not None:
            reason = (
                "the whole transformer is compiled, steps and all; EngineConfig(compile='blocks') compiles its blocks"
            )
        elif getattr(transformer, "is_cache_enabled", False):
            reason = "diffusers' cache is enabled, which skips by itself; transformer.disable_cache() turns it off"
        elif not isinstance(transformer, FastCogVideoXTransformer3DModel):
            reason = f"diffusers' own transformer runs: {why_not_adopted(transformer)}"
        if reason is not None:
            raise ValueError(f"tier 'turbo' cannot work: {reason}")

    def _check_call(self, arguments: Mapping[str, Any]) -> None:
        """Raise a ValueError for a call that upstream would end with shapes that do not fit, or without a step."""
        transformer: Any = unwrapped(self.transformer)
        reason = None if transformer is None else why_not(self._reference.__name__, transformer.config)
        if reason is not None:
            raise ValueError(f"this pipeline cannot run its transformer: {reason}")
        if "strength" not in inspect.signature(self._reference.__call__).parameters:
            return
        strength, steps = arguments.get("strength", 0.8), arguments.get("num_inference_steps", 50)
        if not isinstance(strength, int | float) or not isinstance(steps, int) or steps < 1:
            return  # upstream says so
        if 0 <= strength <= 1 and int(steps * strength) < 1:
            least = f"{1 / steps:.2g}"
            raise ValueError(f"strength={strength} of num_inference_steps={steps} leaves no step; must be {least} to 1")

    def _fast_encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        # Tokenizers keep how they pad on themselves, and pipelines share them.
        shared = contextlib.nullcontext() if self.tokenizer is None else lock_of(self.tokenizer)
        transformer: Any = unwrapped(self.transformer)
        session = None if transformer is None else current(transformer)

        def encode() -> tuple[torch.Tensor, torch.Tensor]:
            return super(GenerationMixin, self).encode_prompt(*args, **kwargs)

        with self._stage("text"), shared:
            if session is None or session.ranks is None:
                return encode()
            return agreement.made_by_first(encode, session.plan.device)

    def _fast_decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        check_latents(latents, unwrapped(self.vae))
        with self._decoding(latents), self._stage("decode"):
            frames = super().decode_latents(latents)
        check_frames(frames)
        return frames

    def preview(self, latents: torch.Tensor) -> torch.Tensor:
        """A small picture of latents, without decoding them: one pixel for 8 x 8, one frame for 4.

        The first call fits a map from latents to colours on the autoencoder itself, as the first generation with
        `preview=True` does: about a second, see `preview.LatentPreview.fit`. It is fitted again when weights of the
        autoencoder change.

        Args:
            latents: clean ones, as a pipeline with `output_type="latent"` returns them:
                `(batch, frames, channels, height / 8, width / 8)`.

        Returns:
            uint8 `(batch, frames, height / 8, width / 8, 3)` on the device of `latents`.

        Raises:
            TypeError, ValueError: for latents that do not fit, and for a pipeline without an autoencoder.
        """
        check_latents(latents, unwrapped(self.vae))
        with lock_of(self):
            return preview.fitted(self).frames(latents)

    def decode_stream(self, latents: torch.Tensor, num_frames: int | None = None) -> Iterator[torch.Tensor]:
        """What `decode_latents` gives, a few frames at a time as they are ready.

        Args:
            latents: `(batch, time, channels, height, width)`, as a pipeline with `output_type="latent"` returns them.
            num_frames: of the video, 8N + 1 or 8N, as the autoencoder makes no others. CogVideoX 1.5 denoises frames of
                padding in front, which a pipeline leaves on latents that it returns: those beyond `num_frames` are
                dropped. None: all are decoded.

        Returns:
            An iterator over pixels `(batch, 3, frames, 8 * height, 8 * width)`, without gradients: 9 frames or fewer,
            then 8 at a time.
            All at once where the autoencoder goes by other pieces: with tiling, with slicing of a batch, and with
            `EngineConfig(fast_vae=False)`.

        Raises:
            TypeError, ValueError: at the call, for latents that do not fit, for NaN or infinite ones, and for a number
                of frames that they do not hold; from the iterator, for pixels that became NaN or infinite.
        """
        vae = unwrapped(self.vae)
        check_latents(latents, vae)
        if num_frames is not None:
            check_num_frames(num_frames, latents.shape[1])
            latents = latents[:, latents.shape[1] - latent_frames(num_frames) :]
        if not isinstance(vae, FastAutoencoderKLCogVideoX):
            return self._decoded_at_once(latents)
        with self._decoding(latents, streams=True):
            pieces = vae.decode_stream(1 / self.vae_scaling_factor_image * latents.permute(0, 2, 1, 3, 4))
        return _pieces(pieces, None if self._ran is None else self._ran.threads)

    def _decoded_at_once(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        with torch.no_grad():
            frames = self.decode_latents(latents)
        yield frames

    @contextlib.contextmanager
    def _decoding(self, latents: torch.Tensor, streams: bool = False) -> Iterator[None]:
        """The running generation, whose steps may be done, or one of the decoding alone."""
        batch, time_axis, channels, *size = latents.shape
        shape = (batch, channels, time_axis, *size)
        vae = unwrapped(self.vae)
        session = None if vae is None else current(vae)
        if session is not None:
            if self._current_timestep is None:  # not in a callback's preview: what the steps kept need not lie beside
                session.release()
            session.ran.latents = shape
            yield
            return
        frames, height, width = (time_axis - 1) * FRAMES_PER_LATENT + 1, *(PIXELS_PER_LATENT * side for side in size)
        request = None
        if self._config.memory_limit is not None:
            request = Request.of_decoding(frames, height, width, batch, streams)
        plan = self._resolve(request)
        ranks = ranks_of(plan.parallel, plan.device)
        lowering.adopt_vae(self, plan.vae)
        ran = dataclasses.replace(self._ran or Ran(), latents=shape)
        _choose_threads(plan, ran)
        with (
            EngineSession(plan, None, unwrapped(self.vae), ran=ran, ranks=ranks).active(),
            threads.at_most(ran.threads),
        ):
            yield
        self._plan, self._ran = plan, ran

    @contextlib.contextmanager
    def engine_session(
        self,
        request: Request | None = None,
        watched: bool = True,
        schedule: StepSchedule | None = None,
        guided: bool = True,
    ) -> Iterator[EngineSession]:
        """One generation: its plan, its session, and the time that each stage of it takes.

        On one pipeline there is one at a time: other threads wait. Calls of the transformer in a loop of your own are
        those of a generation inside of this.

        Args:
            request: the size of what is made; None: the model's own.
            watched: whether something may write to weights or embeddings between steps in a way that torch does not
                count, as merging adapters in a callback does.
            schedule: which steps are computed, for an engine that skips some; None: as it does of 50 steps.
            guided: whether there is guidance: of several processes, half then take one half of a step's batch each.

        Raises:
            ValueError: for an engine that cannot work where the pipeline is now, or a limit in which nothing fits.
        """
        with lock_of(self):
            if self._is_other_precision():
                self._make_fast(self._config)  # the user has put another model in place since
            lowering.adopt_models(self)
            if schedule is None:
                schedule = self._schedule_of({})
            plan = self._resolve(request, schedule, guided)
            lowering.adopt_vae(self, plan.vae)
            transformer: Any = unwrapped(self.transformer)
            if plan.offload is Offload.MODELS and not moves_weights(transformer):
                self.enable_model_cpu_offload(device=plan.device)
            session = EngineSession(plan, *lowering.models_of(self), self.scheduler, watched)
            session.skipping = self._make_skipping(plan)
            session.ranks = ranks_of(plan.parallel, plan.device)
            if session.ranks is not None and plan.parallel.shard_weights:
                share_out(transformer.transformer_blocks, session.ranks, plan.device)
            session.ran.ignored_default = default_of_diffusers()
            if session.ran.ignored_default:
                warnings.warn(
                    f"diffusers' default backend {session.ran.ignored_default!r} has no effect on CogVideoX; what has"
                    " one: transformer.set_attention_backend(...), or EngineConfig(attention=...)",
                    stacklevel=3,
                )
            self._plan, self._ran = plan, session.ran
            self.stage_seconds.clear()
            _choose_threads(plan, session.ran)
            started = time.perf_counter()
            try:
                with session.active(), threads.at_most(session.ran.threads):
                    yield session
            finally:
                self._plan, self._ran = plan, session.ran  # a callback may have run a generation of its own
            elapsed = time.perf_counter() - started
            seconds = self.stage_seconds
            seconds["denoise"] = elapsed - sum(seconds.get(stage, 0.0) for stage in ("preview", "text", "decode"))

    def _make_skipping(self, plan: EnginePlan) -> StepSkipping | None:
        return None if plan.steps == "all" else StepSkipping(plan.steps)

    def _resolve(
        self, request: Request | None, schedule: StepSchedule | None = None, guided: bool = True
    ) -> EnginePlan:
        """The plan of a generation of this size and these steps, where the models are now."""
        device, dtype = lowering.device_and_dtype(self)
        if self.transformer is not None and self._config.memory_limit is not None:
            request = request or self._default_request(Models.of(self))
        vae = choose_vae(device, self._dtype_of_vae(dtype), self._config.fast_vae, self._config.vae_memory, self.vae)
        return resolve(self._config, Models.of(self), device, dtype, vae, request, schedule or "all", guided)

    def _dtype_of_vae(self, otherwise: torch.dtype) -> torch.dtype:
        return otherwise if self.vae is None else self.vae.dtype

    @property
    def _device_of_stages(self) -> torch.device:
        """Of the running generation; to find it out anew goes through all modules, which takes milliseconds."""
        model: Any = unwrapped(self.transformer)
        session = None if model is None else current(model)
        return self._execution_device if session is None else session.plan.device

    def _default_request(self, models: Models) -> Request:
        return Request.default(models.variant, self._reference)

    def _request(self, arguments: Mapping[str, Any]) -> Request | None:
        """The size of what a call of the parent with these arguments makes; None where no limit asks for it."""
        if self._config.memory_limit is None or self.transformer is None:
            return None
        return Request.of_call(Models.of(self).variant, self._reference, arguments)

    def _forget_constants(self) -> None:
        """In a callback: peft has written to weights in a way that torch does not count."""
        model: Any = unwrapped(self.transformer)
        session = None if model is None else current(model)
        if session is not None:
            session.release()

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self._synchronize()
        started = time.perf_counter()
        with devices.current(self._device_of_stages):
            yield
        self._synchronize()
        self.stage_seconds[name] = self.stage_seconds.get(name, 0.0) + time.perf_counter() - started

    def _synchronize(self) -> None:
        """Wait for what runs on each device that this pipeline is on."""
        if not torch.cuda.is_available():
            return  # to ask the models where they are goes through all modules, which takes milliseconds
        parts = self.text_encoder, self.transformer, self.vae
        for device in {self._device_of_stages, *(getattr(part, "device", None) for part in parts)}:
            devices.synchronize(device)


def _bound_arguments(function: Any, pipeline: DiffusionPipeline, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments of a call by name; those that do not fit are left to the call itself, which says so."""
    try:
        arguments = inspect.signature(function).bind_partial(pipeline, *args, **kwargs).arguments
    except TypeError:
        return dict(kwargs)
    return {**arguments, **arguments.get("kwargs", {})}


def _choose_threads(plan: EnginePlan, ran: Ran) -> None:
    # Inductor's code has the number of threads in it.
    if plan.device.type == "cpu" and plan.compile is CompileMode.OFF:
        ran.threads, ran.why_threads = threads.choose(torch.get_num_threads())


def _pieces(pieces: Iterator[torch.Tensor], most: int | None) -> Iterator[torch.Tensor]:
    """The pieces, each computed on `most` threads and looked at."""
    while True:
        with threads.at_most(most):
            frames = next(pieces, None)
        if frames is None:
            return
        check_frames(frames)
        yield frames
