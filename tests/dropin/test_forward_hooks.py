"""Forward hooks of torch on modules, put there before or after accelerate(): they run and what they return counts."""

import functools

import pytest
import torch

from cogvx_fast import accelerate
from tests import toy

from .generations import assert_differs, assert_same, frames, latents, transformer_inputs

pytestmark = pytest.mark.slow

MODULES = (
    "transformer",
    "transformer.patch_embed",
    "transformer.patch_embed.text_proj",
    "transformer.time_embedding",
    "transformer.transformer_blocks.1",
    "transformer.transformer_blocks.1.norm1",
    "transformer.transformer_blocks.1.norm1.norm",
    "transformer.transformer_blocks.1.norm1.linear",
    "transformer.transformer_blocks.1.attn1",
    "transformer.transformer_blocks.1.attn1.to_q",
    "transformer.transformer_blocks.1.attn1.norm_k",
    "transformer.transformer_blocks.1.norm2",
    "transformer.transformer_blocks.1.ff",
    "transformer.transformer_blocks.1.ff.net.0.proj",
    "transformer.norm_out",
    "transformer.proj_out",
    "vae.decoder",
    "vae.decoder.mid_block.resnets.0",
    "vae.decoder.up_blocks.0.resnets.0.norm1",
    "text_encoder",
)
# Upstream never calls the autoencoder itself, so a hook on it never runs: nor may it with us.


def changed(value):
    """A result with every channel scaled a little, each in its own way, which no norm after it undoes."""
    if isinstance(value, torch.Tensor):
        return value * torch.linspace(0.8, 1.1, value.shape[-1]) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(changed(part) for part in value)
    if hasattr(value, "last_hidden_state"):
        value.last_hidden_state = changed(value.last_hidden_state)
    elif hasattr(value, "sample"):
        value.sample = changed(value.sample)
    return value


class Watch:
    """A hook that changes what it sees, and counts how often it does."""

    calls = 0

    def forward(self, module, args, output):
        self.calls += 1
        return changed(output)

    def pre(self, module, args, kwargs):
        self.calls += 1
        return changed(args), {name: changed(value) for name, value in kwargs.items()}

    def put(self, pipe, name, kind):
        module = getattr(pipe, name.split(".")[0])
        module = module.get_submodule(name.partition(".")[2])
        if kind == "forward":
            return module.register_forward_hook(self.forward)
        return module.register_forward_pre_hook(self.pre, with_kwargs=True)


CASES = [(name, "forward") for name in MODULES] + [
    (name, "pre") for name in MODULES if name.endswith(("transformer", "s.1", "1.norm1", "attn1", "ff", "decoder"))
]


def generate(pipe, name):
    return frames(pipe, num_steps=1) if name.startswith("vae") else latents(pipe, num_steps=2)


@functools.cache
def plain(name):
    return generate(toy.pipeline(), name)


@functools.cache
def upstream(name, kind):
    pipe, watch = toy.pipeline(), Watch()
    watch.put(pipe, name, kind)
    output = generate(pipe, name)
    assert watch.calls > 0
    assert_differs(output, plain(name.split(".")[0]), least=1e-4)
    return output


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_forward_hook(name, kind, when):
    pipe, watch = toy.pipeline(), Watch()
    if when == "before":
        handle = watch.put(pipe, name, kind)
        try:
            pipe = accelerate(pipe)
        except ValueError as error:
            assert "hook" in str(error) and "fast first" in str(error)
            return
    else:
        pipe = accelerate(pipe)
        handle = watch.put(pipe, name, kind)
    output = generate(pipe, name)
    assert watch.calls > 0, "the hook never ran, and nobody said so"
    assert_same(output, upstream(name, kind))
    handle.remove()
    assert_same(generate(pipe, name), plain(name.split(".")[0]))


@pytest.mark.parametrize("name", ["transformer.transformer_blocks.1", "transformer.transformer_blocks.1.attn1"])
def test_what_a_hook_sees_is_what_it_sees_upstream(name):
    """Feature extraction: the arguments and results of a block and of attention, video and text apart."""
    seen = []
    for pipe in (toy.pipeline(), accelerate(toy.pipeline())):
        shapes, values = [], []

        def look(module, args, kwargs, output, shapes=shapes, values=values):
            tensors = {k: tuple(v.shape) for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
            shapes.append((tensors, [tuple(part.shape) for part in output]))
            values.append(output[0])

        pipe.transformer.get_submodule(name.partition(".")[2]).register_forward_hook(look, with_kwargs=True)
        frames(pipe)
        seen.append((shapes, values))
    assert seen[1][0] == seen[0][0]
    for output, expected in zip(seen[1][1], seen[0][1], strict=True):
        assert_same(output, expected)


def test_a_backward_hook_while_training():
    gradients = []
    for pipe in (toy.pipeline(), accelerate(toy.pipeline())):
        got = []
        pipe.transformer.transformer_blocks[1].ff.register_full_backward_hook(lambda m, i, o, got=got: got.append(o[0]))
        pipe.transformer(**transformer_inputs(pipe.transformer)).sample.square().mean().backward()
        gradients.append(got)
    assert len(gradients[0]) == len(gradients[1]) == 1
    assert_same(gradients[1][0], gradients[0][0], limit=1e-3)


def test_global_hooks():
    """`register_module_forward_hook` of torch: profilers and feature extractors hang on every module."""
    counts = []
    for pipe in (toy.pipeline(), accelerate(toy.pipeline())):
        names = {module: name for name, module in pipe.transformer.named_modules()}
        seen = set()
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, output, names=names, seen=seen: seen.add(names.get(module)) and None
        )
        try:
            frames(pipe)
        finally:
            handle.remove()
        counts.append(seen - {None})
    for name in ("transformer_blocks.1", "transformer_blocks.1.attn1", "transformer_blocks.1.ff.net.2", "proj_out"):
        assert name in counts[0] and name in counts[1]
