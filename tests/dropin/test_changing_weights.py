"""Adapters and weights that change while a generation runs: what was computed from them before follows."""

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

from cogvx_fast import EngineConfig, accelerate
from tests import toy

from .generations import assert_differs, assert_same, latents

pytestmark = pytest.mark.slow

STEPS = 3
PLACES = {
    "norm1.linear": "transformer_blocks.1.norm1.linear",
    "text_proj": "patch_embed.text_proj",
    "time_embedding": "time_embedding.linear_1",
    "norm_out": "norm_out.linear",
    "to_q": "transformer_blocks.1.attn1.to_q",
    "to_out": "transformer_blocks.1.attn1.to_out.0",
    "ff.proj": "transformer_blocks.1.ff.net.0.proj",
    "ff.out": "transformer_blocks.1.ff.net.2",
    "proj_out": "proj_out",
}
PARAMETERS = {  # of norms and embeddings too, which no adapter sits on
    **{name: f"{module}.weight" for name, module in PLACES.items()},
    "bias of to_q": "transformer_blocks.1.attn1.to_q.bias",
    "bias of ff": "transformer_blocks.1.ff.net.0.proj.bias",
    "bias of text_proj": "patch_embed.text_proj.bias",
    "norm1.norm": "transformer_blocks.1.norm1.norm.weight",
    "norm_q": "transformer_blocks.1.attn1.norm_q.weight",
    "patch": "patch_embed.proj.weight",
}
CONFIGS = {
    "exact": EngineConfig(),
    "torch": EngineConfig(fuse_operations=False, fuse_projections=False, pack_weights=False),
}
BF16_LIMIT = 5e-2  # what both round on the way; a constant that did not follow is several times that


def during(pipe, change, at=0, **overrides):
    """The latents of a generation in which `change(pipe)` is called after step `at`."""

    def callback(pipe, step, timestep, tensors):
        if step == at:
            change(pipe)
        return {}

    return latents(pipe, num_steps=STEPS, callback_on_step_end=callback, **overrides)


def compare(change, prepare=lambda pipe: None, config="exact", dtype=torch.float32, variant="2b"):
    """A change in the middle has the same effect as upstream, then and in the generation after."""
    results = []
    for pipe in (toy.pipeline(variant), accelerate(toy.pipeline(variant), CONFIGS[config])):
        pipe.to(dtype=dtype)
        prepare(pipe)
        before = latents(pipe, num_steps=STEPS)
        results.append((before, during(pipe, change), latents(pipe, num_steps=STEPS)))
    (before, changed, _), output = results
    limit = 1e-4 if dtype == torch.float32 else BF16_LIMIT
    assert_differs(changed, before, least=2 * limit)
    for ours, expected in zip(output, results[0], strict=True):
        assert_same(ours, expected, limit)


def add_adapter(target, name="one", seed=0):
    def add(pipe):
        torch.manual_seed(seed)
        lora = LoraConfig(r=4, lora_alpha=16, target_modules=[target], init_lora_weights=False)
        pipe.transformer.add_adapter(lora, adapter_name=name)

    return add


@pytest.mark.parametrize("place", PLACES)
def test_an_adapter_that_comes_in_the_middle(place):
    compare(add_adapter(PLACES[place]))


# Every way that users have of changing what adapters do, once one is there.
WAYS = {
    "set_adapters": lambda pipe: pipe.set_adapters(["one"], [2.5]),
    "disable_lora": lambda pipe: pipe.disable_lora(),
    "delete_adapters": lambda pipe: pipe.delete_adapters("one"),
    "fuse_lora": lambda pipe: pipe.fuse_lora(lora_scale=3.0),
    "unload": lambda pipe: pipe.unload_lora_weights(),
    "weights of it": lambda pipe: scale_adapter(pipe, 2.5),
}


def scale_adapter(pipe, factor):
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "lora_B" in name:
                parameter.mul_(factor)


@pytest.mark.parametrize(
    ("place", "way"),
    [
        *(("norm1.linear", way) for way in WAYS),
        *(
            (place, way)
            for place in ("text_proj", "time_embedding", "norm_out")
            for way in ("set_adapters", "fuse_lora")
        ),
        *((place, way) for place in ("to_q", "ff.out") for way in ("delete_adapters", "weights of it")),
    ],
)
def test_an_adapter_that_changes_in_the_middle(place, way):
    compare(WAYS[way], prepare=add_adapter(PLACES[place]))


@pytest.mark.parametrize("place", ["norm1.linear", "text_proj", "to_q"])
def test_an_adapter_loaded_from_a_file_in_the_middle(place, tmp_path):
    donor = toy.pipeline()
    add_adapter(PLACES[place])(donor)
    donor.save_lora_weights(
        tmp_path, transformer_lora_layers=get_peft_model_state_dict(donor.transformer, adapter_name="one")
    )
    compare(lambda pipe: pipe.load_lora_weights(tmp_path, adapter_name="late"))


def parameter_of(pipe, name):
    return pipe.transformer.get_parameter(name)


def scaled(parameter):
    """Every row by a factor of its own, which no norm undoes."""
    factors = torch.linspace(0.2, 2.5, len(parameter), dtype=parameter.dtype)
    return parameter.detach() * factors.view(-1, *[1] * (parameter.ndim - 1))


@torch.no_grad()
def write_in_place(pipe, name):
    parameter = parameter_of(pipe, name)
    parameter.copy_(scaled(parameter))


def write_through_data(pipe, name):
    parameter = parameter_of(pipe, name)
    parameter.data.copy_(scaled(parameter))


def replace_data(pipe, name):
    parameter = parameter_of(pipe, name)
    parameter.data = scaled(parameter)


def replace_parameter(pipe, name):
    owner, _, last = name.rpartition(".")
    setattr(pipe.transformer.get_submodule(owner), last, torch.nn.Parameter(scaled(parameter_of(pipe, name))))


def load_one(pipe, name):
    pipe.transformer.load_state_dict({name: scaled(parameter_of(pipe, name))}, strict=False)


def assign_one(pipe, name):
    pipe.transformer.load_state_dict({name: scaled(parameter_of(pipe, name))}, strict=False, assign=True)


WRITES = (write_in_place, write_through_data, replace_data, replace_parameter, load_one, assign_one)


@pytest.mark.parametrize(
    ("place", "write"),
    [
        *(("norm1.linear", write) for write in WRITES),
        *((place, write) for place in ("text_proj", "to_q") for write in (write_in_place, write_through_data)),
        *((place, replace_parameter) for place in ("text_proj", "to_q", "bias of to_q", "ff.out")),
        *((place, write_through_data) for place in PARAMETERS if place not in ("norm1.linear", "text_proj", "to_q")),
        *((place, load_one) for place in ("time_embedding", "ff.proj")),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_weights_that_change_in_the_middle(place, write):
    compare(lambda pipe: write(pipe, PARAMETERS[place]))


@pytest.mark.parametrize("write", [write_in_place, write_through_data], ids=lambda write: write.__name__)
@pytest.mark.parametrize("place", ["norm1.linear", "text_proj", "to_q", "to_out", "ff.proj", "ff.out"])
def test_packed_weights_follow(place, write):
    """In bf16 on a CPU copies of the weights in another order may be held: they are made again."""

    def change(pipe):
        for _ in range(3):  # in this precision less would be lost in rounding
            write(pipe, PARAMETERS[place])

    compare(change, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["torch"])
def test_with_the_operations_of_torch(name):
    compare(lambda pipe: write_through_data(pipe, PARAMETERS["norm1.linear"]), config=name)
    compare(add_adapter(PLACES["text_proj"]), config=name)


@pytest.mark.parametrize("place", ["norm1.linear", "time_embedding"])
def test_between_two_generations(place):
    """Nothing computed for one is kept for the next."""
    for write in (write_in_place, write_through_data):
        results = []
        for pipe in (toy.pipeline(), accelerate(toy.pipeline())):
            latents(pipe)
            write(pipe, PARAMETERS[place])
            results.append(latents(pipe))
        assert_same(results[1], results[0])


def test_the_original_changes_in_the_middle():
    """The user writes to the pipeline that was accelerated: the weights are the same."""
    results = []
    for is_fast in (False, True):
        original = toy.pipeline()
        pipe = accelerate(original) if is_fast else original
        results.append(during(pipe, lambda _, original=original: write_in_place(original, PARAMETERS["norm1.linear"])))
    assert_same(results[1], results[0])


def test_a_transformer_put_in_in_the_middle():
    def change(pipe):
        pipe.transformer = toy.transformer(seed=9)

    compare(change)


@pytest.mark.parametrize("recipe", ["int8", "int8-weight"])
@pytest.mark.parametrize("place", ["norm1.linear", "text_proj", "to_q"])
def test_adapters_beside_quantized_weights(recipe, place):
    fast = accelerate(toy.pipeline(), EngineConfig(recipe=recipe))
    plain = latents(fast, num_steps=STEPS)
    output = during(fast, add_adapter(PLACES[place]))
    expected = during(toy.pipeline(), add_adapter(PLACES[place]))
    unchanged = latents(toy.pipeline(), num_steps=STEPS)
    assert_differs(output, plain)
    # the change is the one that it is in full precision
    assert_same(output - plain, expected - unchanged, limit=0.3)
