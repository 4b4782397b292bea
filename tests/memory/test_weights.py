"""Predicted bytes of weights against what quantizing them gives, by recipe."""

import pytest
import torch

from cogvx_fast import EngineConfig, accelerate
from cogvx_fast.memory.weights import Models, text_encoder_bytes, transformer_bytes, vae_bytes
from cogvx_fast.quantization import RECIPES, Scheme
from cogvx_fast.quantization.apply import (
    quantize_text_encoder,
    quantize_transformer,
    shared_copy,
    storage_bytes,
)
from cogvx_fast.quantization.recipes import AS_THEY_ARE
from tests import toy


def held(model):
    return sum(map(storage_bytes, [*model.parameters(), *model.buffers()]))


@pytest.mark.parametrize("recipe", [None, "int8", "int8-weight", "fp8-weight"])
@pytest.mark.parametrize("variant", ["2b", "1.5-5b-i2v"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_take_what_is_predicted(recipe, dtype, variant):
    model, encoder = toy.transformer(variant).to(dtype), toy.text_encoder().to(dtype)
    scheme = "native"
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
    for given, given_scheme in ((models, scheme), (Models(model, encoder, vae), "native")):
        assert transformer_bytes(
            given, RECIPES.get(recipe, AS_THEY_ARE) if given is models else AS_THEY_ARE, dtype
        ) == held(model)
        assert text_encoder_bytes(given, given_scheme, dtype) == held(encoder)
        assert vae_bytes(given, dtype) == held(vae)


def test_what_models_are_quantized_by_is_seen():
    exact = Models.of(toy.pipeline())
    assert (exact.recipe, exact.text_scheme) == (AS_THEY_ARE, "native")
    for recipe, scheme in (("int8", Scheme.INT8_WEIGHT), ("int8-weight", Scheme.FP8_WEIGHT)):
        config = EngineConfig(recipe=recipe, text_encoder=str(scheme))
        models = Models.of(accelerate(toy.pipeline(), config))
        assert (models.recipe, models.text_scheme) == (RECIPES[recipe], scheme)


def test_a_pipeline_may_lack_models():
    models = Models(None, None, None)
    assert (
        transformer_bytes(models, AS_THEY_ARE, torch.float16)
        == text_encoder_bytes(models, "native", torch.float16)
        == 0
    )
    assert vae_bytes(models, torch.float16) == 0 and models.variant.width == 1920
