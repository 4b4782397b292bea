"""What a step and a prompt are predicted to allocate against what the allocator counts."""

import pytest
import torch
from cogvx_kernels.adaln import cpu as stream
from cogvx_kernels.packed_linear import cpu as onednn
from cogvx_kernels.w8a8_linear import cpu as int8
from torch.profiler import ProfilerActivity, profile
from transformers import T5Config, T5EncoderModel

from cogvx_fast import EngineConfig, accelerate
from cogvx_fast.config import CompileMode
from cogvx_fast.family import TEXT_TOKENS, Variant
from cogvx_fast.memory.step import Tokens, step_memory
from cogvx_fast.memory.weights import Models, text_encoding_bytes
from cogvx_fast.plan import Product
from cogvx_fast.quantization import RECIPES
from cogvx_fast.quantization.apply import quantize_text_encoder
from tests import toy
from tests.memory.plans import CPU, GPU, plan

pytestmark = pytest.mark.slow

STEPS, TEXT = 4, 64


def allocated(call):
    """The bytes that torch's allocator had given out, over those at the start: when `call` ended, and at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return held, most


def counted(heads, side, dtype, config, has_own_size=True):
    """Of a step at 2b's layer sizes but for the number of heads: plan, prediction, and what was counted of it."""
    variant = {"num_attention_heads": heads, "attention_head_dim": 64, "num_layers": 2, "time_embed_dim": 512}
    size = {"sample_height": side, "sample_width": side, "max_text_seq_length": TEXT, "text_embed_dim": 128}
    pipe = toy.pipeline()
    pipe.transformer = toy.transformer(**variant, **size, sample_frames=9 if has_own_size else 17)
    fast = accelerate(pipe.to(dtype), config)
    fast.scheduler.set_timesteps(STEPS)
    latents = torch.randn(2, 3, 16, side, side, dtype=dtype)
    text = torch.randn(2, TEXT, 128, dtype=dtype)

    def step(number):
        fast.transformer(latents, text, fast.scheduler.timesteps[number].expand(2), return_dict=False)

    with torch.no_grad(), fast.engine_session():
        step(0)  # what is freed when weights are merged for the first time is not counted
    with torch.no_grad(), fast.engine_session(watched=False) as session:
        held, _ = allocated(lambda: step(0))
        packed = sum(block.packed_bytes for block in session.ran.blocks)
        _, most = allocated(lambda: step(1))
        tokens = Tokens(TEXT, 3 * (side // 2) ** 2, steps=STEPS, reads_positions=has_own_size)
        predicted = step_memory(Variant.of(fast.transformer.config), tokens, session.plan)
    return session.plan, predicted, (packed, held - packed, most)


HALF, FULL = torch.bfloat16, torch.float32
EXACT = EngineConfig()
PLAIN = EngineConfig(pack_weights=False)
INT8 = EngineConfig(recipe="int8", text_encoder="native")
TORCHAO = EngineConfig(recipe="int8", text_encoder="native", gemm="torchao")
INT8_WEIGHT = EngineConfig(recipe="int8-weight", text_encoder="native")
FP8_WEIGHT = EngineConfig(recipe="fp8-weight", text_encoder="native")


@pytest.mark.parametrize(
    ("heads", "side", "dtype", "config", "product"),
    [
        (8, 24, HALF, EXACT, Product.ONEDNN),
        (16, 16, HALF, EXACT, Product.ONEDNN),
        (8, 24, HALF, PLAIN, Product.MODULES),
        (8, 24, FULL, EXACT, Product.BUFFERED),
        (16, 16, FULL, EXACT, Product.BUFFERED),
        (8, 24, HALF, INT8, Product.INT8),
        (16, 16, HALF, INT8, Product.INT8),
        (8, 24, FULL, INT8, Product.INT8),
        (8, 24, HALF, TORCHAO, Product.MODULES),
        (8, 24, HALF, INT8_WEIGHT, Product.MODULES),
        (16, 16, HALF, INT8_WEIGHT, Product.MODULES),
        (16, 16, HALF, FP8_WEIGHT, Product.MODULES),
        (16, 16, FULL, FP8_WEIGHT, Product.MODULES),
    ],
)
def test_a_step_takes_what_is_predicted(heads, side, dtype, config, product):
    needs = {
        Product.ONEDNN: onednn.why_unavailable,
        Product.BUFFERED: stream.why_unavailable,
        Product.INT8: int8.why_unavailable,
    }
    reason = needs.get(product, lambda: None)()
    if reason is not None:
        pytest.skip(reason)
    planned, predicted, (packed, kept, most) = counted(heads, side, dtype, config)
    assert planned.product is product
    assert packed == predicted.packed
    assert kept == pytest.approx(predicted.kept, rel=0.1)
    assert most + kept == pytest.approx(predicted.kept + predicted.peak, rel=0.1)


def test_positions_of_another_size_are_kept():
    (_, own, own_counts), (_, other, other_counts) = (counted(2, 16, FULL, EXACT, size) for size in (True, False))
    expected = (TEXT + 3 * TEXT) * 128 * 4
    assert other.kept - own.kept == expected
    assert other_counts[1] - own_counts[1] == pytest.approx(expected, rel=0.01)


ON_CPU = {"device": CPU, "dtype": FULL}
NOTHING_KEPT = {"merges": False, "keeps_modulation": False, "keeps_text": False}


# Of CogVideoX-2b at 49 frames of 480x720 with guidance and 50 steps, in MiB: copies of weights, kept, on top.
@pytest.mark.parametrize(
    ("fields", "copies", "kept", "peak"),
    [
        ({"device": GPU}, 0, 133, 1432),
        ({"device": GPU, "tier": "turbo"}, 0, 142, 1432),  # two outputs of both halves
        ({"device": GPU, "operations": "torch"}, 0, 133, 1302),
        ({"device": GPU, "product": Product.MODULES, **NOTHING_KEPT}, 0, 65, 1825),
        ({"recipe": RECIPES["int8"], "product": Product.SCALED}, 0, 133, 1302),
        ({"recipe": RECIPES["int8"]}, 0, 133, 2409),
        ({"recipe": RECIPES["int8"], "compile": CompileMode.OFF}, 0, 133, 2929),
        ({"recipe": RECIPES["fp8"]}, 0, 133, 1758),
        ({"recipe": RECIPES["fp8-weight"]}, 0, 133, 1823),
        ({"recipe": RECIPES["fp8-weight"], "compile": CompileMode.OFF}, 0, 133, 1823),
        (ON_CPU, 1266, 266, 3385),
        ({**ON_CPU, **NOTHING_KEPT}, 0, 130, 3390),
        ({**ON_CPU, "product": Product.BUFFERED}, 1266, 1308, 1823),
        ({**ON_CPU, "product": Product.ONEDNN, "dtype": HALF}, 2531, 133, 1302),
        ({**ON_CPU, "product": Product.INT8, "recipe": RECIPES["int8"]}, 0, 1308, 2669),
    ],
)
def test_predictions_for_2b(fields, copies, kept, peak):
    planned = plan(**fields)
    tokens, on_cpu = Tokens(TEXT_TOKENS, 17550, reads_positions=False), planned.device == CPU
    found = step_memory(Variant(), tokens, planned, mapped=on_cpu)
    assert [round(size / 2**20) for size in (found.packed, found.kept, found.peak)] == [copies, kept, peak]


@pytest.mark.parametrize("recipe", [None, "int8-weight", "fp8-weight"])
def test_a_prompt_takes_what_is_predicted(recipe):
    sizes = {"d_model": 512, "d_kv": 64, "d_ff": 1280, "num_layers": 2, "num_heads": 8, "vocab_size": 32}
    encoder = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu", use_cache=False)).bfloat16().eval()
    scheme = "native" if recipe is None else RECIPES[recipe].text_encoder
    if recipe is not None:
        quantize_text_encoder(encoder, scheme)
    tokens = torch.ones(1, TEXT_TOKENS, dtype=torch.long)
    with torch.no_grad():
        encoder(tokens)
        _, most = allocated(lambda: encoder(tokens))
    predicted = text_encoding_bytes(Models(None, encoder, None), TEXT_TOKENS, torch.bfloat16, scheme)
    # Where oneDNN has no bf16 products, one activation fewer is alive beside an int8 weight that is widened.
    fewer = recipe == "int8-weight" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    expected = predicted - (TEXT_TOKENS * sizes["d_ff"] * 2 if fewer else 0)
    assert most == pytest.approx(expected, rel=0.1)
