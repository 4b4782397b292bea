"""What each recipe names, where it can run, and what is said of what cannot work."""

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from torch import nn

from cogvx_fast import EngineConfig
from cogvx_fast.quantization import BALANCED, RECIPES, Scheme
from cogvx_fast.quantization.recipes import Target, best, check_possible, refusal, why_unsupported
from tests import toy

ADA = Target("cuda", "an L40S (compute capability 8.9)", (8, 9))
AMPERE = Target("cuda", "an A100 (compute capability 8.0)", (8, 0))
VOLTA = Target("cuda", "a V100 (compute capability 7.0)", (7, 0))
CPU = Target("cpu", "a CPU with AVX512-VNNI", int8_units="AVX512-VNNI")
OLD_CPU = Target("cpu", "a CPU without int8 products")

# The whole list: a linear that a version of diffusers adds has to be decided on, not matched by chance.
PER_BLOCK = {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"}
NATIVE_PER_BLOCK = {"norm1.linear", "norm2.linear"}
NATIVE = {"patch_embed.text_proj", "time_embedding.linear_1", "time_embedding.linear_2", "norm_out.linear", "proj_out"}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("variant", toy.VARIANTS)
def test_each_recipe_quantizes_the_blocks_linears_and_nothing_else(variant, recipe):
    with init_empty_weights():
        model = diffusers.CogVideoXTransformer3DModel(num_layers=2, **toy.VARIANTS[variant])
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantized = {name for name, _ in model.named_modules() if RECIPES[recipe].scheme_of(name) is not None}
    blocks = [f"transformer_blocks.{i}." for i in range(2)]
    assert quantized == {block + name for block in blocks for name in PER_BLOCK}
    native = NATIVE | {block + name for block in blocks for name in NATIVE_PER_BLOCK}
    if variant == "1.5-5b-i2v":
        native |= {"ofs_embedding.linear_1", "ofs_embedding.linear_2"}
    if "1.5" in variant:
        native |= {"patch_embed.proj"}
    assert linears - quantized == native


@pytest.mark.parametrize(
    ("target", "dtype", "expected"),
    [
        (ADA, torch.bfloat16, "fp8"),
        (ADA, torch.float16, "int8"),
        (AMPERE, torch.bfloat16, "int8"),
        (VOLTA, torch.float16, None),
        (CPU, torch.float32, "int8"),
        (OLD_CPU, torch.bfloat16, None),
    ],
)
def test_balanced_is_the_best_for_device_and_dtype(target, dtype, expected):
    recipe = best(target, dtype)
    assert (recipe.name if recipe else None) == expected


def test_fp8_says_what_the_device_has_and_what_works_instead():
    for target in (AMPERE, CPU):
        assert target.name in why_unsupported(RECIPES["fp8"], target)
        with pytest.raises(ValueError, match=r"recipe='fp8' cannot work here: .* 8\.9 or newer; .*'int8'"):
            check_possible("fp8", [target])
    check_possible("fp8", [CPU, ADA])
    check_possible(BALANCED, [OLD_CPU])
    message = refusal(RECIPES["fp8"], ADA, torch.float16)
    assert "these are float16" in message and "'fp8'" not in message.split("what can:")[1]


def test_configurations_are_torchaos_by_row_and_leave_inductor_alone():
    import torch._inductor.config as inductor
    from torchao.quantization import quantize_

    before = inductor.get_config_copy()
    for scheme in (Scheme.INT8, Scheme.INT8_WEIGHT, Scheme.FP8_WEIGHT):
        linear = nn.Linear(32, 48).requires_grad_(False)
        quantize_(linear, scheme.torchao_config())
        assert linear.weight.qdata.shape == (48, 32) and linear.weight.scale.numel() == 48
        assert (getattr(linear.weight, "act_quant_kwargs", None) is not None) == scheme.multiplies_8_bits
    assert inductor.get_config_copy() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "int9"}, r"recipe='int9' is unknown; allowed: 'balanced', 'native', 'int8'"),
        (
            {"recipe": "int8", "tier": "exact"},
            r"recipe='int8' changes precision, which tier 'exact' does not; use tier",
        ),
        ({"text_encoder": "int8-weight"}, r"text_encoder='int8-weight' changes precision"),
        (
            {"recipe": "int8", "text_encoder": "int8"},
            r"text_encoder='int8' is unknown; allowed: 'auto', 'native', 'int8",
        ),
        ({"recipe": "int8", "gemm": "cublas"}, r"gemm='cublas' is unknown; allowed: 'auto', 'torchao', 'native'"),
    ],
)
def test_what_cannot_be_asked_for_says_what_can(arguments, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**arguments)


def test_a_recipe_asks_for_its_tier():
    assert EngineConfig(recipe="int8").tier == BALANCED
    assert EngineConfig.from_name(BALANCED).recipe == BALANCED
    assert EngineConfig().tier == "exact" and EngineConfig().recipe is None
