"""The CogVideoX transformer, adopted from diffusers' model and run on one joint stream."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models._modeling_parallel import ContextParallelConfig
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNorm
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from diffusers.utils import apply_lora_scale
from torch import nn

from .. import devices
from ..config import CompileMode
from ..hooks import StandsFor, has_global_hooks, is_hooked, is_patched
from ..parallel import collectives
from ..parallel.degrees import ParallelConfig
from ..parallel.degrees import check as check_degrees
from ..parallel.ranks import processes
from ..parallel.sequence import SequenceSplit
from ..session import EngineSession, current
from . import position
from .adoption import SharedAdapters, adopted
from .binding import BoundBlock, bind, is_current, takes_rows
from .block import FastCogVideoXBlock
from .modulation import Modulation
from .stack import StepInputs, run_blocks

_INPUTS = inspect.signature(CogVideoXTransformer3DModel.forward)


class FastCogVideoXTransformer3DModel(SharedAdapters, CogVideoXTransformer3DModel, metaclass=StandsFor):
    """diffusers' model with our forward pass where a generation runs, and diffusers' own elsewhere.

    It has the configuration, the modules and the state dict of diffusers' class and saves as that, so that what it
    writes loads anywhere. `adopt` makes one of a model that is there, `from_pretrained` one of a folder.
    """

    _no_split_modules: ClassVar = ["FastCogVideoXBlock", "CogVideoXPatchEmbed"]
    _repeated_blocks: ClassVar = ["FastCogVideoXBlock"]
    _stands_for = CogVideoXTransformer3DModel
    recipe: str | None = None  # by which its linears were quantized
    asked_parallel: ParallelConfig | None = None  # by `enable_parallelism`
    transformer_blocks: nn.ModuleList

    # typeshed has `wraps` give an object with `__call__`, which mypy takes for no constructor
    @functools.wraps(CogVideoXTransformer3DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.transformer_blocks = nn.ModuleList(map(FastCogVideoXBlock.adopt, self.transformer_blocks))

    @classmethod
    def adopt(cls, reference: CogVideoXTransformer3DModel) -> FastCogVideoXTransformer3DModel:
        """A fast model that shares every weight with `reference`, which goes on working.

        Configuration, adapters, quantizer, torch's forward hooks, a cache and a device map come along.

        Raises:
            ValueError: for what would be lost: offloading hooks, a forward pass of somebody's own. It says what to do.
        """
        return adopted(cls, reference)

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        config["_class_name"] = CogVideoXTransformer3DModel.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @functools.wraps(CogVideoXTransformer3DModel.set_attention_backend)
    def set_attention_backend(self, backend: str) -> None:
        everywhere = _AttentionBackendRegistry._active_backend
        super().set_attention_backend(backend)
        # diffusers makes it the default of every model, too, and never takes that back; here it is this model's.
        _AttentionBackendRegistry.set_active_backend(everywhere)

    @functools.wraps(CogVideoXTransformer3DModel.enable_parallelism)
    def enable_parallelism(self, *, config: Any, cp_plan: Any = None) -> None:
        """Rows of the stream are shared out over the processes of `torch.distributed`, in generations of a pipeline.

        `EngineConfig(parallel=...)` does that and more: it also splits guidance and the autoencoder.

        Args:
            config: a `ContextParallelConfig` of diffusers, or its `ParallelConfig` with one.

        Raises:
            NotImplementedError: for tensor parallelism, a mesh or a plan of one's own.
            RuntimeError: without processes, and if it was called before.
            ValueError: for degrees that the processes or the heads do not have.
        """
        context = getattr(config, "context_parallel_config", config)
        if not isinstance(context, ContextParallelConfig) or cp_plan is not None or context.mesh is not None:
            raise NotImplementedError(
                "enable_parallelism: CogVideoX has no plan for tensor parallelism, nor for a plan or mesh of your own;"
                " what there is: ContextParallelConfig(ulysses_degree=..., ring_degree=...), and"
                " EngineConfig(parallel=cogvx_fast.ParallelConfig(...)), which also splits guidance and the autoencoder"
            )
        if self.asked_parallel is not None:
            raise RuntimeError("enable_parallelism cannot be called twice: parallelism is on already")
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise RuntimeError(
                "enable_parallelism needs processes: start the script with torchrun, and call"
                " torch.distributed.init_process_group() first"
            )
        degrees = ParallelConfig(ulysses=context.ulysses_degree, ring=context.ring_degree, vae=1)
        check_degrees(degrees, processes(), self.config.num_attention_heads)
        self.asked_parallel = degrees

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Here, not in forward: what caches and patches put around that is in the output.
        output = super().__call__(*args, **kwargs)
        session = current(self)
        if session is not None and session.on_step is not None:
            session.on_step(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], output[0])
        return output

    @functools.wraps(CogVideoXTransformer3DModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor] | Transformer2DModelOutput:
        session = current(self)
        if session is None:
            return super().forward(*args, **kwargs)
        if session.skipping is None or torch.is_grad_enabled():
            return self._computed(session, *args, **kwargs)
        inputs = _INPUTS.bind(self, *args, **kwargs).arguments
        skipping, step = session.skipping, session.step_of(inputs["timestep"])
        if step is not None:
            skipping.follow(session.timesteps)
        if session.watched:
            skipping.look_at(self)
        sample = skipping.predicted(step, inputs["hidden_states"])
        if sample is not None:
            output = Transformer2DModelOutput(sample=sample) if inputs.get("return_dict", True) else (sample,)
        else:
            output = self._computed(session, *args, **kwargs)
            skipping.computed(step, output[0])
            if session.watched:
                skipping.remember(self)
        session.ran.skipped = skipping.done()
        return output

    def _computed(
        self, session: EngineSession, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor] | Transformer2DModelOutput:
        """The output of the network, for the samples of a step that are this process's, and then of all."""
        ranks = session.ranks
        if ranks is None or ranks.guidance.size == 1:
            return self._computed_here(session, *args, **kwargs)
        inputs = _INPUTS.bind(self, *args, **kwargs).arguments
        samples, parts = len(inputs["hidden_states"]), ranks.guidance.size
        reason = self._why_whole(inputs.get("attention_kwargs"))
        if not reason and samples % parts:
            reason = f"a step's {samples} samples are no multiple of {parts}"
        if reason:
            session.ran.why_whole["batch"] = reason
            return self._computed_here(session, *args, **kwargs)
        each = samples // parts
        first, last = ranks.guidance.index * each, (ranks.guidance.index + 1) * each
        own = {name: value for name, value in inputs.items() if name != "self"}
        own["encoder_hidden_states"] = session.own_samples(inputs["encoder_hidden_states"], first, last)
        for name in ("hidden_states", "timestep", "timestep_cond", "ofs"):
            if isinstance(own.get(name), torch.Tensor) and len(own[name]) == samples:
                own[name] = own[name][first:last]
        output = self._computed_here(session, **own)
        sample = collectives.gathered(output[0], 0, [each] * parts, ranks.guidance)
        return Transformer2DModelOutput(sample=sample) if inputs.get("return_dict", True) else (sample,)

    def _computed_here(
        self, session: EngineSession, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor] | Transformer2DModelOutput:
        """The output of the network, by our formula or diffusers'."""
        reason = _why_not_fast()
        session.ran.steps += 1
        if reason:
            session.ran.why_diffusers = reason
            if session.ranks is not None and session.ranks.sequence.size > 1:
                session.ran.why_whole["stream"] = "diffusers' own forward pass runs"
            return super().forward(*args, **kwargs)
        return self._fast_forward(session, *args, **kwargs)

    @apply_lora_scale("attention_kwargs")
    def _fast_forward(
        self,
        session: EngineSession,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
        ofs: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> tuple[torch.Tensor] | Transformer2DModelOutput:
        """A step of a generation; arguments and result as in diffusers.

        Args:
            hidden_states: latents `(batch, frames, channels, height, width)`.
            encoder_hidden_states: prompt embeddings `(batch, text_length, text_embed_dim)`.
            timestep: `(batch,)`.

        Returns:
            The prediction `(batch, frames, out_channels, height, width)`, in a tuple or as `.sample`.
        """
        text_seq_length = encoder_hidden_states.shape[1]
        position.check_size(self.patch_embed, hidden_states, text_seq_length)
        split = self._split(session, text_seq_length, hidden_states, attention_kwargs)
        stream = self.embedding_dropout(self._embed(session, hidden_states, encoder_hidden_states, split))
        if split is not None:
            text_seq_length = split.own_text
            if image_rotary_emb is not None:
                image_rotary_emb = split.own_video(image_rotary_emb[0]), split.own_video(image_rotary_emb[1])
        bound = self._bound(session, stream, attention_kwargs, split)
        conditions = (timestep, timestep_cond, ofs, hidden_states.dtype)
        # Of what is called the vectors are computed where they are used: hooks may bring their weights there.
        ours = [block for block, how in zip(self.transformer_blocks, bound, strict=True) if not how.called]
        by_module = type(self.norm_out) is not AdaLayerNorm or any(map(is_hooked, self.norm_out.modules()))
        modulation = self._modulation(session, ours, None if by_module else self.norm_out, *conditions)
        needs_temb = by_module or len(ours) < len(bound)
        temb = self._time_embedding(*conditions) if needs_temb else None
        rows = iter(modulation.blocks)
        norms = [None if how.called else next(rows) for how in bound]
        step = StepInputs(text_seq_length, temb, image_rotary_emb, attention_kwargs)

        with devices.current(stream.device):  # a device map may have made it another than the generation's
            stream = self._run(session, stream, norms, bound, step)
        # Not by brackets: they ask for the device, so that the graph of a GPU could not be traced without one.
        video = self.norm_final(stream.narrow(1, text_seq_length, stream.shape[1] - text_seq_length))
        if by_module:
            video = self.norm_out(video, temb=temb)
        else:
            video = self.norm_out.norm(video) * (1 + modulation.final_scale) + modulation.final_shift
        tokens = self.proj_out(video)
        if split is not None and session.ranks is not None:
            tokens = collectives.gathered(tokens, 1, split.video_rows(), session.ranks.sequence)
        output = position.unpatchify(tokens, self.config.patch_size, self.config.patch_size_t, hidden_states.shape)
        session.ran.fast += 1
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _run(
        self,
        session: EngineSession,
        stream: torch.Tensor,
        norms: Sequence[Any],
        bound: Sequence[BoundBlock],
        step: StepInputs,
    ) -> torch.Tensor:
        """The stack of blocks, and once more with exact attention where that in 8 bits has overflowed."""
        compiles, called = session.plan.compile, any(how.called or how.eager for how in bound)
        run = run_blocks
        if compiles is CompileMode.FULL and not called:
            run = torch.compile(run_blocks, fullgraph=True)
        arguments = (self.transformer_blocks, norms)
        some = compiles is CompileMode.BLOCKS or (compiles is CompileMode.FULL and called)
        output = run(stream, *arguments, bound, step, some)
        if not session.plan.attention.may_overflow or not _overflowed(session, output):
            return output
        if session.ran.redone == 0:
            warnings.warn(
                "attention gave numbers that are not finite: the step is redone exact, as every one that does so will"
                " be; EngineConfig(attention='auto', tier='exact') takes no such risk",
                RuntimeWarning,
                stacklevel=2,
            )
        session.ran.redone += 1
        exact = session.plan.attention.exact()
        before = session.bindings
        bound = [dataclasses.replace(how, attention=exact, by_hand=None, guard=None) for how in bound]
        session.bindings = self._by_module(bound)
        try:
            return run(stream, *arguments, bound, step, some)
        finally:
            session.bindings = before

    def _split(
        self, session: EngineSession, text: int, latents: torch.Tensor, attention_kwargs: dict[str, Any] | None
    ) -> SequenceSplit | None:
        """The rows of the stream that are this process's; None where all are."""
        ranks = session.ranks
        if ranks is None or ranks.sequence.size == 1:
            return None
        reason = self._why_whole(attention_kwargs)
        if reason:
            session.ran.why_whole["stream"] = reason
            return None
        return SequenceSplit.of(ranks, text, text + position.video_tokens(self.patch_embed, latents))

    def _why_whole(self, attention_kwargs: dict[str, Any] | None) -> str:
        """What keeps a step from being shared out over processes, in words; empty where nothing does."""
        if attention_kwargs:
            return "attention_kwargs are given, for a processor that may want all rows"
        if self.is_cache_enabled:
            return "diffusers' cache is enabled, which looks at whole batches and streams"
        for number, block in enumerate(self.transformer_blocks):
            if not takes_rows(block):
                return f"block {number}, or a part of it, is hooked or was replaced, and may want all rows"
        return ""

    def _bound(
        self,
        session: EngineSession,
        stream: torch.Tensor,
        attention_kwargs: dict[str, Any] | None,
        split: SequenceSplit | None,
    ) -> list[BoundBlock]:
        """How each block runs; decided at the first step, and again if modules or weights were replaced since."""
        blocks, plan, watched = self.transformer_blocks, session.plan, session.watched
        bound = [session.bindings[block] for block in blocks if block in session.bindings]
        if (
            not bound
            or len(bound) != len(blocks)
            or not all(is_current(block, how, plan, watched) for block, how in zip(blocks, bound, strict=True))
        ):
            bound = bind(blocks, plan, stream.shape[0] * stream.shape[1], watched)
            session.ran.counts["bindings"] += 1
            session.ran.blocks = tuple(how.ran() for how in bound)
            if plan.attention.in_8_bits and all(how.attends and how.by_hand is None for how in bound):
                # One number to set where it overflows, instead of a look at the step's result.
                session.guard = torch.zeros(1, dtype=torch.int32, device=stream.device)
                bound = [dataclasses.replace(how, guard=session.guard) for how in bound]
            else:
                session.guard = None
            session.bindings = self._by_module(bound)
        if any(how.split != split for how in bound):
            bound = [dataclasses.replace(how, split=split) for how in bound]
            session.bindings = self._by_module(bound)
        if attention_kwargs:  # meant for the processor, which is called with them
            bound = [dataclasses.replace(how, attends=False) for how in bound]
        return bound

    def _by_module(self, bound: Sequence[BoundBlock]) -> dict[nn.Module, BoundBlock]:
        """By block, and by the attention of each, for when they are called by others."""
        found: dict[nn.Module, BoundBlock] = {}
        for block, how in zip(self.transformer_blocks, bound, strict=True):
            found[block] = how
            if isinstance(block, FastCogVideoXBlock):
                found[block.attn1] = how
        return found

    def _time_embedding(
        self, timestep: torch.Tensor, timestep_cond: torch.Tensor | None, ofs: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        # Sinusoids are fp32 always; the embedding runs in the model's dtype, as in diffusers.
        temb = self.time_embedding(self.time_proj(timestep).to(dtype), timestep_cond)
        if self.ofs_embedding is not None:
            temb = temb + self.ofs_embedding(self.ofs_proj(ofs).to(dtype))
        return temb

    def _modulation(
        self,
        session: EngineSession,
        blocks: Sequence[CogVideoXBlock],
        norm_out: AdaLayerNorm | None,
        timestep: torch.Tensor,
        timestep_cond: torch.Tensor | None,
        ofs: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> Modulation:
        """The vectors of `blocks` and of the final norm: a row of the table of all steps, or computed for this one."""
        embeddings = (self.time_proj, self.time_embedding, self.ofs_proj, self.ofs_embedding)

        def compute(steps: torch.Tensor) -> Modulation:
            return Modulation.compute(blocks, norm_out, self._time_embedding(steps, timestep_cond, ofs, dtype))

        step = session.step_of(timestep) if session.plan.keeps_modulation and timestep_cond is None else None
        hooked = any(is_hooked(module) for part in embeddings if part is not None for module in part.modules())
        if step is None or hooked:
            return compute(timestep)
        linears = [norm.linear for block in blocks for norm in (block.norm1, block.norm2)]
        modules = (*embeddings, norm_out, *linears)
        return session.modulation(step, ofs, modules, compute)

    def _embed(
        self,
        session: EngineSession,
        latents: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        split: SequenceSplit | None,
    ) -> torch.Tensor:
        """The joint stream of a step: prompt and patches, with positions where they are added; of `split` its rows."""
        patch_embed, text_length = self.patch_embed, encoder_hidden_states.shape[1]
        if any(map(is_hooked, patch_embed.modules())):
            whole = patch_embed(encoder_hidden_states, latents)
            return whole if split is None else split.own(whole)
        text = session.projected_text(encoder_hidden_states, patch_embed.text_proj)
        if split is None:
            video = position.embed_patches(patch_embed, latents)
        else:
            text = split.own(text)
            video = position.embed_rows(patch_embed, latents, *split.own_video_rows)
        stream = torch.cat([text, video], dim=1)
        if not position.has_positions(patch_embed):
            return stream

        def compute() -> torch.Tensor:
            return position.joint_positions(patch_embed, latents)

        key = (latents.shape[1:], text_length, latents.dtype, latents.device)
        positions = session.positions(key, patch_embed.pos_embedding, compute)
        return stream + (positions if split is None else split.own(positions))


def _why_not_fast() -> str:
    """What keeps a step from being ours at this moment, in words; empty where nothing does."""
    if has_global_hooks():
        return "hooks of all modules are registered with torch: diffusers' own forward pass, which calls each"
    if is_patched(CogVideoXTransformer3DModel, "forward"):
        return "CogVideoXTransformer3DModel.forward was replaced, and runs as it is"
    if torch.is_grad_enabled():
        return "gradients are asked for: diffusers' own forward pass"
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            return f"torch.autocast({kind!r}) is on: diffusers' own forward pass, whose operations it casts"
    return ""


def _overflowed(session: EngineSession, tokens: torch.Tensor) -> bool:
    """Whether a step with attention in 8 bits has to be redone; the one value that is fetched from the device."""
    guard = session.guard
    overflowed = ~torch.isfinite(tokens).all() if guard is None else guard[0] > 0
    if session.ranks is not None:  # all of them redo it, or none
        everyone = session.ranks.everyone
        overflowed = collectives.gathered(overflowed[None], 0, [1] * everyone.size, everyone).any()
    redo = bool(overflowed)
    if redo and guard is not None:
        guard.zero_()
    return redo
