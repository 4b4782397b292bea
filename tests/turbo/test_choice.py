"""Whose schedule it is: named, shipped or published, and for which checkpoint."""

import itertools
import json

import pytest
import torch

from cogvx_fast import EngineConfig, FastCogVideoXPipeline, accelerate, demo_checkpoint
from cogvx_fast.family import Variant
from cogvx_fast.turbo import ScheduleError, choose_source, published
from cogvx_fast.turbo.identity import Identity, sampled_weights
from cogvx_fast.turbo.published import COEFFICIENTS, TimeEmbeddings, member, schedule
from tests import toy

from .conftest import latents, schedule_file, timesteps_of

FIVE = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
MEMBERS = {
    "2b": {},
    "5b": FIVE,
    "5b-i2v": {**FIVE, "in_channels": 32, "use_learned_positional_embeddings": True},
    "1.5": {**FIVE, "patch_size_t": 2},
    "1.5-i2v": {**FIVE, "patch_size_t": 2, "in_channels": 32, "ofs_embed_dim": 512},
}


def test_every_published_checkpoint_has_coefficients_and_no_other_has():
    assert [member(Variant.of(config)) for config in MEMBERS.values()] == ["2b", "5b", "5b", "1.5", "1.5-i2v"]
    others = [
        {"num_layers": 6},
        {"in_channels": 32},
        {"use_rotary_positional_embeddings": True},
        {**FIVE, "in_channels": 32},  # CogVideoX-Fun
        {**FIVE, "in_channels": 33},
        {**FIVE, "patch_size_t": 2, "in_channels": 32},
    ]
    assert [member(Variant.of(config)) for config in others] == [None] * len(others)


@pytest.mark.parametrize("variant", ["5b", "1.5-5b-i2v"])
def test_the_time_embedding_is_the_transformers(variant):
    model, timesteps = toy.transformer(variant), [999, 500, 20]
    with torch.no_grad():
        rows = [model.time_embedding(model.time_proj(torch.tensor([t]))) for t in timesteps]
        if model.ofs_embedding is not None:
            rows = [row + model.ofs_embedding(model.ofs_proj(torch.tensor([2.0]))) for row in rows]
    changes = [((b - a).abs().mean() / a.abs().mean()).item() for a, b in itertools.pairwise(rows)]
    assert TimeEmbeddings(model).changes(timesteps) == pytest.approx([0.0, *changes], rel=1e-4)


@pytest.fixture
def drifting():
    """Embeddings that move by 2% to 12% from step to step, as those of real checkpoints may."""
    made, generator = TimeEmbeddings(toy.transformer()), torch.Generator().manual_seed(0)
    moves = torch.randn(1000, 64, generator=generator) * torch.linspace(0.004, 0.03, 1000)[:, None]
    made.table = 1 + torch.rand(64, generator=generator) + moves.cumsum(0)
    return made


def test_coefficients_that_do_not_fit_the_embedding_are_refused(drifting):
    drifting.table = drifting.table[:1] + (drifting.table - drifting.table[:1]) * 1e-4
    with pytest.raises(ScheduleError, match=r"published coefficients of 5b give . evaluations where 25 were wanted"):
        schedule("5b", drifting, list(range(999, -1, -20)), 25)


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("evaluations", [31, 25, 17])
def test_a_published_schedule_is_the_rule_with_that_many_evaluations(name, evaluations, drifting):
    timesteps = list(range(999, -1, -20))
    made = schedule(name, drifting, timesteps, evaluations)
    assert 0.8 * evaluations <= made.evaluations <= evaluations
    assert "not measured by us" in made.source and made.distance is None
    # The rule written out: what has gathered since the last computed step, against one threshold.
    rows = [drifting.table[t] for t in timesteps]
    gathered, skipped, taken = 0.0, [], []
    for step in range(1, 49):
        x = ((rows[step] - rows[step - 1]).abs().mean() / rows[step - 1].abs().mean()).item()
        a, b, c, d, e = COEFFICIENTS[name]
        gathered += a * x**4 + b * x**3 + c * x**2 + d * x + e
        if made.is_computed(step):
            taken += [gathered] if step >= 3 else []
            gathered = 0.0
        else:
            skipped.append(gathered)
    assert max(skipped) <= min(taken) + 1e-6


def test_a_file_of_another_checkpoint_is_refused(tmp_path):
    path = schedule_file(toy.pipeline(), tmp_path / "s.json")
    config = EngineConfig("turbo", recipe="native", schedule=path)
    accelerate(toy.pipeline(), config)
    with pytest.raises(ScheduleError, match=r"is not for this checkpoint: it is of a checkpoint with other weights"):
        accelerate(toy.pipeline(seed=3), config)
    with pytest.raises(ScheduleError, match=r"use_rotary_positional_embeddings=False, this one has True"):
        accelerate(toy.pipeline("5b"), config)


def test_the_same_weights_in_half_precision_are_the_same_checkpoint(tmp_path):
    path = schedule_file(toy.pipeline(), tmp_path / "s.json")
    for dtype in (torch.float16, torch.bfloat16):
        accelerate(toy.pipeline().to(dtype), EngineConfig("turbo", recipe="native", schedule=path))


def test_a_folder_is_refused_before_its_weights_are_read(tmp_path, monkeypatch):
    path = schedule_file(toy.pipeline("5b"), tmp_path / "s.json")
    toy.pipeline().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    for config, message in (
        (EngineConfig("turbo", schedule=path), "is not for this checkpoint"),
        (EngineConfig("turbo"), "needs a schedule of the very checkpoint.*calibrate"),
        (EngineConfig("turbo", schedule=tmp_path / "none.json"), "cannot be read"),
    ):
        with pytest.raises(ScheduleError, match=message):
            FastCogVideoXPipeline.from_pretrained(tmp_path / "model", engine=config)


def test_the_demo_checkpoint_has_its_own():
    pipe = FastCogVideoXPipeline.from_pretrained(demo_checkpoint(), dtype=torch.float32, engine="turbo")
    steps = pipe.engine_report().line("steps").detail
    assert "25 of 50 computed; calibrated in float32, demo.json; distance found: " in steps
    pipe.set_progress_bar_config(disable=True)
    made = pipe("a red circle moves right on white", generator=torch.Generator().manual_seed(0), output_type="latent")
    assert pipe._ran.steps == 25 and made.frames.isfinite().all()  # on balanced, which quantizes where it can
    for speed, evaluations in (("fast", 17), (5, 10)):
        source = choose_source(None, pipe.transformer)
        assert source.schedule(pipe.scheduler, speed, 50).evaluations == evaluations
    assert source.schedule(toy.scheduler("dpm"), "fast", 50).source == "calibrated in float32, demo-dpm.json"


def test_an_identity_is_that_of_the_file(tmp_path):
    pipe = toy.pipeline()
    content = json.loads(schedule_file(pipe, tmp_path / "s.json").read_text())["identity"]
    assert content["weights"] == list(sampled_weights(pipe.transformer)) and len(content["weights"]) == 16
    assert content["scheduler"] == "CogVideoXDDIMScheduler"
    assert not Identity.of(pipe.transformer, pipe.scheduler).why_not_scheduler(pipe.scheduler)
    assert timesteps_of(pipe, 4) == (999.0, 749.0, 499.0, 249.0)


def test_a_published_checkpoint_follows_the_rule_and_says_so(monkeypatch):
    monkeypatch.setattr(published, "member", lambda variant: "5b")

    def changes(embeddings, timesteps):
        return [0.05 + 0.001 * step for step in range(len(timesteps))]

    monkeypatch.setattr(TimeEmbeddings, "changes", changes)
    pipe = accelerate(toy.pipeline(scheduler_kind="dpm"), EngineConfig("turbo", recipe="native", speed=2))
    before = pipe.engine_report().line("steps").detail
    assert "from published coefficients, not measured by us: TeaCache's of 5b; distance not measured" in before
    latents(pipe, num_steps=20)
    assert pipe._ran.steps <= 10 and pipe.engine_report().line("steps").detail.startswith("###.")
