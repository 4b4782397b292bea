"""The recipes as contenders: what they run, and what they are held to."""

import torch

from cogvx_fast.bench.gate import FLOOR_DB
from cogvx_fast.bench.recipes import diffusers_torchao, recipes
from cogvx_fast.quantization import RECIPES
from cogvx_fast.quantization.apply import quantized_names
from tests import toy


def test_every_recipe_stands_beside_exact_and_diffusers():
    contenders = recipes()
    assert list(contenders)[:2] == ["diffusers", "ours"] and {f"ours-{name}" for name in RECIPES} <= set(contenders)
    lossy = {name for name, contender in contenders.items() if contender.floor_db is not None}
    assert lossy == set(contenders) - {"diffusers", "ours"}
    assert all(contenders[name].floor_db == FLOOR_DB for name in lossy)
    assert contenders["ours-fp8"].devices == ("cuda",) and contenders["ours-int8"].devices is None


def test_the_contenders_share_unchanged_weights():
    pipe = toy.pipeline()
    expected = pipe(**toy.inputs(num_steps=1, output_type="latent")).frames
    ours = recipes()["ours-int8"].build(pipe, None, "dit-step").pipeline
    theirs = diffusers_torchao(pipe, None, "dit-step", "int8").pipeline
    names = list(quantized_names(theirs.transformer))
    assert len(names) == 18 and names == list(quantized_names(ours.transformer))
    assert not list(quantized_names(pipe.transformer))
    outputs = [p(**toy.inputs(num_steps=1, output_type="latent")).frames for p in (ours, theirs, pipe)]
    assert torch.equal(outputs[2], expected)
    errors = [((output - expected).norm() / expected.norm()).item() for output in outputs[:2]]
    assert all(1e-3 < error < 0.05 for error in errors)


def test_contenders_say_what_their_weights_take():
    pipe = toy.pipeline()
    held = {}
    for name in ("diffusers", "ours", "ours-int8", "diffusers-int8", "diffusers-int8-compile-freeze"):
        held[name] = recipes()[name].build(pipe, None, "dit-step").late_extras()["weights_bytes"]
    assert held["diffusers"] == held["ours"] == sum(p.numel() * 4 for p in pipe.transformer.parameters())
    assert held["ours-int8"] == held["diffusers-int8"] == held["diffusers-int8-compile-freeze"] < held["ours"]
