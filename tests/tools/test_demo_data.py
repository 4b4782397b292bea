"""The demo model's data, sentences, tokenizer and the reader that scores it."""

import random

import pytest
import torch
import torch.nn.functional as F

from tools.demo_model import data, measuring, reading, text


@pytest.mark.parametrize("seed", range(40))
def test_reader_reads_what_was_rendered(seed):
    rng = random.Random(seed)
    scene = rng.choice(data.ALL_SCENES)
    clip = (data.render(scene, rng).transpose(0, 1) + 1) / 2
    noisy = (clip + 0.03 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)
    assert all(reading.read(noisy).matches(scene).values()), (scene, reading.read(noisy))


def test_reader_finds_nothing_in_an_empty_clip():
    clip = torch.full((17, 3, 64, 64), 0.5)
    assert reading.read(clip) == reading.Reading("unclear", "unclear", "gray", "unclear")


def test_reader_tells_a_wrong_way_from_a_right_one():
    scene = data.Scene("square", "blue", "white", "left")
    clip = (data.render(scene, random.Random(1)).transpose(0, 1) + 1) / 2
    assert reading.read(clip.flip(0)).motion == "right"


def test_held_out_scenes_are_not_trained_on():
    assert len(data.HELD_OUT) == 80
    assert not set(data.HELD_OUT) & set(data.TRAINING)
    assert set(data.HELD_OUT) | set(data.TRAINING) == set(data.ALL_SCENES)
    for factor in ("shape", "color", "background", "motion"):
        names = {getattr(scene, factor) for scene in data.ALL_SCENES}
        assert {getattr(scene, factor) for scene in data.TRAINING} == names


def test_paths_stay_inside_the_picture():
    rng = random.Random(0)
    for scene in data.ALL_SCENES:
        radius, centers = data.path(scene, rng)
        assert centers.min() > radius * 0.8 and centers.max() < data.SIZE - radius * 0.8


def test_what_fits_the_latents_moves_by_a_cell_and_stays_inside():
    rng = random.Random(0)
    for scene in data.ALL_SCENES:
        radius, centers = data.path(scene, rng, jitter=None)
        assert radius == 28.0 and torch.equal(centers[0] % data.CELL, torch.zeros(2))
        moved = centers[4::4] - centers[:-4:4]
        assert torch.allclose(moved, data.CELL * torch.tensor(data.MOTIONS[scene.motion], dtype=torch.float32))
        points = data.polygon(scene.shape) if scene.shape != "circle" else torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
        points = centers[:, None] + points * radius * data._CIRCUMRADIUS[scene.shape]
        assert points.min() > 0 and points.max() < data.SIZE


def test_what_fits_the_latents_is_one_of_a_few_pictures():
    for shape, motion, places in (("circle", "left", 9), ("star", "up", 3), ("star", "still", 9)):
        scene = data.Scene(shape, "red", "white", motion)
        found = {data.render(scene, random.Random(seed), jitter=None).numpy().tobytes() for seed in range(80)}
        assert len(found) == places
    # A window of it begins with a latent.
    whole = data.render(scene := data.Scene("star", "red", "white", "up"), random.Random(0), jitter=None)
    windows = [data.render(scene, random.Random(seed), 9, jitter=None) for seed in range(30)]
    same = [k for window in windows for k in range(9) if torch.equal(window, whole[:, k : k + 9])]
    assert set(same) == {0, 4, 8}


def test_all_that_fits_the_latents_is_what_seeds_draw():
    for scene in (data.Scene("star", "red", "white", "up"), data.Scene("square", "blue", "gray", "still")):
        drawn = {data.render(scene, random.Random(seed), jitter=None).numpy().tobytes() for seed in range(80)}
        every = [clip.numpy().tobytes() for clip in data.all_on_cells(scene)]
        assert set(every) == drawn and len(every) == len(drawn) > 1


def test_sentences_name_every_factor_and_vary():
    scene = data.Scene("circle", "purple", "gray", "up")
    rng = random.Random(0)
    sentences = {data.describe(scene, rng) for _ in range(200)}
    assert len(sentences) > 100
    for sentence in sentences:
        assert "purple" in sentence or "violet" in sentence
        assert "gray" in sentence or "grey" in sentence
        assert any(word in sentence for word in ("up", "top"))


def test_tokenizer_keeps_words_whole_and_survives_saving(tmp_path):
    tokenizer = text.build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    for sentence in ("a red circle moves right", "A Red circle, moves RIGHT on zebra!", ""):
        ids = tokenizer(sentence).input_ids
        assert again(sentence).input_ids == ids
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in ids
    assert len(tokenizer("a red circle moves right").input_ids) == 6


def test_capitals_mean_the_same():
    tokenizer = text.build_tokenizer()
    encoder = text.build_text_encoder(len(tokenizer)).eval()
    text.tie_cases(encoder)
    sentences = ["a red star moves up", "A Red STAR moves Up"]
    ids = tokenizer(sentences, padding=True, return_tensors="pt").input_ids
    assert not torch.equal(ids[0], ids[1])
    with torch.no_grad():
        lower, upper = encoder(ids)[0]
    assert torch.equal(lower, upper)


@pytest.mark.parametrize("shape", data.SHAPES)
@pytest.mark.parametrize("size", [64, 128])
def test_an_ideal_clip_measures_as_one(shape, size):
    scene = data.Scene(shape, "red", "white", "right")
    clip = (data.render(scene, random.Random(3), size=size).transpose(0, 1)[::8] + 1) / 2
    drawing = measuring.measure(clip, scene)
    assert drawing.overlap > 0.99 and drawing.least_overlap > 0.985
    assert drawing.ground_spread < 1e-6 and drawing.area_spread < 0.005


def test_a_tint_is_no_error_of_the_outline():
    scene = data.Scene("triangle", "purple", "gray", "left")
    clip = (data.render(scene, random.Random(5)).transpose(0, 1)[::8] + 1) / 2
    assert measuring.measure(0.9 * clip + 0.1 * 0.5, scene).overlap > 0.98


def test_what_is_drawn_badly_measures_so():
    scene = data.Scene("square", "blue", "pink", "up")
    clip = (data.render(scene, random.Random(4)).transpose(0, 1)[::8] + 1) / 2
    ideal = measuring.measure(clip, scene)
    other = data.Scene("triangle", "blue", "pink", "up")
    assert measuring.measure(clip, other).overlap < 0.85
    soft = F.avg_pool2d(F.pad(clip, (8, 8, 8, 8), mode="replicate"), 17, stride=1)
    assert measuring.measure(soft, scene).overlap < 0.95 < ideal.overlap
    generator = torch.Generator().manual_seed(0)
    mottled = (clip + 0.02 * torch.randn(clip.shape, generator=generator)).clamp(0, 1)
    assert 0.01 < measuring.measure(mottled, scene).ground_spread < 0.03
    small = (data.render(scene, random.Random(4)).transpose(0, 1)[::8] + 1) / 2
    small[1] = F.interpolate(F.pad(small[1:2], (20, 20, 20, 20), mode="replicate"), clip.shape[-2:])[0]
    assert measuring.measure(small, scene).area_spread > 0.2 > ideal.area_spread
