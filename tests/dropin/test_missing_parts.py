"""Pipelines without one of their models: encode here, denoise there, decode elsewhere."""

import json

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

import cogvx_fast
from cogvx_fast import EngineConfig, FastCogVideoXPipeline, FastCogVideoXVideoToVideoPipeline, accelerate
from tests import toy

from .generations import assert_differs, assert_same, frames, latents, picture

pytestmark = pytest.mark.slow

TEXT = {"text_encoder": None, "tokenizer": None}
ABSENT = {
    "text encoder": TEXT,
    "text encoder, not the tokenizer": {"text_encoder": None},
    "vae": {"vae": None},
    "text and vae": {**TEXT, "vae": None},
    "transformer": {"transformer": None},
    "transformer and vae": {"transformer": None, "vae": None},
    "transformer and text": {"transformer": None, **TEXT},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    toy.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole():
    """What each stage gives in diffusers: embeddings, latents, pixels."""
    pipe = toy.pipeline()
    embeds = encode(pipe)
    code = latents(pipe)
    with torch.no_grad():
        return {"embeds": embeds, "latents": code, "pixels": pipe.decode_latents(code)}


def encode(pipe):
    with torch.no_grad():
        return pipe.encode_prompt(
            prompt="a cat", do_classifier_free_guidance=True, max_sequence_length=toy.TEXT_LENGTH, device="cpu"
        )


def check_stages(pipe, absent, whole):
    """Whatever the pipeline has models for gives what diffusers' whole pipeline gives there."""
    if "text_encoder" not in absent:
        for output, expected in zip(encode(pipe), whole["embeds"], strict=True):
            assert_same(output, expected)
    if "transformer" not in absent:
        prompt, negative = whole["embeds"]
        given = {"prompt": None, "prompt_embeds": prompt, "negative_prompt_embeds": negative}
        sizes = {"num_frames": toy.NUM_FRAMES}
        assert_same(latents(pipe, **given, **sizes), whole["latents"])
    if "vae" not in absent:
        with torch.no_grad():
            assert_same(pipe.decode_latents(whole["latents"]), whole["pixels"])
            assert_same(torch.cat(list(pipe.decode_stream(whole["latents"])), dim=2), whole["pixels"])
    assert all(getattr(pipe, name) is None for name in absent)
    assert str(pipe.engine_report())


@pytest.mark.parametrize("absent", ABSENT)
def test_loaded_without(absent, folder, whole):
    absent = ABSENT[absent]
    pipe = FastCogVideoXPipeline.from_pretrained(folder, dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    check_stages(pipe, absent, whole)


@pytest.mark.parametrize("absent", ["text and vae", "transformer", "transformer and text"])
def test_made_without(absent, whole):
    absent = ABSENT[absent]
    pipe = FastCogVideoXPipeline(**{**toy.pipeline().components, **absent})
    pipe.set_progress_bar_config(disable=True)
    check_stages(pipe, absent, whole)


@pytest.mark.parametrize("absent", ABSENT)
def test_accelerated_without(absent, whole):
    absent = ABSENT[absent]
    reference = diffusers.CogVideoXPipeline(**{**toy.pipeline().components, **absent})
    reference.set_progress_bar_config(disable=True)
    check_stages(accelerate(reference), absent, whole)


@pytest.mark.parametrize("absent", ABSENT)
def test_set_to_none_later(absent, whole):
    absent = ABSENT[absent]
    pipe = accelerate(toy.pipeline())
    latents(pipe)
    for name in absent:
        setattr(pipe, name, None)
    check_stages(pipe, absent, whole)


@pytest.mark.parametrize("absent", ["text encoder", "vae", "transformer", "transformer and vae"])
@pytest.mark.parametrize("from_fast", [True, False])
def test_from_pipe_without(absent, from_fast, whole):
    absent = ABSENT[absent]
    source = diffusers.CogVideoXPipeline(**{**toy.pipeline().components, **absent})
    if from_fast:
        source = accelerate(source)
    pipe = FastCogVideoXPipeline.from_pipe(source, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    check_stages(pipe, absent, whole)


@pytest.mark.parametrize("name", ["ImageToVideo", "VideoToVideo", "FunControl"])
def test_the_other_pipelines_without(name):
    """The published recipe of little memory: T5 first, in a pipeline that has nothing else."""
    variant = {"ImageToVideo": "5b-i2v", "VideoToVideo": "2b", "FunControl": "fun"}[name]
    reference = toy.pipeline(variant, cls=f"CogVideoX{name}Pipeline")
    fast_class = getattr(cogvx_fast, f"FastCogVideoX{name}Pipeline")
    prompt, negative = encode(fast_class(**{**reference.components, "transformer": None, "vae": None}))
    extra = {
        "ImageToVideo": {"image": picture()},
        "VideoToVideo": {"video": [picture()] * toy.NUM_FRAMES, "strength": 0.6},
        "FunControl": {"control_video": [picture()] * toy.NUM_FRAMES},
    }[name]
    arguments = toy.inputs(num_steps=4, output_type="latent", **extra)
    if name != "ImageToVideo":
        arguments.pop("num_frames")
    expected = reference(**arguments).frames
    arguments.pop("prompt")
    arguments["generator"].manual_seed(0)
    denoiser = fast_class(**{**reference.components, **TEXT})
    denoiser.set_progress_bar_config(disable=True)
    output = denoiser(**arguments, prompt_embeds=prompt, negative_prompt_embeds=negative).frames
    assert_same(output, expected)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_whole_generation_without_a_part_raises_as_upstream(part):
    """No half of a video: upstream fails on the None, ours too, and then works again."""
    for pipe in (toy.pipeline(), accelerate(toy.pipeline())):
        kept = getattr(pipe, part)
        expected = frames(pipe)
        setattr(pipe, part, None)
        with pytest.raises((AttributeError, TypeError, ValueError)):
            frames(pipe)
        setattr(pipe, part, kept)
        assert_same(frames(pipe), expected)


@pytest.mark.parametrize("recipe", [None, "int8"])
def test_a_part_that_comes_later(recipe, whole):
    """A transformer that is put in after all is made fast, as the engine says."""
    engine = EngineConfig(recipe=recipe)
    pipe = FastCogVideoXPipeline(**{**toy.pipeline().components, "transformer": None}, engine=engine)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = toy.transformer()
    output = latents(pipe)
    expected = latents(accelerate(toy.pipeline(), engine))
    assert_same(output, expected)
    if recipe is not None:
        assert_differs(output, whole["latents"])


@pytest.mark.parametrize("absent", ["text encoder", "vae", "transformer", "text and vae"])
def test_saved_after_a_part_was_set_to_none(absent, tmp_path):
    """As upstream, whether it saves or raises: what is there is written under diffusers' names."""
    absent = ABSENT[absent]
    indices = []
    for where, pipe in (("reference", toy.pipeline()), ("fast", accelerate(toy.pipeline()))):
        for name in absent:
            setattr(pipe, name, None)
        pipe.save_pretrained(tmp_path / where)
        indices.append(json.loads((tmp_path / where / "model_index.json").read_text()))
    assert indices[1] == indices[0]
    written = [
        {path.relative_to(tmp_path / w).as_posix() for path in (tmp_path / w).rglob("*")} for w in ("reference", "fast")
    ]
    assert written[1] == written[0]


@pytest.mark.parametrize("part", ["vae", "text_encoder", "transformer"])
def test_adapters_after_a_part_was_set_to_none(part, tmp_path):
    """As upstream, whether it fuses or raises."""
    donor = toy.pipeline()
    torch.manual_seed(0)
    donor.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "ff.net.2"], init_lora_weights=False))
    donor.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(donor.transformer))
    outcomes = []
    for pipe in (toy.pipeline(), accelerate(toy.pipeline())):
        pipe.load_lora_weights(tmp_path, adapter_name="one")
        kept = getattr(pipe, part)
        setattr(pipe, part, None)
        seen = []
        for action in (
            lambda pipe=pipe: pipe.fuse_lora(lora_scale=0.5),
            lambda pipe=pipe: pipe.unfuse_lora(),
            lambda pipe=pipe: pipe.get_list_adapters(),
            lambda pipe=pipe: pipe.fuse_lora(adapter_names=["one"]),
        ):
            try:
                action()
                seen.append("done")
            except Exception as error:
                seen.append(type(error))
        setattr(pipe, part, kept)
        outcomes.append((seen, latents(pipe)))
    assert outcomes[1][0] == outcomes[0][0]
    assert_same(outcomes[1][1], outcomes[0][1])


def test_a_memory_limit_without_a_part(folder, whole):
    config = EngineConfig(memory_limit="2GiB")
    pipe = FastCogVideoXPipeline.from_pretrained(folder, dtype=torch.float32, engine=config, **TEXT)
    pipe.set_progress_bar_config(disable=True)
    check_stages(pipe, TEXT, whole)


def test_another_task_without_its_text(whole):
    source = accelerate(toy.pipeline())
    source.text_encoder = None
    pipe = FastCogVideoXVideoToVideoPipeline.from_pipe(source)
    assert pipe.text_encoder is None and pipe.transformer is source.transformer
