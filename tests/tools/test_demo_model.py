"""The demo model's data, sentences, tokenizer and the reader that scores it."""

import random

import pytest
import torch

from tools.demo_model import data, reading, text


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
