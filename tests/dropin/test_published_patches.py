"""Speed-ups that are published as patches of torch or of diffusers' classes: used, or refused in words.

What stands here is written from their documentation, not taken from them.
"""

import pytest
import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from cogvx_fast import EngineConfig, accelerate
from tests import toy

from .generations import assert_differs, assert_same, latents, line, outcome

pytestmark = pytest.mark.slow


def half_attention(calls):
    """As SageAttention's README says: a function in the place of `F.scaled_dot_product_attention`."""
    original = F.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
        calls.append((tuple(query.shape), attn_mask is None and dropout_p == 0.0 and not is_causal))
        return original(query, key, value, attn_mask=attn_mask, scale=scale) * 0.5

    return attention


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("config", ["auto", "sdpa"])
def test_attention_replaced_in_torch(config, when, monkeypatch):
    calls, plain, pipe = [], latents(toy.pipeline()), toy.pipeline()
    if when == "after":
        pipe = accelerate(pipe, EngineConfig(attention=config))
    monkeypatch.setattr(F, "scaled_dot_product_attention", half_attention(calls))
    expected = latents(toy.pipeline())
    own = [call for call in calls if call[0][1] == 2]  # two heads: the transformer's, and not the text encoder's
    assert len(own) == 9
    calls.clear()
    assert_differs(expected, plain)
    if when == "before":
        pipe = accelerate(pipe, EngineConfig(attention=config))
    assert_same(latents(pipe), expected)
    ours = [call for call in calls if call[0][1] == 2]
    assert ours == own and all(plain_call for _, plain_call in ours)  # (batch, heads, tokens, head_dim)
    detail = line(pipe, "attention").detail
    assert "scaled_dot_product_attention" in detail and ("replaced" in detail or "patched" in detail)
    monkeypatch.undo()
    assert_same(latents(pipe), plain)
    assert "replaced" not in line(pipe, "attention").detail


def of_head_dim_64():
    """In bf16, the family's head dim: where a CPU has units for it, the engine has attention of its own."""
    pipe = toy.pipeline()
    pipe.transformer = toy.transformer(num_attention_heads=1, attention_head_dim=64)
    return pipe.to(dtype=torch.bfloat16)


def test_attention_replaced_in_torch_where_the_engine_has_its_own(monkeypatch):
    calls, fast = [], accelerate(of_head_dim_64())
    plain = latents(fast)
    monkeypatch.setattr(F, "scaled_dot_product_attention", half_attention(calls))
    expected, output = latents(of_head_dim_64()), latents(fast)
    assert_differs(expected, plain, least=0.1)
    assert_same(output, expected, limit=5e-2)
    assert "scaled_dot_product_attention" in line(fast, "attention").detail


@pytest.mark.parametrize("name", ["avx512", "amx"])
def test_another_backend_by_name_is_not_the_patch(name, monkeypatch):
    """Asked for by name, a backend that does not go through torch's function runs, and the report says which."""
    fast = accelerate(of_head_dim_64(), EngineConfig(attention=name))
    embeds = torch.randn(1, toy.TEXT_LENGTH, toy.TEXT_DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    given = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": -embeds}  # T5 has torch's attention too
    plain = outcome(lambda: latents(fast, **given))
    if isinstance(plain, ValueError):
        pytest.skip(f"not on this machine: {plain}")
    monkeypatch.setattr(F, "scaled_dot_product_attention", half_attention([]))
    assert_same(latents(fast, **given), plain, limit=5e-2)
    assert name in line(fast, "attention").detail


def cached_forward(state):
    """A forward as TeaCache publishes one: diffusers' own, with the loop over blocks left out now and then."""

    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        timestep,
        timestep_cond=None,
        ofs=None,
        image_rotary_emb=None,
        attention_kwargs=None,
        return_dict=True,
    ):
        batch, num_frames, _, height, width = hidden_states.shape
        emb = self.time_embedding(self.time_proj(timestep).to(dtype=hidden_states.dtype), timestep_cond)
        hidden_states = self.embedding_dropout(self.patch_embed(encoder_hidden_states, hidden_states))
        text_length = encoder_hidden_states.shape[1]
        text, video = hidden_states[:, :text_length], hidden_states[:, text_length:]
        state["calls"] = state.get("calls", 0) + 1
        if state["calls"] % 2 == 0 and "residual" in state:
            video = video + state["residual"]
        else:
            before = video.clone()
            for block in self.transformer_blocks:
                video, text = block(
                    hidden_states=video, encoder_hidden_states=text, temb=emb, image_rotary_emb=image_rotary_emb
                )
            state["residual"] = video - before
        video = self.norm_final(video)
        video = self.proj_out(self.norm_out(video, temb=emb))
        p = self.config.patch_size
        output = video.reshape(batch, num_frames, height // p, width // p, -1, p, p)
        output = output.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    return forward


def generate(pipe, state):
    state.clear()
    return latents(pipe, num_steps=6)


@pytest.mark.parametrize("variant", ["2b", "5b"])
@pytest.mark.parametrize("where", ["diffusers' class", "the model's class", "the model"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_that_is_published_as_a_patch(where, when, variant, monkeypatch):
    state = {}
    forward = cached_forward(state)
    plain = latents(toy.pipeline(variant), num_steps=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CogVideoXTransformer3DModel, "forward", forward)
        expected = generate(toy.pipeline(variant), state)
    assert state["calls"] == 6
    assert_differs(expected, plain)

    def patched(pipe):
        if where == "diffusers' class":
            monkeypatch.setattr(CogVideoXTransformer3DModel, "forward", forward)
        elif where == "the model's class":
            monkeypatch.setattr(type(pipe.transformer), "forward", forward)
        else:
            pipe.transformer.forward = forward.__get__(pipe.transformer)

    pipe = toy.pipeline(variant)
    try:
        if when == "before":
            patched(pipe)
            pipe = accelerate(pipe)
        else:
            pipe = accelerate(pipe)
            patched(pipe)
        output = generate(pipe, state)
    except (TypeError, ValueError, RuntimeError) as error:
        assert "forward" in str(error) and ("EngineConfig" in str(error) or "enable_cache" in str(error))
        return
    assert state.get("calls") == 6, "the patched forward never ran, and nobody said so"
    assert_same(output, expected)
    assert not line(pipe, "modulation table").applied, "the engine's forward was never entered: the report must say so"


def test_blocks_called_as_diffusers_calls_them():
    """By name, with `temb`: video and text go in and come out."""
    reference, model = toy.transformer("5b"), accelerate(toy.pipeline("5b")).transformer
    generator = torch.Generator().manual_seed(0)
    video, text = torch.randn(2, 12, 64, generator=generator), torch.randn(2, 16, 64, generator=generator)
    temb, angles = torch.randn(2, 24, generator=generator), torch.rand(12, 32, generator=generator)
    rotary = (angles.cos(), angles.sin())
    with torch.no_grad():
        for theirs, ours in zip(reference.transformer_blocks, model.transformer_blocks, strict=True):
            arguments = {
                "hidden_states": video,
                "encoder_hidden_states": text,
                "temb": temb,
                "image_rotary_emb": rotary,
            }
            expected = theirs(**arguments)
            for output in (ours(**arguments), ours(video, text, temb, rotary)):
                assert isinstance(output, tuple) and len(output) == 2
                for each, want in zip(output, expected, strict=True):
                    assert_same(each, want)


def test_norms_called_as_diffusers_calls_them():
    reference, model = toy.transformer(), accelerate(toy.pipeline()).transformer
    video, text, temb = torch.randn(2, 12, 64), torch.randn(2, 16, 64), torch.randn(2, 24)
    with torch.no_grad():
        expected = reference.transformer_blocks[0].norm1(video, text, temb)
        for each, want in zip(model.transformer_blocks[0].norm1(video, text, temb), expected, strict=True):
            assert_same(each, want)
        assert_same(model.norm_out(video, temb=temb), reference.norm_out(video, temb=temb))


@pytest.mark.parametrize("when", ["before", "after"])
def test_cache_dit(when):
    """Its enable_cache() replaces the list of blocks: it works on ours or is refused in words."""
    cache_dit = pytest.importorskip("cache_dit", exc_type=ImportError)
    options = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 2, "residual_diff_threshold": 5.0}

    def enable(pipe):
        cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**options))
        return pipe

    plain = latents(toy.pipeline(), num_steps=8)
    expected = latents(enable(toy.pipeline()), num_steps=8)
    assert_differs(expected, plain)
    try:
        fast = accelerate(enable(toy.pipeline())) if when == "before" else enable(accelerate(toy.pipeline()))
        output = latents(fast, num_steps=8)
    except (AssertionError, TypeError, ValueError) as error:
        assert "cache" in str(error).lower()
        return
    assert_same(output, expected)
    assert not line(fast, "modulation table").applied or "cache" in str(fast.engine_report())
