"""The kernels compile for every GPU without one, fit it, spill nothing and use its tensor cores."""

import contextlib
import os
import re

import pytest
import torch
from cogvx_kernels._triton import why_unavailable
from tqdm import tqdm

if why_unavailable() is not None:
    pytest.skip(why_unavailable(), allow_module_level=True)

from cogvx_kernels import aot, ops
from cogvx_kernels.aot import farm, models
from cogvx_kernels.inspect import machine_code
from cogvx_kernels.targets import TARGETS

pytestmark = pytest.mark.slow

A100 = TARGETS["sm_80"]
WIDTHS = {"2b": 1920, "5b": 3072}
# What multiplies matrices in each family: mma.sync, wgmma, tcgen05, MFMA.
PRODUCTS = {
    **dict.fromkeys(("a100", "rtx", "rtx-blackwell"), r"HMMA\.16816\.F32"),
    "hopper": r"HGMMA\.64x\d+x16\.F32",
    "blackwell": r"UTCHMMA",
    "cdna": r"v_mfma_f32_\d+x\d+x\d+_(bf16|f16)",
}
# The same of 8-bit numbers. For int8 triton does not use tcgen05.
PRODUCTS_INT8 = {
    **dict.fromkeys(("a100", "rtx", "blackwell", "rtx-blackwell"), r"IMMA\.16832\.S8\.S8"),
    "hopper": r"IGMMA\.64x128x32\.S8\.S8",
    "cdna": r"v_mfma_i32_32x32x16_i8",
}
PRODUCTS_E4M3 = {
    **dict.fromkeys(("rtx", "rtx-blackwell"), r"QMMA\.16832\.F32\.E4M3\.E4M3"),
    "hopper": r"QGMMA\.64x\d+x32\.F32\.E4M3\.E4M3",
    "blackwell": r"UTCQMMA",
}

every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)


# What is not 16 bytes a thread: indices of 64 bits, a few hundred KiB of partial results.
NARROWER = {"group_norm_modulate_silu": {"load 64"}, "group_norm_join": {"load 32"}}


def products(launch):
    """What multiplies matrices in a launch, by family; None if nothing should."""
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
        copied = launch.arguments["CHANNELS"] >= 16 and compiled.target.family != "cdna"
        assert not copied or copies == {"copy 128"}, f"{compiled}: {copies}"
        if launch.arguments["x_ptr"] == torch.float32:
            return
    if expected := products(launch):
        kinds = compiled.resources.matrix
        assert kinds and all(re.match(expected[compiled.target.family], kind) for kind in kinds), f"{compiled}: {kinds}"
    elif compiled.target.family != "cdna":
        wide = {access: count for access, count in compiled.resources.widths.items() if access.startswith("load")}
        if compiled.launch.arguments.get("output_scale_ptr") is not None:
            # With four rows a thread has 4 columns, and not 8, of the vectors in L2 if what it stores is in 8 bits.
            narrow = (*narrow, "load 64")
        narrow = (*narrow, *NARROWER.get(launch.name, ()), vector_load(compiled))
        least = set() if launch.name == "group_norm_join" else {"load 128"}
        assert least <= set(wide) <= {"load 128", *narrow}, f"{compiled}: {wide}"


def every_configuration(launch, target):
    """All that can be chosen, compiled; there is one, or the kernel says why there is none."""
    compiled = aot.compile_all(launch, [target])
    assert compiled or target.family in launch.kernel.without, f"{launch.name} has nothing for {target.name}"
    return compiled


def vector_load(compiled):
    """How a thread loads its part of an expert's vector: 16 warps may be more threads than it has 16 bytes."""
    arguments = compiled.launch.arguments
    bits = 8 * compiled.launch.tensors["x_ptr"][1] if "BLOCK" in arguments and "gate_ptr" in arguments else 128
    columns = arguments.get("BLOCK", 0) // (32 * compiled.config.num_warps) or 1
    return f"load {min(128, bits * columns)}"


@pytest.fixture(scope="module")
def launches():
    return models.model_launches(WIDTHS["2b"], torch.float16)


@every_target
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


@every_target
def test_first_configuration_of_convolutions(target, vae_launches):
    """Of those whose epilogue has most registers to hold."""
    adding = [launch for launch in vae_launches if launch.arguments.get("residual_ptr") is not None]
    for launch in (adding[-1], next(launch for launch in vae_launches if launch.name == "upsample_conv2d")):
        (compiled,) = aot.compile_all(launch, [target], first_only=True)
        check(compiled)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_first_configuration_of_norms(target, vae_launches):
    for launch in [launch for launch in vae_launches if launch.name.startswith("group_norm")][-3:]:
        (compiled,) = aot.compile_all(launch, [TARGETS[target]], first_only=True)
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
        compiled.append(aot.compile_for(launch, A100, launch.configs(A100)[0]).kernel)
    assert len({kernel.hash for kernel in compiled}) == 1


def test_a_spill_is_found(launches):
    config = aot.triton.Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=4, num_stages=2)
    compiled = aot.compile_for(launches[-1], A100, config)
    assert "spills" in compiled.resources.problems(A100)[0]


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
            wanted |= dict.fromkeys(farm.jobs(model, [given["target"].name]))
    capture = request.config.pluginmanager.getplugin("capturemanager")
    done = farm.run(list(wanted), str, len(os.sched_getaffinity(0)))
    with contextlib.suppress(farm.CompileError), capture.global_and_fixture_disabled():
        for _ in tqdm(done, "kernels", len(wanted)):  # the test that looks at one that does not compile says so
            pass


@pytest.mark.kernels_all
@pytest.mark.usefixtures("compiled_in_parallel")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@every_target
def test_all_configurations(target, width, dtype):
    for launch in models.model_launches(WIDTHS[width], dtype, rotary=width != "2b"):
        for compiled in every_configuration(launch, target):
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
        (compiled,) = aot.compile_all(launch, [TARGETS[target]], first_only=True)
        check(compiled)


@pytest.mark.kernels_all
@pytest.mark.parametrize("quantized", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@every_target
def test_all_configurations_in_8_bits(target, width, dtype, quantized):
    if quantized.is_floating_point and not target.e4m3:
        pytest.skip(f"{target.name} does not multiply e4m3")
    for launch in models.quantized_launches(WIDTHS[width], dtype, quantized):
        for compiled in every_configuration(launch, target):
            check(compiled)


@pytest.mark.kernels_all
@pytest.mark.usefixtures("compiled_in_parallel")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_target
def test_all_configurations_of_head_dim_128(target, dtype):
    for launch in models.model_launches(WIDTHS["2b"], dtype, head_dim=128)[-2:]:
        for compiled in every_configuration(launch, target):
            # A head's weights and biases are as many numbers as a program has threads: one each.
            check(compiled, ["load 16"])


@pytest.mark.kernels_all
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@every_target
def test_all_configurations_of_the_autoencoder(target, dtype):
    for launch in models.vae_launches(dtype):
        for compiled in every_configuration(launch, target):
            check(compiled)


def every_launch(dtype=torch.float16):
    width = WIDTHS["5b"]
    of_a_block = models.model_launches(width, dtype) + models.int8_attention_launches(width, dtype)
    return of_a_block + models.quantized_launches(width, dtype, torch.int8) + models.vae_launches(dtype)


def test_numbers_that_are_not_whole_are_constants():
    """Inductor takes Python's floats for fp64 where they are arguments: such a kernel computes in double."""
    for launch in every_launch():
        constants = {parameter.name for parameter in launch.kernel.fn.params if parameter.is_constexpr}
        floats = {name for name, value in launch.arguments.items() if isinstance(value, float)}
        assert floats <= constants, launch.name
    assert any(isinstance(value, float) for launch in every_launch() for value in launch.arguments.values())


def test_the_largest_clip_launches_the_kernels_of_a_small_one():
    """A stride of 64 bits would be another kernel, which no cache was built with."""
    sizes = (2, 60, 90), (21, 96, 170)  # of the default clip's first chunk, and 81 frames of 768 x 1360 at once
    small, large = (models.vae_launches(torch.float16, latents=latents) for latents in sizes)
    assert [launch.name for launch in small] == [launch.name for launch in large]
    largest = max(shape.numel() for launch in large for shape in (torch.Size(s) for s, _ in launch.tensors.values()))
    assert largest > 2**31
    for launch in large:
        numbers = [value for value in launch.arguments.values() if isinstance(value, int)]
        assert max(numbers) < 2**31, (launch.name, launch.arguments)


@pytest.mark.parametrize("target", ["sm_89", "sm_90"])
def test_products_of_e4m3_are_added_in_fp32(target):
    """The tensor cores' own sums have 22 bits at most: a tile's product starts at zero, and is added to the sum."""
    launches = models.quantized_launches(WIDTHS["2b"], torch.float16, torch.float8_e4m3fn)
    launch = next(launch for launch in launches if launch.name == "scaled_linear" and not launch.arguments["GROUPED"])
    (compiled,) = aot.compile_all(launch, [TARGETS[target]], first_only=True)
    zeros = set(
        re.findall(r"(%[\w#]+) = arith\.constant dense<0\.0+e\+00> : tensor<\d+x\d+xf32", compiled.kernel.asm["ttir"])
    )
    products = re.findall(r"tt\.dot [^,]+, [^,]+, (%[\w#]+)", compiled.kernel.asm["ttir"])
    assert products and set(products) <= zeros
    tile = compiled.config.kwargs["BLOCK_M"] * compiled.config.kwargs["BLOCK_N"]
    each = tile // (32 * compiled.config.num_warps)
    additions = len(re.findall(r"\bFADD2?\b", machine_code.disassemble(compiled.kernel)))
    assert additions >= each, f"{additions} additions for {each} numbers of a thread"
