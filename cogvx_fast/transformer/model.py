"""The CogVideoX transformer, adopted from diffusers' model and run on one joint stream."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, ClassVar

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from . import position
from .attention import JointAttnProcessor
from .block import FastCogVideoXBlock
from .modulation import Modulation
from .plan import UNPLANNED, BlockPlan
from .session import EngineSession


class FastCogVideoXTransformer3DModel(CogVideoXTransformer3DModel):
    """diffusers' model with our forward pass; made by `adopt`, never from scratch.

    It has the configuration, the modules and the state dict of the model it was adopted from, and saves
    as that class, so that what it writes loads anywhere.
    """

    _no_split_modules: ClassVar = ["FastCogVideoXBlock", "CogVideoXPatchEmbed"]
    _repeated_blocks: ClassVar = ["FastCogVideoXBlock"]
    recipe: str | None = None  # by which its linears were quantized

    @classmethod
    def adopt(cls, reference: CogVideoXTransformer3DModel) -> FastCogVideoXTransformer3DModel:
        """A fast model that shares every weight with `reference`, which goes on working.

        What is not a module (configuration, adapters, quantizer) is carried over as it is.

        Raises:
            ValueError: if offloading hooks hang on `reference`: they belong to its own forward pass.
        """
        if hasattr(reference, "_hf_hook"):
            raise ValueError(
                "the transformer has offloading hooks already; make the pipeline fast first and then call"
                " enable_model_cpu_offload(), enable_sequential_cpu_offload() or set a device map"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        own = set(self.__dict__)
        self.__dict__.update({name: value for name, value in reference.__dict__.items() if name not in own})
        for name, child in reference.named_children():
            self.add_module(name, child)
        self.transformer_blocks = nn.ModuleList(FastCogVideoXBlock(block) for block in reference.transformer_blocks)
        self.train(reference.training)
        self._session = None
        return self

    @contextlib.contextmanager
    def session(self, session: EngineSession) -> Iterator[EngineSession]:
        """Within the block, forward passes take their constants from `session`."""
        outer, self._session = self._session, session
        try:
            yield session
        finally:
            self._session = outer
            for processor in self.joint_processors:
                processor.guard = None

    @property
    def joint_processors(self) -> list[JointAttnProcessor]:
        """The attention processors that are ours; those that the user set are not among them."""
        processors = (block.attn1.processor for block in self.transformer_blocks)
        return [processor for processor in processors if isinstance(processor, JointAttnProcessor)]

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        config["_class_name"] = CogVideoXTransformer3DModel.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: int | float | torch.LongTensor,
        timestep_cond: torch.Tensor | None = None,
        ofs: int | float | torch.LongTensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> tuple[torch.Tensor] | Transformer2DModelOutput:
        """The denoiser's prediction; arguments and result as in diffusers.

        Args:
            hidden_states: latents `(batch, frames, channels, height, width)`.
            encoder_hidden_states: prompt embeddings `(batch, text_length, text_embed_dim)`.
            timestep: `(batch,)`.

        Returns:
            The prediction `(batch, frames, out_channels, height, width)`, in a tuple or as `.sample`.
        """
        text_seq_length = encoder_hidden_states.shape[1]
        modulation = self._modulation(timestep, timestep_cond, ofs, hidden_states.dtype)
        stream = self.embedding_dropout(self._embed(hidden_states, encoder_hidden_states))
        self._set_guard(stream.device)
        plans, compiles = self._plans(stream)
        run = torch.compile(_run_blocks, fullgraph=True) if compiles == "full" else _run_blocks
        arguments = (modulation, text_seq_length, image_rotary_emb, attention_kwargs, plans, compiles == "blocks")
        tokens = run(self, stream, *arguments)
        if self._overflowed(tokens):
            with self._exact_attention():
                tokens = run(self, stream, *arguments)
        output = position.unpatchify(tokens, self.config.patch_size, self.config.patch_size_t, hidden_states.shape)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _set_guard(self, device: torch.device) -> None:
        """Gives attention in 8 bits one number to set where it overflows, if no other attention is in this model."""
        session, processors = self._session, self.joint_processors
        if session is None or session.fallback is None:
            return
        in_8_bits = [p.backend.operation == "int8_attention" and p._attention_backend is None for p in processors]
        if not all(in_8_bits) or len(in_8_bits) < len(self.transformer_blocks):
            session.guard = None
        elif session.guard is None:
            session.guard = torch.zeros(1, dtype=torch.int32, device=device)
        for processor in processors:
            processor.guard = session.guard

    def _overflowed(self, tokens: torch.Tensor) -> bool:
        """Whether a step with a lossy attention has to be redone; the one value that is fetched from the device."""
        session = self._session
        if session is None or session.fallback is None:
            return False
        if session.guard is None:
            return not bool(torch.isfinite(tokens).all())
        overflowed = bool(session.guard)
        if overflowed:
            session.guard.zero_()
        return overflowed

    @contextlib.contextmanager
    def _exact_attention(self) -> Iterator[None]:
        """Within the block, for one step, attention is the session's fallback; the first time is warned of."""
        session, processors = self._session, self.joint_processors
        if session.redone == 0:
            warnings.warn(
                "attention gave numbers that are not finite: the step is redone exact, as every one that does so will"
                " be; EngineConfig(attention='auto', tier='exact') takes no such risk",
                RuntimeWarning,
                stacklevel=2,
            )
        session.redone += 1
        before = [(processor.backend, processor._attention_backend) for processor in processors]
        for processor in processors:
            processor.backend, processor._attention_backend = session.fallback, None
        try:
            yield
        finally:
            for processor, (backend, by_hand) in zip(processors, before, strict=True):
                processor.backend, processor._attention_backend = backend, by_hand

    def _plans(self, stream: torch.Tensor) -> tuple[list[BlockPlan], str]:
        """How each block runs, and what of it is compiled; outside a session, or for training, as the modules are."""
        session = self._session
        if session is None or torch.is_grad_enabled():
            return [UNPLANNED] * len(self.transformer_blocks), "off"
        return session.plans(self.transformer_blocks, stream.shape[0] * stream.shape[1]), session.compiles

    def _time_embedding(
        self, timestep: torch.Tensor, timestep_cond: torch.Tensor | None, ofs: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        # Sinusoids are fp32 always; the embedding runs in the model's dtype, as in diffusers.
        temb = self.time_embedding(self.time_proj(timestep).to(dtype), timestep_cond)
        if self.ofs_embedding is not None:
            temb = temb + self.ofs_embedding(self.ofs_proj(ofs).to(dtype))
        return temb

    def _modulation(
        self, timestep: torch.Tensor, timestep_cond: torch.Tensor | None, ofs: torch.Tensor | None, dtype: torch.dtype
    ) -> Modulation:
        def compute(steps: torch.Tensor) -> Modulation:
            return Modulation.compute(self, self._time_embedding(steps, timestep_cond, ofs, dtype))

        if self._session is not None and timestep_cond is None:
            modulation = self._session.modulation(timestep, ofs, compute)
            if modulation is not None:
                return modulation
        return compute(timestep)

    def _embed(self, latents: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        session, patch_embed, text_length = self._session, self.patch_embed, encoder_hidden_states.shape[1]
        if session is None:
            text = patch_embed.text_proj(encoder_hidden_states)
        else:
            text = session.projected_text(encoder_hidden_states, patch_embed.text_proj)
        stream = torch.cat([text, position.embed_patches(patch_embed, latents)], dim=1)
        if not position.has_positions(patch_embed):
            return stream

        def compute() -> torch.Tensor:
            return position.joint_positions(patch_embed, latents, text_length)

        if session is None:
            return stream + compute()
        return stream + session.positions((latents.shape[1:], text_length, latents.dtype, latents.device), compute)


def _run_blocks(
    transformer: FastCogVideoXTransformer3DModel,
    stream: torch.Tensor,
    modulation: Modulation,
    text_seq_length: int,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
    attention_kwargs: dict[str, Any] | None,
    plans: list[BlockPlan],
    compile_blocks: bool,
) -> torch.Tensor:
    """The stream through all blocks and the final projection: `(batch, video tokens, patch * out_channels)`."""
    blocks = list(zip(transformer.transformer_blocks, modulation.blocks, plans, strict=True))
    # One function for all blocks: dynamo compiles it once and takes their weights as inputs.
    whole, branches = FastCogVideoXBlock.forward, FastCogVideoXBlock.run_branches
    if compile_blocks:
        whole, branches = (torch.compile(function, fullgraph=True) for function in (whole, branches))
    normed = None  # of the stream, for the next block, where the one before gave it along with its last addition
    for (block, vectors, plan), following in zip_longest(blocks, blocks[1:]):
        arguments = (vectors, text_seq_length, image_rotary_emb, attention_kwargs)
        if torch.is_grad_enabled() and transformer.gradient_checkpointing:
            stream = transformer._gradient_checkpointing_func(block, stream, *arguments)
        elif plan.hooked or not (plan.chains or compile_blocks):
            stream = block(stream, *arguments, plan)
        elif not plan.chains:
            stream = whole(block, stream, *arguments, plan)
        else:
            if normed is None:
                normed = block.enter(stream, vectors[0], text_seq_length, plan)
            stream, forwarded = branches(block, stream, normed, *arguments, plan)
            if following is not None and following[2].chains:
                after, (first, _), its_plan = following
                parts = (stream, forwarded, vectors[1].gate, first)
                stream, normed = after.enter_after(*parts, text_seq_length, its_plan)
                del parts
            else:
                stream, normed = block.leave(stream, forwarded, vectors[1], text_seq_length, plan), None
            del forwarded  # two streams that would lie beside all of the next block
    # Not by brackets: they ask for the device, so that the graph of a GPU could not be traced without one.
    video = transformer.norm_final(stream.narrow(1, text_seq_length, stream.shape[1] - text_seq_length))
    video = transformer.norm_out.norm(video) * (1 + modulation.final_scale) + modulation.final_shift
    return transformer.proj_out(video)
