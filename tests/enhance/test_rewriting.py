"""An enhanced prompt: what is asked, once more where it is too long or empty, and without pictures where it must be."""

import base64
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from cogvx_fast.enhance import Endpoint, Pictures, RefusedError, UnansweredError, enhance
from tests import toy

from .server import refuses_pictures, stand_in

SHORT = "A cat sits."  # 12 tokens of the toy's tokenizer: letters, and the end mark
LONG = "A cat sits. A dog runs to it."


def picture(colour, size=(640, 320)):
    return Image.new("RGB", size, colour)


def asked(server, prompt="cat", **options):
    return enhance(prompt, Endpoint("tiny", server.url, retries=0), **options)


def decoded(part):
    """The mean colour and the size of a picture in a message."""
    head, _, data = part["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(BytesIO(base64.b64decode(data))) as image:
        return np.asarray(image).mean((0, 1)), image.size


def test_the_answer_is_the_prompt():
    with stand_in(f'**Prompt:** "{LONG}"') as server:
        made = asked(server)
    assert (made.original, made.prompt, made.notes, made.saw_pictures) == ("cat", LONG, (), False)
    system, *example, user = server.asked[0]["messages"]
    assert system["role"] == "system" and user == {"role": "user", "content": "cat"}
    assert [message["role"] for message in example] == ["user", "assistant"]


@pytest.mark.parametrize(("max_tokens", "wanted"), [(226, "about 102 words, never more than 136"), (64, "about 29")])
def test_it_is_told_how_many_words_there_is_room_for(max_tokens, wanted):
    with stand_in(SHORT) as server:
        asked(server, max_tokens=max_tokens)
    assert wanted in server.asked[0]["messages"][0]["content"]


def test_what_fits_exactly_is_taken():
    tokenizer = toy.tokenizer()
    with stand_in(SHORT) as server:
        number = len(tokenizer(SHORT).input_ids)
        assert asked(server, tokenizer=tokenizer, max_tokens=number).notes == ()
        assert len(server.asked) == 1
        assert asked(server, tokenizer=tokenizer, max_tokens=number - 1).notes != ()


def test_one_that_is_too_long_is_asked_for_again():
    with stand_in(LONG, SHORT) as server:
        made = asked(server, tokenizer=toy.tokenizer(), max_tokens=16)
    assert made.prompt == SHORT and "this is a shorter one" in made.notes[0]
    assert server.asked[1]["messages"][:-2] == server.asked[0]["messages"]
    assert server.asked[1]["messages"][-2] == {"role": "assistant", "content": LONG}
    assert "too long" in server.said[1] and "6 words" in server.said[1]


@pytest.mark.parametrize("again", [LONG, "", (500, {"error": "out of breath"}), (400, {"error": "too much"})])
def test_one_that_stays_too_long_is_cut_at_the_end_of_a_sentence(again):
    with stand_in(LONG, again) as server:
        made = asked(server, tokenizer=toy.tokenizer(), max_tokens=16)
    assert made.prompt == SHORT and "was cut" in made.notes[0] and len(server.asked) == 2
    assert len(toy.tokenizer()(made.prompt).input_ids) <= 16


def test_an_empty_answer_is_asked_for_once_more():
    with stand_in("<think>what?</think>", SHORT) as server:
        assert asked(server).prompt == SHORT
    with stand_in("") as server, pytest.raises(UnansweredError, match="the answer is empty"):
        asked(server)
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("pictures", "colours", "words"),
    [
        (Pictures(picture("red")), ["red"], "is the first frame of the video. Begin with"),
        (Pictures(last_image=picture("blue")), ["blue"], "is the last frame of the video"),
        (Pictures(picture("red"), picture("blue")), ["red", "blue"], "are the first and the last frame"),
        (Pictures(video=[picture(c) for c in ("red", "lime", "blue", "white")]), ["red", "lime", "white"], "made anew"),
        (Pictures(video=[picture("red")]), ["red"], "made anew"),
    ],
)
def test_pictures_go_along_and_are_explained(pictures, colours, words):
    with stand_in(SHORT) as server:
        assert asked(server, pictures=pictures).saw_pictures
    system, user = server.asked[0]["messages"]
    assert words in system["content"] and user["content"][0] == {"type": "text", "text": "cat"}
    found = [decoded(part) for part in user["content"][1:]]
    assert [size for _, size in found] == [(512, 256)] * len(colours)
    for (mean, _), colour in zip(found, colours, strict=True):
        assert np.abs(mean - picture(colour).getpixel((0, 0))).max() < 3


@pytest.mark.parametrize("status", [400, 404, 413, 415, 422, 500])
def test_where_pictures_are_refused_it_is_asked_without(status):
    with stand_in(refuses_pictures(status)) as server:
        made = asked(server, pictures=Pictures(picture("red")))
    assert made.prompt == "A cat sits on a chair." and not made.saw_pictures
    assert "takes no pictures" in made.notes[0] and "this model takes no image input" in made.notes[0]
    assert server.said == ["cat", "cat"]


@pytest.mark.parametrize(
    ("status", "error", "times"),
    [(401, RefusedError, 1), (429, UnansweredError, 1), (404, RefusedError, 2), (500, UnansweredError, 2)],
)
def test_what_is_not_about_pictures_stays_an_error(status, error, times):
    with stand_in((status, {"error": {"message": "no"}})) as server, pytest.raises(error):
        asked(server, pictures=Pictures(picture("red")))
    assert len(server.asked) == times


def test_no_pictures_are_none():
    assert not Pictures() and Pictures(video=[picture("red")])
    with stand_in(SHORT) as server:
        assert not asked(server, pictures=Pictures()).saw_pictures
    assert server.said == ["cat"]
