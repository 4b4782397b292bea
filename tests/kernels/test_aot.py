"""The kernels compile for every GPU without one, fit it, spill nothing and use its tensor cores."""

import contextlib
import os
import re

import pytest
import torch
from cogvx_kernels.triton import why_not

if why_not() is not None:
    pytest.skip(why_not(), allow_module_level=True)

from cogvx_kernels import aot, farm
from cogvx_kernels.triton.targets import TARGETS

WIDTHS = {"2b": 1920, "5b": 3072}
# What multiplies matrices on each target: mma.sync, wgmma, tcgen05, MFMA.
PRODUCTS = {
    "sm_80": r"HMMA\.16816\.F32",
    "sm_86": r"HMMA\.16816\.F32",
    "sm_89": r"HMMA\.16816\.F32",
    "sm_90": r"HGMMA\.64x\d+x16\.F32",
    "sm_100": r"UTCHMMA",
    "sm_120": r"HMMA\.16816\.F32",
    "gfx942": r"v_mfma_f32_\d+x\d+x\d+_(bf16|f16)",
}


def check(compiled):
    assert not compiled.resources.problems(compiled.target), str(compiled)
    if compiled.launch.name == "attention":
        kinds = compiled.resources.matrix
        assert kinds and all(re.match(PRODUCTS[compiled.target], kind) for kind in kinds), f"{compiled}: {kinds}"
    elif compiled.target != "gfx942":
        wide = {access: count for access, count in compiled.resources.widths.items() if access.startswith("load")}
        assert {"load 128"} <= set(wide) <= {"load 128", vector_load(compiled)}, f"{compiled}: {wide}"


def vector_load(compiled):
    """How a thread loads its part of an expert's vector: 16 warps may be more threads than it has 16 bytes."""
    bits = 8 * compiled.launch.tensors["x_ptr"][1] if "BLOCK" in compiled.launch.arguments else 128
    columns = compiled.launch.arguments.get("BLOCK", 0) // (32 * compiled.config.num_warps) or 1
    return f"load {min(128, bits * columns)}"


@pytest.fixture(scope="module")
def launches():
    return aot.model_launches(WIDTHS["2b"], torch.float16)


def test_a_block_launches_every_kernel(launches):
    assert [launch.name for launch in launches] == [
        "layer_norm_modulate",
        "gated_residual",
        "gated_residual_layer_norm_modulate",
        "qk_norm_rope",
        "attention",
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_first_configuration(target, launches):
    for launch in launches:
        (compiled,) = aot.compile_all(launch, [target], first_only=True)
        check(compiled)


def test_streams_of_any_length_share_one_binary():
    def arguments(tokens):
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(), torch.device("cuda"):
            x, vectors = torch.empty(1, tokens, 64, dtype=torch.float16), torch.empty(1, 2, 64, dtype=torch.float16)
        return x, x, vectors

    compiled = []
    for tokens, text in ((300, 226), (17, 0), (16, 1)):
        launch = aot.launches(lambda *a, text=text: aot.ops.gated_residual(*a, text, "triton"), *arguments(tokens))[0]
        compiled.append(aot.compile_for(launch, "sm_80", launch.kernel.configs["sm_80"][0]).kernel)
    assert len({kernel.hash for kernel in compiled}) == 1


def test_a_spill_is_found(launches):
    config = aot.triton.Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=4, num_stages=2)
    compiled = aot.compile_for(launches[-1], "sm_80", config)
    assert "spills" in compiled.resources.problems("sm_80")[0]


@pytest.fixture(scope="module")
def compiled_in_parallel(request):
    """Compiles what the selected tests will look at, on all cores; triton's cache keeps it for them."""
    wanted = {}
    for item in request.session.items:
        if item.module is request.module and item.get_closest_marker("kernels_all"):
            given = item.callspec.params
            width, name = given.get("width", "2b"), str(given["dtype"]).removeprefix("torch.")
            head_dim = 64 if "width" in given else 128
            model = aot.Model(WIDTHS[width] // head_dim, head_dim, name, width != "2b", tokens=74)
            wanted |= dict.fromkeys(farm.jobs(model, [given["target"]]))
    with contextlib.suppress(farm.CompileError):  # the test that looks at it says so
        for _ in farm.run(list(wanted), str, len(os.sched_getaffinity(0))):
            pass


@pytest.mark.kernels_all
@pytest.mark.usefixtures("compiled_in_parallel")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("target", TARGETS)
def test_all_configurations(target, width, dtype):
    for launch in aot.model_launches(WIDTHS[width], dtype, rotary=width != "2b"):
        for compiled in aot.compile_all(launch, [target]):
            check(compiled)


@pytest.mark.kernels_all
@pytest.mark.usefixtures("compiled_in_parallel")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_all_configurations_of_head_dim_128(target, dtype):
    for launch in aot.model_launches(WIDTHS["2b"], dtype, head_dim=128)[-2:]:
        for compiled in aot.compile_all(launch, [target]):
            check(compiled)
