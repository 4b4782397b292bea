"""What the demo model's stages train, on what, and where they go on from."""

import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from cogvx_fast.fun import conditions
from tools.demo_model import data, dit, drawn, latents, muon, objective, text, vae
from tools.demo_model.state import save_state


def test_large_stages_start_where_small_ones_ended():
    assert vae.ENLARGE.after is vae.TRAIN and dit.ENLARGE.after is dit.TRAIN
    assert dit.GUIDED.after is dit.ENLARGE and dit.GUIDED.latents == dit.ENLARGE.name
    assert vae.SHARPEN.after is vae.ENLARGE
    assert dit.FOLLOW.after is dit.GUIDED and not dit.FOLLOW.latents, "latents of the sharpened autoencoder"
    assert dit.FINE.after is dit.FOLLOW and dit.FINE.latents == dit.FOLLOW.name
    assert dit.FINER.after is dit.FINE and dit.FINER.latents == dit.FOLLOW.name
    assert vae.SETTLE.after is vae.SHARPEN and vae.SETTLE.decoder_only, "the denoiser knows the encoder's latents"
    assert dit.SETTLE.after is dit.FINER and dit.SETTLE.jitter is vae.SETTLE.jitter is None and not dit.SETTLE.latents
    assert dit.STEADY.after is dit.SETTLE and dit.STEADY.latents == dit.SETTLE.name and dit.STEADY.jitter is None
    assert dit.REST.after is dit.STEADY and dit.REST.latents == dit.SETTLE.name and dit.REST.starts == dit.STEADY.starts
    assert vae.REST.after is vae.SETTLE and vae.REST.decoder_only and vae.REST.from_drawn
    assert vae.CLEAR.after is vae.REST and vae.CLEAR.decoder_only and not vae.CLEAR.from_drawn
    assert dit.SNAP.after is dit.REST and dit.SNAP.latents == dit.SETTLE.name and dit.SNAP.whole
    assert dit.INPAINT.told and dit.INPAINT.after is dit.FINER and not dit.INPAINT.latents
    small, large = dit.build_transformer(data.SMALL), dit.build_transformer()
    assert large.load_state_dict(small.state_dict()) and large.config.sample_height == 2 * small.config.sample_height
    # A place has the same position in both: every other token of the large grid is one of the small.
    rows = large.config.sample_height // 2
    positions = [
        model.patch_embed.pos_embedding[0, dit.TEXT_LENGTH :].unflatten(0, (5, grid, grid))
        for model, grid in ((small, rows // 2), (large, rows))
    ]
    assert torch.allclose(positions[1][:, ::2, ::2], positions[0], atol=1e-5)


def test_guidance_is_trained_as_the_pipeline_adds_it():
    told, untold = torch.randn(2, 3, 5, 16, 4, 4).unbind()
    guided = objective.guide(told, untold, torch.tensor([0.0, 1.0, 6.0]))
    assert torch.equal(guided[0], untold[0]) and torch.allclose(guided[1], told[1], atol=1e-6)
    assert torch.allclose(guided[2], untold[2] + 6 * (told[2] - untold[2]))


def test_where_the_prompt_decides_both_predictions_are_trained_apart():
    timesteps = torch.arange(1000)
    scales = objective.guidance_scales(timesteps, 7.0, torch.Generator().manual_seed(0))
    assert set(scales[timesteps >= objective.NOISY].tolist()) == {0.0, 1.0}
    elsewhere = scales[timesteps < objective.NOISY]
    assert 0 <= elsewhere.min() < 0.5 and 6.5 < elsewhere.max() <= 7 and elsewhere.unique().numel() > 500


@pytest.mark.parametrize("share", [0.13, 0.475])
def test_a_batch_has_its_share_of_the_noisiest_quarter(share):
    timesteps = objective.draw_timesteps(torch.Generator().manual_seed(0), 1000, 16, share)
    assert (timesteps >= objective.NOISY).sum() == int(16 * share) and timesteps.unique().numel() == 16
    assert 0 <= timesteps.min() < objective.NOISY / 8 and objective.NOISY + 100 < timesteps.max() < 1000


def test_less_noise_is_drawn_more_often_where_a_stage_says_so():
    even, uneven = (
        torch.cat([objective.draw_timesteps(torch.Generator().manual_seed(i), 1000, 16, 0.13, e) for i in range(20)])
        for e in (1.0, 1.5)
    )
    assert (uneven < 200).float().mean() > 1.3 * (even < 200).float().mean()


def test_what_a_denoiser_has_left_is_led_to_the_clip():
    generator = torch.Generator().manual_seed(0)
    clean, error, noise = torch.randn(3, 5, 16, 4, 4, generator=generator).unbind()
    scheduler = dit.build_scheduler()
    for timestep in (objective.LAST, 320, 500):
        alpha = scheduler.alphas_cumprod[timestep].float()
        noisy, target = objective.from_drawn(clean + 0.1 * error, clean, noise, alpha)
        assert torch.allclose(alpha.sqrt() * noisy - (1 - alpha).sqrt() * target, clean, atol=1e-5)
        steps = torch.tensor([timestep])
        noisy, target = objective.from_drawn(clean, clean, noise, alpha)
        assert torch.allclose(noisy, scheduler.add_noise(clean[None], noise[None], steps)[0], atol=1e-5)
        assert torch.allclose(target, scheduler.get_velocity(clean[None], noise[None], steps)[0], atol=1e-4)


def test_drawn_clips_are_what_the_denoiser_makes_of_noisy_ones(tmp_path):
    """A denoiser that knows the clips gives them back, whatever the noise; one that says nothing does not."""
    autoencoder = vae.build(32).eval()
    cache = latents.LatentCache(autoencoder, tmp_path / f"{dit.FINE.latents}_latents.pt", 32, scale=0.75)
    cache.grow(4)
    cache.save()
    transformer, tokenizer = dit.build_transformer(32), text.build_tokenizer()
    model = torch.nn.ModuleDict({"transformer": transformer, "text_encoder": text.build_text_encoder(len(tokenizer))})
    save_state(tmp_path / "dit_fine.pt", {"average": model.state_dict()})
    made = drawn.DrawnCache(autoencoder, tmp_path, dataclasses.replace(dit.FINE, size=32), dit.FINER.starts)
    assert made.scale == 0.75
    alphas = made.scheduler.alphas_cumprod.float()

    def knows(noisy, embeds, timesteps, return_dict):
        alpha = alphas[timesteps].view(-1, 1, 1, 1, 1)
        clean = cache.latents[chosen].repeat(2, 1, 1, 1, 1)
        return ((alpha.sqrt() * noisy - clean) / (1 - alpha).sqrt(),)

    made.transformer = knows
    for chosen in ([0, 1], [2, 3]):
        found = made.redrawn(cache.latents[chosen], ["a red circle moves up on white"] * 2, 200, seed=1)
        assert torch.allclose(found, cache.latents[chosen], atol=1e-4)
    made.transformer = transformer
    made.grow(4)
    assert made.latents.shape == cache.latents.shape and (made.latents - cache.latents).abs().mean() > 0.1


@pytest.fixture
def before(tmp_path):
    """A folder with the latents and weights of a stage, and 32 pixels' clips as its denoiser leaves them."""
    autoencoder = vae.build(32).eval()
    save_state(tmp_path / "vae_sharp.pt", {"model": autoencoder.state_dict()})
    stage = dataclasses.replace(dit.SETTLE, size=32)
    cache = latents.LatentCache(autoencoder, stage.latents_in(tmp_path), 32, 0.75, jitter=None)
    cache.grow(2)
    cache.save()
    model = torch.nn.ModuleDict(
        {"transformer": dit.build_transformer(32), "text_encoder": text.build_text_encoder(len(text.build_tokenizer()))}
    )
    save_state(tmp_path / f"{stage.name}.pt", {"average": model.state_dict()})
    made = drawn.DrawnCache(autoencoder, tmp_path, stage, dit.STEADY.starts)
    made.grow(2)
    return SimpleNamespace(folder=tmp_path, autoencoder=autoencoder, stage=stage, drawn=made, model=model)


@pytest.mark.parametrize("part", [0.0, 1.0])
def test_a_step_of_training_is_on_what_the_denoiser_left_where_the_stage_says_so(before, part, monkeypatch):
    """One whole step, and that nothing is drawn again: a stage that is done is left as it is."""
    used = []
    told = objective.from_drawn
    monkeypatch.setattr(dit, "from_drawn", lambda *arguments: used.append(arguments) or told(*arguments))
    stage = dataclasses.replace(
        dit.STEADY, size=32, after=before.stage, steps=1, batch=4, noisy_share=0.25, first_clips=2, redrawn=part
    )
    dit.train(before.folder, before.autoencoder, stage, before.drawn)
    assert (len(used) > 0) == (part > 0)
    for left, clean, _, _ in used:
        pairs = zip(before.drawn.latents, state(before.folder, before.stage.name + "_latents")["latents"], strict=True)
        assert any(torch.equal(left, one) and torch.equal(clean, other) for one, other in pairs), "of the same clip"
    found = state(before.folder, stage.name)
    assert found["step"] == 1 and all(one.isfinite().all() for one in found["average"].values())
    old = before.model.state_dict()
    changed = {name.split(".")[0] for name, one in found["model"].items() if not torch.equal(one, old[name])}
    assert changed == {"transformer", "text_encoder"}
    dit.train(before.folder, before.autoencoder, stage, before.drawn)
    again = state(before.folder, stage.name)
    assert all(torch.equal(one, again["model"][name]) for name, one in found["model"].items())


def test_a_whole_generation_is_led_to_the_nearest_clip_that_there_is(before):
    """A denoiser that says a clip of all those that fit, and a part of another, means the first."""
    made = drawn.WholeCache(before.autoencoder, before.folder, before.stage)
    scene = made.scene(0)
    every = made.encode(data.all_on_cells(scene, 32))
    assert len(every) > 1
    said = 0.8 * every[-1] + 0.2 * every[0]
    alphas = made.scheduler.alphas_cumprod.float()

    def says(noisy, embeds, timesteps, return_dict):
        alpha = alphas[timesteps].view(-1, 1, 1, 1, 1)
        return ((alpha.sqrt() * noisy - said) / (1 - alpha).sqrt(),)

    made.transformer = says
    made.grow(1)
    left, meant = made.pair(0, torch.zeros_like(every[0]))
    assert torch.allclose(left, said, atol=1e-4) and torch.allclose(meant, every[-1], atol=1e-5)


def test_a_step_leads_whole_generations_to_what_was_meant(before, monkeypatch):
    used, told = [], objective.from_drawn
    monkeypatch.setattr(dit, "from_drawn", lambda *arguments: used.append(arguments) or told(*arguments))
    made = drawn.WholeCache(before.autoencoder, before.folder, before.stage)
    made.grow(2)
    sizes = {"size": 32, "steps": 1, "batch": 4, "first_clips": 2, "growth": 0.0, "redrawn": 1.0}
    stage = dataclasses.replace(dit.SNAP, after=before.stage, latents=before.stage.name, **sizes)
    dit.train(before.folder, before.autoencoder, stage, made)
    assert used
    for left, clean, _, _ in used:
        assert any(torch.equal(left, one) and torch.equal(clean, other) for one, other in made.latents)


def state(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


def test_a_decoder_learns_what_the_denoiser_left(before):
    clips, left = vae.of_drawn(before.drawn, "a", 1, 9)
    assert clips.shape == (1, 3, 9, 32, 32) and left.shape == (1, 16, 3, 4, 4)
    index = next(k for k in range(2) if torch.equal(clips[0], before.drawn.clip(k)[:, :9]))
    assert torch.allclose(left[0].transpose(0, 1) * 0.75, before.drawn.latents[index, :3])
    stage = dataclasses.replace(vae.SETTLE, size=32, phases=((2, 1, 9),), after=vae.Stage("vae_sharp", 32, (), 0.0))
    after = vae.train(before.folder, stage, before.drawn).state_dict()
    old = before.autoencoder.state_dict()
    changed = {name.split(".")[0] for name in old if not torch.equal(old[name], after[name])}
    assert changed == {"decoder"}


def test_every_frame_of_a_phase_is_trained_at_the_stage_s_size():
    for stage in (vae.TRAIN, vae.ENLARGE, vae.SHARPEN, vae.SETTLE):
        for step in (0, stage.steps - 1):
            clips, frames = stage.clips_and_frames(step)
            assert vae.batch(stage.name, step, 1, frames, stage.size).shape == (1, 3, frames, stage.size, stage.size)
            assert clips >= 1


def test_the_encoder_stays_while_the_decoder_learns_large_clips(tmp_path):
    """So that the denoiser can learn its latents meanwhile."""
    assert vae.ENLARGE.decoder_only
    before = vae.build(32)
    save_state(tmp_path / "small.pt", {"model": before.state_dict()})
    small = vae.Stage("small", 32, (), peak_lr=0.0)
    after = vae.train(tmp_path, vae.Stage("large", 32, ((1, 2, 1),), peak_lr=1e-2, after=small, decoder_only=True))
    old, new = before.state_dict(), after.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old if name.startswith("encoder."))
    assert not torch.equal(old["decoder.conv_out.conv.weight"], new["decoder.conv_out.conv.weight"])


def test_an_anchored_encoder_learns_and_its_latents_stay(tmp_path, monkeypatch):
    """So that the denoiser can follow them."""
    before = vae.build(32)
    save_state(tmp_path / "before.pt", {"model": before.state_dict()})
    clip = vae.batch("clip", 0, 1, 1, 32)
    moved = {}
    for penalty in (0.0, 1e4):
        monkeypatch.setattr(vae, "ANCHOR_PENALTY", penalty)
        stage = vae.Stage(f"after {penalty}", 32, ((6, 2, 1),), 1e-2, vae.Stage("before", 32, (), 0.0), anchored=True)
        after = vae.train(tmp_path, stage)
        with torch.no_grad():
            old, new = (model.encode(clip).latent_dist.mode() for model in (before, after))
        moved[penalty] = (new - old).norm().item()
    assert 0 < moved[1e4] < moved[0.0] / 2


def test_an_error_counts_by_the_contrast_of_its_clip():
    clip = data.render(data.Scene("star", "red", "white", "up"), random.Random(0), 9, 32)[None]
    error = 0.1 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    strong, faint = (vae.relative_loss(factor * (clip + error), factor * clip) for factor in (1.0, 0.25))
    assert faint == pytest.approx(strong.item(), rel=1e-4)


def test_a_faint_object_counts_as_much_where_it_can_be_seen():
    ground = torch.randn(1, 1, 16, 1, 1, generator=torch.Generator().manual_seed(0)).expand(2, 5, 16, 8, 8).clone()
    ground[:, :, :, 2:5, 2:5] += torch.tensor([1.0, 0.6]).view(2, 1, 1, 1, 1)
    weights = [
        objective.faint_weights(ground, torch.full((2,), timestep)).flatten() for timestep in (100, objective.NOISY)
    ]
    assert weights[0][1] / weights[0][0] == pytest.approx(1 / 0.36, rel=1e-4)
    assert weights[1].tolist() == [1.0, 1.0], "the mean of what is possible is learned there"


def test_latents_have_the_scale_of_the_stage_before(tmp_path):
    cache = latents.LatentCache(vae.build(32).eval(), tmp_path / "clips.pt", 32, scale=0.75)
    cache.grow(1)
    cache.save()
    again = latents.LatentCache(vae.build(32).eval(), tmp_path / "clips.pt", 32)
    assert cache.scale == again.scale == 0.75 and again.latents.shape == (1, 5, 16, 4, 4)


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_muon_is_torch_s_without_its_rounding(shape):
    generator = torch.Generator().manual_seed(1)
    ours = torch.nn.Parameter(torch.randn(shape, generator=generator))
    torchs = torch.nn.Parameter(ours.detach().clone())
    before = ours.detach().clone()
    optimizers = [
        muon.Muon([ours], lr=0.1, weight_decay=0.01),
        torch.optim.Muon([torchs], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(4):
        ours.grad = torch.randn(shape, generator=generator)
        torchs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - torchs).norm() < 0.02 * (torchs - before).norm()  # bf16 keeps eight bits, through five iterations
    values = torch.linalg.svdvals(muon.orthogonal(torch.randn(2, *shape, generator=generator)))
    assert values.min() > 0.5 and values.max() < 1.3


def test_the_second_model_is_told_what_the_pipeline_tells_it(tmp_path, monkeypatch):
    """Of the first frame, the last or both: the channels that our pipeline for these checkpoints makes of pictures."""
    monkeypatch.setattr(latents, "scaling_factor", lambda model: 0.75)
    autoencoder = vae.build(32).eval()
    autoencoder.register_to_config(scaling_factor=0.75)
    cache = latents.KnownCache(autoencoder, tmp_path / "known.pt", 32)
    cache.grow(1)
    scene = cache.scene(0)
    clip = data.render(scene, random.Random("clip 0"), size=32, jitter=latents.JITTER)
    pixels = ((clip[:, [0, -1]] + 1) * 127.5).round().byte().permute(1, 2, 3, 0)
    pictures = [Image.fromarray(frame.numpy()) for frame in pixels]
    first, last = ([picture] for picture in pictures)
    for case, given in enumerate(((first, []), ([], last), (first, last))):
        known = conditions.of_frames(*given, data.NUM_FRAMES, 32, 32)
        with torch.no_grad():
            encoded = autoencoder.encode(known.pixels).latent_dist.mode()
        mask = conditions.mask_latents(known.unknown, *encoded.shape[2:])
        expected = torch.cat([mask, encoded], dim=1).transpose(1, 2)[0] * 0.75
        found = cache.latents[0, case].float()
        assert (found - expected).norm() < 0.02 * expected.norm(), "but for eight bits of a picture's values"
    drawn = torch.stack([cache.draw([0], random.Random(seed))[0] for seed in range(40)])
    silent = drawn.flatten(1).abs().amax(1) == 0
    assert 0 < silent.sum() < 40, "a part of them is told nothing, in zeros"


def test_the_second_model_begins_as_the_first(tmp_path):
    first, second = dit.build_transformer(32), dit.build_transformer(32, told=True)
    torch.nn.init.normal_(first.proj_out.weight)
    wide = dit.widened({f"transformer.{name}": weight for name, weight in first.state_dict().items()}, 33)
    second.load_state_dict({name.removeprefix("transformer."): weight for name, weight in wide.items()})
    generator = torch.Generator().manual_seed(0)
    noisy, told = (torch.randn(1, 5, channels, 4, 4, generator=generator) for channels in (16, 17))
    text_rows, step = torch.randn(1, dit.TEXT_LENGTH, text.WORD_DIM, generator=generator), torch.tensor([500])
    with torch.no_grad():
        expected = first(noisy, text_rows, step, return_dict=False)[0]
        found = second(torch.cat([noisy, told], dim=2), text_rows, step, return_dict=False)[0]
    assert expected.abs().max() > 0 and torch.allclose(found, expected, atol=1e-5)
