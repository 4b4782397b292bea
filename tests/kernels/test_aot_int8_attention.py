"""Attention in 8 bits compiles for every GPU without one, fits it, spills nothing and multiplies bytes."""

import re

import pytest
import torch
from cogvx_kernels._triton import why_unavailable

if why_unavailable() is not None:
    pytest.skip(why_unavailable(), allow_module_level=True)

from cogvx_kernels import aot
from cogvx_kernels.aot import models
from cogvx_kernels.inspect import machine_code
from cogvx_kernels.targets import TARGETS

pytestmark = pytest.mark.slow

FP8 = torch.float8_e4m3fn
FP8_TARGETS = [target for target in TARGETS.values() if target.e4m3]
# What multiplies Q and K, and P and V in 16 bits and in 8, in each family. Triton has no tcgen05 for integers.
MMA = (r"IMMA\.16832\.S8\.S8", r"HMMA\.16816\.F32", r"QMMA\.16832\.F32\.E4M3")
PRODUCTS = dict.fromkeys(["a100", "rtx", "rtx-blackwell"], MMA) | {
    "hopper": (r"IGMMA\.64x\d+x32\.S8\.S8", r"HGMMA\.64x\d+x16\.F32", r"QGMMA\.64x\d+x32\.F32\.E4M3"),
    "blackwell": (MMA[0], "UTCHMMA", "UTCQMMA"),
    "cdna": (r"v_mfma_i32_\d+x\d+x\d+_i8", r"v_mfma_f32_\d+x\d+x\d+_(bf16|f16)", None),
}
CONVERSION = re.compile(r"\bU?I2FP?\.")


def main_loop(code):
    """The instructions between a label and the branch back to it: of the loops with products, the shortest."""
    lines, labels, loops = code.splitlines(), {}, []
    for number, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = number
        elif (branch := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) and branch[1] in labels:
            loops.append(lines[labels[branch[1]] : number])
    return min((loop for loop in loops if any("MMA" in line for line in loop)), key=len)


def check(launch, target, config, fp8):
    compiled = aot.compile_for(launch, target, config)
    assert not compiled.resources.problems(target), str(compiled)
    if launch.name != "int8_attention":
        # Vectors and sums of a head and scales are narrow; rows are not.
        widths = compiled.resources.widths
        assert not {"store 8", "store 16"} & set(widths), f"{compiled}: {widths}"
        assert target.family == "cdna" or widths["load 128"] > sum(widths.get(f"load {w}", 0) for w in (8, 16, 32, 64))
        return
    kinds, (integers, halves, bytes_) = compiled.resources.matrix, PRODUCTS[target.family]
    expected = (integers, bytes_ if fp8 else halves)
    assert all(any(re.match(one, kind) for one in expected) for kind in kinds), f"{compiled}: {kinds}"
    assert all(any(re.match(one, kind) for kind in kinds) for one in expected), f"{compiled}: {kinds}"
    if target.family not in ("blackwell", "cdna"):
        code = machine_code.disassemble(compiled.kernel)
        assert not [line for line in main_loop(code) if CONVERSION.search(line)], str(compiled)
        assert CONVERSION.search(code)  # outside the loop heads are divided by: the pattern finds what it should


def check_all(launches, target, fp8=False, first_only=False):
    for launch in launches:
        configs = launch.configs(target)[: 1 if first_only else None]
        assert configs, f"{launch.name} has nothing for {target.name}"
        for config in configs:
            check(launch, target, config, fp8)


def test_launches():
    names = [launch.name for launch in models.int8_attention_launches(1920, torch.float16)]
    assert names == ["qk_norm_rope_int8", "quantize_qk", "int8_attention"]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_first_configuration(target):
    check_all(models.int8_attention_launches(1920, torch.float16), TARGETS[target], first_only=True)


def test_first_configuration_of_fp8():
    launches = models.int8_attention_launches(1920, torch.float16, value_dtype=FP8)
    assert [launch.name for launch in launches[-3:]] == ["value_parts", "quantize_value", "int8_attention"]
    check_all(launches[-2:], TARGETS["sm_89"], fp8=True, first_only=True)


@pytest.mark.kernels_all
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_all_configurations(target, head_dim, dtype):
    check_all(models.int8_attention_launches(1920, dtype, head_dim), target)


@pytest.mark.kernels_all
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("target", FP8_TARGETS, ids=lambda target: target.name)
def test_all_configurations_of_fp8(target, head_dim):
    check_all(models.int8_attention_launches(1920, torch.bfloat16, head_dim, FP8), target, fp8=True)
