"""torch.compile in every place where users put it.

Tracing takes seconds even at this size: it is done where graphs count, and elsewhere it is only seen who is called.
"""

import json

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import nn
from torch._dynamo import OptimizedModule

from cogvx_fast import EngineConfig, FastCogVideoXPipeline, accelerate
from tests import toy

from .generations import assert_differs, assert_same, frames, latents, line

pytestmark = pytest.mark.slow


class Backend:
    """A dynamo backend that runs graphs as they are and counts how many it was given and how often they ran."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*args):
            self.runs += 1
            return graph(*args)

        return run


@pytest.mark.parametrize(("variant", "how"), [("5b", "torch.compile"), ("2b", "module.compile")])
def test_the_fast_transformer_is_compiled_as_one_graph(variant, how):
    torch._dynamo.reset()
    backend, pipe = Backend(), toy.pipeline(variant)
    pipe.transformer = toy.transformer(variant, num_layers=1)
    expected, fast = latents(pipe), accelerate(pipe)
    if how == "torch.compile":
        fast.transformer = torch.compile(fast.transformer, fullgraph=True, backend=backend)
    else:
        fast.transformer.compile(fullgraph=True, backend=backend)
    for _ in range(2):
        assert_same(latents(fast), expected)
    assert backend.graphs == 1 and backend.runs == 6  # every step ran compiled, and none broke the graph
    latents(fast, prompt="a dog", num_steps=5)
    assert backend.graphs == 1  # as upstream: another prompt and other steps compile nothing
    torch._dynamo.reset()


class Calls:
    """How often what `torch.compile` gave was called."""

    def __init__(self):
        self.number = 0

    def count(self, function):
        def counted(*args, **kwargs):
            self.number += 1
            return function(*args, **kwargs)

        return counted


@pytest.fixture
def compiled(monkeypatch):
    """What is compiled runs as it is, and its calls are counted."""
    calls, compile_, call = Calls(), torch.compile, OptimizedModule.__call__

    def compile_nothing(model=None, **options):
        if model is None:
            return lambda model: compile_nothing(model, **options)
        return compile_(model, **options) if isinstance(model, nn.Module) else calls.count(model)

    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr(OptimizedModule, "__call__", calls.count(call))
    with torch.compiler.set_stance("force_eager"):
        yield calls


def put(pipe, part, how, model=None):
    model = getattr(pipe, part) if model is None else model
    if how == "torch.compile":
        model = torch.compile(model)
    else:
        model.compile()
    setattr(pipe, part, model)


HOW = ["torch.compile", "module.compile"]


@pytest.mark.parametrize("how", HOW)
def test_compiled_first_and_made_fast_then(how, compiled):
    """The user's compilation is kept, or refused in words: a pipeline that quietly lost it is slower, not faster."""
    pipe = toy.pipeline()
    expected = latents(pipe)
    put(pipe, "transformer", how)
    try:
        fast = accelerate(pipe)
    except (TypeError, ValueError) as error:
        assert "compile" in str(error)
        return
    assert_same(latents(fast), expected)
    assert compiled.number == 3, "accelerate() dropped the user's torch.compile"
    assert_same(latents(pipe), expected)


@pytest.mark.parametrize("how", HOW)
def test_compiled_after_it_was_made_fast(how, compiled):
    fast = accelerate(toy.pipeline())
    put(fast, "transformer", how)
    for _ in range(2):
        assert_same(latents(fast), latents(toy.pipeline()))
    assert compiled.number == 6
    assert str(fast.engine_report())
    again = accelerate(fast, EngineConfig(recipe="int8"))
    assert_differs(latents(again), latents(toy.pipeline()), least=1e-4)  # of a compiled pipeline, another tier


@pytest.mark.parametrize("kind", ["reference", "fast"])
@pytest.mark.parametrize("how", HOW)
def test_a_compiled_transformer_put_in_later(kind, how, compiled):
    fast = accelerate(toy.pipeline(seed=7))
    latents(fast)
    model = toy.transformer() if kind == "reference" else accelerate(toy.pipeline()).transformer
    put(fast, "transformer", how, model)
    assert_same(latents(fast), latents(toy.pipeline()))
    assert compiled.number == 3, "the user's compiled transformer was not called"


def compile_autoencoder(pipe, how):
    if how in HOW:
        put(pipe, "vae", how)
    elif how == "decode":
        pipe.vae.decode = torch.compile(pipe.vae.decode)
    elif how == "encode":
        pipe.vae.encode = torch.compile(pipe.vae.encode)
    else:
        pipe.vae.decoder = torch.compile(pipe.vae.decoder)


@pytest.mark.parametrize("how", [*HOW, "decode", "encode", "decoder"])
@pytest.mark.parametrize("when", ["before", "after", "put in later"])
def test_a_compiled_autoencoder(how, when, compiled):
    """`decode` and `encode` of a compiled module are uncompiled upstream; a compiled decoder is called."""
    arguments = {"output_type": "pt", "num_frames": 9}
    reference = toy.pipeline()
    compile_autoencoder(reference, how)
    expected = frames(reference)
    sample = torch.randn(1, 3, 9, toy.SIZE, toy.SIZE, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    with torch.no_grad():
        moments = reference.vae.encode(sample).latent_dist.mode()
    called, compiled.number = compiled.number, 0
    pipe = toy.pipeline()
    if when == "after":
        pipe = accelerate(pipe)
        latents(pipe)
    if when == "put in later":
        pipe = accelerate(toy.pipeline())
        pipe.vae = toy.vae()
    compile_autoencoder(pipe, how)
    if when == "before":
        try:
            pipe = accelerate(pipe)
        except (TypeError, ValueError) as error:
            assert "compile" in str(error)
            return
    assert_same(frames(pipe, **arguments), expected)
    with torch.no_grad():
        assert_same(pipe.vae.encode(sample).latent_dist.mode(), moments)
    assert bool(compiled.number) == bool(called), "the user's torch.compile was dropped"
    if how == "decoder" or (how == "decode" and when != "after"):  # diffusers' own code ran, compiled
        assert "compile" in line(pipe, "vae").detail or not line(pipe, "vae").applied


@pytest.mark.parametrize("part", ["transformer", "vae"])
@pytest.mark.parametrize("how", HOW)
def test_saving_what_is_compiled(part, how, tmp_path, compiled):
    fast = accelerate(toy.pipeline())
    expected = frames(toy.pipeline())
    put(fast, part, how)
    latents(fast)
    fast.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "CogVideoXPipeline"
    for name, kind in (("transformer", CogVideoXTransformer3DModel), ("vae", AutoencoderKLCogVideoX)):
        assert index[name] == ["diffusers", kind.__name__]
        assert json.loads((tmp_path / name / "config.json").read_text())["_class_name"] == kind.__name__
    for cls in (CogVideoXPipeline, FastCogVideoXPipeline):
        loaded = cls.from_pretrained(tmp_path, dtype=torch.float32)
        loaded.set_progress_bar_config(disable=True)
        assert_same(frames(loaded), expected)


def test_compile_repeated_blocks(compiled):
    """Regional compilation, which diffusers' own class of this family does not offer."""
    outcomes, fast = [], accelerate(toy.pipeline())
    for model in (toy.transformer(), fast.transformer):
        try:
            model.compile_repeated_blocks(fullgraph=True)
            outcomes.append("compiled")
        except ValueError as error:
            outcomes.append(str(error))
    assert_same(latents(fast), latents(toy.pipeline()))
    if outcomes[1] == "compiled":
        assert compiled.number == 9  # three blocks, three steps
    else:
        assert "_repeated_blocks" in outcomes[1]


def test_adapters_in_a_compiled_transformer(tmp_path, compiled):
    from peft import LoraConfig, get_peft_model_state_dict

    donor = toy.pipeline()
    torch.manual_seed(0)
    donor.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "norm1.linear"], init_lora_weights=False))
    donor.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(donor.transformer))
    results = []
    for pipe in (toy.pipeline(), accelerate(toy.pipeline())):
        put(pipe, "transformer", "torch.compile")
        pipe.load_lora_weights(tmp_path, adapter_name="one")
        results.append(latents(pipe))
        pipe.disable_lora()  # upstream, this passes a compiled model over
        results.append(latents(pipe))
        pipe.unload_lora_weights()
        results.append(latents(pipe))
    assert_differs(results[0], latents(toy.pipeline()))
    for output, expected in zip(results[3:], results[:3], strict=True):
        assert_same(output, expected)
