"""Whole generations of several processes: within the budget of one, and the same bits at all of them."""

import numpy as np
import pytest

from . import jobs

pytestmark = pytest.mark.slow

SPLITS = {
    2: [{"guidance": 2}, {"ulysses": 2}, {"ring": 2}],
    3: [{"ulysses": 3}, {"ring": 3}],
    4: [{"guidance": 2, "ulysses": 2}, {"guidance": 2, "ring": 2}, {"ulysses": 2, "ring": 2}, {"ring": 4}, "auto"],
}
# Of diffusers' own error at that precision, which is what the exact tier may have.
BUDGET = 1.1
DEGREES = "ulysses_degree", "ring_degree"  # of diffusers' `ContextParallelConfig`
VIDEOS = 4  # of one clip alone the error scatters by several per cent


def error(made, exact):
    return float(np.sqrt(np.mean((made.astype(np.float64) - exact) ** 2)))


def check(processes, number, config, variant, exact, budget, **options):
    made = processes.run(number, jobs.clip, config, variant, **options)
    frames, whole, fast = made[0]
    assert error(frames, exact) <= budget, (number, config)
    assert all((other == frames).all() for other, _, _ in made), (number, config)
    assert not whole and fast == 3
    return frames


@pytest.mark.parametrize("variant", ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v", "fun"])
def test_every_variant_is_split_in_every_way(processes, variant):
    (exact,) = processes.run(1, jobs.reference, variant, videos=VIDEOS)
    (single,) = processes.run(1, jobs.reference, variant, dtype="float32", videos=VIDEOS)
    budget = BUDGET * error(single, exact)
    for number, configs in SPLITS.items():
        for config in configs:
            check(processes, number, config, variant, exact, budget, videos=VIDEOS)


def test_sizes_that_do_not_divide(processes):
    """16 of text and 3 x 3 x 1 of video are 25 rows; 3 rows of patches are 6 of latents."""
    size = {"height": 48, "width": 16, "noise": (6, 2)}
    (exact,) = processes.run(1, jobs.reference, **size)
    (single,) = processes.run(1, jobs.reference, dtype="float32", **size)
    for number, config in ((2, {"ulysses": 2}), (3, {"ring": 3}), (4, {"ulysses": 2, "ring": 2}), (4, {"ring": 4})):
        check(processes, number, config, "2b", exact, BUDGET * error(single, exact), **size)


def test_without_guidance(processes):
    (exact,) = processes.run(1, jobs.reference, guidance_scale=1.0)
    (single,) = processes.run(1, jobs.reference, dtype="float32", guidance_scale=1.0)
    budget = BUDGET * error(single, exact)
    for number, config in ((2, "auto"), (4, "auto"), (3, {"ulysses": 3})):
        check(processes, number, config, "2b", exact, budget, guidance_scale=1.0)
    # Halves that are not there: each process computes the whole, and it is said.
    (frames, whole, _), (other, _, _) = processes.run(2, jobs.clip, {"guidance": 2}, guidance_scale=1.0)
    assert error(frames, exact) <= budget and (frames == other).all()
    assert whole == {"batch": "a step's 1 samples are no multiple of 2"}


def test_frames_of_all_pipelines(processes):
    """Decoded, and where there is a picture or a video encoded, in bands."""
    for variant, number in (("2b", 2), ("5b-i2v", 3), ("fun", 4), ("1.5-5b", 2)):
        asked = {"output_type": "pt", "videos": VIDEOS}
        (exact,) = processes.run(1, jobs.reference, variant, **asked)
        (single,) = processes.run(1, jobs.reference, variant, dtype="float32", **asked)
        check(processes, number, "auto", variant, exact, BUDGET * error(single, exact), **asked)


def test_a_payload_in_8_bits(processes):
    (exact,) = processes.run(1, jobs.reference, "5b")
    spread = float(exact.std())
    made = processes.run(2, jobs.clip, {"ulysses": 2, "payload": "int8"}, "5b", changes={"recipe": "native"})
    distance = error(made[0][0], exact) / spread
    assert 1e-4 < distance < 0.05  # it is what travels, and near
    assert (made[0][0] == made[1][0]).all()


def test_rows_in_8_bits():
    assert jobs.in_8_bits((5, 3, 7, 64)) <= 0.5 / 127 * 1.0001


def test_blocks_are_compiled(processes):
    """As one graph each, collectives and all."""
    (alone,) = processes.run(1, jobs.clip, None)
    made = processes.run(2, jobs.clip, {"ulysses": 2}, changes={"compile": "blocks"})
    assert np.abs(made[0][0] - alone[0]).max() < 1e-4 and (made[0][0] == made[1][0]).all()


def test_a_hooked_block_sees_all_rows(processes):
    """It may do something with them: each process computes the whole stream, and it is said."""
    (alone,) = processes.run(1, jobs.clip, None)
    for number, config in ((2, {"ulysses": 2}), (4, {"guidance": 2, "ulysses": 2})):
        made = processes.run(number, jobs.hooked_clip, config)
        frames, whole, rows = made[0]
        assert list(whole) == (["batch", "stream"] if "guidance" in config else ["stream"])
        assert all("block 1" in reason for reason in whole.values())
        assert rows == [28] * 3 and np.abs(frames - alone[0]).max() < 1e-4


def test_the_call_of_diffusers(processes):
    """`transformer.enable_parallelism` splits the stream alone."""
    (alone,) = processes.run(1, jobs.clip, None)
    for number, degrees in ((2, {"ulysses_degree": 2}), (3, {"ring_degree": 3}), (4, dict.fromkeys(DEGREES, 2))):
        made = processes.run(number, jobs.clip_by_diffusers, degrees)
        assert np.abs(made[0][0] - alone[0]).max() < 1e-4 and all((other == made[0][0]).all() for other, _ in made)
        assert made[0][1].startswith(f"{number} processes: ")
    said = processes.run(2, jobs.refusals_of_diffusers)
    assert said[0] == ["RuntimeError", "ValueError", "NotImplementedError", "ValueError"]


def test_what_a_callback_and_a_preview_see_is_the_whole(processes):
    seen = processes.run(2, jobs.watched_clip, {"ulysses": 2})
    assert seen[0] == seen[1] and seen[0][:3] == [(1, 3, 16, 4, 4)] * 3


def test_two_clips_at_once(processes):
    """Their samples are the parts of a batch without guidance."""
    made = processes.run(2, jobs.clip, {"guidance": 2}, guidance_scale=1.0, videos=2)
    (two,) = processes.run(1, jobs.clip, None, guidance_scale=1.0, videos=2)
    assert made[0][0].shape[0] == 2
    assert np.abs(made[0][0] - two[0]).max() < 1e-4 and not made[0][1]


def test_weights_that_come_when_they_run(processes):
    """Blocks are called then, by what brings the weights, each with its own rows."""
    (alone,) = processes.run(1, jobs.clip, None)
    for number, config in ((2, {"ulysses": 2}), (4, {"guidance": 2, "ulysses": 2})):
        made = processes.run(number, jobs.clip_with_weights_elsewhere, config, "offload")
        assert np.abs(made[0][0] - alone[0]).max() < 1e-4 and (made[0][0] == made[1][0]).all() and not made[0][1]


def test_diffusers_cache_sees_the_whole(processes):
    ((alone, _),) = processes.run(1, jobs.clip_with_a_cache, None)
    made = processes.run(4, jobs.clip_with_a_cache, {"guidance": 2, "ulysses": 2})
    assert (made[0][0] == alone).all() and (made[3][0] == alone).all()
    assert all("cache is enabled" in made[0][1][part] for part in ("batch", "stream"))


def test_turbo(processes, tmp_path):
    path = tmp_path / "schedule.json"
    ((alone, computed),) = processes.run(1, jobs.turbo_clip, None, path)
    made = processes.run(2, jobs.turbo_clip, {"guidance": 2}, path)
    assert computed == made[0][1] < 10
    assert np.abs(made[0][0] - alone).max() < 1e-4 and (made[0][0] == made[1][0]).all()


def test_int8_products(processes):
    """Each row has its own scale, so that to share rows out changes nothing but rounding."""
    ((alone, _),) = processes.run(1, jobs.int8_clip, None)
    made = processes.run(2, jobs.int8_clip, {"ulysses": 2})
    spread = float(np.abs(alone).std())
    assert error(made[0][0], alone) < 0.01 * spread and (made[0][0] == made[1][0]).all() and not made[0][1]


@pytest.mark.parametrize(
    ("number", "config"),
    [
        (2, {"guidance": 2}),
        (2, {"ulysses": 2}),
        (3, {"ulysses": 3, "vae": 1}),
        (3, {"ring": 3}),
        (4, {"guidance": 2, "ulysses": 2}),
        (4, {"ulysses": 2, "ring": 2, "vae": 1}),
    ],
)
def test_what_is_sent_is_what_the_formula_says(processes, number, config):
    found = processes.run(number, jobs.sent_in_a_step, config, "5b")
    formula = found[0][1]
    for place, name in enumerate(("rows", "ring", "gathered")):
        assert max(sent[name] for sent, _ in found) == formula[place], name


def test_weights_in_parts(processes):
    """Each rank holds a share of them, and the numbers are those of whole ones."""
    (alone,) = processes.run(1, jobs.clip, None)
    for number, config in ((2, {"guidance": 2}), (2, {"ulysses": 2}), (4, {"guidance": 2, "ulysses": 2})):
        made = processes.run(number, jobs.clip_with_parts_of_weights, config)
        assert np.abs(made[0][0] - alone[0]).max() < 1e-4 and (made[0][0] == made[1][0]).all() and not made[0][1]
        assert 0.9 / number < made[0][2] < 1.3 / number


def test_an_adapter(processes):
    ((alone, _),) = processes.run(1, jobs.clip_with_an_adapter, None)
    for number, config in ((2, {"ulysses": 2}), (4, {"guidance": 2, "ring": 2})):
        made = processes.run(number, jobs.clip_with_an_adapter, config)
        assert np.abs(made[0][0] - alone).max() < 1e-4 and (made[0][0] == made[1][0]).all() and not made[0][1]
