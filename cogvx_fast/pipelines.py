"""The fast pipelines: diffusers' own with our models, made from a checkpoint, a pipeline or parts.

What they do when they are called is in `generation`.
"""

import functools
import json
import types
from collections.abc import Callable
from typing import Any, TypeVar

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
from transformers import T5EncoderModel, T5Tokenizer

from . import adapters, loading, lowering, preview, report
from .attention import check_available
from .checkpoint.check import check_tokenizer
from .config import AttentionBackend, EngineConfig
from .fun import CogVideoXFunInpaintPipeline
from .generation import GenerationMixin
from .hooks import unwrapped
from .memory import LimitError, Models
from .parallel.degrees import ParallelConfig
from .parallel.ranks import ranks_of
from .parallel.weights import share_out
from .plan import UNLIMITED, Offload
from .quantization.pipeline import check_engine, destination, precision, quantize_pipeline
from .quantization.recipes import AS_THEY_ARE, NATIVE, Recipe, Target, TextScheme
from .report import EngineReport
from .resolve import resolve_new
from .turbo import choose_source
from .vae import choose_vae

_MODELS = ("transformer", "text_encoder", "vae")
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _documented(parent: Any) -> Callable[[_Method], _Method]:
    """`functools.wraps`, with the types of the method that it decorates: mypy binds none that is wrapped by it."""
    wraps: Any = functools.wraps(parent)
    return wraps


class FastPipelineMixin(GenerationMixin):
    """What fast pipelines have in common. It stands before a pipeline class of diffusers, or of somebody else."""

    _quantized: str = ""  # in words
    _why_dtype: str = ""  # why it is of the dtype that it is, where none was asked for
    _precision: tuple[Recipe, TextScheme] = (AS_THEY_ARE, NATIVE)  # of transformer and text encoder

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if FastPipelineMixin in cls.__bases__:
            cls._stand_before(cls.__bases__[cls.__bases__.index(FastPipelineMixin) + 1])

    @classmethod
    def _stand_before(cls, reference: type[DiffusionPipeline]) -> None:
        """Calls of the class come here first, with the signatures and documentation of `reference`."""
        cls._reference = reference
        for name in ("__call__", "encode_prompt", "decode_latents"):
            own = getattr(FastPipelineMixin, f"_fast_{name.strip('_')}")
            setattr(cls, name, _signed(own, getattr(reference, name)))
        call: Any = cls.__call__
        call.__signature__ = preview.signature(reference.__call__)
        call.__doc__ = (reference.__call__.__doc__ or "") + preview.DOCUMENTATION

    def __init__(
        self,
        tokenizer: T5Tokenizer,
        text_encoder: T5EncoderModel,
        vae: AutoencoderKLCogVideoX,
        transformer: CogVideoXTransformer3DModel,
        scheduler: CogVideoXDDIMScheduler | CogVideoXDPMScheduler,
        engine: str | EngineConfig = "exact",
    ):
        config = EngineConfig.from_name(engine)
        super().__init__(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self._make_fast(config)

    def _make_fast(self, config: EngineConfig) -> None:
        self._config, self._plan, self._ran = config, None, None
        self.stage_seconds: dict[str, float] = {}
        check_available(AttentionBackend(config.attention), exact=config.tier == "exact")
        lowering.adopt_models(self)
        self._schedules = None
        if config.skips_steps and self.transformer is not None:
            self._schedules = choose_source(config.schedule_path, unwrapped(self.transformer))
        self._quantized = ""
        if self.transformer is not None or self.text_encoder is not None:
            self._precision = self._choose_precision(config)
            self._quantized = quantize_pipeline(self, config, *self._precision)
        device, dtype = lowering.device_and_dtype(self)
        vae = choose_vae(device, self._dtype_of_vae(dtype), config.fast_vae, config.vae_memory, self.vae)
        lowering.adopt_vae(self, vae)
        lowering.set_memory_budget(self, config.vae_memory or UNLIMITED)

    def _choose_precision(self, config: EngineConfig) -> tuple[Recipe, TextScheme]:
        """What transformer and text encoder are to be quantized by: as the engine says, or as fits its limit."""
        if config.memory_limit is None or self.transformer is None:
            return precision(self, config)
        check_engine(config, getattr(self.transformer, "recipe", None))
        models = Models.of(self)
        self._plan = resolve_new(
            config, models, destination(self), self.transformer.dtype, self._default_request(models)
        )
        return self._plan.recipe, self._plan.text_encoder

    def _is_other_precision(self) -> bool:
        """Whether a model that is there now is not quantized as the engine wants it."""
        models, (recipe, text_encoder) = Models.of(self), self._precision
        transformer_differs = models.transformer is not None and models.recipe != recipe
        return transformer_differs or (models.text_encoder is not None and models.text_scheme != text_encoder)

    @classmethod
    @_documented(DiffusionPipeline.from_pretrained.__func__)
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "FastPipelineMixin":
        """As in diffusers, with `engine=`: a preset's name or an `EngineConfig`, checked before anything is loaded.

        A folder that `cogvx-fast quantize` wrote, or the Hub id of one, gives a quantized pipeline, without its
        full-precision weights ever being in memory. Its files are checked first.

        Without `dtype=` all parts get one: that of parts that are given, else the checkpoint's own on a GPU, and on a
        CPU bfloat16 if it has units for it, or float32. The report says which.

        Raises:
            CheckpointError: a ValueError, before a weight is read: for a checkpoint whose files do not hold what its
                configurations say, one for another pipeline, weights in pickles, or a quantized one that is of
                another torchao, broken, or changed since it was written.
            ValueError: for an engine that cannot work.
        """
        if "torch_dtype" in kwargs:
            # The name that all published examples use; diffusers has begun to warn of it.
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        source = pretrained_model_name_or_path
        ready = loading.prepare(cls, source, kwargs)
        if ready is None:
            return super().from_pretrained(source, **kwargs)
        with ready.found.loading():
            pipe: Any = super().from_pretrained(ready.folder, **ready.arguments, use_safetensors=True)
        pipe.register_to_config(_name_or_path=str(source))
        pipe._why_dtype = ready.why_dtype
        if "tokenizer" not in kwargs and pipe.tokenizer is not None:
            check_tokenizer(pipe.tokenizer, source, getattr(pipe.text_encoder, "config", None))
        return pipe

    @classmethod
    @_documented(DiffusionPipeline.from_pipe.__func__)
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "FastPipelineMixin":
        """As in diffusers, but that nothing is cast unless `torch_dtype` is given; `engine=` as in `from_pretrained`,
        that of `pipeline` if it is a fast one."""
        if isinstance(pipeline, FastPipelineMixin):
            kwargs.setdefault("engine", pipeline._config)
        if not kwargs.keys().isdisjoint(("torch_dtype", "dtype", "custom_pipeline")):
            return super().from_pipe(pipeline, **kwargs)
        # The weights are shared: a cast, by default to fp32, would be one of the other pipeline's too.
        parts, _ = cls._get_signature_keys(cls)
        made = cls(**{name: getattr(pipeline, name, None) for name in parts} | kwargs)
        made._made_from(pipeline)
        made.register_to_config(**{k: v for k, v in pipeline.config.items() if k not in made.config})
        return made

    @_documented(DiffusionPipeline.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers.

        Raises:
            ValueError: for a quantized pipeline: `cogvx-fast quantize` writes its checkpoint from the original one.
        """
        recipe = getattr(self.transformer, "recipe", None)
        if recipe is not None:
            raise ValueError(
                f"the weights are quantized ({recipe}); `cogvx-fast quantize MODEL OUT --recipe {recipe}` writes such a"
                " checkpoint from the full-precision one"
            )
        super().save_pretrained(*args, **kwargs)

    @_documented(CogVideoXPipeline.load_lora_weights)
    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: Any, adapter_name: str | None = None, **kwargs: Any
    ) -> None:
        """As in diffusers, and files as peft, ComfyUI, kohya and VideoX-Fun write them, with their alpha.

        Raises:
            ValueError: for a file of which nothing, or not all, would be loaded.
        """
        source, low_memory = pretrained_model_name_or_path_or_dict, kwargs.pop("low_cpu_mem_usage", None)
        hotswap, transformer = kwargs.pop("hotswap", False), unwrapped(self.transformer)
        tensors, metadata = self.lora_state_dict(source, **{**kwargs, "return_lora_metadata": True})
        options: dict[str, Any] = {} if low_memory is None else {"low_cpu_mem_usage": low_memory}
        if transformer is None or adapters.is_of_diffusers(tensors):
            if transformer is not None:
                adapters.check_reaches(tensors, transformer)
            super().load_lora_weights(source, adapter_name, hotswap=hotswap, **options, **kwargs)
            return
        tensors, found = adapters.to_diffusers(tensors, transformer)
        self.load_lora_into_transformer(
            tensors,
            transformer=self.transformer,
            adapter_name=adapter_name,
            metadata=found or metadata,
            _pipeline=self,
            hotswap=hotswap,
            **({"low_cpu_mem_usage": True} | options),
        )

    @_documented(CogVideoXPipeline.fuse_lora)
    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers.

        Raises:
            ValueError: for a quantized pipeline, whose weights have no room for an adapter's: it runs beside them.
        """
        recipe = getattr(self.transformer, "recipe", None)
        if recipe is not None:
            raise ValueError(
                f"the weights are quantized ({recipe}): adapters run beside them in full precision; to fuse, call"
                " load_lora_weights() and fuse_lora() on the exact pipeline, then accelerate(pipeline,"
                " engine='balanced')"
            )
        super().fuse_lora(*args, **kwargs)
        self._forget_constants()

    @_documented(CogVideoXPipeline.unfuse_lora)
    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None:
        super().unfuse_lora(*args, **kwargs)
        self._forget_constants()

    def engine_report(self) -> EngineReport:
        """What the engine does to this pipeline, what it leaves out, and why.

        Before the first generation it is for where the models are now and the size that they make by themselves;
        afterwards it says what ran.
        """
        try:
            plan = self._plan or self._resolve(None, self._schedule_of({}))
        except ValueError as error:  # asked for before the models are where they are to run
            return report.refused(self._config, error)
        return report.describe(self, self._config, plan, self._quantized, self._ran)

    @_documented(DiffusionPipeline.to)
    def to(self, *args: Any, **kwargs: Any) -> "FastPipelineMixin":
        """As in diffusers. Where a memory limit asks for it, a GPU gets each model while it runs, not all at once."""
        device = _device(*args, **kwargs)
        parallel, blocks = self._config.parallel, getattr(unwrapped(self.transformer), "transformer_blocks", None)
        if isinstance(parallel, ParallelConfig) and parallel.shard_weights and device is not None and blocks:
            ranks = ranks_of(parallel, device)
            if ranks is not None:  # before all of them would be there
                share_out(blocks, ranks, device)
        if device is None or device.type == "cpu" or self._config.memory_limit is None or self.transformer is None:
            return super().to(*args, **kwargs)
        if getattr(self, "_all_hooks", None):  # diffusers' own, of offloading by model: it is on already
            return self
        models = Models.of(self)
        try:
            plan = resolve_new(
                self._config, models, Target.of(device), self.transformer.dtype, self._default_request(models), device
            )
            offloads = plan.offload is Offload.MODELS
        except LimitError:
            offloads = True
        if not offloads:
            return super().to(*args, **kwargs)
        dtype = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)), None)
        if dtype is not None:
            super().to(dtype)
        self.enable_model_cpu_offload(device=device)
        return self

    def to_json_string(self) -> str:
        # What this pipeline saves is a plain checkpoint: it names the classes that everyone has.
        config = json.loads(super().to_json_string())
        config["_class_name"] = self._reference.__name__
        config |= {name: value for name, value in lowering.class_names(self).items() if config.get(name)}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _signed(own: Any, parent: Any) -> Any:
    """The function `own` with the name, signature and documentation of `parent`."""

    @functools.wraps(parent)
    def method(self: FastPipelineMixin, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    return method


class FastCogVideoXPipeline(FastPipelineMixin, CogVideoXPipeline):
    """Text to video. Every call of `diffusers.CogVideoXPipeline`, faster."""


class FastCogVideoXImageToVideoPipeline(FastPipelineMixin, CogVideoXImageToVideoPipeline):
    """Image to video. Every call of `diffusers.CogVideoXImageToVideoPipeline`, faster."""


class FastCogVideoXVideoToVideoPipeline(FastPipelineMixin, CogVideoXVideoToVideoPipeline):
    """Video to video. Every call of `diffusers.CogVideoXVideoToVideoPipeline`, faster."""


class FastCogVideoXFunControlPipeline(FastPipelineMixin, CogVideoXFunControlPipeline):
    """Control video to video (CogVideoX-Fun). Every call of `diffusers.CogVideoXFunControlPipeline`, faster."""


class FastCogVideoXFunInpaintPipeline(FastPipelineMixin, CogVideoXFunInpaintPipeline):
    """First and last frame, or any others, to video (CogVideoX-Fun InP), which diffusers has no pipeline for."""


_FAST: dict[type[DiffusionPipeline], type[FastPipelineMixin]] = {
    fast._reference: fast
    for fast in (
        FastCogVideoXPipeline,
        FastCogVideoXImageToVideoPipeline,
        FastCogVideoXVideoToVideoPipeline,
        FastCogVideoXFunInpaintPipeline,  # before control, which it is one of
        FastCogVideoXFunControlPipeline,
    )
}


def accelerate(pipeline: DiffusionPipeline, engine: str | EngineConfig = "exact") -> FastPipelineMixin:
    """A fast pipeline that shares weights, scheduler and tokenizer with `pipeline`, which goes on working.

    What the pipeline's class overrides stays overridden; hooks, a cache and a device map come along.

    Args:
        pipeline: one of diffusers' four CogVideoX pipelines or a `fun.CogVideoXFunInpaintPipeline`, or of a subclass of
            one.
        engine: a preset's name or an `EngineConfig`.

    Raises:
        TypeError: for any other pipeline.
        ValueError: for an engine that cannot work, or a pipeline with offloading already on.
    """
    config = EngineConfig.from_name(engine)
    fast = _fast_class(type(pipeline))
    accelerated = fast.__new__(fast)
    for name, value in vars(pipeline).items():
        if isinstance(value, types.MethodType) and value.__self__ is pipeline:
            value = types.MethodType(value.__func__, accelerated)  # put on the object, as some scripts do
        accelerated.__dict__[name] = value
    accelerated._progress_bar_config = dict(getattr(pipeline, "_progress_bar_config", {}))
    accelerated._made_from(pipeline)
    accelerated._make_fast(config)
    return accelerated


def _fast_class(cls: type[DiffusionPipeline]) -> type[FastPipelineMixin]:
    """The fast class of a pipeline's class; of somebody's own it is made, once."""
    if issubclass(cls, FastPipelineMixin):
        return cls
    if cls in _FAST:
        return _FAST[cls]
    fast = next((fast for reference, fast in _FAST.items() if issubclass(cls, reference)), None)
    if fast is None:
        allowed = ", ".join(
            reference.__name__ for reference in _FAST if reference.__module__.startswith(("diffusers.", __package__))
        )
        raise TypeError(f"pipeline is a {cls.__name__}, which is no CogVideoX pipeline; allowed: {allowed}")
    _FAST[cls] = type(f"Fast{cls.__name__}", (fast, cls), {"__module__": cls.__module__})
    _FAST[cls]._stand_before(cls)
    return _FAST[cls]


def _device(*args: Any, **kwargs: Any) -> torch.device | None:
    """The device among the arguments of a pipeline's `to`."""
    value = next((value for value in (*args, kwargs.get("device")) if isinstance(value, str | torch.device)), None)
    return None if value is None else torch.device(value)
