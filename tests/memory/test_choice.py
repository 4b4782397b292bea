"""What is chosen by memory limit: for the family's models on GPUs of known sizes, and by rules alone."""

from dataclasses import dataclass

import pytest
import torch

from cogvx_fast import EngineConfig
from cogvx_fast.memory import Demand, LimitError, Models, Option, Predictor, Request, choose, fit, options
from cogvx_fast.memory.step import StepMemory
from cogvx_fast.plan import Offload
from cogvx_fast.quantization import RECIPES, Scheme
from cogvx_fast.quantization.recipes import AS_THEY_ARE, Target
from cogvx_fast.vae.slicing import BudgetError
from tests.memory.plans import CPU as CPU_DEVICE
from tests.memory.plans import GPU, plan, planner

GIB = 2**30
A100 = Target("cuda", "a GPU of 8.0", (8, 0))
ADA = Target("cuda", "a GPU of 8.9", (8, 9))
CPU = Target("cpu", "a CPU", int8_units="units")
T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}
CONFIGS = {
    "2b": {"num_attention_heads": 30, "num_layers": 30},
    "5b": {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
}


@pytest.fixture(scope="module")
def family():
    return {name: Models.from_configs(config, T5_XXL, {}) for name, config in CONFIGS.items()}


def chosen(models, target, config, dtype=torch.bfloat16):
    request = Request.default(models.variant)
    assert (request.num_frames, request.height, request.width) == (49, 480, 720)
    device = CPU_DEVICE if target.device == "cpu" else GPU
    plan_of = planner(device, dtype, budget=config.vae_memory or 0)
    found = fit(config, models, request, target, dtype, plan_of)
    demand = Predictor(models, request).demand(found)
    assert demand.peak <= config.memory_limit == found.memory_limit
    left = list(options(config, target, dtype))
    taken = next(
        i
        for i, option in enumerate(left)
        if plan_of(option).recipe == found.recipe
        and option.text_encoder == found.text_encoder
        and option.offload == found.offload
    )
    if taken:  # nothing more exact was passed over
        with pytest.raises(LimitError):
            choose(config.memory_limit, left[:taken], plan_of, Predictor(models, request))
    return found, demand


# At 49 frames of 480x720 with guidance. 2b: text encoder 8.9 GiB in bf16, transformer 3.4; 5b: transformer 10.4.
@pytest.mark.parametrize(
    ("model", "limit", "recipe", "text_encoder", "offload"),
    [
        ("2b", 8, "native", Scheme.INT8_WEIGHT, Offload.MODELS),
        ("2b", 16, "native", "native", Offload.NONE),
        ("2b", 24, "native", "native", Offload.NONE),
        ("5b", 12, "int8-weight", "native", Offload.MODELS),
        ("5b", 16, "native", "native", Offload.MODELS),
        ("5b", 24, "native", "native", Offload.NONE),
    ],
)
def test_the_family_on_gpus(family, model, limit, recipe, text_encoder, offload):
    found, _ = chosen(family[model], A100, EngineConfig(memory_limit=f"{limit}GiB"))
    assert (found.recipe.name, found.text_encoder, found.offload) == (recipe, text_encoder, offload)


def test_the_plan_says_what_was_chosen_and_what_was_not(family):
    found, demand = chosen(family["2b"], A100, EngineConfig(memory_limit="8GiB"))
    assert found.memory.startswith("8.00 GiB for 49 frames of 720x480: transformer as it is, text encoder int8-weight")
    assert f"each model on the device only while it runs: predicted {demand.parts()}" in found.memory
    assert "; not transformer as it is, text encoder as it is" in found.memory


def test_5b_with_guidance_on_8_gib_is_refused_with_its_parts(family):
    with pytest.raises(
        LimitError, match=r"8\.00 GiB is too small.*with transformer (fp8|int8).*'step': transformer 5\.95"
    ) as error:
        chosen(family["5b"], ADA, EngineConfig(memory_limit="8GiB"))
    assert f"{error.value.num_frames} frames of this size" in str(error.value) and error.value.num_frames % 8 == 1


def test_a_refusal_names_another_precision_that_fits(family):
    with pytest.raises(
        LimitError, match="what fits: that limit, or a pipeline of another precision: transformer int8-weight"
    ):
        chosen(family["5b"], ADA, EngineConfig(memory_limit="12GiB", tier="exact"))


def test_nothing_leaves_a_cpu(family):
    found, demand = chosen(family["2b"], CPU, EngineConfig(memory_limit="12GiB"))
    assert found.offload is Offload.NONE and found.text_encoder is Scheme.INT8_WEIGHT
    assert min(demand.stages.values()) > demand.weights
    with pytest.raises(LimitError, match=r"the smallest possible is 8\.\d+ GiB"):
        chosen(family["2b"], CPU, EngineConfig(memory_limit="8GiB"))


def test_frames_get_what_is_left(family):
    ample, _ = chosen(family["2b"], A100, EngineConfig(memory_limit="14GiB", recipe="int8-weight"))
    assert ample.vae.budget == 0
    tight, demand = chosen(family["2b"], A100, EngineConfig(memory_limit="9.5GiB", recipe="int8-weight"))
    assert tight.vae.budget == 9.5 * GIB - demand.weights
    assert 0.8 * tight.vae.budget < demand.decode <= tight.vae.budget
    assert f"frames within {tight.vae.budget / GIB:.2f} GiB" in tight.memory


def test_a_named_budget_stays(family):
    config = EngineConfig(memory_limit="24GiB", vae_memory="2GiB")
    found, demand = chosen(family["2b"], A100, config)
    assert found.vae.budget == 2 * GIB and demand.decode <= 2 * GIB


def test_decoding_alone_counts_alone(family):
    request = Request.of_decoding(49, 480, 720)
    demand = Predictor(family["2b"], request).demand(plan())
    assert list(demand.stages) == ["decode"] and demand.peak == demand.weights + demand.decode


def test_what_diffusers_decodes_is_not_planned(family):
    foreign = plan()
    foreign = plan(vae=type(foreign.vae)(GPU, foreign.dtype, ours=False, why="its activation is 'relu'"))
    with pytest.raises(ValueError, match="no plan for this autoencoder: its activation is 'relu'"):
        Predictor(family["2b"], Request.default(family["2b"].variant)).demand(foreign)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (EngineConfig(memory_limit=1), ["native", "int8-weight", "int8", "fp8-weight", "fp8"]),
        (EngineConfig(memory_limit=1, tier="exact"), ["native"]),
        (EngineConfig(memory_limit=1, recipe="int8"), ["int8"]),
        (EngineConfig(memory_limit=1, recipe="native"), ["native"]),
        (EngineConfig(memory_limit=1, gemm="torchao"), ["native", "int8-weight", "int8", "fp8-weight", "fp8"]),
        (EngineConfig(memory_limit=1, tier="balanced"), ["fp8", "int8-weight", "int8", "fp8-weight"]),
    ],
)
def test_what_was_named_stays_and_the_rest_goes_by_quality(config, names):
    left = options(config, ADA, torch.bfloat16)
    assert list(dict.fromkeys(option.recipe.name for option in left)) == names


def test_what_is_quantized_is_not_quantized_again():
    config = EngineConfig(memory_limit=1)
    left = list(options(config, ADA, torch.bfloat16, RECIPES["int8"], Scheme.FP8_WEIGHT))
    assert {(option.recipe.name, option.text_encoder) for option in left} == {("int8", Scheme.FP8_WEIGHT)}
    on_cpu = list(options(EngineConfig(memory_limit=1, text_encoder="native"), CPU, torch.float16))
    assert all(option.text_encoder == "native" and option.offload is Offload.NONE for option in on_cpu)
    assert [option.packs for option in on_cpu if option.recipe is AS_THEY_ARE] == [True, False]
    assert "fp8" not in {option.recipe.name for option in on_cpu}


def test_what_our_products_cannot_run_is_not_tried_where_they_are_asked_for():
    config = EngineConfig(memory_limit=1, gemm="native")
    names = {option.recipe.name for option in options(config, CPU, torch.bfloat16)}
    assert names <= {"native", "int8"}


def demand(offloads=False, encode=0, decode=10):
    return Demand(100, 50, 20, 5, StepMemory(3, 2, 40), encode, decode, offloads)


def test_the_stages_are_what_is_there():
    assert demand().stages == {"text": 175, "step": 215, "decode": 180}
    assert demand(offloads=True).stages == {"text": 105, "step": 95, "decode": 30}
    # Whoever encodes has the text encoder beside it, and the autoencoder stays for the steps.
    assert demand(True, encode=7).stages == {"text": 105, "encode": 127, "step": 115, "decode": 30}
    assert demand(True).parts().startswith("0.00 MiB in stage 'text': text encoder")


@dataclass(frozen=True)
class Fixed:
    """Predicts the same for whatever is made, with frames that take 400 or, sliced as small as can be, 300."""

    request: Request = Request(9, 32, 32)  # noqa: RUF009
    models: Models = Models(None, None, None)  # noqa: RUF009

    def demand(self, planned):
        if planned.vae.budget:
            raise BudgetError("too small", 300)
        return demand(planned.offload is Offload.MODELS, decode=400)


def test_a_decoder_that_cannot_be_small_enough_counts():
    with pytest.raises(LimitError) as error:
        choose(200, [Option(), Option(offload=Offload.MODELS)], planner(), Fixed())
    option, least = error.value.smallest
    assert option.offload is Offload.MODELS and least.peak == 320
