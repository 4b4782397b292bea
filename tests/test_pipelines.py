"""The fast pipelines are diffusers' pipelines: the same calls, the same results, the same files."""

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import cogvx_fast
from cogvx_fast import EngineConfig, FastCogVideoXPipeline, accelerate
from tests import toy


def image():
    pixels = torch.randint(0, 255, (toy.SIZE, toy.SIZE, 3), generator=torch.Generator().manual_seed(4))
    return Image.fromarray(pixels.byte().numpy())


def extra_inputs(variant_or_class: str) -> dict:
    """What the other three pipelines want besides a prompt."""
    if "i2v" in variant_or_class:
        return {"image": image()}
    if variant_or_class == "fun":
        return {"control_video": [image()] * toy.NUM_FRAMES}
    return {}


def assert_same(output, expected, limit=1e-4):
    if isinstance(output, list):
        output, expected = (
            np.stack([np.asarray(frame, dtype=np.float32) for frame in v[0]]) for v in (output, expected)
        )
    output, expected = torch.as_tensor(output), torch.as_tensor(expected)
    assert output.shape == expected.shape
    assert torch.isfinite(expected).all() and expected.float().std() > 0
    assert ((output - expected).float().norm() / expected.float().norm()).item() < limit


# diffusers' Fun-Control loop does not call the DPM scheduler the way it wants to be called: DDIM only.
@pytest.mark.parametrize(
    ("variant", "scheduler"), [(v, s) for v in toy.VARIANTS for s in ("ddim", "dpm") if (v, s) != ("fun", "dpm")]
)
def test_every_variant_generates_what_diffusers_generates(variant, scheduler):
    reference = toy.pipeline(variant, scheduler_kind=scheduler)
    fast = accelerate(reference)
    assert isinstance(fast, type(reference))
    inputs = toy.inputs(**extra_inputs(variant), output_type="latent")
    if variant == "fun":
        inputs.pop("num_frames")
    expected = reference(**inputs).frames
    inputs["generator"].manual_seed(0)
    assert_same(fast(**inputs).frames, expected)


def test_video_to_video():
    reference = toy.pipeline("2b", cls="CogVideoXVideoToVideoPipeline")
    fast = accelerate(reference)
    inputs = toy.inputs(num_steps=4, video=[image()] * toy.NUM_FRAMES, strength=0.6, output_type="latent")
    inputs.pop("num_frames")
    expected = reference(**inputs).frames
    inputs["generator"].manual_seed(0)
    assert_same(fast(**inputs).frames, expected)


def scale_latents(pipe, step, timestep, tensors):
    return {"latents": tensors["latents"] * 0.9}


def change_prompt(pipe, step, timestep, tensors):
    return {"prompt_embeds": tensors["prompt_embeds"] * 1.5}


def change_prompt_in_place(pipe, step, timestep, tensors):
    tensors["prompt_embeds"].mul_(1.5)
    return {}


def stop_after_two(pipe, step, timestep, tensors):
    pipe._interrupt = step >= 1
    return {}


LATENTS = torch.randn(1, 3, 16, 4, 4, generator=torch.Generator().manual_seed(9))
CALLS = {
    "one prompt": {},
    "prompt list": {"prompt": ["a cat", "two dogs, running"]},
    "negative prompt": {"negative_prompt": "blurry"},
    "negative prompts": {"prompt": ["a", "b"], "negative_prompt": ["c", "d"]},
    "given latents": {"latents": LATENTS},
    "no guidance": {"guidance_scale": 1},
    "dynamic guidance": {"use_dynamic_cfg": True},
    "several videos a prompt": {"num_videos_per_prompt": 2},
    "a generator each": {"prompt": ["a", "b"], "generator": "list"},
    "eta": {"eta": 0.5},
    "pil": {"output_type": "pil"},
    "np": {"output_type": "np"},
    "pt": {"output_type": "pt"},
    "other size": {"height": 48, "width": 16, "num_frames": 17},
    "callback on latents": {"callback_on_step_end": scale_latents},
    "callback on prompt": {
        "callback_on_step_end": change_prompt,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    },
    "callback on prompt in place": {
        "callback_on_step_end": change_prompt_in_place,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    },
    "interruption": {"callback_on_step_end": stop_after_two, "num_inference_steps": 5},
}


@pytest.fixture(scope="module")
def pair():
    reference = toy.pipeline()
    return reference, accelerate(reference)


@pytest.mark.parametrize("call", CALLS)
def test_every_call_gives_what_diffusers_gives(pair, call):
    results = []
    for pipe in pair:
        arguments = toy.inputs(**{"output_type": "latent", **CALLS[call]})
        if arguments["generator"] == "list":
            arguments["generator"] = [torch.Generator().manual_seed(i) for i in range(2)]
        results.append(pipe(**arguments).frames)
    assert_same(results[1], results[0])


def test_calls_that_should_differ_do(pair):
    # Guards the comparison above: were an argument dropped on the way, these would be equal.
    fast = pair[1]
    plain = fast(**toy.inputs(output_type="latent")).frames
    for call in ("negative prompt", "given latents", "no guidance", "dynamic guidance", "callback on prompt in place"):
        other = fast(**toy.inputs(**{"output_type": "latent", **CALLS[call]})).frames
        assert not torch.allclose(other, plain, rtol=1e-3), call


def test_return_dict_false_and_frames_type(pair):
    (frames,) = pair[1](**toy.inputs(return_dict=False, output_type="np"))
    assert frames.shape == (1, toy.NUM_FRAMES, toy.SIZE, toy.SIZE, 3)


def test_custom_timesteps():
    reference = toy.pipeline()
    config = {**reference.scheduler.config, "timestep_spacing": "leading"}
    reference.scheduler = diffusers.DDPMScheduler.from_config(config)
    fast = accelerate(reference)
    results = [
        pipe(**toy.inputs(timesteps=[901, 500, 123], num_inference_steps=None, output_type="latent")).frames
        for pipe in (reference, fast)
    ]
    assert_same(results[1], results[0])
    ddim = accelerate(toy.pipeline())
    with pytest.raises(ValueError, match="does not support custom"):
        ddim(**toy.inputs(timesteps=[901, 500], output_type="latent"))


def test_the_two_step_usage_of_the_launch_page(pair, tmp_path):
    from diffusers.utils import export_to_video

    results = []
    for pipe in pair:
        prompt_embeds, _ = pipe.encode_prompt(
            prompt="a panda plays a guitar",
            do_classifier_free_guidance=True,
            num_videos_per_prompt=1,
            max_sequence_length=toy.TEXT_LENGTH,
            device="cpu",
            dtype=torch.float32,
        )
        arguments = toy.inputs(prompt_embeds=prompt_embeds, output_type="pil")
        arguments.pop("prompt")
        results.append(pipe(**arguments).frames)
    assert_same(results[1], results[0], limit=1e-2)  # 8-bit frames: a rounding may tip a level
    export_to_video(results[1][0], str(tmp_path / "output.mp4"), fps=8)
    assert (tmp_path / "output.mp4").stat().st_size > 0


def test_the_transformer_of_a_fast_pipeline_is_diffusers_own_outside_of_it(pair):
    """In a loop of one's own, and in a pipeline of diffusers: the numbers bit for bit."""
    inputs = toy.inputs(output_type="latent")
    expected = pair[0](**inputs).frames
    inputs["generator"].manual_seed(0)
    pair[1](**toy.inputs(output_type="latent"))
    pipe = diffusers.CogVideoXPipeline(**pair[0].components | {"transformer": pair[1].transformer})
    assert torch.equal(pipe(**inputs).frames, expected)


def test_a_loop_of_ones_own_is_fast_in_a_session(pair):
    from tests.generation import forward_inputs

    fast, arguments = pair[1], forward_inputs(pair[0].transformer)
    fast.scheduler.set_timesteps(4)

    def loop(model):
        return [model(**arguments | {"timestep": t.expand(2)}).sample for t in fast.scheduler.timesteps]

    with torch.no_grad():
        expected = loop(pair[0].transformer)
        with fast.engine_session() as session:
            outputs = loop(fast.transformer)
    assert session.ran.fast == 4 and session.ran.counts["modulation"] == 1
    for output, wanted in zip(outputs, expected, strict=True):
        assert_same(output, wanted, 1e-5)


def test_generations_of_two_pipelines_of_the_same_weights_at_once():
    import threading

    reference = toy.pipeline()
    sizes = (16, 48)
    expected = {height: reference(**toy.inputs(height=height, output_type="latent")).frames for height in sizes}
    outputs, turns = {}, threading.Barrier(2, timeout=60)

    def generate(height):
        def wait(pipe, step, timestep, tensors):
            turns.wait()
            return {}

        pipe = diffusers.CogVideoXPipeline(
            **toy_parts(reference), transformer=reference.transformer, scheduler=toy.scheduler()
        )
        pipe.set_progress_bar_config(disable=True)
        fast = accelerate(pipe)
        inputs = toy.inputs(height=height, output_type="latent", callback_on_step_end=wait)
        outputs[height] = fast(**inputs).frames, fast.engine_report().line("modulation table").detail

    threads = [threading.Thread(target=generate, args=(height,)) for height in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for height, (frames, detail) in outputs.items():
        assert_same(frames, expected[height])
        assert "computed" not in detail  # by each once, whatever the other did in between
    assert sorted(outputs) == [16, 48]


def toy_parts(pipe):
    return {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae")}


@pytest.mark.parametrize("name", ["", "ImageToVideo", "VideoToVideo", "FunControl"])
def test_signatures_are_the_parents(name):
    fast = getattr(cogvx_fast, f"FastCogVideoX{name}Pipeline")
    reference = getattr(diffusers, f"CogVideoX{name}Pipeline")
    assert issubclass(fast, reference)
    parameters = dict(inspect.signature(fast.__call__).parameters)
    assert parameters.pop("preview").kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters == dict(inspect.signature(reference.__call__).parameters)
    assert set(inspect.signature(fast.__init__).parameters) == {
        *inspect.signature(reference.__init__).parameters,
        "engine",
    }


def test_saves_and_loads_as_a_plain_checkpoint(pair, tmp_path):
    reference, fast = pair
    fast.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "CogVideoXPipeline"
    assert index["transformer"] == ["diffusers", "CogVideoXTransformer3DModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKLCogVideoX"]
    expected = reference(**toy.inputs(output_type="latent")).frames
    for load in (FastCogVideoXPipeline, diffusers.CogVideoXPipeline, diffusers.DiffusionPipeline):
        pipe = load.from_pretrained(tmp_path, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        assert_same(pipe(**toy.inputs(output_type="latent")).frames, expected)


def test_engine_is_taken_and_checked_before_loading(tmp_path):
    with pytest.raises(ValueError, match="engine tier 'warp' is unknown"):
        FastCogVideoXPipeline.from_pretrained(tmp_path / "nowhere", engine="warp")
    toy.pipeline().save_pretrained(tmp_path)
    config = EngineConfig(modulation_table=False)
    pipe = FastCogVideoXPipeline.from_pretrained(tmp_path, engine=config, torch_dtype=torch.float32)
    assert pipe.engine_report().config is config
    line = pipe.engine_report().line("modulation table")
    assert not line.applied and line.detail == "EngineConfig.modulation_table=False"


def test_accelerate_shares_weights_and_leaves_the_pipeline_working():
    reference = toy.pipeline()
    reference.vae.enable_slicing()
    before = reference(**toy.inputs(output_type="latent")).frames
    fast = accelerate(reference)
    assert fast.vae.use_slicing
    assert fast.vae.decoder is reference.vae.decoder and type(reference.vae) is diffusers.AutoencoderKLCogVideoX
    assert fast.transformer.proj_out.weight is reference.transformer.proj_out.weight
    assert torch.equal(reference(**toy.inputs(output_type="latent")).frames, before)
    again = accelerate(fast, EngineConfig(reuse_text_projection=False))
    assert again.transformer is fast.transformer and again.vae is fast.vae
    assert fast.engine_report().line("text projection").applied
    assert not again.engine_report().line("text projection").applied


def test_from_pipe_takes_either_kind(pair):
    from cogvx_fast import FastCogVideoXVideoToVideoPipeline

    inputs = toy.inputs(num_steps=4, video=[image()] * toy.NUM_FRAMES, strength=0.6, output_type="latent")
    inputs.pop("num_frames")
    expected = diffusers.CogVideoXVideoToVideoPipeline(**toy.pipeline().components)(**inputs).frames
    for source in pair:
        inputs["generator"].manual_seed(0)
        pipe = FastCogVideoXVideoToVideoPipeline.from_pipe(source, engine=EngineConfig(modulation_table=False))
        assert_same(pipe(**inputs).frames, expected)
        assert not pipe.engine_report().line("modulation table").applied
        assert type(source) is type(pair[0]) or source.engine_report().line("modulation table").applied
        # One that is made of a fast one is fast in the same way, unless told otherwise.
        again = FastCogVideoXVideoToVideoPipeline.from_pipe(pipe)
        assert not again.engine_report().line("modulation table").applied


def test_loading_by_the_published_examples_says_nothing(tmp_path, recwarn):
    toy.pipeline().save_pretrained(tmp_path)
    pipe = FastCogVideoXPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
    assert not [str(warning.message) for warning in recwarn if "dtype" in str(warning.message)]


def test_accelerate_refuses_what_it_cannot_do():
    with pytest.raises(
        TypeError, match="pipeline is a str, which is no CogVideoX pipeline; allowed: CogVideoXPipeline"
    ):
        accelerate("THUDM/CogVideoX-2b")
    with pytest.raises(ValueError, match=r"needs a schedule of the very checkpoint.*`cogvx-fast calibrate"):
        accelerate(toy.pipeline(), engine="turbo")


def test_accelerate_refuses_a_pipeline_that_offloads_already():
    from accelerate.hooks import ModelHook, add_hook_to_module

    pipe = toy.pipeline()
    add_hook_to_module(pipe.transformer, ModelHook())
    with pytest.raises(ValueError, match="make the pipeline fast first"):
        accelerate(pipe)


def test_offloading_hooks_work_on_the_fast_pipeline(pair):
    # On a machine without an accelerator the hooks themselves are what can be checked.
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    fast = accelerate(toy.pipeline())
    hook = Counting()
    add_hook_to_module(fast.transformer, hook)
    assert_same(fast(**toy.inputs(output_type="latent")).frames, pair[0](**toy.inputs(output_type="latent")).frames)
    assert hook.calls == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator to offload from")
def test_model_cpu_offload():
    expected = toy.pipeline().to("cuda")(**toy.inputs(output_type="latent")).frames
    fast = accelerate(toy.pipeline())
    fast.enable_model_cpu_offload()
    assert_same(fast(**toy.inputs(output_type="latent")).frames.cpu(), expected.cpu())


def test_a_transformer_put_in_later_is_made_fast_too(pair):
    fast = accelerate(toy.pipeline(seed=7))
    fast.transformer = toy.transformer(seed=0)
    assert_same(fast(**toy.inputs(output_type="latent")).frames, pair[0](**toy.inputs(output_type="latent")).frames)
    assert type(fast.transformer).__name__ == "FastCogVideoXTransformer3DModel"


def test_stage_times_add_up(pair):
    import time

    started = time.perf_counter()
    pair[1](**toy.inputs())
    elapsed = time.perf_counter() - started
    seconds = pair[1].stage_seconds
    assert set(seconds) == {"text", "denoise", "decode"}
    assert all(value > 0 for value in seconds.values()) and sum(seconds.values()) <= elapsed


def test_report_says_what_is_on_and_off():
    text = str(accelerate(toy.pipeline(), EngineConfig(modulation_table=False)).engine_report())
    assert "engine: exact" in text
    assert "off  modulation table  EngineConfig.modulation_table=False" in text
    assert "on   adopt blocks" in text and "3 blocks" in text
