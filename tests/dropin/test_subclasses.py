"""Users' own subclasses of pipelines and models: what they override is honoured, or refused with its name."""

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

from cogvx_fast import FastCogVideoXPipeline, accelerate
from tests import toy

from .generations import assert_differs, assert_same, frames, latents, transformer_inputs

pytestmark = pytest.mark.slow


class OwnCall(CogVideoXPipeline):
    def __call__(self, *args, **kwargs):
        output = super().__call__(*args, **kwargs)
        output.frames = output.frames * 0.5
        return output


class OwnPrompt(CogVideoXPipeline):
    def encode_prompt(self, *args, **kwargs):
        prompt, negative = super().encode_prompt(*args, **kwargs)
        return prompt * 2, negative


class OwnDecoding(CogVideoXPipeline):
    def decode_latents(self, latents):
        return super().decode_latents(latents * 0.5)


class OwnLatents(CogVideoXPipeline):
    def prepare_latents(self, *args, **kwargs):
        return super().prepare_latents(*args, **kwargs) * 0.5


class OwnAttribute(CogVideoXPipeline):
    strength = 2.0

    def helped(self):
        return self.strength

    def encode_prompt(self, *args, **kwargs):
        prompt, negative = super().encode_prompt(*args, **kwargs)
        return prompt * self.helped(), negative


METHODS = {
    OwnCall: "__call__",
    OwnPrompt: "encode_prompt",
    OwnDecoding: "decode_latents",
    OwnLatents: "prepare_latents",
    OwnAttribute: "encode_prompt",
}


def made_fast(pipe, *names):
    """The fast pipeline, or None where it was refused in words that say what would be lost."""
    try:
        return accelerate(pipe)
    except (TypeError, ValueError) as error:
        said = str(error)
        assert any(name in said for name in names), f"says nothing of {names}: {said}"
        return None


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_a_pipeline_of_ones_own(cls):
    pipe = toy.pipeline(cls=cls)
    expected = frames(pipe)
    assert_differs(expected, frames(toy.pipeline()))
    fast = made_fast(pipe, METHODS[cls], cls.__name__)
    if fast is not None:
        assert_same(frames(fast), expected)
    assert_same(frames(pipe), expected)


def test_a_subclass_that_overrides_nothing_is_made_fast():
    """A name of one's own, or more methods, loses nothing."""

    class Named(CogVideoXPipeline):
        def caption(self):
            return "mine"

    fast = accelerate(toy.pipeline(cls=Named))
    assert isinstance(fast, FastCogVideoXPipeline)
    assert_same(latents(fast), latents(toy.pipeline()))


def test_a_subclass_of_ours():
    class Own(FastCogVideoXPipeline):
        def encode_prompt(self, *args, **kwargs):
            prompt, negative = super().encode_prompt(*args, **kwargs)
            return prompt * 2, negative

    pipe = Own(**toy.pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    expected = latents(toy.pipeline(cls=OwnPrompt))
    assert_same(latents(pipe), expected)
    again = made_fast(pipe, "encode_prompt", "Own")
    if again is not None:
        assert_same(latents(again), expected)


@pytest.mark.parametrize("name", ["encode_prompt", "decode_latents", "prepare_latents"])
def test_a_method_replaced_on_the_pipeline(name):
    """Not a subclass: the attribute of one pipeline, as many notebooks do it."""

    def replaced(pipe):
        original = getattr(pipe, name)

        def changed(*args, **kwargs):
            if name == "decode_latents":
                return original(args[0] * 0.5)
            result = original(*args, **kwargs)
            return (result[0] * 2, result[1]) if isinstance(result, tuple) else result * 0.5

        setattr(pipe, name, changed)
        return pipe

    expected = frames(replaced(toy.pipeline()))
    assert_differs(expected, frames(toy.pipeline()))
    assert_same(frames(replaced(accelerate(toy.pipeline()))), expected)
    fast = made_fast(replaced(toy.pipeline()), name)
    if fast is not None:
        assert_same(frames(fast), expected)


class OwnTransformer(CogVideoXTransformer3DModel):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **{**kwargs, "return_dict": False})
        return (output[0] * 0.5,)


class OwnAutoencoder(AutoencoderKLCogVideoX):
    def decode(self, z, return_dict=True):
        return super().decode(z * 0.5, return_dict=return_dict)


class OwnEncoder(AutoencoderKLCogVideoX):
    def _encode(self, x):
        return super()._encode(x) * 0.5


class OwnBlock(CogVideoXBlock):
    def forward(self, *args, **kwargs):
        video, text = super().forward(*args, **kwargs)
        return video * 0.9, text


def of_class(model, cls):
    """The same weights in a model of the user's class."""
    own = cls.from_config(model.config)
    own.load_state_dict(model.state_dict())
    return own.eval()


def own_model_pipeline(kind):
    pipe = toy.pipeline()
    if kind == "transformer":
        pipe.transformer = of_class(pipe.transformer, OwnTransformer)
    elif kind in ("vae", "vae's encoder"):
        pipe.vae = of_class(pipe.vae, OwnAutoencoder if kind == "vae" else OwnEncoder)
    else:
        config = pipe.transformer.config
        sizes = (config.num_attention_heads, config.attention_head_dim, config.time_embed_dim)
        block = OwnBlock(64, *sizes, attention_bias=True)
        block.load_state_dict(pipe.transformer.transformer_blocks[1].state_dict())
        pipe.transformer.transformer_blocks[1] = block.eval()
    return pipe


KINDS = {
    "transformer": ("OwnTransformer", "forward"),
    "vae": ("OwnAutoencoder", "decode"),
    "block": ("OwnBlock", "forward"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_ones_own(kind):
    pipe = own_model_pipeline(kind)
    expected = frames(pipe)
    assert_differs(expected, frames(toy.pipeline()))
    fast = made_fast(pipe, *KINDS[kind])
    if fast is not None:
        assert_same(frames(fast), expected)
        named = [line for line in fast.engine_report().lines if KINDS[kind][0] in line.detail]
        # A model is left as it is; of blocks, that one is called as it is.
        assert named and (kind == "block" or not any(line.applied for line in named))
    assert_same(frames(pipe), expected)


@pytest.mark.parametrize("kind", ["transformer", "vae"])
def test_a_model_of_ones_own_put_in_later(kind):
    expected = frames(own_model_pipeline(kind))
    fast = accelerate(toy.pipeline())
    frames(fast)
    setattr(fast, kind, getattr(own_model_pipeline(kind), kind))
    try:
        output = frames(fast)
    except (TypeError, ValueError) as error:
        assert any(name in str(error) for name in KINDS[kind])
        return
    assert_same(output, expected)


def test_an_encoder_of_ones_own():
    pipe = own_model_pipeline("vae's encoder")
    sample = torch.randn(1, 3, 9, toy.SIZE, toy.SIZE, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    with torch.no_grad():
        expected = pipe.vae.encode(sample).latent_dist.mode()
        fast = made_fast(pipe, "OwnEncoder", "_encode")
        if fast is not None:
            assert_same(fast.vae.encode(sample).latent_dist.mode(), expected)


@pytest.mark.parametrize("where", ["transformer", "transformer_blocks.1", "transformer_blocks.1.ff", "time_embedding"])
def test_a_forward_replaced_on_a_module(where):
    """`module.forward = …` on one object: upstream calls it."""
    pipe = toy.pipeline()
    module = pipe.transformer.get_submodule("" if where == "transformer" else where)
    original = module.forward

    def changed(*args, **kwargs):
        output = original(*args, **kwargs)
        if isinstance(output, tuple):
            return tuple(part * 0.9 for part in output)
        return output * 0.9

    module.forward = changed
    expected = latents(pipe)
    assert_differs(expected, latents(toy.pipeline()))
    fast = made_fast(pipe, "forward", "fast first")
    if fast is not None:
        assert_same(latents(fast), expected)


def test_subclasses_of_layers():
    """A linear of the user's class, or one that was swapped for something else, is called."""

    class Halved(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 0.5

    names = ["attn1.to_q", "norm1.linear", "ff.net.2", "attn1.to_out.0"]
    for name in names:
        results = []
        for is_fast in (False, True):
            pipe = toy.pipeline()
            block = pipe.transformer.transformer_blocks[1]
            old = block.get_submodule(name)
            new = Halved(old.in_features, old.out_features)
            new.load_state_dict(old.state_dict())
            block.set_submodule(name, new)
            results.append(latents(accelerate(pipe) if is_fast else pipe))
        assert_same(results[1], results[0])


def test_layers_of_ones_own_in_embeddings():
    results = []
    for is_fast in (False, True):
        pipe = toy.pipeline()
        norm = torch.nn.RMSNorm(64)
        pipe.transformer.norm_final = norm
        pipe.transformer.patch_embed.text_proj = torch.nn.Sequential(
            pipe.transformer.patch_embed.text_proj, torch.nn.Tanh()
        )
        results.append(latents(accelerate(pipe) if is_fast else pipe))
    assert_same(results[1], results[0])


def test_one_forward_pass_of_a_subclass():
    model = own_model_pipeline("transformer").transformer
    pipe = toy.pipeline()
    pipe.transformer = model
    arguments = transformer_inputs(model)
    with torch.no_grad():
        expected = model(**arguments)[0]
        fast = made_fast(pipe, *KINDS["transformer"])
        if fast is not None:
            assert_same(fast.transformer(**arguments)[0], expected)
