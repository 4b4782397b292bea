"""Torch's own kernels: which one it takes is asked and reported, and two can be named. Devices are pretended."""

import contextlib
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cogvx_fast import EngineConfig, accelerate
from cogvx_fast.attention import CAPABILITIES, AttentionBackend, resolve, sdpa
from cogvx_fast.plan import AttentionPlan
from cogvx_fast.transformer.binding import BoundBlock
from tests import toy
from tests.generation import fast_model, plain, plan, relative, run, session

PINNED = {
    AttentionBackend.SDPA_CUDNN: "_scaled_dot_product_cudnn_attention",
    AttentionBackend.SDPA_FLASH: "_scaled_dot_product_flash_attention",
}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of the capability that is given, whose torch has the kernels that are given; questions are kept."""

    def pretend(capability, *kernels):
        asked = []

        def ask(kernel):
            def can_use(params, debug=False):
                asked.append((kernel, tuple(params.query.shape), params.query.dtype))
                return kernel in kernels

            can_use.__name__ = f"can_use_{kernel.name.lower()}"
            return can_use

        operands = sdpa._operands
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(sdpa, "_operands", lambda device, *rest: operands(CPU, *rest))
        monkeypatch.setattr(sdpa, "_CAN_USE", {kernel: ask(kernel) for kernel in sdpa._CAN_USE})
        return asked

    return pretend


@pytest.mark.parametrize("backend", PINNED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_kernel_that_torch_has_for_the_gpu_is_taken(gpu, backend, dtype):
    kernel = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}[backend]
    asked = gpu((9, 0), kernel)
    assert resolve(backend, GPU, dtype, 64).backend is backend
    assert (kernel, (1, 2, 128, 64), dtype) in asked


@pytest.mark.parametrize("backend", PINNED)
@pytest.mark.parametrize(
    ("device", "capability", "dtype", "head_dim", "reason"),
    [
        ("cpu", (9, 0), torch.float16, 64, "it runs on cuda, not on cpu"),
        ("cuda", (9, 0), torch.float32, 64, r"it takes torch\.bfloat16, torch\.float16, not torch\.float32"),
        ("cuda", (9, 0), torch.float16, 60, "it has no kernel for head dim 60"),
        ("cuda", (7, 5), torch.float16, 64, r"it needs compute capability 8\.0 to 99\.0, this GPU has 7\.5"),
        (
            "cuda",
            (9, 0),
            torch.float16,
            64,
            r"torch refuses it; .*can_use_.*_attention\(\.\.\., debug=True",
        ),
    ],
)
def test_what_cannot_run_is_refused_in_words(gpu, backend, device, capability, dtype, head_dim, reason):
    gpu(capability)  # its torch has neither kernel
    with pytest.raises(ValueError, match=f"attention='{backend}' cannot work here: {reason}.*what can: .*'sdpa'"):
        resolve(backend, torch.device(device), dtype, head_dim)


@pytest.mark.parametrize("backend", PINNED)
def test_without_a_gpu_it_is_refused(backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def none_there(*arguments):
        raise RuntimeError("Found no NVIDIA driver on your system")

    monkeypatch.setattr(sdpa, "_operands", none_there)
    with pytest.raises(ValueError, match=f"attention='{backend}' cannot work here: torch cannot use the GPU: Found no"):
        resolve(backend, GPU, torch.float16, 64)


def test_on_a_cpu_a_pipeline_refuses_it_before_heavy_work():
    fast = accelerate(toy.pipeline(), EngineConfig(attention="sdpa-cudnn"))
    fast.encode_prompt = None  # would be the first thing to run
    with pytest.raises(ValueError, match="attention='sdpa-cudnn' cannot work here: it runs on cuda, not on cpu"):
        fast(**toy.inputs())


def test_auto_takes_neither(gpu):
    gpu((9, 0), SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    assert resolve(AttentionBackend.AUTO, GPU, torch.float16, 64).backend is AttentionBackend.SDPA


@pytest.mark.parametrize(
    ("kernel", "words"), [("CUDNN_ATTENTION", "cuDNN's kernel"), ("FLASH_ATTENTION", "the flash kernel")]
)
def test_torch_is_asked_for_its_choice_with_the_gpu_made_current(gpu, kernel, words, monkeypatch):
    gpu((9, 0))
    entered, shapes = [], []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(entered.append(device)))

    def choice(query, key, value):
        shapes.append((tuple(query.shape), query.dtype))
        return int(getattr(SDPBackend, kernel))

    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    assert sdpa.chosen(torch.device("cuda:1"), torch.bfloat16, 64) == words
    assert entered == [torch.device("cuda:1")] and shapes == [((1, 2, 128, 64), torch.bfloat16)]


def test_the_choice_follows_torchs_own_switches_and_is_in_the_report():
    def detail(**config):
        return accelerate(toy.pipeline(), EngineConfig(**config)).engine_report().line("attention").detail

    assert detail(attention="sdpa") == "sdpa: the flash kernel"
    with sdpa_kernel(SDPBackend.MATH):
        assert detail(attention="sdpa") == "sdpa: no kernel of its own, products and a softmax"
        assert detail().startswith("sdpa: no kernel of its own, products and a softmax (not flash-attn-3: ")


def test_no_kernel_is_named_where_torch_cannot_say_or_is_not_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def none_there(*arguments, **keywords):
        raise AssertionError("Torch not compiled with CUDA enabled")

    with monkeypatch.context() as patch:
        patch.setattr(sdpa, "_operands", none_there)
        assert sdpa.chosen(GPU, torch.float16, 64) == ""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: None)
    detail = accelerate(toy.pipeline(), EngineConfig(attention="sdpa")).engine_report().line("attention").detail
    assert detail.startswith("sdpa (torch's scaled_dot_product_attention was replaced by ")


@pytest.mark.parametrize("backend", PINNED)
def test_it_is_the_operation_that_torch_calls_itself(backend, monkeypatch):
    """On a CPU a stand-in of the operation's documented signature, in torch's own layout."""
    calls = []

    def stand_in(query, key, value, *rest):
        calls.append((tuple(query.shape), rest))
        return (F.scaled_dot_product_attention(query, key, value), *[None] * 8)

    model = fast_model("5b")
    expected = plain(model, session(model))
    monkeypatch.setattr(torch.ops.aten, PINNED[backend], stand_in)
    pinned = plan(model, {"attention": AttentionPlan(backend, backend), "operations": "torch"})
    assert relative(run(model, session(model, plan=pinned)), expected) < 1e-5
    assert len(calls) == len(model.transformer_blocks)
    shape, rest = calls[0]
    config = model.config
    assert shape[1] == config.num_attention_heads and shape[3] == config.attention_head_dim
    assert rest == ((None, False) if backend is AttentionBackend.SDPA_CUDNN else ())  # no mask, no sums to keep


@pytest.mark.parametrize("backend", PINNED)
def test_masks_and_gradients_go_to_torchs_own_choice(backend, monkeypatch):
    from cogvx_fast.transformer.attention import _attend

    monkeypatch.delattr(torch.ops.aten, PINNED[backend], raising=False)
    query, key, value = (torch.randn(1, 5, 2, 8, dtype=torch.float32, device="cpu") for _ in range(3))
    bound = BoundBlock(attention=AttentionPlan(backend, backend))
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: q)
        with torch.no_grad():
            mask = torch.ones(1, 1, 5, 5, dtype=torch.bool, device="cpu")
            assert torch.equal(_attend(query, key, value, mask, bound), query)
        assert torch.equal(_attend(query.requires_grad_(), key, value, None, bound), query)


def test_naming_a_kernel_sets_no_flag_that_another_thread_would_see(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.ops.aten, PINNED[AttentionBackend.SDPA_CUDNN], lambda q, *rest: (other_thread(), (q,))[1])

    def other_thread():
        def look():
            seen.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()

    query = torch.zeros(1, 2, 3, 8, dtype=torch.float32, device="cpu")
    assert CAPABILITIES[AttentionBackend.SDPA_CUDNN].kernel(query, query, query).shape == query.shape
    assert seen == [(True, True)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("backend", PINNED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_it_gives_what_torch_gives_with_its_switch(backend, dtype):
    """To the bit, as it is the same kernel on the same memory; the choice follows the switch."""
    kernel = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}[backend]
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    if sdpa.why_not(kernel, device, dtype, 64) is not None:
        pytest.skip(sdpa.why_not(kernel, device, dtype, 64))
    generator = torch.Generator(device).manual_seed(0)
    packed = torch.randn(2, 333, 3, 5, 64, generator=generator, dtype=dtype, device=device)
    query, key, value = packed.unbind(2)
    with sdpa_kernel(kernel):
        expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
        assert sdpa.chosen(device, dtype, 64) == sdpa._IN_WORDS[kernel]
    assert torch.equal(CAPABILITIES[backend].kernel(query, key, value), expected)
