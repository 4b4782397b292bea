"""The choice of backend, its reasons, and that each adapter gets layout, scale and dtype right."""

import dataclasses
import types

import pytest
import torch
import torch.nn.functional as F
from cogvx_kernels import ops
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from cogvx_fast import EngineConfig, accelerate
from cogvx_fast.attention import CAPABILITIES, AttentionBackend
from cogvx_fast.attention import resolve as resolve_backend
from cogvx_fast.plan import AttentionPlan
from cogvx_fast.transformer import attention
from tests import toy
from tests.generation import fast_model, plain, plan, relative, run, session


def resolve(requested, *arguments, **keywords):
    return resolve_backend(AttentionBackend(requested), *arguments, **keywords)


NO_PACKAGE = ("auto", "sdpa", "sdpa-cudnn", "sdpa-flash", "amx", "avx512", "triton", "triton-int8")
PACKAGES = ("_CAN_USE_FLASH_ATTN", "_CAN_USE_FLASH_ATTN_3", "_CAN_USE_XFORMERS_ATTN", "_CAN_USE_SAGE_ATTN")


@pytest.fixture
def everything_installed(monkeypatch):
    for name in PACKAGES:
        monkeypatch.setattr(attention_dispatch, name, True)


@pytest.fixture
def gpu(monkeypatch):
    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return pretend


def test_auto_on_a_cpu_is_sdpa_for_what_our_kernel_does_not_take_and_says_why():
    resolution = resolve("auto", "cpu", torch.float32, 64)
    assert resolution.backend is AttentionBackend.SDPA
    assert resolution.capability.dispatch is AttentionBackendName.NATIVE
    assert "not flash-attn-3: its package is not installed" in str(resolution)
    assert "not amx: it takes torch.bfloat16, not torch.float32" in str(resolution)


@pytest.mark.parametrize(
    ("lacks", "chosen"),
    [((), "amx"), (("amx",), "avx512"), (("avx512",), "amx"), (("amx", "avx512"), "sdpa")],
)
def test_auto_takes_our_kernel_on_a_cpu_that_can_run_it(lacks, chosen, monkeypatch):
    for backend in (AttentionBackend.AMX, AttentionBackend.AVX512):
        reason = f"it needs a CPU with {backend}" if backend in lacks else None
        capability = dataclasses.replace(CAPABILITIES[backend], why_unavailable=lambda reason=reason: reason)
        monkeypatch.setitem(CAPABILITIES, backend, capability)
    resolution = resolve("auto", "cpu", torch.bfloat16, 64)
    assert resolution.backend == chosen
    tried = lacks if chosen != "amx" else ()
    assert all(f"not {backend}: it needs a CPU with {backend}" in str(resolution) for backend in tried)


def test_auto_takes_flash_attn_3_on_hopper_only(everything_installed, gpu):
    gpu(9, 0)
    assert resolve("auto", "cuda", torch.bfloat16, 64).backend is AttentionBackend.FLASH_3
    gpu(8, 0)
    resolution = resolve("auto", "cuda", torch.bfloat16, 64)
    assert resolution.backend is AttentionBackend.SDPA
    assert "needs compute capability 9.0 to 9.0, this GPU has 8.0" in str(resolution)


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "head_dim", "exact", "reason"),
    [
        ("flash-attn", "cpu", torch.float16, 64, True, "it runs on cuda, not on cpu"),
        ("flash-attn", "cuda", torch.float32, 64, True, r"takes torch.bfloat16, torch.float16, not torch.float32"),
        ("flash-attn", "cuda", torch.float16, 60, True, "no kernel for head dim 60"),
        ("sage", "cuda", torch.float16, 64, True, "changes more than rounding"),
        ("sage", "cuda", torch.float16, 72, False, "no kernel for head dim 72"),
        ("xformers", "cuda", torch.float64, 64, True, "not torch.float64"),
    ],
)
def test_what_cannot_work_says_why_and_what_can(
    everything_installed, gpu, backend, device, dtype, head_dim, exact, reason
):
    gpu(8, 6)
    with pytest.raises(ValueError, match=f"attention='{backend}' cannot work here: .*{reason}.*what can: .*'sdpa'"):
        resolve(backend, device, dtype, head_dim, exact)


@pytest.mark.parametrize("backend", [b for b in AttentionBackend if b not in NO_PACKAGE])
def test_a_missing_package_says_how_to_get_it(backend, monkeypatch):
    for name in PACKAGES:
        monkeypatch.setattr(attention_dispatch, name, False)
    with pytest.raises(ValueError, match="not installed, or too old") as caught:
        resolve(backend, "cuda", torch.float16, 64, exact=False)
    assert CAPABILITIES[backend].install in str(caught.value)


def test_triton_runs_on_gpus_and_is_not_chosen_by_itself(gpu):
    with pytest.raises(ValueError, match="attention='triton' cannot work here: it runs on cuda, not on cpu"):
        resolve("triton", "cpu", torch.bfloat16, 64)
    gpu(8, 0)
    assert resolve("triton", "cuda", torch.float16, 64).capability.impl == "triton"
    assert resolve("auto", "cuda", torch.float16, 64).backend is AttentionBackend.SDPA
    gpu(7, 5)
    with pytest.raises(ValueError, match=r"it needs compute capability 8\.0 to 99\.0, this GPU has 7\.5"):
        resolve("triton", "cuda", torch.float16, 64)


def test_triton_in_8_bits_is_for_gpus_and_not_for_the_exact_tier(gpu):
    gpu(8, 0)
    with pytest.raises(ValueError, match="attention='triton-int8' cannot work here: it changes more than rounding"):
        resolve("triton-int8", "cuda", torch.float16, 64)
    with pytest.raises(ValueError, match="it changes more than rounding, which the exact tier does not"):
        accelerate(toy.pipeline(), EngineConfig(attention="triton-int8"))
    with pytest.raises(ValueError, match="it runs on cuda, not on cpu"):
        resolve("triton-int8", "cpu", torch.float16, 64, exact=False)
    with pytest.raises(ValueError, match=r"it takes torch\.bfloat16, torch\.float16, not torch\.float32"):
        resolve("triton-int8", "cuda", torch.float32, 64, exact=False)
    capability = resolve("triton-int8", "cuda", torch.bfloat16, 64, exact=False).capability
    assert (capability.operation, capability.impl) == ("int8_attention", "triton")
    assert resolve("auto", "cuda", torch.float16, 64, exact=False).backend is AttentionBackend.SDPA


def test_auto_takes_8_bits_if_they_may_be_and_gain_time(gpu):
    for capability in ((8, 0), (8, 6), (8, 9)):
        gpu(*capability)
        chosen = resolve("auto", "cuda", torch.float16, 64, exact=False, in_8_bits=True)
        assert chosen.backend is AttentionBackend.TRITON_INT8
        assert resolve("auto", "cuda", torch.float16, 64, exact=False).backend is AttentionBackend.SDPA
    gpu(9, 0)
    chosen = resolve("auto", "cuda", torch.float16, 64, exact=False, in_8_bits=True)
    assert chosen.backend is AttentionBackend.SDPA
    assert "not triton-int8: it gains time on compute capability 8.0, 8.6, 8.9, this GPU has 9.0" in str(chosen)
    assert resolve("triton-int8", "cuda", torch.float16, 64, exact=False).backend is AttentionBackend.TRITON_INT8
    assert resolve("auto", "cpu", torch.float32, 64, exact=False, in_8_bits=True).backend is AttentionBackend.SDPA


def test_attention_in_8_bits_is_what_its_plan_calls(monkeypatch):
    """Norms and the rest in torch; on a CPU, attention by its formula in place of the kernel."""
    calls = []

    def by_formula(query, key, value, impl, **options):
        calls.append((impl, options["guard"].dtype))
        return ops.int8_attention(query, key, value, **options)

    stand_in = types.SimpleNamespace(
        **{name: getattr(ops, name) for name in ops.__all__} | {"int8_attention": by_formula}
    )
    monkeypatch.setattr(attention, "ops", stand_in)
    model = fast_model("5b").to(torch.bfloat16)
    expected = plain(model, session(model), dtype=torch.bfloat16)
    in_8_bits = AttentionPlan(AttentionBackend.TRITON_INT8, AttentionBackend.SDPA)
    current = session(model, plan=plan(model, {"attention": in_8_bits, "operations": "torch"}))
    output = run(model, current, dtype=torch.bfloat16)
    assert calls == [("triton", torch.int32)] * 3 and current.ran.redone == 0
    assert 0 < relative(output, expected) < 0.02


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(
        ValueError,
        match=r"EngineConfig.attention='fast' is unknown; allowed: 'auto', 'sdpa', 'sdpa-cudnn'",
    ):
        EngineConfig(attention="fast")


# --- stand-ins: the documented signature and layout (batch, sequence, heads, dim) of each package, by SDPA --------


def by_sdpa(q, k, v, scale):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, return_attn_probs):
    assert not causal and dropout_p == 0 and window_size == (-1, -1) and not return_attn_probs
    return by_sdpa(q, k, v, softmax_scale)


def flash_attn_3_func(q, k, v, softmax_scale, causal, **_):
    assert not causal
    lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1])
    return by_sdpa(q, k, v, softmax_scale), lse


def sageattn(q, k, v, tensor_layout, is_causal, sm_scale, return_lse):
    assert tensor_layout == "NHD" and not is_causal and not return_lse
    return by_sdpa(q, k, v, sm_scale)


class XFormersOps:
    @staticmethod
    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        assert attn_bias is None and p == 0
        return by_sdpa(query, key, value, scale)


@pytest.fixture
def stand_ins(everything_installed, monkeypatch):
    monkeypatch.setattr(attention_dispatch, "flash_attn_func", flash_attn_func)
    monkeypatch.setattr(attention_dispatch, "sageattn", sageattn)
    monkeypatch.setattr(attention_dispatch, "xops", XFormersOps, raising=False)
    # Its custom op is registered for CUDA alone: what it calls is stood in for.
    monkeypatch.setattr(attention_dispatch, "_wrapped_flash_attn_3", flash_attn_3_func)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", CAPABILITIES)
def test_every_backend_gets_layout_scale_and_dtype_right(stand_ins, backend, dtype):
    generator = torch.Generator().manual_seed(0)
    # Different sizes in every dimension, so that no exchange of two goes unnoticed.
    query, key, value = (torch.randn(2, 7, 3, 16, generator=generator).to(dtype) for _ in range(3))
    output = dispatch_attention_fn(query, key, value, backend=CAPABILITIES[backend].dispatch)
    weights = (torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) / 16**0.5).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, value.double())
    assert output.shape == query.shape and output.dtype == dtype
    assert (output.double() - expected).abs().max() < 8 * torch.finfo(dtype).eps * expected.abs().max()


# --- in a pipeline ------------------------------------------------------------------------------------------------


@pytest.fixture
def everybodys_default():
    """diffusers' `set_attention_backend` changes it."""
    yield
    attention_dispatch._AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.mark.usefixtures("everybodys_default")
def test_set_attention_backend_takes_effect():
    # Upstream it silently does nothing for this family.
    fast = accelerate(toy.pipeline())
    expected = fast(**toy.inputs(output_type="latent")).frames
    fast.transformer.set_attention_backend("_native_math")
    output = fast(**toy.inputs(output_type="latent")).frames
    assert relative(output, expected) < 1e-4
    assert "set by hand: _native_math" in str(fast.engine_report())
    names = {block.attn1.processor._attention_backend for block in fast.transformer.transformer_blocks}
    assert names == {AttentionBackendName._NATIVE_MATH}
    fast.transformer.reset_attention_backend()
    assert "set by hand" not in str(fast.engine_report())
    assert torch.equal(fast(**toy.inputs(output_type="latent")).frames, expected)


def test_the_backend_that_is_set_is_the_one_called(stand_ins, monkeypatch):
    calls = []

    def counting(**kwargs):
        calls.append(kwargs["q"].shape)
        return flash_attn_func(**kwargs)

    monkeypatch.setattr(attention_dispatch, "flash_attn_func", counting)
    fast = accelerate(toy.pipeline("5b"))
    expected = fast(**toy.inputs(output_type="latent")).frames
    assert not calls
    for block in fast.transformer.transformer_blocks:
        block.attn1.processor._attention_backend = AttentionBackendName.FLASH
    output = fast(**toy.inputs(output_type="latent")).frames
    assert len(calls) == 3 * 3  # steps x layers
    assert ((output - expected).norm() / expected.norm()).item() < 1e-4


def test_the_backend_that_is_set_is_called_outside_of_a_generation_too(stand_ins, monkeypatch):
    calls = []
    monkeypatch.setattr(
        attention_dispatch, "flash_attn_func", lambda **given: calls.append(1) or flash_attn_func(**given)
    )
    model = fast_model("5b")
    current = session(model)
    expected = plain(model, current)
    for block in model.transformer_blocks:
        block.attn1.processor._attention_backend = AttentionBackendName.FLASH
    assert not calls
    assert relative(plain(model, current), expected) < 1e-5 and len(calls) == 3


def test_the_report_names_the_backend_before_and_after():
    fast = accelerate(toy.pipeline())
    for _ in range(2):
        assert "attention         sdpa: the flash kernel (not flash-attn-3" in str(fast.engine_report())
        fast(**toy.inputs(num_steps=1, output_type="latent"))


def test_a_backend_that_cannot_work_is_refused_before_heavy_work(everything_installed):
    reference = toy.pipeline()
    with pytest.raises(ValueError, match="attention='sage' cannot work here: it changes more than rounding"):
        accelerate(reference, EngineConfig(attention="sage"))
    fast = accelerate(reference, EngineConfig(attention="flash-attn"))
    fast.encode_prompt = None  # would be the first thing to run
    with pytest.raises(ValueError, match="it runs on cuda, not on cpu; what can: 'sdpa'"):
        fast(**toy.inputs())


def test_a_missing_package_is_refused_when_the_pipeline_is_made(monkeypatch):
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", False)
    with pytest.raises(ValueError, match=r"not installed, or too old \(pip install 'cogvx_fast\[flash\]'\)"):
        accelerate(toy.pipeline(), EngineConfig(attention="flash-attn"))
