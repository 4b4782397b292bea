"""Predicted bytes of weights against what quantizing them gives, by recipe; what doctor says of them."""

import json

import pytest
import torch
from typer.testing import CliRunner

from cogvx_fast import demo_checkpoint
from cogvx_fast.cli import app
from cogvx_fast.quantization import RECIPES
from cogvx_fast.quantization.apply import (
    quantize_text_encoder,
    quantize_transformer,
    shared_copy,
    storage_bytes,
)
from cogvx_fast.quantization.memory import Models, text_encoder_bytes, transformer_bytes, vae_bytes
from tests import toy


def held(model):
    return sum(map(storage_bytes, [*model.parameters(), *model.buffers()]))


@pytest.mark.parametrize("recipe", [None, "int8", "int8-weight", "fp8-weight"])
@pytest.mark.parametrize("variant", ["2b", "1.5-5b-i2v"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_take_what_is_predicted(recipe, dtype, variant):
    model, encoder = toy.transformer(variant).to(dtype), toy.text_encoder().to(dtype)
    scheme = None
    if recipe is not None:
        scheme = RECIPES[recipe].text_encoder
        model, encoder = shared_copy(model), shared_copy(encoder)
        quantize_transformer(model, RECIPES[recipe])
        quantize_text_encoder(encoder, scheme)
    vae = toy.vae().to(dtype)
    models = Models.from_configs(model.config, encoder.config.to_dict(), vae.config)
    for buffer in models.transformer.buffers():  # stays as it was when loading casts the weights, unlike here
        buffer.data = buffer.to(dtype)
    # From configurations, and from models that are quantized already.
    for given, given_scheme in ((models, scheme), (Models(model, encoder, vae), None)):
        assert transformer_bytes(given, RECIPES.get(recipe) if given is models else None, dtype) == held(model)
        assert text_encoder_bytes(given, given_scheme, dtype) == held(encoder)
        assert vae_bytes(given, dtype) == held(vae)


def doctor(*options):
    result = CliRunner().invoke(app, ["doctor", "--json", "--model", demo_checkpoint(), *options])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["memory"]["models"]


def test_doctor_plans_the_models_by_recipe():
    exact, int8 = (doctor("--dtype", "bfloat16", "--device", "cpu", *more) for more in ((), ("--recipe", "int8")))
    assert exact["recipe"] is None and int8["recipe"] == "int8"
    assert 0.5 < int8["transformer"] / exact["transformer"] < 0.8  # the modulation's weights stay as they are
    assert int8["text_encoder"] < exact["text_encoder"]
    assert int8["stages"]["decode"] < exact["stages"]["decode"]
    larger = doctor("--dtype", "bfloat16", "--device", "cpu", "--frames", "33")
    assert larger["activations"] > exact["activations"] and larger["transformer"] == exact["transformer"]


def test_doctor_shows_what_a_limit_leads_to():
    options = "--dtype", "bfloat16", "--device", "cpu", "--memory-limit"
    assert doctor(*options, "1GiB")["choice"].startswith("transformer as it is, text encoder as it is")
    tight = doctor(*options, "22MiB")
    assert tight["recipe"] == "int8-weight" and max(tight["stages"].values()) <= 22 * 2**20
    assert "not transformer as it is" in tight["choice"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory-limit", "1GiB"], "--memory-limit '1GiB': needs --model"),
        (["--memory-limit", "much", "--model", demo_checkpoint()], "must be a number of bytes or a string"),
        (["--memory-limit", "1MiB", "--model", demo_checkpoint()], "memory_limit=1.00 MiB is too small for 17 frames"),
        (["--recipe", "int8"], "--recipe 'int8': needs --model"),
        (["--recipe", "int3", "--model", demo_checkpoint()], "is unknown; allowed: balanced, native, int8"),
        (["--recipe", "fp8", "--device", "cpu", "--model", demo_checkpoint()], "cannot work here: fp8 products need"),
    ],
)
def test_what_cannot_be_planned_is_said(options, message):
    result = CliRunner().invoke(app, ["doctor", *options])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
