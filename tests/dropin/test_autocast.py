"""torch.autocast around a pipeline or a model means what it means around diffusers' own."""

import pytest
import torch
from accelerate import Accelerator

from cogvx_fast import EngineConfig, accelerate
from tests import toy

from .generations import assert_differs, latents, relative, transformer_inputs

BF16 = torch.bfloat16
CONFIGS = {
    "default": EngineConfig(),
    "torch": EngineConfig(fuse_operations=False, fuse_projections=False, pack_weights=False, fast_vae=True),
}


def assert_as_close(output, expected, exact):
    """`output` is in the precision that `expected` is in: of its dtype, its error about the same, and not exact."""
    assert output.dtype == expected.dtype
    own = relative(expected, exact)
    assert 0.3 * own < relative(output, exact) < 1.5 * own


@pytest.mark.parametrize("variant", ["2b", "5b"])
@pytest.mark.parametrize("config", CONFIGS)
def test_autocast_around_a_generation(config, variant):
    reference = toy.pipeline(variant)
    fast = accelerate(reference, CONFIGS[config])
    exact = latents(reference)
    with torch.autocast("cpu", dtype=BF16):
        expected, output = latents(reference), latents(fast)
    assert_differs(expected, exact)
    assert_as_close(output, expected, exact)
    assert relative(latents(fast), exact) < 1e-4  # and nothing of it is left


@pytest.mark.parametrize("order", ["inside", "outside"])
@pytest.mark.parametrize("config", CONFIGS)
def test_autocast_around_a_forward_pass(config, order):
    reference = toy.transformer()
    model = accelerate(toy.pipeline(), CONFIGS[config]).transformer
    arguments = transformer_inputs(reference)
    results = []
    for each in (reference, model):
        if order == "inside":
            with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
                results.append(each(**arguments).sample)
        else:
            with torch.autocast("cpu", dtype=BF16), torch.no_grad():
                results.append(each(**arguments).sample)
    with torch.no_grad():
        exact = reference(**arguments).sample
    assert_as_close(results[1], results[0], exact)


@pytest.mark.parametrize("config", CONFIGS)
def test_autocast_around_the_autoencoder(config):
    reference, model = toy.vae(), accelerate(toy.pipeline(), CONFIGS[config]).vae
    sample = torch.randn(1, 3, 9, toy.SIZE, toy.SIZE, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    with torch.no_grad():
        exact = reference.encode(sample).latent_dist.mode()
        pixels = reference.decode(exact).sample
        results = []
        for vae in (reference, model):
            with torch.autocast("cpu", dtype=BF16):
                results.append((vae.encode(sample).latent_dist.mode(), vae.decode(exact).sample))
    for output, expected, right in zip(results[1], results[0], (exact, pixels), strict=True):
        assert_as_close(output, expected, right)


def test_latents_in_half_precision_under_autocast():
    """What autocast is for: inputs of any dtype go into weights of fp32."""
    reference, model = toy.transformer(), accelerate(toy.pipeline()).transformer
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        expected = reference(**transformer_inputs(reference, BF16)).sample
        output = model(**transformer_inputs(model, BF16)).sample
    with torch.no_grad():
        exact = reference(**transformer_inputs(reference)).sample
    assert_as_close(output, expected, exact)


def test_training_under_autocast():
    results = []
    for model in (toy.transformer(), accelerate(toy.pipeline()).transformer):
        model.train()
        with torch.autocast("cpu", dtype=BF16):
            model(**transformer_inputs(model)).sample.float().square().mean().backward()
        results.append([model.transformer_blocks[0].norm1.linear.weight.grad, model.proj_out.weight.grad])
    for output, expected in zip(results[1], results[0], strict=True):
        assert output.dtype == expected.dtype and relative(output, expected) < 5e-2


@pytest.mark.parametrize("fused", [True, False])
def test_mixed_precision_of_accelerate(fused):
    """`Accelerator.prepare` puts autocast and a cast back to fp32 around the model's forward."""
    exact = latents(toy.pipeline())
    results = []
    for pipe in (toy.pipeline(), accelerate(toy.pipeline(), EngineConfig(fuse_operations=fused))):
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        prepared = accelerator.prepare(pipe.transformer)
        with torch.no_grad():
            direct = prepared(**transformer_inputs(prepared)).sample
        pipe.transformer = prepared
        results.append((latents(pipe), direct))
        pipe.transformer = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert relative(latents(pipe), exact) < 1e-4
    assert results[1][1].dtype == results[0][1].dtype == torch.float32
    assert relative(results[1][1], results[0][1]) < 2e-2
    assert_as_close(results[1][0], results[0][0], exact)


def test_mixed_precision_before_accelerate():
    exact = latents(toy.pipeline())
    results = []
    for is_fast in (False, True):
        pipe = toy.pipeline()
        pipe.transformer = Accelerator(mixed_precision="bf16", cpu=True).prepare(pipe.transformer)
        if is_fast:
            try:
                pipe = accelerate(pipe)
            except ValueError as error:
                assert "forward" in str(error) and "fast first" in str(error)
                return
        results.append(latents(pipe))
    assert_as_close(results[1], results[0], exact)
