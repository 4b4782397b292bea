"""CogVideoX-Fun InP: ours, plain and fast, beside the formulas written out."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from cogvx_fast import FastCogVideoXFunInpaintPipeline, accelerate
from cogvx_fast.fun import CogVideoXFunInpaintPipeline
from cogvx_fast.fun.positions import stretch
from cogvx_fast.resume import ResumableGeneration
from tests import toy

KINDS = {
    "2b": {},
    "5b": {"use_rotary_positional_embeddings": True},
    "1.5": {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False, "sample_width": 6},
}
FRAMES = {"2b": 9, "5b": 9, "1.5": 5}
HEIGHT, WIDTH = 32, 48  # not the toy's own, so that positions are stretched


def make(kind="2b", noisy=False, scheduler=None):
    pipe = CogVideoXFunInpaintPipeline(
        tokenizer=toy.tokenizer(),
        text_encoder=toy.text_encoder(),
        vae=toy.vae(),
        transformer=toy.transformer("2b", in_channels=33, **KINDS[kind]),
        scheduler=scheduler or toy.scheduler(),
    )
    if noisy:
        pipe.transformer.register_to_config(add_noise_in_inpaint_model=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed, size=(WIDTH, HEIGHT)):
    pixels = torch.randint(0, 255, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy())


def call(kind="2b", **given):
    arguments = toy.inputs(height=HEIGHT, width=WIDTH, num_frames=FRAMES[kind], output_type="latent")
    return arguments | {"generator": torch.Generator().manual_seed(0)} | given


def as_pixels(image):
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(HEIGHT, WIDTH, 3).permute(2, 0, 1) / 127.5
        - 1
    )


@torch.no_grad()
def by_hand(pipe, pixels, unknown, arguments, sigma=None):
    """What the pipeline is to make, from the published formulas alone, with diffusers' models.

    Args:
        pixels, unknown: `(1, 3, frames, height, width)`, known where `(1, 1, frames, height, width)` is 0; or None.
    """
    frames, steps, scale = arguments["num_frames"], arguments["num_inference_steps"], arguments["guidance_scale"]
    generator = torch.Generator().manual_seed(0)
    shape = 1, (frames - 1) // 4 + 1, 16, HEIGHT // 8, WIDTH // 8
    if sigma is not None:
        drawn = sigma * torch.randn(pixels.shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    if pixels is None:
        beside = torch.zeros(1, shape[1], 17, *shape[3:])
    else:
        masked = torch.where(unknown.bool(), -1.0, pixels)
        if sigma is not None:
            drawn[masked == -1] = 0
            masked = masked + drawn
        factor = pipe.vae.config.scaling_factor
        latents = pipe.vae.encode(masked).latent_dist.mode() * factor
        known, size = 1 - unknown, shape[3:]
        first = torch.nn.functional.interpolate(known[:, :, 0], size=size, mode="bilinear")[:, :, None]
        rest = torch.nn.functional.interpolate(known[:, :, 1:], size=(shape[1] - 1, *size), mode="trilinear")
        beside = torch.cat([torch.cat([first, rest], dim=2) * factor, latents], dim=1).transpose(1, 2)
    text = [pipe._get_t5_prompt_embeds(words, max_sequence_length=toy.TEXT_LENGTH) for words in ("", "a cat")]
    transformer = pipe.transformer
    rotary = None
    if transformer.config.use_rotary_positional_embeddings:
        rotary = pipe._prepare_rotary_positional_embeddings(HEIGHT, WIDTH, shape[1], "cpu")
    pipe.scheduler.set_timesteps(steps)
    latents = noise
    for t in pipe.scheduler.timesteps:
        both = torch.cat([torch.cat([latents, beside], dim=2)] * 2)
        out = transformer(both, torch.cat(text), t.expand(2), image_rotary_emb=rotary, return_dict=False)[0]
        guided = out[:1] + scale * (out[1:] - out[:1])
        latents = pipe.scheduler.step(guided, t, latents, return_dict=False)[0]
    return latents


@pytest.fixture
def stretched_table(monkeypatch):
    """diffusers' transformer with Fun's positions, its table stretched by another formula than ours."""

    def of(transformer):
        embed = transformer.patch_embed

        def positions(height, width, frames, device=None):
            time, rows, columns = 3, embed.sample_height // 2, embed.sample_width // 2
            table = embed.pos_embedding[0, toy.TEXT_LENGTH :].reshape(time, rows, columns, -1)
            found = torch.stack([_bilinear(frame, height // 2, width // 2) for frame in table])
            found = found[: (frames - 1) // 4 + 1].flatten(0, 2)[None]
            return torch.cat([embed.pos_embedding[:, : toy.TEXT_LENGTH], found], dim=1)

        monkeypatch.setattr(embed, "_get_positional_embeddings", positions)
        return transformer

    return of


def _bilinear(frame, rows, columns):
    """Of `(h, w, dim)`, half-pixel centres, edges repeated: for each place by hand."""
    height, width, _ = frame.shape
    out = torch.empty(rows, columns, frame.shape[-1])
    for r in range(rows):
        for c in range(columns):
            y = min(max((r + 0.5) * height / rows - 0.5, 0), height - 1)
            x = min(max((c + 0.5) * width / columns - 0.5, 0), width - 1)
            y0, x0 = math.floor(y), math.floor(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            top = frame[y0, x0] * (1 - x + x0) + frame[y0, x1] * (x - x0)
            bottom = frame[y1, x0] * (1 - x + x0) + frame[y1, x1] * (x - x0)
            out[r, c] = top * (1 - y + y0) + bottom * (y - y0)
    return out


def known_frames(frames, first=(), last=()):
    pixels, unknown = torch.zeros(1, 3, frames, HEIGHT, WIDTH), torch.ones(1, 1, frames, HEIGHT, WIDTH)
    for place, image in [*enumerate(first), *enumerate(last, frames - len(last))]:
        pixels[0, :, place], unknown[:, :, place] = as_pixels(image), 0
    return pixels, unknown


def assert_near(made, expected, most=2e-5):
    assert made.shape == expected.shape
    assert (made - expected).norm() / expected.norm() < most


CASES = {
    "first": {"image": picture(1)},
    "last": {"last_image": picture(2)},
    "both": {"image": picture(1), "last_image": picture(2)},
    "several": {"image": [picture(1), picture(3)], "last_image": [picture(4), picture(2)]},
    "none": {},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_first_and_last_frames_are_the_formulas(kind, case, stretched_table):
    pipe, given = make(kind), CASES[case]
    arguments = call(kind)
    made = {"plain": pipe(**arguments, **given).frames, "fast": accelerate(pipe)(**call(kind), **given).frames}
    listed = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    known = known_frames(FRAMES[kind], listed.get("image", ()), listed.get("last_image", ())) if given else (None, None)
    pipe = make(kind)
    if kind == "2b":
        stretched_table(pipe.transformer)
    expected = by_hand(pipe, *known, arguments)
    for latents in made.values():
        assert_near(latents, expected)


def test_a_video_and_its_mask_are_the_formulas(stretched_table):
    pipe, frames = make(), 9
    video = [picture(seed) for seed in range(frames)]
    unknown = (torch.rand(1, 1, frames, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3)) > 0.4).float()
    mask = [Image.fromarray((frame * 255).byte().numpy()) for frame in unknown[0, 0]]
    given = {"video": video, "mask_video": mask, "num_frames": None}
    made = accelerate(pipe)(**call(**given)).frames
    pixels = torch.stack([as_pixels(image) for image in video], dim=1)[None]
    pipe = make()
    stretched_table(pipe.transformer)
    assert_near(made, by_hand(pipe, pixels, unknown, call()))


def test_a_mask_that_is_all_white_is_text_alone():
    pipe = accelerate(make("5b"))
    video, mask = [picture(1)] * 9, [Image.new("L", (WIDTH, HEIGHT), 255)] * 9
    made = pipe(**call("5b", video=video, mask_video=mask, num_frames=None)).frames
    assert torch.equal(made, pipe(**call("5b")).frames)


def test_noise_on_known_pixels_comes_from_the_generator_before_that_of_the_video():
    pipe, given = make("5b", noisy=True), {"image": picture(1)}
    made = accelerate(pipe)(**call("5b", noise_aug_strength=0.1), **given).frames
    expected = by_hand(make("5b"), *known_frames(9, [picture(1)]), call("5b"), sigma=0.1)
    assert_near(made, expected)
    without = accelerate(pipe)(**call("5b", noise_aug_strength=0.0), **given).frames
    assert_near(without, by_hand(make("5b"), *known_frames(9, [picture(1)]), call("5b")))
    assert not torch.equal(made, without)


def test_a_batch_is_each_alone():
    pipe, given = accelerate(make("5b", noisy=True)), {"image": picture(1), "last_image": picture(2)}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 7)]
    both = pipe(**call("5b", prompt=["a cat", "a dog"], generator=generators), **given).frames
    for number, (prompt, seed) in enumerate((("a cat", 0), ("a dog", 7))):
        alone = pipe(**call("5b", prompt=prompt, generator=torch.Generator().manual_seed(seed)), **given).frames
        assert_near(both[number : number + 1], alone)


def test_runs_with_the_scheduler_that_fun_is_shown_with():
    kept = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
    }
    scheduler = DDIMScheduler(**kept, clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    pipe, given = make("5b", scheduler=scheduler), {"image": picture(1)}
    made = accelerate(pipe)(**call("5b"), **given).frames
    assert_near(made, by_hand(make("5b", scheduler=scheduler), *known_frames(9, [picture(1)]), call("5b")))


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_frames_come_out_as_were_asked_for(kind):
    frames = accelerate(make(kind))(**call(kind, output_type="np"), image=picture(1)).frames
    assert frames.shape == (1, FRAMES[kind], HEIGHT, WIDTH, 3)


def test_pictures_of_any_kind_are_stretched():
    large = picture(5, (160, 90)).convert("RGBA")
    small = large.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    pipe = accelerate(make("5b"))
    assert torch.equal(pipe(**call("5b"), image=large).frames, pipe(**call("5b"), image=small).frames)


@pytest.mark.parametrize("tier", ["exact", "balanced"])
def test_every_tier_runs_it(tier):
    pipe = make("5b")
    expected = pipe(**call("5b"), image=picture(1)).frames
    made = accelerate(pipe, engine=tier)(**call("5b"), image=picture(1)).frames
    assert_near(made, expected, {"exact": 2e-5, "balanced": 0.2}[tier])


def test_other_pipelines_of_the_same_weights_keep_diffusers_positions():
    pipe = make()
    latents, text = torch.randn(1, 3, 33, 4, 6), torch.randn(1, toy.TEXT_LENGTH, toy.TEXT_DIM)
    with torch.no_grad():
        before = pipe.transformer(latents, text, torch.tensor([500]), return_dict=False)[0]
        pipe(**call(), image=picture(1))
        after = pipe.transformer(latents, text, torch.tensor([500]), return_dict=False)[0]
    assert torch.equal(before, after)


def test_at_the_tables_own_size_stretching_changes_nothing():
    embed = toy.transformer("2b", in_channels=33).patch_embed
    assert torch.equal(stretch(embed, 3, 2, 2), embed.pos_embedding)
    with pytest.raises(ValueError, match=r"num_frames=17 is more than .* at most 9"):
        stretch(embed, 5, 2, 2)


def test_saves_and_loads(tmp_path):
    pipe, given = make("5b", noisy=True), {"image": picture(1)}
    expected = pipe(**call("5b"), **given).frames
    accelerate(pipe).save_pretrained(tmp_path)
    again = FastCogVideoXFunInpaintPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    assert again.transformer.config.add_noise_in_inpaint_model
    assert_near(again(**call("5b"), **given).frames, expected)


WRONG = {
    "video": ({"video": [picture(1)] * 9}, "video is given without mask_video"),
    "mask": ({"mask_video": [picture(1)] * 9}, "mask_video is given without video"),
    "all": (
        {"image": picture(1), "video": [picture(1)] * 9, "mask_video": [picture(1)] * 9},
        "cannot be given with video",
    ),
    "lengths": (
        {"video": [picture(1)] * 9, "mask_video": [picture(1)] * 5, "num_frames": None},
        "mask_video has 5 frames",
    ),
    "frames": ({"num_frames": 12}, r"num_frames=12 must be 8N \+ 1"),
    "size": ({"height": 40}, "height=40 must be a multiple of 16"),
    "kind": ({"image": "cat.png"}, "image must be a PIL.Image.Image"),
    "many": ({"image": [picture(1)] * 6, "last_image": [picture(1)] * 4}, "more than num_frames=9"),
    "several": ({"num_videos_per_prompt": 2}, "must be 1; give a list of prompts"),
    "noise": ({"noise_aug_strength": -1.0}, "noise_aug_strength=-1.0 must be 0 to 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_together_is_refused_in_words(case):
    given, words = WRONG[case]
    with pytest.raises(ValueError, match=words):
        accelerate(make())(**call(**given))


def test_the_other_pipelines_name_it():
    with pytest.raises(ValueError, match="FastCogVideoXFunInpaintPipeline takes it"):
        accelerate(toy_control())(
            control_video=[picture(1)] * 9, **toy.inputs(height=HEIGHT, width=WIDTH) | {"num_frames": None}
        )


def toy_control():
    from diffusers import CogVideoXFunControlPipeline

    return CogVideoXFunControlPipeline(**make().components)


@pytest.mark.parametrize("case", ["image", "video"])
def test_a_parked_generation_goes_on_to_the_same_bits(case):
    pipe = accelerate(make("5b", noisy=True))
    known = {"image": {"image": picture(1)}}.get(case) or {
        "video": [picture(seed) for seed in range(9)],
        "mask_video": [Image.new("L", (WIDTH, HEIGHT), 255 * (place > 2)) for place in range(9)],
        "num_frames": None,
    }
    given = {name: value for name, value in call("5b", **known).items() if name not in ("generator", "output_type")}
    parked = ResumableGeneration(pipe, [0], given)
    assert parked.run(lambda step: step.done == 1) is None
    again = ResumableGeneration(pipe, [0], given, parked=parked.parked)
    assert torch.equal(again.run(), pipe(**call("5b", **known)).frames)
