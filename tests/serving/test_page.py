"""The page in a real browser, with a real server of the demo model behind it."""

import contextlib
import importlib.util
import re
import time

import numpy as np
import openai
import pytest
from PIL import Image

from cogvx_fast.serving.keys import add_key
from cogvx_fast.video import write_video
from tests.serving.process import WAIT, Server
from tests.serving.visitor import PROMPT, Visitor
from tools.page_pictures import ARGUMENTS, find_chromium

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="needs Chromium, such as Debian's package `chromium`"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="needs the package playwright"),
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),
]

QUICK = {"width": 32, "height": 32, "num_frames": 9, "guidance_scale": 1, "num_inference_steps": 4}
# Of so many steps that it lasts until it is cancelled.
LONG = {**QUICK, "num_inference_steps": 1000}
REFUSED = "Failed to load resource: the server responded with a status of 400 (Bad Request)"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    add_key(folder / "keys", "nobody")
    started = Server(folder / "server", "--api-keys-file", str(folder / "keys"))
    started.keys = folder / "keys"
    yield started
    started.end()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=find_chromium(), args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def visitor(server, browser, request):
    someone = Visitor(server, browser, re.sub(r"\W", "-", request.node.name)[:60])
    yield someone
    for video_id in someone.videos():
        with contextlib.suppress(openai.NotFoundError):
            someone.client.videos.delete(video_id)
    someone.context.close()
    assert someone.errors == [], "the console stays empty"


def test_progress_and_cancelling(visitor):
    page = visitor.open()
    assert page.locator("#empty").is_visible() and not page.locator("#progress").is_visible()
    visitor.ask(num_inference_steps=1000)
    visitor.runs()
    seen, values = set(), []

    def watch():
        seen.add(visitor.text("#state"))
        values.append(page.evaluate("document.querySelector('#bar').value"))
        seen.update({"picture"} if page.locator("#picture").is_visible() else {})
        return len(seen) > 4 and "picture" in seen

    visitor.see(watch)
    assert values == sorted(values) and values[-1] > values[0], "the bar grows"
    assert any(re.fullmatch(r"Step \d+ of 1000 · about .+ left", state) for state in seen)
    assert page.evaluate("document.querySelector('#picture').naturalWidth") > 0
    page.click("#cancel")
    page.get_by_text("Cancelled.", exact=True).wait_for()
    assert not page.locator("#progress").is_visible() and not page.locator("#picture").is_visible()
    video = visitor.client.videos.retrieve(visitor.shown())
    assert (video.status, video.error.code) == ("failed", "cancelled")


def test_from_a_sentence_to_files(visitor):
    page = visitor.open()
    page.click(f"#examples >> text={PROMPT}")
    assert page.input_value("#prompt") == PROMPT
    visitor.ask(num_inference_steps=4, seed=7)
    visitor.plays()
    assert page.evaluate("document.querySelector('#video').videoWidth") == 128
    assert visitor.text("#caption") == PROMPT and "seed 7" in visitor.text("#facts")
    assert visitor.text("#news") == "The video is ready and plays."
    video_id = visitor.shown()
    assert visitor.videos() == [video_id]
    for label, variant in (("MP4", "video"), ("GIF", "gif"), ("WebP", "webp")):
        with page.expect_download() as downloading:
            page.click(f"#downloads >> text={label}")
        file = downloading.value
        assert file.suggested_filename == f"a-red-circle-moves-right-on-a-white-background-7.{label.lower()}"
        expected = visitor.client.videos.download_content(video_id, variant=variant).read()
        with open(file.path(), "rb") as downloaded:
            assert downloaded.read() == expected


def test_one_that_is_being_made_is_found_again(visitor):
    visitor.open()
    visitor.ask(**LONG)
    visitor.runs()
    video_id, before = visitor.shown(), visitor.client.videos.retrieve(visitor.shown()).steps_done
    visitor.page.reload()
    visitor.runs()
    assert visitor.shown() == video_id and visitor.text("#caption") == PROMPT
    assert int(re.match(r"Step (\d+)", visitor.text("#state"))[1]) >= before
    # In another window, which knows nothing of it, too.
    visitor.page = visitor.open(visitor.new_page())
    visitor.runs()
    assert visitor.text("#caption") == PROMPT


def test_a_cut_connection_is_taken_up_again(visitor):
    page, cuts = visitor.open(), []

    def cut(route):
        cuts.append(route)
        route.abort() if len(cuts) <= 2 else route.continue_()

    page.route("**/events", cut)
    visitor.ask(**LONG)
    visitor.see(lambda: visitor.text("#state").startswith("The connection is cut"))
    visitor.runs()
    assert len(cuts) == 3
    assert {error for error in visitor.errors if "ERR_FAILED" in error} == set(visitor.errors)
    visitor.errors.clear()


def test_remix_and_delete(visitor):
    page = visitor.open()
    visitor.ask(**QUICK, seed=3)
    visitor.plays()
    first = visitor.shown()
    page.click("#remix")
    assert visitor.text("#remixed") == PROMPT and page.input_value("#prompt") == PROMPT
    assert not page.locator("#settings").is_visible(), "a remix keeps them"
    page.fill("#prompt", "a blue square")
    page.click("#make")
    visitor.see(lambda: visitor.shown() != first)
    visitor.plays()
    second = visitor.client.videos.retrieve(visitor.shown())
    assert (second.prompt, second.remixed_from_video_id, second.seed) == ("a blue square", first, 3)
    assert page.locator("#settings").is_visible() and not page.locator("#remixing").is_visible()
    page.click("#remix")
    page.select_option("#origin", "video")
    page.fill("#strength", "0.5")
    page.click("#make")
    visitor.see(lambda: visitor.shown() != second.id)
    third = visitor.client.videos.poll(visitor.shown())
    assert (third.strength, third.remixed_from_video_id) == (0.5, second.id)
    assert page.locator(".card").count() == 3
    page.click("#delete")
    page.click("#confirm >> text=Keep it")
    assert len(visitor.videos()) == 3
    page.click("#delete")
    page.click("#confirm >> text=Delete >> nth=-1")
    visitor.see(lambda: visitor.shown() == second.id)
    assert visitor.videos() == [second.id, first] and page.locator(".card").count() == 2
    page.locator(".card").nth(1).click()
    visitor.plays()
    assert visitor.shown() == first


def test_a_video_to_start_from(visitor, tmp_path):
    frames = [Image.fromarray(np.full((32, 32, 3), 20 * number, np.uint8)) for number in range(9)]
    write_video(frames, tmp_path / "mine.mp4", 8)
    page = visitor.open()
    assert page.get_attribute("#input_reference", "accept") == "video/*"
    page.set_input_files("#input_reference", tmp_path / "mine.mp4")
    visitor.see("document.querySelector('#chosen-video').videoWidth === 32")
    page.fill("#strength", "0.5")
    assert visitor.text("#strength-says") == "50%"
    visitor.ask(**QUICK)
    visitor.plays()
    video = visitor.client.videos.retrieve(visitor.shown())
    assert (video.strength, video.steps_done) == (0.5, 2)
    page.click("#no-reference")
    assert not page.locator("#chosen").is_visible() and not page.locator("#strength-field").is_visible()


def test_a_wrong_key_and_the_right_one(visitor):
    page = visitor.page = visitor.new_page(with_key=False)
    page.goto(visitor.address)
    page.locator("#key-form").wait_for()
    assert not page.locator("#main").is_visible() and visitor.text("#key-error") == ""
    page.keyboard.type("cvx-wrong")
    page.keyboard.press("Enter")
    page.locator("#key-error", has_text="none of this server").wait_for()
    page.keyboard.type(visitor.key)
    page.keyboard.press("Enter")
    page.locator("#main").wait_for()
    visitor.ask(**QUICK)
    visitor.plays()
    page.reload()
    visitor.plays()
    page.click("#forget")
    page.locator("#key-form").wait_for()
    assert not page.locator("#main").is_visible() and page.locator(".card").count() == 0
    page.reload()
    page.locator("#key-form").wait_for()


def test_with_the_keyboard_alone(visitor):
    page = visitor.open()

    def tab_to(selector, most=40):
        for _ in range(most):
            page.keyboard.press("Tab")
            if page.evaluate(f"document.activeElement?.matches('{selector}')"):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline == "solid", f"{selector} shows that it has the focus"
                return
        raise AssertionError(f"{selector} is not reached")

    tab_to("#prompt")
    page.keyboard.type(PROMPT)
    tab_to("summary")
    page.keyboard.press("Enter")
    for name, value in (("width", "32"), ("height", "32"), ("num_inference_steps", "4")):
        tab_to(f"#{name}")
        page.keyboard.type(value)
    tab_to("#make")
    page.keyboard.press("Enter")
    visitor.plays()
    page.keyboard.press("Home")
    tab_to("#delete")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert len(visitor.videos()) == 1 and page.evaluate("document.activeElement.id") == "delete"
    tab_to("#prompt")
    page.keyboard.press("Control+a")
    page.keyboard.type("a blue star")
    page.keyboard.press("Control+Enter")
    visitor.see(lambda: len(visitor.videos()) == 2)
    visitor.plays()
    tab_to(".card")
    tab_to(".card")
    page.keyboard.press("Enter")
    visitor.see(lambda: visitor.text("#caption") == PROMPT)


def test_every_control_has_a_name(visitor):
    page = visitor.open()
    nameless = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea, button, video, progress, section')]"
        ".filter((control) => !(control.labels?.length || control.ariaLabel || control.getAttribute('aria-labelledby')"
        " || control.textContent.trim())).map((control) => control.id)"
    )
    assert set(nameless) <= {"video", "chosen-video"}, "which get the prompt as theirs, or are beside their field"


def test_errors_stand_at_their_fields(visitor):
    page = visitor.open()
    page.click("#make")
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert page.get_attribute("#prompt", "aria-invalid") == "true"
    visitor.ask(width=50)
    page.locator("#width-error").wait_for()
    assert "multiple of 16" in visitor.text("#width-error")
    assert page.get_attribute("#width", "aria-describedby") == "width-error"
    assert page.evaluate("document.activeElement.id") == "width" and not page.locator("#prompt-error").count()
    page.fill("#width", "32")
    page.fill("#seed", "-1")
    page.evaluate("document.querySelector('#settings').open = false")
    page.click("#make")
    page.locator("#seed-error").wait_for()
    assert page.locator("#seed").is_visible(), "what is closed opens"
    assert not visitor.videos()
    assert set(visitor.errors) == {REFUSED}, "which browsers say themselves"
    visitor.errors.clear()


def test_another_model_has_other_choices(visitor):
    page = visitor.page

    def two(route):
        answer = route.fetch()
        said = answer.json()
        other = {
            "id": "other",
            "width": 720,
            "height": 480,
            "fixed_size": True,
            "frame_choices": [49],
            "num_frames": 49,
        }
        pictures = {"kinds": ["image"], "required": True, "max_bytes": 1, "strength": 0.8}
        said["models"].append(said["models"][0] | other | {"reference": pictures})
        route.fulfill(response=answer, json=said)

    page.route("**/page/about", two)
    visitor.open()
    page.click("summary")
    page.select_option("#model", "other")
    assert page.input_value("#width") == "720" and page.get_attribute("#width", "readonly") is not None
    assert page.locator("#num_frames option").all_inner_texts() == ["6 s (49 frames)"]
    assert page.get_attribute("#input_reference", "accept") == "image/*"
    page.fill("#prompt", PROMPT)
    page.click("#make")
    page.locator("#model-error", has_text="is not served here").wait_for()
    assert visitor.errors == [REFUSED]
    visitor.errors.clear()


def test_a_model_that_starts_from_pictures_remixes_from_noise_alone(visitor):
    page = visitor.page

    def of_pictures(route):
        answer = route.fetch()
        said = answer.json()
        said["models"][0]["reference"]["kinds"] = ["image"]
        route.fulfill(response=answer, json=said)

    visitor.client.videos.create_and_poll(prompt=PROMPT, extra_body=QUICK)
    visitor.open()
    page.click("#remix")
    assert page.locator("#origin").is_visible()
    page.route("**/page/about", of_pictures)
    visitor.open()
    page.reload()
    page.click("#remix")
    page.locator("#remixing").wait_for()
    assert not page.locator("#origin").is_visible()


def test_words_are_never_markup(visitor):
    page = visitor.open()
    evil = "<img src=x onerror=\"document.title='hit'\"> <b>bold</b>"
    visitor.ask(evil, **QUICK)
    visitor.plays()
    assert visitor.text("#caption") == evil and visitor.text(".card .words").strip() == evil
    assert page.locator("#caption *").count() == 0 and page.title() != "hit"


def test_a_browser_without_h264_shows_the_animation(visitor):
    page = visitor.open()
    page.route("**/content?variant=video", lambda route: route.fulfill(body=b"no video", content_type="video/mp4"))
    visitor.ask(**QUICK)
    visitor.see("document.querySelector('#picture').naturalWidth === 32")
    assert page.locator("#picture").is_visible() and not page.locator("#video").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_380_pixels(visitor, scheme):
    page = visitor.page
    page.set_viewport_size({"width": 380, "height": 800})
    page.emulate_media(color_scheme=scheme)
    visitor.open()

    def fits():
        wide = "[...document.querySelectorAll('body *')].filter((part) => part.getBoundingClientRect().right > 380.5)"
        assert page.evaluate("document.documentElement.scrollWidth") == 380
        assert page.evaluate(f"{wide}.map((part) => part.id || part.className)") == []

    fits()
    visitor.ask("Donaudampfschifffahrtsgesellschaft" * 4, **LONG)
    visitor.runs()
    fits()
    page.click("#cancel")
    page.get_by_text("Cancelled.", exact=True).wait_for()
    visitor.ask(**QUICK)
    visitor.plays()
    assert page.evaluate("document.querySelector('#theatre').getBoundingClientRect().top") >= 0, "it is in view"
    fits()
    page.click("#remix")
    fits()
    channels = re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (int(channels[0]) < 60) == (scheme == "dark")


def test_past_ones_come_page_by_page(visitor):
    made = [visitor.client.videos.create(prompt=f"number {n}", extra_body=QUICK).id for n in range(14)]
    page = visitor.open()
    page.locator(".card").nth(11).wait_for()
    assert page.locator(".card").count() == 12
    page.click("#older")
    page.locator(".card").nth(13).wait_for()
    assert page.locator(".card .words").all_inner_texts() == [f"number {n}" for n in reversed(range(14))]
    assert not page.locator("#older").is_visible()
    end = time.monotonic() + WAIT
    while page.locator(".card img:visible").count() < 14:  # also those that nobody looks at get their pictures
        assert time.monotonic() < end
        page.wait_for_timeout(50)
    assert len(visitor.videos()) == len(made)
