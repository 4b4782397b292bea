"""What is decided, by device, dtype, recipe and configuration; cuda without a GPU."""

import dataclasses
import enum
import itertools
import types

import pytest
import torch
from cogvx_kernels._triton import why_unavailable as why_no_triton
from diffusers.models import attention_dispatch

from cogvx_fast import EngineConfig, machine, resolve
from cogvx_fast.attention import backends
from cogvx_fast.config import AttentionBackend, CompileMode
from cogvx_fast.memory import LimitError, Models, Request
from cogvx_fast.plan import UNLIMITED, AttentionPlan, EnginePlan, Offload, Product, VaePlan
from cogvx_fast.quantization import RECIPES, QuantizedAttention, Scheme
from cogvx_fast.quantization.recipes import AS_THEY_ARE, Target
from cogvx_fast.vae import choose_vae
from tests import toy
from tests.availability import set_missing

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PACKAGES = ("_CAN_USE_FLASH_ATTN", "_CAN_USE_FLASH_ATTN_3", "_CAN_USE_XFORMERS_ATTN", "_CAN_USE_SAGE_ATTN")
CPP = {(name, "cpu") for name in ("layer_norm_modulate", "qk_norm_rope", "bias_gelu")}
needs_triton = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """A CPU that has a compiler and no units for attention, torch alone, and a GPU of the capability that is set."""
    gpu = types.SimpleNamespace(capability=(8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: gpu.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    for name in PACKAGES:
        monkeypatch.setattr(attention_dispatch, name, False)
    set_missing(monkeypatch, {"cpu": None})
    monkeypatch.setattr(machine, "cpu_int8_units", lambda: "units")
    for backend in (AttentionBackend.AMX, AttentionBackend.AVX512):
        lacking = dataclasses.replace(backends.CAPABILITIES[backend], why_unavailable=lambda: "it is an old CPU")
        monkeypatch.setitem(backends.CAPABILITIES, backend, lacking)
    return gpu


def decide(device="cpu", dtype=FP32, recipe=None, head_dim=64, packs=None, offload=Offload.NONE, **config):
    device = torch.device(device)
    return resolve.decide(
        EngineConfig(recipe=recipe, **config),
        device=device,
        dtype=dtype,
        head_dim=head_dim,
        vae=choose_vae(device, dtype, None, None, None),
        recipe=AS_THEY_ARE if recipe is None else RECIPES[recipe],
        packs=packs,
        offload=offload,
    )


# device, dtype, recipe, configuration -> fields of the plan.
TABLE = [
    # On a CPU: our operations in C++, and whatever multiplies fastest in the dtype.
    ("cpu", FP32, None, {}, {"operations": "cpu", "product": Product.BUFFERED, "compile": CompileMode.OFF}),
    ("cpu", BF16, None, {}, {"operations": "cpu", "product": Product.ONEDNN}),
    ("cpu", BF16, None, {"pack_weights": False}, {"operations": "cpu", "product": Product.MODULES}),
    ("cpu", FP64, None, {}, {"operations": "torch", "product": Product.MODULES}),
    ("cpu", FP32, None, {"fuse_operations": False}, {"operations": "torch", "product": Product.MODULES}),
    ("cpu", BF16, None, {"fuse_operations": False}, {"operations": "torch", "product": Product.ONEDNN}),
    ("cpu", FP32, None, {"compile": "blocks"}, {"operations": "torch", "product": Product.MODULES}),
    ("cpu", BF16, None, {"compile": "full"}, {"operations": "torch", "product": Product.ONEDNN}),
    ("cpu", FP32, "int8", {}, {"operations": "cpu", "product": Product.INT8, "tier": "balanced"}),
    ("cpu", BF16, "int8", {}, {"operations": "cpu", "product": Product.INT8}),
    ("cpu", FP32, "int8", {"gemm": "torchao"}, {"operations": "cpu", "product": Product.MODULES}),
    ("cpu", FP32, "int8", {"compile": "blocks"}, {"operations": "torch", "product": Product.MODULES}),
    ("cpu", FP64, "int8", {}, {"operations": "torch", "product": Product.MODULES}),
    ("cpu", BF16, "int8-weight", {}, {"operations": "cpu", "product": Product.MODULES}),
    ("cpu", FP32, "fp8-weight", {}, {"operations": "cpu", "product": Product.MODULES}),
    # On a GPU: Triton between the products; compiled is what has tensor code in it, or what is said to be.
    *(
        ("cuda", dtype, None, {}, {"operations": "triton", "product": Product.CUBLASLT, "compile": CompileMode.OFF})
        for dtype in (FP16, BF16, FP32)
    ),
    ("cuda", FP64, None, {}, {"operations": "torch", "product": Product.CUBLASLT, "compile": CompileMode.BLOCKS}),
    (
        *("cuda", FP16, None, {"fuse_operations": False}),
        {"operations": "torch", "product": Product.MODULES, "compile": CompileMode.BLOCKS},
    ),
    ("cuda", FP64, None, {"compile": "off"}, {"operations": "torch", "compile": CompileMode.OFF}),
    ("cuda", FP16, None, {"compile": "blocks"}, {"operations": "triton", "compile": CompileMode.BLOCKS}),
    ("cuda", FP16, None, {"compile": "full"}, {"operations": "triton", "compile": CompileMode.FULL}),
    (
        *("cuda", FP16, "int8", {}),
        {"operations": "triton", "product": Product.SCALED, "mixes": False, "compile": CompileMode.OFF},
    ),
    ("cuda", FP16, "int8", {"gemm": "native"}, {"product": Product.SCALED, "mixes": True}),
    *(
        (
            *("cuda", BF16, recipe, config),
            {"operations": "triton", "product": Product.MODULES, "compile": CompileMode.BLOCKS},
        )
        for recipe, config in (("int8", {"gemm": "torchao"}), ("int8-weight", {}), ("fp8-weight", {}))
    ),
    # Elsewhere: torch.
    ("mps", FP16, None, {}, {"operations": "torch", "product": Product.MODULES, "compile": CompileMode.OFF}),
]


@needs_triton
@pytest.mark.parametrize(("device", "dtype", "recipe", "config", "expected"), TABLE, ids=str)
def test_what_is_decided(device, dtype, recipe, config, expected):
    plan = decide(device, dtype, recipe, **config)
    assert {name: getattr(plan, name) for name in expected} == expected
    assert (plan.device, plan.dtype) == (torch.device(device), dtype)
    assert plan.recipe is (AS_THEY_ARE if recipe is None else RECIPES[recipe])
    assert plan.tier == ("exact" if recipe is None else "balanced")


@needs_triton
def test_fp8_products_are_ours_where_a_gpu_has_them(everywhere):
    everywhere.capability = (8, 9)
    assert decide("cuda", BF16, "fp8").product is Product.SCALED
    assert decide("cuda", BF16, "fp8", gemm="torchao").product is Product.MODULES


@needs_triton
def test_operations_are_of_head_dims_that_are_powers_of_two():
    assert decide("cuda", FP16, head_dim=48).operations == "torch"
    assert decide("cuda", FP16, head_dim=128).operations == "triton"
    assert decide("cpu", FP32, head_dim=48).operations == "cpu"


# What each lacks, and what then runs.
@pytest.mark.parametrize(
    ("lacks", "arguments", "expected"),
    [
        ({"cpu"}, {}, {"operations": "torch", "product": Product.MODULES}),
        (CPP, {"dtype": BF16}, {"operations": "torch", "product": Product.ONEDNN}),
        ({("packed_linear", "cpu")}, {"dtype": BF16}, {"operations": "cpu", "product": Product.MODULES}),
        ({("int8_products", "cpu")}, {"recipe": "int8"}, {"operations": "cpu", "product": Product.MODULES}),
    ],
    ids=["C++", "C++ in bf16", "oneDNN", "int8"],
)
def test_what_a_cpu_lacks_is_left_to_torch(lacks, arguments, expected, monkeypatch):
    set_missing(monkeypatch, dict.fromkeys(lacks, "it is not there"))
    plan = decide(**arguments)
    assert {name: getattr(plan, name) for name in expected} == expected


def test_without_triton_a_gpu_runs_torch(monkeypatch):
    set_missing(monkeypatch, {"triton": "triton is not installed"})
    plan = decide("cuda", FP16)
    assert (plan.operations, plan.product) == ("torch", Product.CUBLASLT)
    assert decide("cuda", FP16, "int8").product is Product.MODULES


@needs_triton
def test_attention_in_8_bits_is_for_recipes_that_say_so_on_gpus_that_gain(everywhere):
    def backend(*arguments, **config):
        return decide(*arguments, **config).attention.backend

    ours = AttentionBackend.TRITON_INT8
    for everywhere.capability in ((8, 0), (8, 6), (8, 9)):
        assert backend("cuda", FP16, "int8") is ours
        assert backend("cuda", FP16) is AttentionBackend.SDPA
        assert backend("cuda", FP16, "int8-weight") is AttentionBackend.SDPA
        assert backend("cuda", FP16, "int8-weight", quantized_attention=QuantizedAttention()) is ours
    attention = decide("cuda", FP16, "int8").attention
    assert attention.fallback is AttentionBackend.SDPA and attention.value == RECIPES["int8"].attention
    value = QuantizedAttention(smooth_value=True)
    assert decide("cuda", FP16, "int8", quantized_attention=value).attention.value == value
    everywhere.capability = (9, 0)
    attention = decide("cuda", FP16, "int8").attention
    assert attention.backend is attention.fallback is AttentionBackend.SDPA
    assert "not triton-int8: it gains time on compute capability 8.0, 8.6, 8.9" in attention.why
    assert backend("cuda", FP16, "int8", attention="triton-int8") is ours


def test_an_exact_attention_is_its_own_fallback_and_says_what_was_tried():
    attention = decide().attention
    assert attention == AttentionPlan(why=attention.why, kernel=attention.kernel)
    assert "not amx: it takes torch.bfloat16, not torch.float32" in decide().attention.why
    assert decide(dtype=BF16).attention.why.endswith("not amx: it is an old CPU; not avx512: it is an old CPU")
    assert decide(attention="sdpa").attention.why == ""


def test_what_is_said_is_what_was_decided():
    assert decide().compile_why.startswith("off on cpu: ")
    assert decide(compile="full").compile_why == "full"
    assert decide("cuda", FP64).compile_why.startswith("blocks: norms, gates and rotations are torch's, which inductor")


@needs_triton
def test_what_chains_on_a_gpu_is_not_compiled_and_says_why():
    plan = decide("cuda", FP16)
    assert plan.chains and plan.compile is CompileMode.OFF
    assert plan.compile_why.startswith("off: all of a block is launches of our own and products of libraries")
    assert "EngineConfig(compile='blocks') compiles" in plan.compile_why
    assert decide("cuda", FP16, "int8-weight").compile_why.startswith("blocks: torchao's products are tensor code")
    assert decide("cuda", FP16, compile="blocks").compile_why == "blocks"


def test_switches_and_circumstances_are_in_the_plan():
    plan = decide()
    assert plan.keeps_modulation and plan.keeps_text and plan.merges
    without = {"modulation_table": False, "reuse_text_projection": False, "fuse_projections": False}
    plan = decide(**without)
    assert not (plan.keeps_modulation or plan.keeps_text or plan.merges)
    assert decide(dtype=BF16, packs=False).product is Product.MODULES
    assert decide(dtype=BF16, packs=True, pack_weights=False).product is Product.ONEDNN
    assert decide(offload=Offload.BY_HAND).offload is Offload.BY_HAND
    assert decide().steps == "all" and decide().memory_limit == UNLIMITED


REFUSED = [
    ("cpu", FP32, "fp8", {}, "recipe='fp8' cannot work here: fp8 products need a GPU .*; what can: 'int8'"),
    ("cuda", BF16, "fp8", {}, "recipe='fp8' cannot work here: fp8 products need a GPU of compute capability 8.9"),
    ("cuda", FP16, "fp8", {}, "recipe='fp8' cannot work here: fp8 products need a GPU of compute capability 8.9"),
    ("cpu", FP32, "int8-weight", {"gemm": "native"}, r"EngineConfig\.gemm='native' cannot work here: .*'torchao'"),
    ("cuda", FP16, "fp8-weight", {"gemm": "native"}, r"EngineConfig\.gemm='native' cannot work here"),
    ("cpu", FP32, None, {"attention": "triton"}, "attention='triton' cannot work here: it runs on cuda, not on cpu"),
    ("cpu", FP32, None, {"attention": "triton-int8"}, "it changes more than rounding, which the exact tier does not"),
    ("cpu", FP32, None, {"attention": "flash-attn"}, "its package is not installed, or too old"),
]


@pytest.mark.parametrize(("device", "dtype", "recipe", "config", "message"), REFUSED, ids=str)
def test_what_cannot_work_is_refused(device, dtype, recipe, config, message):
    with pytest.raises(ValueError, match=message):
        decide(device, dtype, recipe, **config)


@needs_triton
def test_e4m3_in_attention_is_refused_where_a_gpu_has_none(everywhere, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    value = QuantizedAttention(fp8_value=True)
    with pytest.raises(ValueError, match=r"quantized_attention=.* cannot work here: a GPU has .* fp8_value=False can"):
        decide("cuda", FP16, "int8", quantized_attention=value)
    everywhere.capability = (8, 9)
    assert decide("cuda", FP16, "int8", quantized_attention=value).attention.value == value


def is_open(value):
    return value is None or (isinstance(value, str) and value == "auto")


def all_fields(plan, name="plan"):
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        yield f"{name}.{field.name}", value
        if isinstance(value, AttentionPlan | VaePlan | QuantizedAttention):
            yield from all_fields(value, f"{name}.{field.name}")


@pytest.mark.parametrize("compiles", CompileMode)
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_every_plan_is_complete(device, compiles):
    """Nothing in it is left to be decided, and all is of the kind that it says."""
    for dtype, recipe in itertools.product((FP16, BF16, FP32), (None, "int8", "int8-weight", "fp8-weight")):
        plan = decide(device, dtype, recipe, compile=compiles)
        assert type(plan) is EnginePlan
        assert [name for name, value in all_fields(plan) if is_open(value)] == []
        for kind, value in ((CompileMode, plan.compile), (Product, plan.product), (Offload, plan.offload)):
            assert isinstance(value, enum.Enum) and value in kind
        assert plan.operations in ("torch", "cpu", "triton")
        assert plan.attention.backend is not AttentionBackend.AUTO
        # Each implementation where it can be.
        assert (plan.operations == "cpu") <= (device == "cpu") and (plan.operations == "triton") <= (device == "cuda")


# --- of a pipeline, and of one that is not loaded ------------------------------------------------------------------


def models(**quantized):
    pipe = toy.pipeline()
    return Models(pipe.transformer, pipe.text_encoder, pipe.vae, **quantized)


def place(models, config, device="cpu", dtype=FP32):
    device = torch.device(device)
    return config, models, device, dtype, choose_vae(device, dtype, config.fast_vae, config.vae_memory, models.vae)


def test_a_pipelines_precision_is_what_it_was_made_with():
    loaded = models(recipe=RECIPES["int8"], text_scheme=Scheme.INT8_WEIGHT)
    plan = resolve.resolve(*place(loaded, EngineConfig(recipe="int8")))
    assert plan.recipe is RECIPES["int8"] and plan.text_encoder is Scheme.INT8_WEIGHT and plan.tier == "balanced"
    plan = resolve.resolve(*place(models(), EngineConfig()))
    assert plan.recipe is AS_THEY_ARE and plan.text_encoder == "native" and plan.tier == "exact"


def test_a_limit_without_a_size_is_none():
    config = EngineConfig(memory_limit="1KiB", tier="exact")
    assert resolve.resolve(*place(models(), config)).memory_limit == UNLIMITED
    with pytest.raises(LimitError):
        resolve.resolve(*place(models(), config), Request(9, 32, 32, 16))
    plan = resolve.resolve(*place(models(), EngineConfig(memory_limit="1GiB")), Request(9, 32, 32, 16))
    assert plan.memory_limit == 2**30 and plan.memory and plan.tier == "exact"


def test_a_limit_chooses_precision_for_what_is_not_made_yet():
    request, dtype = Request(9, 32, 32, 16, steps=2), BF16
    target = Target("cpu", "a CPU", int8_units="units")

    def chosen(limit):
        return resolve.resolve_new(EngineConfig(memory_limit=limit), models(), target, dtype, request)

    roomy = chosen("1GiB")
    assert roomy.tier == "exact" and roomy.recipe is AS_THEY_ARE and roomy.product is Product.ONEDNN
    with pytest.raises(LimitError):
        chosen("10KiB")


def test_what_keeps_a_cpu_from_our_cpp_is_in_the_plan(monkeypatch):
    assert decide("cpu", FP32).why_not_cpp == ""
    set_missing(monkeypatch, {"cpu": "g++ did not finish in 120 s"})
    assert decide("cpu", FP32).why_not_cpp == "g++ did not finish in 120 s"
    assert decide("cpu", FP64).why_not_cpp == decide("cuda", FP16).why_not_cpp == ""
    assert decide("cpu", FP32, fuse_operations=False).why_not_cpp == ""
    assert decide("cpu", FP32, compile="blocks").why_not_cpp == ""
