"""torch.inference_mode around a generation: the same video, kept constants, and models that can be trained after it."""

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from cogvx_fast import EngineConfig, accelerate
from tests import toy

from .generations import assert_differs, assert_same, frames, latents, line, relative, transformer_inputs

pytestmark = pytest.mark.slow

STEPS = 5
CONFIGS = {"exact": EngineConfig(), "int8": EngineConfig(recipe="int8"), "unpacked": EngineConfig(pack_weights=False)}


class Products(TorchDispatchMode):
    """Counts matrix products by the shape of their weight: what is called, without a hook that would change it."""

    def __init__(self, weights):
        super().__init__()
        self.shapes, self.number = {tuple(weight.shape[::-1]) for weight in weights}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("addmm", "mm", "linear"):
            second = args[2] if name == "addmm" else args[1]
            shape = tuple(second.shape) if name != "linear" else tuple(second.shape[::-1])
            self.number += shape in self.shapes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", CONFIGS)
def test_a_generation_under_inference_mode_is_the_same(config):
    fast = accelerate(toy.pipeline(), CONFIGS[config])
    with torch.inference_mode():
        output = frames(fast)
    assert_same(output.clone(), frames(accelerate(toy.pipeline(), CONFIGS[config])))
    assert_same(frames(fast), output.clone())  # with what was made before, outside of it


@pytest.mark.parametrize("part", ["text_proj", "norm1.linear", "time_embedding"])
def test_constants_are_kept_under_inference_mode(part):
    """Once a generation, not once a step: as outside of inference mode."""
    numbers = []
    for mode in (torch.no_grad, torch.inference_mode):
        fast = accelerate(toy.pipeline())
        model = fast.transformer
        weight = {
            "text_proj": model.patch_embed.text_proj.weight,
            "norm1.linear": model.transformer_blocks[0].norm1.linear.weight,
            "time_embedding": model.time_embedding.linear_1.weight,
        }[part]
        with mode(), Products([weight]) as counted:
            latents(fast, num_steps=STEPS)
        numbers.append(counted.number)
    assert numbers[0] == numbers[1] > 0
    reference = toy.pipeline()
    with torch.inference_mode(), Products([weight]) as counted:
        latents(reference, num_steps=STEPS)
    assert counted.number == STEPS * numbers[0]  # guards the count: upstream it is once a step


def test_the_report_says_that_constants_are_kept():
    fast = accelerate(toy.pipeline())
    with torch.inference_mode():
        latents(fast)
    assert line(fast, "modulation table").applied and line(fast, "text projection").applied


def test_a_prompt_that_changes_under_inference_mode_is_projected_again():
    """In-place changes of inference tensors are not counted by torch: they must be noticed in another way."""

    def louder(pipe, step, timestep, tensors):
        tensors["prompt_embeds"].mul_(1.5)
        return {}

    options = {"callback_on_step_end": louder, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with torch.inference_mode():
        expected = latents(toy.pipeline(), **options)
        output = latents(accelerate(toy.pipeline()), **options)
        plain = latents(toy.pipeline())
    assert_differs(expected, plain)
    assert_same(output.clone(), expected.clone())


def train(model, steps=2):
    """Two steps of training; the weights that came out."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for _ in range(steps):
        loss = model(**transformer_inputs(model)).sample.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("whose", ["ours", "the original's"])
@pytest.mark.parametrize("config", ["exact", "unpacked"])
def test_training_after_inference_mode(whose, config):
    reference = toy.transformer()
    expected, original = train(reference), toy.pipeline()
    fast = accelerate(original, CONFIGS[config])
    with torch.inference_mode():
        latents(fast)
    output = train(fast.transformer if whose == "ours" else original.transformer)
    assert output.keys() == expected.keys()
    for name, weight in expected.items():
        assert relative(output[name], weight) < 1e-4, name
    trained = toy.pipeline()
    trained.transformer = reference
    assert_same(latents(fast), latents(trained))  # and both see what was trained


@pytest.mark.parametrize("whose", ["ours", "the original's"])
def test_training_an_adapter_after_inference_mode(whose):
    lora = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0", "norm1.linear", "ff.net.2"])

    def adapted(model):
        model.requires_grad_(False)
        torch.manual_seed(0)
        model.add_adapter(lora)
        return train(model)

    expected, original = adapted(toy.transformer()), toy.pipeline()
    fast = accelerate(original)
    with torch.inference_mode():
        latents(fast)
    output = adapted(fast.transformer if whose == "ours" else original.transformer)
    assert output.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(output[name], weight, atol=1e-5, rtol=1e-3), name


def test_training_between_generations():
    original = toy.pipeline()
    fast = accelerate(original)
    with torch.inference_mode():
        before = latents(fast).clone()
    train(fast.transformer)
    with torch.inference_mode():
        after, expected = latents(fast).clone(), latents(original).clone()
    assert_differs(after, before)
    assert_same(after, expected)


def test_models_made_under_inference_mode():
    with torch.inference_mode():
        reference = toy.pipeline()
        expected = frames(reference).clone()
        fast = accelerate(reference)
        assert_same(frames(fast).clone(), expected)


def test_a_trained_autoencoder_after_inference_mode():
    original = toy.pipeline()
    fast = accelerate(original)
    with torch.inference_mode():
        frames(fast)
    z = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    gradients = []
    for vae in (toy.vae(), fast.vae):
        vae.decode(z).sample.square().mean().backward()
        gradients.append(vae.decoder.conv_in.conv.weight.grad)
    assert relative(gradients[1], gradients[0]) < 1e-4
