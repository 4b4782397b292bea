"""The fast transformer with every operation as a Triton kernel, interpreted: as close to fp32 as diffusers is."""

import copy

import pytest
import torch
from cogvx_kernels import ops
from torchao.quantization import PerRow
from torchao.quantization.quantize_.workflows.float8.float8_tensor import QuantizeTensorToFloat8Kwargs

from cogvx_fast.config import AttentionBackend
from cogvx_fast.plan import AttentionPlan, Product
from cogvx_fast.quantization import RECIPES
from cogvx_fast.quantization.apply import is_quantized, quantize_transformer
from cogvx_fast.transformer import FastCogVideoXTransformer3DModel
from cogvx_fast.transformer.binding import _linears, _scaled
from tests import toy
from tests.generation import bound, plain, plan, relative, run, session
from tests.kernels.triton_operations import watch

LAYERS = 2
# Attention, and the operations between the products of a block: what runs where.
BACKENDS = {
    AttentionBackend.TRITON: ["qk_norm_rope", "attention"],
    AttentionBackend.TRITON_INT8: ["qk_norm_rope_int8", "int8_attention"],
}


@pytest.fixture(autouse=True)
def outputs():
    """The plain allocator: diffusers' own code is among what runs here."""


def on_gpu(model, backend=AttentionBackend.TRITON, **config):
    """A generation as a GPU's, though the tensors are on the CPU."""
    product = Product.SCALED if config.get("recipe") and "gemm" not in config else Product.MODULES
    attention = AttentionPlan(backend, AttentionBackend.SDPA)
    changes = {"operations": "triton", "attention": attention, "product": product, "merges": False}
    return session(model, plan=plan(model, changes, **config))


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "dtype", "backend"),
    [
        *((v, d, AttentionBackend.TRITON) for d in (torch.float16, torch.bfloat16) for v in ("2b", "1.5-5b")),
        ("1.5-5b", torch.float16, AttentionBackend.TRITON_INT8),
    ],
)
def test_a_forward_pass(variant, dtype, backend, monkeypatch):
    truth = toy.transformer(variant, attention_head_dim=64, num_layers=LAYERS)
    reference = copy.deepcopy(truth).to(dtype)
    model = FastCogVideoXTransformer3DModel.adopt(copy.deepcopy(reference))
    current, calls = on_gpu(model, backend), []
    others = [name for names in BACKENDS.values() for name in names]
    for name in ("layer_norm_modulate", "gated_residual_layer_norm_modulate", *others):
        watch(monkeypatch, name, lambda *_, name=name: calls.append(name))
    expected = plain(truth, current)
    own = plain(reference, current, dtype=dtype)
    assert not calls
    output = run(model, current, dtype=dtype)
    assert current.ran.redone == 0
    # A block's last addition is in the launch of the next block's norm.
    block = [*BACKENDS[backend], *["gated_residual_layer_norm_modulate"] * 2]
    assert calls == ["layer_norm_modulate", *(block * LAYERS)[:-1]]
    error, own = (relative(o, expected) for o in (output, own))
    if backend is AttentionBackend.TRITON:
        assert error <= 1.1 * own
    else:  # at least 30 dB of attention alone, to which the stream adds what has no noise
        assert own < error <= 10 ** (-30 / 20)


@torch.no_grad()
def quantized(dtype, recipe="int8"):
    """A toy in fp32, and our model of it in `dtype` with quantized linears."""
    truth = toy.transformer("1.5-5b", attention_head_dim=64, num_layers=LAYERS)
    model = FastCogVideoXTransformer3DModel.adopt(copy.deepcopy(truth).to(dtype))
    quantize_transformer(model, RECIPES[recipe])
    return truth, model


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_in_8_bits_give_torchaos_numbers_within_rounding(dtype, monkeypatch):
    truth, model = quantized(dtype)
    memory = {name: value.qdata.clone() for name, value in model.state_dict().items() if hasattr(value, "qdata")}
    current = on_gpu(model, recipe="int8")
    expected = plain(truth, current)
    theirs = plain(model, current, dtype=dtype)

    calls = []
    for name in ("quantize_rows", "scaled_linear", "layer_norm_modulate"):
        watch(monkeypatch, name, lambda *_, name=name: calls.append(name))
    with current.active():
        ours = run(model, current, dtype=dtype)
        how = bound(model, current)[0]
    block = ["scaled_linear", "quantize_rows", "scaled_linear", "scaled_linear", "scaled_linear"]
    assert calls == ["layer_norm_modulate", *block * LAYERS]
    error, own = (relative(output, expected) for output in (ours, theirs))
    assert error <= 1.1 * own
    # Two roundings of the same numbers, each as far from the truth: no further from each other than they could be.
    assert relative(ours, theirs) <= 2 * own

    # Q, K and V lie side by side now, nothing was copied, and torchao's tensors are what they were.
    attention = model.transformer_blocks[0].attn1
    starts = [getattr(attention, name).weight.qdata.data_ptr() for name in ("to_q", "to_k", "to_v")]
    assert starts == [part.data_ptr() for part in how.qkv.weight.chunk(3)]
    assert attention.to_out[0].weight.qdata.data_ptr() == how.out.weight.data_ptr()
    after = {name: value.qdata for name, value in model.state_dict().items() if hasattr(value, "qdata")}
    assert after.keys() == memory.keys() and all(torch.equal(after[name], memory[name]) for name in memory)
    with (torchaos := on_gpu(model, recipe="int8", gemm="torchao")).active():
        run(model, torchaos, dtype=dtype)
        for how in bound(model, torchaos):
            assert how.operations == "triton" and how.qkv is how.out is how.ff is None


@torch.no_grad()
def test_fp8_products_are_those_of_torchaos_weights():
    _, model = quantized(torch.bfloat16, "fp8-weight")
    block = model.transformer_blocks[0]
    for linear in (linear for linear in block.modules() if is_quantized(linear)):
        # torchao makes these without a GPU only for weights alone.
        linear.weight.act_quant_kwargs = QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, PerRow())
    _, out, ff = _scaled(*_linears(block), partly=False)
    linear, x = block.attn1.to_out[0], torch.randn(5, 128, dtype=torch.bfloat16)
    weight, bias = linear.weight.dequantize().float(), linear.bias.float()
    rows, scales = ops.quantize_rows(x, torch.float8_e4m3fn)
    expected = (rows.float() * scales[:, None]) @ weight.T + bias
    assert relative(out(x).float(), expected) < 2**-8  # of the bf16 that it is written in
    wide = [(proj.weight.dequantize().float(), proj.bias.float()) for proj in (block.ff.net[0].proj, block.ff.net[2])]
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(x.float(), *wide[0]), approximate="tanh")
    # Two roundings of 3 bits of mantissa, each off by 2^-4 at most and evenly below that.
    assert relative(ff(x).float(), torch.nn.functional.linear(hidden, *wide[1])) < 2**-4


def test_a_block_is_all_ours_or_torchaos_unless_asked():
    _, model = quantized(torch.float16)
    block = model.transformer_blocks[0]
    qkv, out, ff = _linears(block)
    plain = torch.nn.Linear(128, 128, dtype=torch.float16)
    assert all(_scaled(qkv, out, ff, partly=False))
    assert not any(_scaled(qkv, plain, ff, partly=False)) and not any(_scaled(qkv, out, [], partly=False))
    partly = _scaled(qkv, plain, ff, partly=True)
    assert [product is None for product in partly] == [False, True, False]
    assert not any(_scaled([qkv[0], qkv[1], plain], plain, [ff[0], plain], partly=True))
