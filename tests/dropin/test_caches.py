"""diffusers' caches: the same video as upstream with them, whenever they were turned on."""

import functools

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import (
    LayerSkipConfig,
    SmoothedEnergyGuidanceConfig,
    apply_faster_cache,
    apply_first_block_cache,
    apply_layer_skip,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)

from cogvx_fast import EngineConfig, accelerate
from tests import toy

from .generations import assert_differs, assert_same, latents, outcome

pytestmark = pytest.mark.slow

STEPS = 8
THRESHOLD = 0.9  # by which the first block of the toy may change: more in some steps, less in others
RATIOS = [1.0, 1.01, 0.99, 1.0, 1.02, 1.0, 0.98, 1.0]


def pyramid(timestep):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        current_timestep_callback=timestep,
    )


def faster(timestep):
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(100, 900),
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=timestep,
        tensor_format="BFCHW",
    )


CACHES = {
    "pyramid attention broadcast": (pyramid, apply_pyramid_attention_broadcast),
    "faster cache": (faster, apply_faster_cache),
    "first block": (lambda _: FirstBlockCacheConfig(threshold=THRESHOLD), apply_first_block_cache),
    "mag": (
        lambda _: MagCacheConfig(threshold=0.2, max_skip_steps=2, num_inference_steps=STEPS, mag_ratios=RATIOS),
        apply_mag_cache,
    ),
    "taylor seer of blocks": (
        lambda _: TaylorSeerCacheConfig(
            cache_interval=2,
            disable_cache_before_step=3,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"transformer_blocks\.\d+"],
        ),
        apply_taylorseer_cache,
    ),
    "taylor seer, lite": (
        lambda _: TaylorSeerCacheConfig(cache_interval=3, taylor_factors_dtype=torch.float32, use_lite_mode=True),
        apply_taylorseer_cache,
    ),
    "taylor seer of feed-forwards": (
        lambda _: TaylorSeerCacheConfig(
            cache_interval=3,
            disable_cache_before_step=2,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"transformer_blocks\.\d+\.ff", r"transformer_blocks\.\d+\.attn1"],
        ),
        apply_taylorseer_cache,
    ),
}


def run(pipe, **overrides):
    return latents(pipe, num_steps=STEPS, **overrides)


@pytest.fixture(scope="module")
def plain():
    return {variant: run(toy.pipeline(variant)) for variant in ("2b", "5b")}


@functools.cache
def upstream(cache, variant):
    pipe = toy.pipeline(variant)
    config, _ = CACHES[cache]

    def generate():
        pipe.transformer.enable_cache(config(lambda: pipe.current_timestep))
        return run(pipe)

    return outcome(generate)


def compare(generate, expected, plain):
    if isinstance(expected, Exception):
        with pytest.raises(type(expected)):
            generate()
        return
    assert_differs(expected, plain)
    assert_same(generate(), expected)


@pytest.mark.parametrize(
    ("cache", "variant"), [*((cache, "2b") for cache in CACHES), *((cache, "5b") for cache in ("first block", "mag"))]
)
def test_enabled_after(cache, variant, plain):
    fast = accelerate(toy.pipeline(variant))

    def generate():
        fast.transformer.enable_cache(CACHES[cache][0](lambda: fast.current_timestep))
        return run(fast)

    expected = upstream(cache, variant)
    compare(generate, expected, plain[variant])
    if not isinstance(expected, Exception):
        assert fast.transformer.is_cache_enabled
        assert_same(run(fast), expected)  # the state of a generation is reset before the next
        fast.transformer.disable_cache()
    assert_same(run(fast), plain[variant])


@pytest.mark.parametrize(
    ("cache", "how"),
    [*((cache, "enable_cache") for cache in CACHES), ("first block", "apply"), ("faster cache", "apply")],
)
def test_enabled_before(cache, how, plain):
    """On the original, then accelerate(): the same, or refused in words; the callback looks at the old pipeline."""
    expected, pipe = upstream(cache, "2b"), toy.pipeline()
    config, apply = CACHES[cache]
    made = config(lambda: pipe.current_timestep)
    if how == "apply":
        apply(pipe.transformer, made)
    else:
        pipe.transformer.enable_cache(made)
    try:
        fast = accelerate(pipe)
    except ValueError as error:
        assert "cache" in str(error) and "fast first" in str(error)
        return
    compare(lambda: run(fast), expected, plain["2b"])
    if how == "enable_cache":
        assert fast.transformer.is_cache_enabled
        fast.transformer.disable_cache()
        assert_same(run(fast), plain["2b"])


@pytest.mark.parametrize("cache", ["pyramid attention broadcast", "faster cache"])
def test_a_callback_that_holds_the_old_pipeline(cache, plain):
    """`current_timestep_callback=lambda: pipe.current_timestep` with the `pipe` from before accelerate()."""
    expected, pipe = upstream(cache, "2b"), toy.pipeline()
    fast = accelerate(pipe)
    fast.transformer.enable_cache(CACHES[cache][0](lambda: pipe.current_timestep))
    compare(lambda: run(fast), expected, plain["2b"])


@pytest.mark.parametrize("cache", ["pyramid attention broadcast", "first block"])
@pytest.mark.parametrize("config", [{"recipe": "int8"}, {"fuse_operations": False}, {"pack_weights": False}], ids=str)
def test_with_other_engines(cache, config, plain):
    fast = accelerate(toy.pipeline(), EngineConfig(**config))
    without = run(fast)
    fast.transformer.enable_cache(CACHES[cache][0](lambda: fast.current_timestep))
    output = run(fast)
    assert_differs(output, without)
    assert_same(output, upstream(cache, "2b"), limit=0.2 if "recipe" in config else 1e-4)
    fast.transformer.disable_cache()
    assert_same(run(fast), without)


def test_a_cache_is_one_pipelines_own(plain):
    """Of two pipelines that share weights, the one that did not ask for a cache has none."""
    original = toy.pipeline()
    fast = accelerate(original)
    fast.transformer.enable_cache(FirstBlockCacheConfig(threshold=THRESHOLD))
    assert not original.transformer.is_cache_enabled
    assert_same(run(original), plain["2b"])
    assert_same(run(fast), upstream("first block", "2b"))


def test_the_report_names_the_cache():
    fast = accelerate(toy.pipeline())
    fast.transformer.enable_cache(FirstBlockCacheConfig(threshold=THRESHOLD))
    run(fast)
    assert "cache" in str(fast.engine_report()).lower()


@pytest.mark.parametrize("layers", [[1], [0, 2]], ids=str)
def test_layer_skipping(layers):
    """The hook of skip-layer guidance, on whole blocks."""
    config = LayerSkipConfig(indices=layers, fqn="transformer_blocks", skip_attention=True, skip_ff=True)
    results = []
    for pipe in (toy.pipeline(), accelerate(toy.pipeline())):
        apply_layer_skip(pipe.transformer, config)
        results.append(outcome(lambda pipe=pipe: run(pipe)))
    if isinstance(results[0], Exception):
        assert isinstance(results[1], Exception)
        return
    assert_same(results[1], results[0])


def test_smoothed_energy_guidance_is_not_ignored():
    from diffusers.hooks.smoothed_energy_guidance_utils import _apply_smoothed_energy_guidance_hook

    results = []
    for pipe in (toy.pipeline(), accelerate(toy.pipeline())):

        def generate(pipe=pipe):
            config = SmoothedEnergyGuidanceConfig(indices=[1], fqn="transformer_blocks")
            _apply_smoothed_energy_guidance_hook(pipe.transformer, config, blur_sigma=5.0)
            return run(pipe)

        results.append(outcome(generate))
    if isinstance(results[0], Exception):
        assert isinstance(results[1], Exception)
        return
    assert_same(results[1], results[0])
