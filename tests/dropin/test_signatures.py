"""Every public method takes what diffusers' takes: by position, by name, with the same defaults."""

import inspect

import diffusers
import pytest

import cogvx_fast
from cogvx_fast import accelerate
from tests import toy

NAMES = ("", "ImageToVideo", "VideoToVideo", "FunControl")
PIPELINES = [f"CogVideoX{name}Pipeline" for name in NAMES]
# The one thing that a call of ours takes beside, by name only.
PREVIEW = ("preview", inspect.Parameter.KEYWORD_ONLY, False)


@pytest.fixture(scope="module")
def classes():
    """Ours and diffusers', by name; the models' as a user meets them, in a pipeline."""
    fast = accelerate(toy.pipeline())
    pipelines = {
        f"CogVideoX{name}Pipeline": (
            getattr(cogvx_fast, f"FastCogVideoX{name}Pipeline"),
            getattr(diffusers, f"CogVideoX{name}Pipeline"),
        )
        for name in NAMES
    }
    return pipelines | {
        "transformer": (type(fast.transformer), diffusers.CogVideoXTransformer3DModel),
        "vae": (type(fast.vae), diffusers.AutoencoderKLCogVideoX),
    }


def kind_of(cls, name):
    return type(inspect.getattr_static(cls, name))


@pytest.mark.parametrize("name", [*PIPELINES, "transformer", "vae"])
def test_public_methods_have_the_parents_signatures(name, classes):
    ours, theirs = classes[name]
    assert issubclass(ours, theirs)
    public = [n for n in dir(theirs) if not n.startswith("_") or n == "__call__"]
    different = {}
    for method in public:
        expected = getattr(theirs, method)
        if not callable(expected) or inspect.isclass(expected):
            assert kind_of(ours, method) is kind_of(theirs, method), method
            continue
        try:
            expected = inspect.signature(expected)
        except ValueError:
            continue
        given = inspect.signature(getattr(ours, method))
        names = [(p.name, p.kind, p.default) for p in given.parameters.values()]
        if method == "__call__" and name in PIPELINES:
            names.remove(PREVIEW)
        if names != [(p.name, p.kind, p.default) for p in expected.parameters.values()]:
            different[method] = f"{given} is not {expected}"
        elif kind_of(ours, method) is not kind_of(theirs, method):
            different[method] = f"{kind_of(ours, method)} is not {kind_of(theirs, method)}"
    assert not different, different
    assert len(public) > 20


@pytest.mark.parametrize("name", PIPELINES)
def test_the_constructor_takes_an_engine_beside(name, classes):
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in classes[name])
    assert list(ours) == [*theirs, "engine"]
    assert all(ours[parameter].default == theirs[parameter].default for parameter in theirs)


def test_methods_say_what_they_do(classes):
    """What `help()` shows of a method that is wrapped is what it shows upstream."""
    for ours, theirs in classes.values():
        for name in ("__call__", "encode_prompt", "decode_latents", "save_pretrained", "from_pretrained", "fuse_lora"):
            if inspect.getdoc(getattr(theirs, name, None)) and name in dir(theirs):
                assert inspect.getdoc(getattr(ours, name)), f"{ours.__name__}.{name}"


def test_settings_of_the_class_are_the_parents(classes):
    for name, (ours, theirs) in classes.items():
        for setting in ("_optional_components", "model_cpu_offload_seq", "_callback_tensor_inputs", "config_name"):
            assert getattr(ours, setting, None) == getattr(theirs, setting, None), (name, setting)
    assert "transformer" in classes["CogVideoXPipeline"][0]._lora_loadable_modules
    vae, transformer = classes["vae"][0], classes["transformer"][0]
    assert vae._supports_gradient_checkpointing and transformer._supports_gradient_checkpointing
    assert transformer._skip_layerwise_casting_patterns == ["patch_embed", "norm"]
