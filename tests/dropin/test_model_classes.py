"""The fast models as models: from_pretrained, from_config and save_pretrained of their own classes."""

import json

import diffusers
import pytest
import torch

from cogvx_fast import FastCogVideoXPipeline, accelerate
from tests import toy

from .generations import assert_same, frames, transformer_inputs

MODELS = {"transformer": "CogVideoXTransformer3DModel", "vae": "AutoencoderKLCogVideoX"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    toy.pipeline("5b").save_pretrained(folder)
    return folder


def class_of(part):
    return type(getattr(accelerate(toy.pipeline()), part))


def reference_of(part):
    return toy.transformer("5b") if part == "transformer" else toy.vae()


@torch.no_grad()
def run(model, dtype=torch.float32):
    if isinstance(model, diffusers.CogVideoXTransformer3DModel):
        return model(**transformer_inputs(model, dtype)).sample
    z = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    return model.decode(z).sample


@pytest.mark.parametrize("part", MODELS)
def test_from_pretrained(part, folder):
    model = class_of(part).from_pretrained(folder, subfolder=part, dtype=torch.float32)
    assert isinstance(model, class_of(part)) and not model.training
    assert_same(run(model), run(reference_of(part)))


@pytest.mark.parametrize("part", MODELS)
def test_from_pretrained_in_half_precision(part, folder):
    model = class_of(part).from_pretrained(folder, subfolder=part, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    exact = run(reference_of(part))
    own = run(reference_of(part).to(torch.bfloat16), torch.bfloat16).float()
    error = (run(model, torch.bfloat16).float() - exact).norm()
    assert error < 1.3 * (own - exact).norm()


@pytest.mark.parametrize("part", MODELS)
def test_the_loading_info_is_upstreams(part, folder):
    reference = getattr(diffusers, MODELS[part])
    infos = [
        cls.from_pretrained(folder, subfolder=part, dtype=torch.float32, output_loading_info=True)[1]
        for cls in (reference, class_of(part))
    ]
    assert infos[1] == infos[0]


@pytest.mark.parametrize("part", MODELS)
def test_from_config(part, folder):
    cls, reference = class_of(part), reference_of(part)
    for config in (reference.config, cls.load_config(folder, subfolder=part)):
        model = cls.from_config(config)
        assert dict(model.config).keys() >= {k for k in reference.config if not k.startswith("_")}
        assert model.state_dict().keys() == reference.state_dict().keys()
        model.load_state_dict(reference.state_dict())
        assert_same(run(model.eval()), run(reference))


@pytest.mark.parametrize("part", MODELS)
def test_made_from_arguments(part):
    """The constructor, as in a training script."""
    reference = reference_of(part)
    arguments = {k: v for k, v in reference.config.items() if not k.startswith("_")}
    model = class_of(part)(**arguments)
    model.load_state_dict(reference.state_dict())
    assert_same(run(model.eval()), run(reference))


@pytest.mark.parametrize("part", MODELS)
def test_saved_and_loaded_again(part, folder, tmp_path):
    """Written under diffusers' name, with diffusers' files; each class reads it."""
    model = class_of(part).from_pretrained(folder, subfolder=part, dtype=torch.float32)
    expected = run(reference_of(part))
    model.save_pretrained(tmp_path / "ours")
    reference_of(part).save_pretrained(tmp_path / "theirs")
    configs = [json.loads((tmp_path / whose / "config.json").read_text()) for whose in ("ours", "theirs")]
    for config in configs:
        config.pop("_name_or_path", None)
    assert configs[0] == configs[1]
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {p.name for p in (tmp_path / "theirs").iterdir()}
    for cls in (getattr(diffusers, MODELS[part]), class_of(part), diffusers.AutoModel):
        assert_same(run(cls.from_pretrained(str(tmp_path / "ours"), dtype=torch.float32)), expected)


@pytest.mark.parametrize("part", MODELS)
def test_the_configuration_is_of_diffusers_class(part, folder):
    model = class_of(part).from_pretrained(folder, subfolder=part, dtype=torch.float32)
    assert json.loads(model.to_json_string())["_class_name"] == MODELS[part]
    other = getattr(diffusers, MODELS[part]).from_config(model.config)
    other.load_state_dict(model.state_dict())
    assert_same(run(other.eval()), run(reference_of(part)))


@pytest.mark.parametrize("fast_pipeline", [True, False])
def test_in_a_pipeline(folder, fast_pipeline):
    """Loaded apart and put into a pipeline of either kind, as scripts that quantize or cast one of them do."""
    parts = {name: class_of(name).from_pretrained(folder, subfolder=name, dtype=torch.float32) for name in MODELS}
    cls = FastCogVideoXPipeline if fast_pipeline else diffusers.CogVideoXPipeline
    pipe = cls.from_pretrained(folder, dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    assert_same(frames(pipe), frames(toy.pipeline("5b")))


def test_training_from_scratch():
    """A forward pass with gradients, through a model that no pipeline has made."""
    reference = toy.transformer("5b")
    model = class_of("transformer").from_config(reference.config)
    model.load_state_dict(reference.state_dict())
    gradients = []
    for each in (reference, model):
        each.train()
        each(**transformer_inputs(each)).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters()})
    assert gradients[1].keys() == gradients[0].keys()
    for name, expected in gradients[0].items():
        assert torch.allclose(gradients[1][name], expected, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("part", MODELS)
def test_gradient_checkpointing(part):
    """Turned on and off by diffusers' own methods, with the same gradients; the blocks know of it."""
    gradients = []
    for model in (reference_of(part), None):
        if model is None:
            model = class_of(part).from_config(reference_of(part).config)
            model.load_state_dict(reference_of(part).state_dict())
        model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing
        model.train()
        if part == "transformer":
            loss = model(**transformer_inputs(model)).sample.square().mean()
        else:
            sample = torch.randn(1, 3, 9, toy.SIZE, toy.SIZE, generator=torch.Generator().manual_seed(0))
            loss = model(sample).sample.square().mean()
        loss.backward()
        model.disable_gradient_checkpointing()
        assert not model.is_gradient_checkpointing
        gradients.append([p.grad for p in model.parameters()][:4])
    for output, expected in zip(gradients[1], gradients[0], strict=True):
        assert torch.allclose(output, expected, rtol=1e-3, atol=1e-6)
