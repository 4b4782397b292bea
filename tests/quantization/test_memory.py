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
from cogvx_fast.quantization.memory import predict
from tests import toy


def held(model):
    return sum(storage_bytes(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("recipe", [None, "int8", "int8-weight", "fp8-weight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_take_what_is_predicted(recipe, dtype):
    model, encoder = toy.transformer("1.5-5b-i2v").to(dtype), toy.text_encoder().to(dtype)
    scheme = None
    if recipe is not None:
        scheme = RECIPES[recipe].text_encoder
        model, encoder = shared_copy(model), shared_copy(encoder)
        quantize_transformer(model, RECIPES[recipe])
        quantize_text_encoder(encoder, scheme)
    prediction = predict(
        dict(model.config), encoder.config.to_dict(), RECIPES.get(recipe), scheme, dtype, batch=2, tokens=40
    )
    assert prediction.transformer == held(model) and prediction.text_encoder == held(encoder)


def doctor(*options):
    result = CliRunner().invoke(app, ["doctor", "--json", "--model", demo_checkpoint(), *options])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["memory"]["models"]


def test_doctor_plans_the_models_by_recipe():
    exact, int8 = (doctor("--dtype", "bfloat16", "--device", "cpu", *more) for more in ((), ("--recipe", "int8")))
    assert exact["recipe"] is None and int8["recipe"] == "int8"
    assert 0.5 < int8["transformer"] / exact["transformer"] < 0.8  # the modulation's weights stay as they are
    assert int8["text_encoder"] < exact["text_encoder"]
    larger = doctor("--dtype", "bfloat16", "--device", "cpu", "--frames", "33")
    assert larger["activations"] > exact["activations"] and larger["transformer"] == exact["transformer"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "int8"], "--recipe 'int8': needs --model"),
        (["--recipe", "int3", "--model", demo_checkpoint()], "is unknown; allowed: balanced, int8"),
        (["--recipe", "fp8", "--device", "cpu", "--model", demo_checkpoint()], "cannot work here: fp8 products need"),
    ],
)
def test_what_cannot_be_planned_is_said(options, message):
    result = CliRunner().invoke(app, ["doctor", *options])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
