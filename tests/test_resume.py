"""A generation that is parked and gone on with: the same bits as one that is not."""

import dataclasses
import subprocess
import sys
import types

import pytest
import torch
from PIL import Image

from cogvx_fast import EngineConfig, accelerate, threads
from cogvx_fast.resume import Parked, ResumableGeneration
from cogvx_fast.session import EngineSession
from tests import toy
from tests.turbo.conftest import schedule, schedule_file

STEPS = 5


def arguments(**overrides):
    left_out = ("generator", "output_type")
    return {name: value for name, value in toy.inputs(STEPS, **overrides).items() if name not in left_out}


def direct(pipe, seeds, given):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with threads.fixed(torch.get_num_threads()):
        return pipe(**given, generator=generators if len(seeds) > 1 else generators[0], output_type="latent").frames


def parked_at(pipe, given, step, seeds=(0,), **options):
    generation = ResumableGeneration(pipe, seeds, given, **options)
    assert generation.run(lambda now: now.done == step) is None
    return generation.parked


@pytest.fixture(params=["ddim", "dpm"])
def pipe(request):
    return accelerate(toy.pipeline(scheduler_kind=request.param))


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_it_goes_on_to_the_same_bits_in_another_pipeline(pipe, step, tmp_path):
    given = arguments()
    expected = direct(pipe, [3], given)
    parked_at(pipe, given, step, seeds=[3]).save(tmp_path / "parked")
    other = accelerate(toy.pipeline(scheduler_kind="dpm" if "DPM" in type(pipe.scheduler).__name__ else "ddim"))
    loaded = Parked.load(tmp_path / "parked")
    assert (loaded.done, loaded.total) == (step, STEPS)
    seen = []
    made = ResumableGeneration(other, [3], given, parked=loaded).run(lambda now: seen.append(now.done))
    assert torch.equal(made, expected)
    assert seen == list(range(step + 1, STEPS + 1))


@pytest.mark.parametrize(
    "overrides",
    [{"guidance_scale": 1.0}, {"use_dynamic_cfg": True}, {"prompt": ["a cat", "a dog"]}],
    ids=["unguided", "dynamic guidance", "two clips"],
)
def test_with_every_kind_of_guidance_and_a_seed_for_each_clip(pipe, overrides):
    given = arguments(**overrides)
    seeds = [5, 6] if isinstance(given["prompt"], list) else [5]
    generation = ResumableGeneration(pipe, seeds, given)
    while (made := generation.run(lambda now: True)) is None:  # parked after every single step
        pass
    assert torch.equal(made, direct(pipe, seeds, given))


@pytest.mark.parametrize(
    ("case", "kind"),
    [("5b-i2v", "dpm"), ("1.5-5b", "ddim"), ("v2v", "ddim"), ("v2v", "dpm"), ("fun", "ddim")],  # no other for fun
)
def test_of_every_pipeline(case, kind):
    picture = Image.new("RGB", (toy.SIZE, toy.SIZE), "teal")
    variant, cls = ("2b", "CogVideoXVideoToVideoPipeline") if case == "v2v" else (case, None)
    extra = {
        "5b-i2v": {"image": picture},
        "1.5-5b": {},
        "v2v": {"video": [picture] * toy.NUM_FRAMES, "strength": 0.8},
        "fun": {"control_video": [picture] * toy.NUM_FRAMES},
    }[case]
    given = arguments(**extra)
    if case in ("v2v", "fun"):
        given.pop("num_frames")
    pipe = accelerate(toy.pipeline(variant, cls, scheduler_kind=kind))
    parked = parked_at(pipe, given, 2)
    assert parked.total == (4 if case == "v2v" else STEPS)
    assert torch.equal(ResumableGeneration(pipe, [0], given, parked=parked).run(), direct(pipe, [0], given))


def test_it_goes_on_in_another_process_in_half_precision(tmp_path):
    code = """
import sys, torch
from cogvx_fast import accelerate
from cogvx_fast.resume import Parked, ResumableGeneration
from tests import toy
from tests.test_resume import arguments
pipe = accelerate(toy.pipeline(scheduler_kind="dpm")).to(torch.bfloat16)
torch.save(ResumableGeneration(pipe, [0], arguments(), parked=Parked.load(sys.argv[1])).run(), sys.argv[2])
"""
    pipe = accelerate(toy.pipeline(scheduler_kind="dpm")).to(torch.bfloat16)
    parked_at(pipe, arguments(), 3).save(tmp_path / "parked")
    subprocess.run([sys.executable, "-c", code, tmp_path / "parked", tmp_path / "made"], check=True)
    expected = direct(pipe, [0], arguments())
    assert expected.dtype == torch.bfloat16
    assert torch.equal(torch.load(tmp_path / "made"), expected)


def test_the_steps_are_those_of_the_whole_table(pipe, monkeypatch):
    steps, tables = [], []
    modulation = EngineSession.modulation

    def watched(self, step, ofs, modules, compute):
        steps.append(step)
        return modulation(
            self, step, ofs, modules, lambda all_steps: tables.append(len(all_steps)) or compute(all_steps)
        )

    parked = parked_at(pipe, arguments(), 2)
    monkeypatch.setattr(EngineSession, "modulation", watched)
    ResumableGeneration(pipe, [0], arguments(), parked=parked).run()
    assert steps == [2, 3, 4] and tables == [STEPS], "a product of fewer rows may differ in its last bits"


@pytest.mark.parametrize("kind", ["ddim", "dpm"])
def test_steps_that_are_left_out_are_predicted_from_the_same_outputs(kind, tmp_path):
    steps, given = 10, {**arguments(), "num_inference_steps": 10}
    reference = toy.pipeline(scheduler_kind=kind)
    weights = {4: (1.2, -0.1, -0.02), 5: (1.4, -0.5, 0.0)}
    path = schedule_file(reference, tmp_path / "s.json", schedule(reference, "##.#..#.##", weights))
    engine = EngineConfig("turbo", recipe="native", schedule=path, speed=10 / 6)
    turbo = accelerate(reference, engine)
    expected = direct(turbo, [3], given)
    for step in range(1, steps):
        parked = parked_at(turbo, given, step, seeds=[3])
        parked.save(tmp_path / "parked")
        other = accelerate(toy.pipeline(scheduler_kind=kind), engine)
        assert torch.equal(
            ResumableGeneration(other, [3], given, parked=Parked.load(tmp_path / "parked")).run(), expected
        )
        assert other._ran.steps == "##.#..#.##"[step:].count("#")
        # What was parked is as it was: gone on with once more it gives the same.
        assert torch.equal(ResumableGeneration(other, [3], given, parked=parked).run(), expected)


def test_a_generation_can_be_copied_without_being_stopped(pipe):
    copies = []
    generation = ResumableGeneration(pipe, [0], arguments())
    made = generation.run(lambda now: copies.append(generation.take()))
    assert [copy.done for copy in copies] == [1, 2, 3, 4, 5]
    assert torch.equal(copies[-1].latents, made)
    for copy in copies:
        assert torch.equal(ResumableGeneration(pipe, [0], arguments(), parked=copy).run(), made)


def test_the_pipeline_is_as_it_was(pipe):
    scheduler, config = pipe.scheduler, dict(pipe.config)
    expected = direct(pipe, [0], arguments())
    parked_at(pipe, arguments(), 2)
    with pytest.raises(KeyboardInterrupt):
        ResumableGeneration(pipe, [0], arguments()).run(lambda now: (_ for _ in ()).throw(KeyboardInterrupt))
    assert pipe.scheduler is scheduler and dict(pipe.config) == config
    assert torch.equal(direct(pipe, [0], arguments()), expected)


def test_it_takes_as_many_threads_as_before(pipe, monkeypatch):
    def threads_of(now):
        seen.append(torch.get_num_threads())
        return now.done == 1

    seen = []
    with threads.at_most(1):
        generation = ResumableGeneration(pipe, [0], arguments())
        generation.run(threads_of)
    with threads.at_most(2):
        generation.run(threads_of)
        assert torch.get_num_threads() == 2
    assert set(seen) == {1}


def test_another_generation_is_refused(pipe):
    parked = parked_at(pipe, arguments(), 2)
    for seeds, steps in (((1,), STEPS), ((0,), 3)):
        with pytest.raises(ValueError, match="parked is of"):
            ResumableGeneration(pipe, seeds, arguments() | {"num_inference_steps": steps}, parked=parked)
    other = toy.scheduler("ddim" if parked.made_by["scheduler"] == "dpm" else "dpm")
    with pytest.raises(ValueError, match="parked is of"):
        ResumableGeneration(pipe, [0], arguments(), scheduler=other, parked=parked)
    with pytest.raises(ValueError, match="gives latents itself"):
        ResumableGeneration(pipe, [0], arguments() | {"latents": parked.latents})
    with pytest.raises(TypeError, match="SimpleNamespace, which cannot be parked"):
        ResumableGeneration(pipe, [0], arguments(), scheduler=types.SimpleNamespace())


def test_a_file_of_something_else_is_refused(pipe, tmp_path):
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="is no parked generation"):
        Parked.load(tmp_path / "text")
    from safetensors.torch import save_file

    save_file({"latents": torch.zeros(1)}, tmp_path / "tensors")
    with pytest.raises(ValueError, match="its format is None"):
        Parked.load(tmp_path / "tensors")


def test_a_write_that_fails_leaves_the_one_before(pipe, tmp_path, monkeypatch):
    parked = parked_at(pipe, arguments(), 2)
    parked.save(tmp_path / "parked")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        dataclasses.replace(parked, done=3).save(tmp_path / "parked")
    assert Parked.load(tmp_path / "parked").done == 2
    assert [path.name for path in tmp_path.iterdir()] == ["parked"]
