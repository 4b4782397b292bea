"""A language model that runs here: what it is told, that the answer alone comes back, and what is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cogvx_fast import machine
from cogvx_fast.enhance import LocalModel, Pictures, RefusedError, enhance, local

from .conftest import TEMPLATE, language_model

ASKED = [
    {"role": "system", "content": "Be plain."},
    {"role": "user", "content": "a cat"},
    {"role": "assistant", "content": "A cat sits."},
    {"role": "user", "content": "a dog"},
]
MADE = 8  # tokens of an answer


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(local, "_MOST", MADE)
    monkeypatch.setattr(machine, "cpu_bf16_units", lambda: None)


def continued(folder, text):
    """What the model itself says after a text, taking the likeliest letter each time."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer(text, return_tensors="pt").input_ids
    start = tokens.shape[1]
    for _ in range(MADE):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
        if tokens[0, -1] == 0:
            break
    return tokenizer.decode(tokens[0, start:], skip_special_tokens=True)


def test_the_answer_alone_comes_back(local_model):
    told = "<system>Be plain.<user>a cat<assistant>A cat sits.<user>a dog<assistant>"
    said = LocalModel(str(local_model)).write(ASKED)
    assert said == continued(local_model, told) and said and "cat" not in said
    assert LocalModel(str(local_model)).write(ASKED) == said, "the same each time"
    assert LocalModel(str(local_model)).write([*ASKED[:3], {"role": "user", "content": "owl"}]) != said


def test_a_model_without_a_part_for_the_system_gets_it_from_the_user(tmp_path):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    folder = language_model(tmp_path / "model", refuses)
    told = "<user>Be plain.\n\na cat<assistant>A cat sits.<user>a dog<assistant>"
    assert LocalModel(str(folder)).write(ASKED) == continued(folder, told)


def test_it_is_loaded_when_it_is_asked_and_gone_when_it_is_closed(local_model, monkeypatch):
    loads, load = [], AutoModelForCausalLM.from_pretrained

    def counted(*args, **kwargs):
        loads.append(kwargs)
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    model = LocalModel(str(local_model))
    assert loads == []
    said = model.write(ASKED)
    assert model.write(ASKED) == said and len(loads) == 1
    assert loads[0]["use_safetensors"] is True and loads[0]["trust_remote_code"] is False
    model.close()
    assert model._loaded is None and model.write(ASKED) == said and len(loads) == 2


def test_it_gets_the_text_alone(local_model, monkeypatch):
    monkeypatch.setattr(LocalModel, "write", lambda self, messages: messages[-1]["content"] + " sits.")
    from PIL import Image

    made = enhance("a cat", LocalModel(str(local_model)), pictures=Pictures(Image.new("RGB", (8, 8))))
    assert made.prompt == "a cat sits." and "sees no pictures" in made.notes[0]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nothing", "no such folder"),
        ("a/b/c", "no such folder"),
        ("file", "is a file"),
        ("empty", "has no config.json"),
    ],
)
def test_what_is_no_model_is_refused_at_once(source, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RefusedError, match=words):
        LocalModel(source)


def test_what_cannot_be_loaded_is_refused(tmp_path):
    plain = language_model(tmp_path / "plain", template=None)
    with pytest.raises(RefusedError, match="has no chat template"):
        LocalModel(str(plain)).write(ASKED)
    pickled = language_model(tmp_path / "pickled", safe=False)
    with pytest.raises(RefusedError, match=r"cannot be used \(.*safetensors"):
        LocalModel(str(pickled)).write(ASKED)
    (tmp_path / "plain" / "config.json").write_text("{")
    with pytest.raises(RefusedError, match="cannot be used"):
        LocalModel(str(plain)).write(ASKED)
