"""What a step is predicted to allocate against what the allocator counts."""

import pytest
import torch
from cogvx_kernels.cpu import int8, stream
from cogvx_kernels.cpu import linear as onednn
from torch.profiler import ProfilerActivity, profile

from cogvx_fast import EngineConfig, accelerate
from cogvx_fast.quantization import RECIPES
from cogvx_fast.quantization.memory import Models, text_encoding_bytes
from cogvx_fast.transformer.memory import Clip, Product, Way, step_memory
from tests import toy

STEPS = 4


def peak(call):
    """The most bytes that torch's allocator had given out at once, over those at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def storages(*tensors):
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}


def kept(session, transformer):
    """The bytes that a session holds, apart from packed weights."""
    table, plans = session._table.value, session.block_plans
    tensors = [vectors for norms in table.blocks for norm in norms for vectors in (norm.shift, norm.scale, norm.gate)]
    tensors += [table.final_shift, table.final_scale, session._text.value]
    own = storages(transformer.patch_embed.pos_embedding)
    tensors += [positions for positions in session._positions.values() if storages(positions) != own]
    tensors += [getattr(plan.ff, name, None) for plan in plans for name in ("hidden", "buffer")]
    tensors += [getattr(plan.qkv, "buffer", None) for plan in plans]
    return sum(storages(*tensors).values())


def counted(heads, side, dtype, config, has_own_size=True):
    """Of a step at 2b's layer sizes but for the number of heads: predicted and counted, kept and on top."""
    variant = {"num_attention_heads": heads, "attention_head_dim": 64, "num_layers": 2, "time_embed_dim": 512}
    size = {"sample_height": side, "sample_width": side, "max_text_seq_length": 64, "text_embed_dim": 128}
    own = 9 if has_own_size else 17  # frames
    pipe = toy.pipeline()
    pipe.transformer = toy.transformer(**variant, **size, sample_frames=own)
    fast = accelerate(pipe.to(dtype), config)
    model, sizes = fast.transformer, fast.transformer.config
    fast.scheduler.set_timesteps(STEPS)
    latents = torch.randn(2, 3, 16, side, side, dtype=dtype)
    text = torch.randn(2, 64, 128, dtype=dtype)

    def step(number):
        timestep = fast.scheduler.timesteps[number].expand(2)
        model(latents, text, timestep, return_dict=False)

    with torch.no_grad(), fast.engine_session():
        step(0)
        held = kept(model._session, model)
        packed = sum(plan.packed_bytes for plan in model._session.block_plans)
        most = peak(lambda: step(1))
    way = Way.of(torch.device("cpu"), dtype, config, RECIPES.get(config.recipe))
    clip = Clip(text_tokens=64, video_tokens=3 * (side // 2) ** 2, steps=STEPS, reads_positions=has_own_size)
    return step_memory(sizes, clip, dtype, way, config), (packed, held, most), way


NATIVE_8_BITS = EngineConfig(recipe="int8", text_encoder="native")
TORCHAOS = EngineConfig(recipe="int8", text_encoder="native", gemm="torchao")
WIDENED = EngineConfig(recipe="int8-weight", text_encoder="native")
FP8 = EngineConfig(recipe="fp8-weight", text_encoder="native")


NATIVE = EngineConfig()


@pytest.mark.parametrize(
    ("heads", "side", "dtype", "config", "product"),
    [
        (8, 24, torch.bfloat16, NATIVE, Product.FUSED),
        (16, 16, torch.bfloat16, NATIVE, Product.FUSED),
        (8, 24, torch.bfloat16, EngineConfig(pack_weights=False), Product.PLAIN),
        (8, 24, torch.float32, NATIVE, Product.BUFFERED),
        (16, 16, torch.float32, NATIVE, Product.BUFFERED),
        (8, 24, torch.bfloat16, NATIVE_8_BITS, Product.INT8),
        (16, 16, torch.bfloat16, NATIVE_8_BITS, Product.INT8),
        (8, 24, torch.float32, NATIVE_8_BITS, Product.INT8),
        (8, 24, torch.bfloat16, TORCHAOS, Product.TORCHAO_INT8),
        (8, 24, torch.bfloat16, WIDENED, Product.WIDENED),
        (16, 16, torch.bfloat16, WIDENED, Product.WIDENED),
        (16, 16, torch.bfloat16, FP8, Product.WIDENED_FP8),
        (16, 16, torch.float32, FP8, Product.WIDENED_FP8),
    ],
)
def test_a_step_takes_what_is_predicted(heads, side, dtype, config, product):
    needs = {Product.FUSED: onednn.why_not, Product.BUFFERED: stream.why_not, Product.INT8: int8.why_not}
    reason = needs.get(product, lambda: None)()
    if reason is not None:
        pytest.skip(reason)
    predicted, (packed, held, most), way = counted(heads, side, dtype, config)
    assert way.product is product
    assert packed == predicted.packed
    assert held == pytest.approx(predicted.kept, rel=0.1)
    assert most + held == pytest.approx(predicted.kept + predicted.peak, rel=0.1)


def test_positions_of_another_size_are_kept():
    (own, counts, _), (other, more, _) = (
        counted(2, 16, torch.float32, NATIVE, has_own_size=own) for own in (True, False)
    )
    assert other.kept - own.kept == more[1] - counts[1] == (64 + 3 * 64) * 128 * 4


@pytest.mark.parametrize("recipe", [None, "int8-weight", "fp8-weight"])
def test_a_prompt_takes_what_is_predicted(recipe):
    from transformers import T5Config, T5EncoderModel

    from cogvx_fast.quantization.apply import quantize_text_encoder

    sizes = {"d_model": 512, "d_kv": 64, "d_ff": 1280, "num_layers": 2, "num_heads": 8, "vocab_size": 32}
    encoder = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu", use_cache=False)).bfloat16().eval()
    scheme = None if recipe is None else RECIPES[recipe].text_encoder
    if scheme is not None:
        quantize_text_encoder(encoder, scheme)
    tokens = torch.ones(1, 226, dtype=torch.long)
    with torch.no_grad():
        encoder(tokens)
        most = peak(lambda: encoder(tokens))
    predicted = text_encoding_bytes(Models(None, encoder, None), 226, torch.bfloat16, scheme)
    assert most == pytest.approx(predicted, rel=0.1)
