"""What is taken of an answer, and where one that is too long is cut."""

import pytest

from cogvx_fast.enhance import answers


@pytest.mark.parametrize(
    ("answer", "taken"),
    [
        ("A cat sits.", "A cat sits."),
        ('"A cat sits."', "A cat sits."),
        ("“A cat sits.”", "A cat sits."),
        ('**Caption:** "A cat\'s toy."', "A cat's toy."),
        ("'It's a cat.'", "It's a cat."),
        ("Sure! Here's the enhanced prompt for you:\n\n> A cat sits.\n> It leaps.", "A cat sits. It leaps."),
        ("Here you go: A cat.", "A cat."),
        ("<think>The user wants\n\na cat.</think>\n\nA cat.", "A cat."),
        ("<think>and on and on", ""),
        ("```text\nA cat.\n```", "A cat."),
        ("# Caption\n\nA *red* cat, a __blue__ dog. (98 words)", "A red cat, a blue dog."),
        ("# A cat", "A cat"),
        ("- A cat.\n- It leaps.", "A cat. It leaps."),
        ("1. A cat.\n2. It leaps.", "A cat. It leaps."),
        ("A\u200bcat\x1b[31m\tsits\ud800.", "A cat [31m sits."),
        ("  \n", ""),
        ('""', ""),
    ],
)
def test_what_is_around_the_caption_goes(answer, taken):
    assert answers.cleaned(answer) == taken


@pytest.mark.parametrize(
    "caption",
    [
        'A sign says "open" and another "closed"',
        '"Open" says a sign, and another "closed"',
        "Here are three kittens: one black, two white.",
        "A sign: 12 words on a wall (red), 5 * 3 on another.",
        "A description of nothing, in 3 words.",
        "A man of 1.90 m walks. He stops.",
    ],
)
def test_what_belongs_to_the_caption_stays(caption):
    assert answers.cleaned(caption) == caption


@pytest.mark.parametrize(
    ("text", "most", "kept"),
    [
        ("One is. Two are. Three", 100, "One is. Two are."),
        ("One is. Two are. Three", 16, "One is. Two are."),
        ("One is. Two are. Three", 15, "One is."),
        ("One is 1.5 m. Two", 12, "One is 1.5"),
        ('He says "no!" She goes.', 14, 'He says "no!"'),
        ("One two three four.", 10, "One two"),
        ("一。二。三", 4, "一。二。"),
        ("Onetwothree", 4, ""),
    ],
)
def test_the_cut_is_at_the_end_of_a_sentence_else_of_a_word(text, most, kept):
    assert answers.cut(text, lambda part: len(part) <= most) == kept
