"""What is chosen by memory limit: for the family's models on GPUs of known sizes, and by rules alone."""

import pytest
import torch

from cogvx_fast import EngineConfig
from cogvx_fast.fit.choice import LimitError, choose, options
from cogvx_fast.fit.demand import Demand, Option, Predictor
from cogvx_fast.fit.request import Request
from cogvx_fast.quantization import RECIPES, Scheme
from cogvx_fast.quantization.memory import Models
from cogvx_fast.quantization.recipes import Target
from cogvx_fast.transformer.memory import StepMemory
from cogvx_fast.vae.memory import BudgetError
from cogvx_fast.vae.place import Place

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


def predictor(models, target, config, dtype=torch.bfloat16):
    device = torch.device(target.device)
    request = Request.default(models.transformer.config)
    assert (request.num_frames, request.height, request.width) == (49, 480, 720)
    return Predictor(models, request, device, dtype, config, Place(device, dtype))


def chosen(models, target, config, dtype=torch.bfloat16):
    predicts = predictor(models, target, config, dtype)
    left = list(options(config, target, dtype))
    return choose(config.memory_limit, left, predicts.demand, predicts.frames, "49 frames of 720x480")


# At 49 frames of 480x720 with guidance. 2b: text encoder 8.9 GiB in bf16, transformer 3.4; 5b: transformer 10.4.
@pytest.mark.parametrize(
    ("model", "limit", "recipe", "text_encoder", "offloads"),
    [
        ("2b", 8, None, Scheme.INT8_WEIGHT, True),
        ("2b", 16, None, None, False),
        ("2b", 24, None, None, False),
        ("5b", 12, "int8-weight", None, True),
        ("5b", 16, None, None, True),
        ("5b", 24, None, None, False),
    ],
)
def test_the_family_on_gpus(family, model, limit, recipe, text_encoder, offloads):
    choice = chosen(family[model], A100, EngineConfig(memory_limit=f"{limit}GiB"))
    assert (choice.option.recipe and choice.option.recipe.name) == recipe
    assert (choice.option.text_encoder, choice.option.offloads) == (text_encoder, offloads)
    assert choice.demand.peak <= limit * GIB
    assert all(demand.peak > limit * GIB for _, demand in choice.rejected)  # nothing more exact was passed over


def test_5b_with_guidance_on_8_gib_is_refused_with_its_parts(family):
    with pytest.raises(
        LimitError, match=r"8\.00 GiB is too small.*with transformer (fp8|int8).*'step': transformer 5\.95"
    ):
        chosen(family["5b"], ADA, EngineConfig(memory_limit="8GiB"))


def test_nothing_leaves_a_cpu(family):
    choice = chosen(family["2b"], CPU, EngineConfig(memory_limit="12GiB"))
    assert not choice.option.offloads and choice.option.text_encoder is Scheme.INT8_WEIGHT
    assert min(choice.demand.stages.values()) > choice.demand.weights
    with pytest.raises(LimitError, match=r"the smallest possible is 9\.05 GiB"):
        chosen(family["2b"], CPU, EngineConfig(memory_limit="8GiB"))


def test_frames_get_what_is_left(family):
    ample = chosen(family["2b"], A100, EngineConfig(memory_limit="14GiB", recipe="int8-weight"))
    assert ample.vae_memory is None
    tight = chosen(family["2b"], A100, EngineConfig(memory_limit="9.5GiB", recipe="int8-weight"))
    assert tight.vae_memory == 9.5 * GIB - tight.demand.weights
    assert 0.8 * tight.vae_memory < tight.demand.decode <= tight.vae_memory


def test_a_named_budget_stays(family):
    config = EngineConfig(memory_limit="24GiB", vae_memory="2GiB")
    assert predictor(family["2b"], A100, config).demand(Option()).decode <= 2 * GIB
    assert chosen(family["2b"], A100, config).demand.decode <= 2 * GIB


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (EngineConfig(memory_limit=1), [None, "int8-weight", "int8", "fp8-weight", "fp8"]),
        (EngineConfig(memory_limit=1, tier="exact"), [None]),
        (EngineConfig(memory_limit=1, recipe="int8"), ["int8"]),
        (EngineConfig(memory_limit=1, recipe="native"), [None]),
        (EngineConfig(memory_limit=1, tier="balanced"), ["fp8", "int8-weight", "int8", "fp8-weight"]),
    ],
)
def test_what_was_named_stays_and_the_rest_goes_by_quality(config, names):
    left = options(config, ADA, torch.bfloat16)
    found = [None if option.recipe is None else option.recipe.name for option in left]
    assert list(dict.fromkeys(found)) == names


def test_what_is_quantized_is_not_quantized_again():
    config = EngineConfig(memory_limit=1)
    left = list(options(config, ADA, torch.bfloat16, RECIPES["int8"], Scheme.FP8_WEIGHT))
    assert {(option.recipe.name, option.text_encoder) for option in left} == {("int8", Scheme.FP8_WEIGHT)}
    on_cpu = list(options(EngineConfig(memory_limit=1, text_encoder="native"), CPU, torch.float16))
    assert all(option.text_encoder is None and not option.offloads for option in on_cpu)
    assert [o.packs for o in on_cpu if o.recipe is None] == [True, False]
    assert "fp8" not in {option.recipe.name for option in on_cpu if option.recipe}


def demand(offloads=False, encode=0, decode=10):
    return Demand(100, 50, 20, 5, StepMemory(3, 2, 40), encode, decode, offloads)


def test_the_stages_are_what_is_there():
    assert demand().stages == {"text": 175, "step": 215, "decode": 180}
    assert demand(offloads=True).stages == {"text": 105, "step": 95, "decode": 30}
    # Whoever encodes has the text encoder beside it, and the autoencoder stays for the steps.
    assert demand(True, encode=7).stages == {"text": 105, "encode": 127, "step": 115, "decode": 30}
    assert demand(True).parts().startswith("0.00 MiB in stage 'text': text encoder")


def test_a_decoder_that_cannot_be_small_enough_counts():
    def within(budget):
        raise BudgetError("too small", 300)

    with pytest.raises(LimitError) as error:
        choose(200, [Option(), Option(offloads=True)], lambda o: demand(o.offloads, decode=400), within, "this")
    option, least = error.value.smallest
    assert option.offloads and least.peak == 320
