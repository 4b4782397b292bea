"""Damaged checkpoints: what comes out is the model's own video, or one sentence about what is wrong."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cogvx_fast import FastCogVideoXPipeline
from tests import toy

from .harness import count, examples, limited
from .values import JSON, WHOLE

# What a change of may be a model of its own, which no one can tell from what was meant.
FREE = ("scheduler/", "generation_config", "README", "tokenizer/")


def latents(pipe):
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        # A configuration that was changed may say another length, as any model may.
        length = pipe.transformer.config.max_text_seq_length
        text = pipe.encode_prompt("a cat", do_classifier_free_guidance=False, max_sequence_length=length)[0]
        noise = torch.randn(1, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
        step = pipe.transformer(noise, text, torch.tensor([500]), return_dict=False)[0]
        return torch.cat([step.flatten(), pipe.decode_latents(noise[:, :1]).flatten()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "toy"
    toy.pipeline().save_pretrained(folder)
    return folder, latents(FastCogVideoXPipeline.from_pretrained(folder, dtype=torch.float32))


def header_end(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@st.composite
def damages(draw):
    """How one file is damaged, and where, as a part of its length."""
    kind = draw(st.sampled_from(["cut", "zero", "flip", "remove", "insert", "json", "swap"]))
    return (
        kind,
        draw(st.floats(0, 1)),
        draw(st.integers(0, 255)),
        draw(st.one_of(WHOLE, JSON)),
        draw(st.integers(0, 99)),
    )


def apply(folder, path, damage):
    """Damages a file; says whether it may now be another model that nobody can tell from this one."""
    kind, place, byte, value, number = damage
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    if path.suffix == ".safetensors" and kind in ("zero", "flip"):
        at %= header_end(path)  # in the numbers themselves nothing is there to be seen
    if kind == "cut":
        path.write_bytes(content[:at])
    elif kind == "zero":
        path.write_bytes(content[:at] + bytes(min(16, len(content) - at)) + content[at + 16 :])
    elif kind == "flip" and content:
        content[min(at, len(content) - 1)] ^= byte
        path.write_bytes(content)
    elif kind == "remove":
        path.unlink()
    elif kind == "insert":
        path.write_bytes(content[:at] + bytes([byte]) + content[at:])
    elif kind == "swap":
        others = sorted(other for other in folder.rglob("*") if other.is_file() and other.suffix == path.suffix)
        shutil.copyfile(others[number % len(others)], folder / "other")
        (folder / "other").replace(path)
    elif path.suffix == ".json":
        loaded = json.loads(content)
        if isinstance(loaded, dict) and loaded:
            loaded[sorted(loaded)[number % len(loaded)]] = value
        path.write_text(json.dumps(loaded))


@examples(60)
@given(number=st.integers(0, 99), damage=damages())
def test_a_damaged_checkpoint(whole, number, damage):
    source, expected = whole
    with tempfile.TemporaryDirectory() as temporary, limited():
        folder = Path(shutil.copytree(source, Path(temporary) / "toy"))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        path = files[number % len(files)]
        name = str(path.relative_to(folder))
        apply(folder, path, damage)
        try:
            output = latents(FastCogVideoXPipeline.from_pretrained(folder, dtype=torch.float32))
        except (ValueError, OSError) as error:
            assert str(error).strip()
            count("damaged checkpoints", "clear error")
            return
        # What loads is the model, unless a configuration says another in words that can be.
        changes_meaning = damage[0] in ("json", "flip", "swap", "zero", "insert") and path.suffix == ".json"
        if not changes_meaning and not name.startswith(FREE):
            assert torch.equal(output, expected), f"another video, and not a word: {name}"
        count("damaged checkpoints", "done")
