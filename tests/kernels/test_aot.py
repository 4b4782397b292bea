"""The kernels compile for every GPU without one, fit it, spill nothing and use its tensor cores."""

import contextlib
import os
import re

import pytest
import torch
from cogvx_kernels.triton import why_unavailable
from tqdm import tqdm

if why_unavailable() is not None:
    pytest.skip(why_unavailable(), allow_module_level=True)

from cogvx_kernels import aot, farm, models, ops
from cogvx_kernels.triton.targets import TARGETS

pytestmark = pytest.mark.slow

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
# The same of 8-bit numbers. For int8 triton does not use tcgen05.
PRODUCTS_INT8 = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_100", "sm_120"), r"IMMA\.16832\.S8\.S8"),
    "sm_90": r"IGMMA\.64x128x32\.S8\.S8",
    "gfx942": r"v_mfma_i32_32x32x16_i8",
}
PRODUCTS_E4M3 = {
    **dict.fromkeys(("sm_89", "sm_120"), r"QMMA\.16832\.F32\.E4M3\.E4M3"),
    "sm_90": r"QGMMA\.64x\d+x32\.F32\.E4M3\.E4M3",
    "sm_100": r"UTCQMMA",
}


# What is not 16 bytes a thread: indices of 64 bits, a few hundred KiB of partial results.
NARROWER = {"group_norm_modulate_silu": {"load 64"}, "group_norm_join": {"load 32"}}


def products(launch):
    """What multiplies matrices in a launch, by target; None if nothing should."""
    if launch.name == "scaled_linear":
        return PRODUCTS_INT8 if launch.arguments["x_ptr"] == torch.int8 else PRODUCTS_E4M3
    return PRODUCTS if launch.name in ("attention", "causal_conv3d", "upsample_conv2d") else None


def check(compiled, narrow=()):
    """`narrow`: loads that may be there beside those of 16 bytes."""
    assert not compiled.resources.problems(compiled.target), str(compiled)
    launch = compiled.launch
    if launch.name in ("causal_conv3d", "upsample_conv2d"):
        copies = {access for access in compiled.resources.widths if access.startswith("copy")}
        # Three channels are no 4 bytes, the least that is copied without registers.
        copied = launch.arguments["CHANNELS"] >= 16 and compiled.target != "gfx942"
        assert not copied or copies == {"copy 128"}, f"{compiled}: {copies}"
        if launch.arguments["x_ptr"] == torch.float32:
            return
    if expected := products(launch):
        kinds = compiled.resources.matrix
        assert kinds and all(re.match(expected[compiled.target], kind) for kind in kinds), f"{compiled}: {kinds}"
    elif compiled.target != "gfx942":
        wide = {access: count for access, count in compiled.resources.widths.items() if access.startswith("load")}
        if compiled.launch.arguments.get("output_scale_ptr") is not None:
            # With four rows a thread has 4 columns, and not 8, of the vectors in L2 if what it stores is in 8 bits.
            narrow = (*narrow, "load 64")
        narrow = (*narrow, *NARROWER.get(launch.name, ()), vector_load(compiled))
        least = set() if launch.name == "group_norm_join" else {"load 128"}
        assert least <= set(wide) <= {"load 128", *narrow}, f"{compiled}: {wide}"


def vector_load(compiled):
    """How a thread loads its part of an expert's vector: 16 warps may be more threads than it has 16 bytes."""
    arguments = compiled.launch.arguments
    bits = 8 * compiled.launch.tensors["x_ptr"][1] if "BLOCK" in arguments and "gate_ptr" in arguments else 128
    columns = arguments.get("BLOCK", 0) // (32 * compiled.config.num_warps) or 1
    return f"load {min(128, bits * columns)}"


@pytest.fixture(scope="module")
def launches():
    return models.model_launches(WIDTHS["2b"], torch.float16)


@pytest.mark.parametrize("target", TARGETS)
def test_first_configuration(target, launches):
    for launch in launches:
        (compiled,) = aot.compile_all(launch, [target], first_only=True)
        check(compiled)


@pytest.fixture(scope="module")
def vae_launches():
    return models.vae_launches(torch.float16)


def test_the_autoencoder_launches_every_kernel(vae_launches):
    sizes = [(a["CHANNELS"], a["OUT"]) for a in (x.arguments for x in vae_launches if x.name == "causal_conv3d")]
    assert sizes[:3] == [(16, 512), (512, 512), (512, 512)] and {(128, 3), (3, 128), (512, 32)} <= set(sizes)
    names = [launch.name for launch in vae_launches]
    assert [names.count(name) for name in dict.fromkeys(names)] == [len(sizes), 3, 1, 3, 3]
    assert set(names) == {
        "causal_conv3d",
        "group_norm_spans",
        "group_norm_join",
        "group_norm_modulate_silu",
        "upsample_conv2d",
    }


@pytest.mark.parametrize("target", TARGETS)
def test_first_configuration_of_convolutions(target, vae_launches):
    """Of those whose epilogue has most registers to hold."""
    adding = [launch for launch in vae_launches if launch.arguments.get("residual_ptr") is not None]
    for launch in (adding[-1], next(launch for launch in vae_launches if launch.name == "upsample_conv2d")):
        (compiled,) = aot.compile_all(launch, [target], first_only=True)
        check(compiled)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_first_configuration_of_norms(target, vae_launches):
    for launch in [launch for launch in vae_launches if launch.name.startswith("group_norm")][-3:]:
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
        launch = aot.launches(lambda *a, text=text: ops.gated_residual(*a, text, "triton"), *arguments(tokens))[0]
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
            model = models.Model(WIDTHS[width] // head_dim, head_dim, name, width != "2b", tokens=74)
            wanted |= dict.fromkeys(farm.jobs(model, [given["target"]]))
    capture = request.config.pluginmanager.getplugin("capturemanager")
    done = farm.run(list(wanted), str, len(os.sched_getaffinity(0)))
    with contextlib.suppress(farm.CompileError), capture.global_and_fixture_disabled():
        for _ in tqdm(done, "kernels", len(wanted)):  # the test that looks at one that does not compile says so
            pass


@pytest.mark.kernels_all
@pytest.mark.usefixtures("compiled_in_parallel")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("target", TARGETS)
def test_all_configurations(target, width, dtype):
    for launch in models.model_launches(WIDTHS[width], dtype, rotary=width != "2b"):
        for compiled in aot.compile_all(launch, [target]):
            # 16 warps have 4 numbers a thread of the 2,048 that an expert's vectors of 1,920 are padded to.
            check(compiled, ["load 64"] if compiled.config.num_warps == 16 else [])


def test_between_the_products_of_a_block_in_8_bits_there_are_8_bits():
    for quantized in (torch.int8, torch.float8_e4m3fn):
        found = models.quantized_launches(WIDTHS["2b"], torch.float16, quantized)
        assert [launch.arguments.get("GROUPED", False) for launch in found] == [False] * 6 + [True]
        # The norms write 8 bits, and what is between the two layers of the feed-forward is 8 bits, too.
        assert [found[i].arguments["output_ptr"] for i in (0, 4, 5)] == [quantized] * 3
        assert found[6].arguments["x_ptr"] == quantized


@pytest.mark.parametrize(("target", "quantized"), [("sm_80", torch.int8), ("sm_90", torch.float8_e4m3fn)], ids=str)
def test_first_configuration_in_8_bits(target, quantized):
    for launch in models.quantized_launches(WIDTHS["2b"], torch.float16, quantized):
        (compiled,) = aot.compile_all(launch, [target], first_only=True)
        check(compiled)


@pytest.mark.kernels_all
@pytest.mark.parametrize("quantized", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("target", TARGETS)
def test_all_configurations_in_8_bits(target, width, dtype, quantized):
    if quantized.is_floating_point and target not in PRODUCTS_E4M3:
        pytest.skip(f"{target} does not multiply e4m3")
    for launch in models.quantized_launches(WIDTHS[width], dtype, quantized):
        compiled = aot.compile_all(launch, [target])
        assert compiled
        for one in compiled:
            check(one)


@pytest.mark.kernels_all
@pytest.mark.usefixtures("compiled_in_parallel")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_all_configurations_of_head_dim_128(target, dtype):
    for launch in models.model_launches(WIDTHS["2b"], dtype, head_dim=128)[-2:]:
        for compiled in aot.compile_all(launch, [target]):
            # A head's weights and biases are as many numbers as a program has threads: one each.
            check(compiled, ["load 16"])


@pytest.mark.kernels_all
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_all_configurations_of_the_autoencoder(target, dtype):
    for launch in models.vae_launches(dtype):
        for compiled in aot.compile_all(launch, [target]):
            check(compiled)
