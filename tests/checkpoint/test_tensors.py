"""Files that do not hold what the configuration makes are refused before a weight is read, and named."""

import json
import re
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvx_fast import FastCogVideoXPipeline
from cogvx_fast.checkpoint import CheckpointError, stored_dtype, stored_tensors
from cogvx_fast.checkpoint.tensors import STEMS, read_header
from tests import toy

NAMES = {"transformer": "proj_out.weight", "vae": "decoder.conv_in.conv.weight", "text_encoder": "shared.weight"}


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message):
        FastCogVideoXPipeline.from_pretrained(folder)


def weights(folder, part):
    return folder / part / f"{STEMS[part]}.safetensors"


@pytest.mark.parametrize("part", STEMS)
def test_the_header_says_what_the_file_holds(whole, part):
    stored, loaded = stored_tensors(whole, part), load_file(weights(whole, part))
    assert {name: one.shape for name, one in stored.items()} == {name: tuple(t.shape) for name, t in loaded.items()}
    assert {one.dtype for one in stored.values()} <= {"float16", "float32"} and stored_dtype(whole, part) == "float16"


@pytest.mark.parametrize("part", STEMS)
@pytest.mark.parametrize("fault", ["missing", "surplus", "misshapen", "integers"])
def test_a_tensor_that_the_model_does_not_have_so(folder, part, fault):
    path, name = weights(folder, part), NAMES[part]
    tensors = load_file(path)
    if fault == "missing":
        del tensors[name]
        message = rf"{part}: lacks the tensor {re.escape(name)}"
    elif fault == "surplus":
        tensors["another.weight"] = torch.zeros(2)
        message = rf"{part}: has the tensor another\.weight, for which its configuration has no place"
    elif fault == "misshapen":
        shape = "x".join(map(str, tensors[name].shape))
        tensors[name] = tensors[name][:1].clone()
        message = rf"{re.escape(name)} has shape 1x.*; must be {shape}"
    else:
        tensors[name] = tensors[name].to(torch.int8)
        message = rf"{re.escape(name)} is of I8; must be one of float64"
    save_file(tensors, path, {"format": "pt"})
    refused(folder, message)


@pytest.mark.parametrize("part", STEMS)
def test_a_file_that_was_cut_off_or_zeroed(folder, part):
    path = weights(folder, part)
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], "bytes instead of"),
        (whole + b"0", "bytes instead of"),
        (whole[:100], "is no safetensors file, or cut off"),
        (whole[:4], "is no safetensors file, or cut off"),
        (b"", "is no safetensors file, or cut off"),
        (bytes(len(whole)), "is no safetensors file"),
        (b"\xff" * len(whole), "is no safetensors file, or cut off"),
    ):
        path.write_bytes(content)
        refused(folder, rf"{re.escape(path.name)}: .*{message}")


@pytest.mark.parametrize(
    "entry",
    [
        3,
        {},
        {"dtype": "F16", "shape": [2], "data_offsets": [0, 3]},
        {"dtype": "F16", "shape": [2], "data_offsets": [0]},
        {"dtype": "F16", "shape": [-2], "data_offsets": [0, -4]},
        {"dtype": "F16", "shape": "2", "data_offsets": [0, 4]},
        {"dtype": ["F16"], "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F17", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F16", "shape": [10**40], "data_offsets": [0, 4]},
    ],
    ids=str,
)
def test_a_header_that_cannot_be(tmp_path, entry):
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    with pytest.raises(CheckpointError, match="describes 'a' in a way that cannot be"):
        read_header(path)


def sharded(folder, part="transformer"):
    toy.transformer().half().save_pretrained(folder / part, max_shard_size="40KB")
    weights(folder, part).unlink()
    return next((folder / part).glob("*.index.json"))


def test_shards(folder):
    index = sharded(folder)
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    assert FastCogVideoXPipeline.from_pretrained(folder, dtype=torch.float32).transformer is not None


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "has no weight_map"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        ({"a": 3}, "names the file 3; must be one beside it"),
        ({"a": "../vae/x.safetensors"}, "names the file '../vae/x.safetensors'; must be one beside it"),
        ({"a": "/etc/passwd"}, "must be one beside it"),
        ({"a": "none.safetensors"}, "names none.safetensors, which is not there"),
        ({"a": "x" * 300}, "x, which is not there"),
    ],
)
def test_an_index_that_cannot_be(folder, weight_map, message):
    index = sharded(folder)
    index.write_text(json.dumps({} if weight_map is None else {"weight_map": weight_map}))
    refused(folder, re.escape(message))


def test_a_shard_that_is_missing(folder):
    index = sharded(folder)
    next(index.parent.glob("*-00002-*.safetensors")).unlink()
    refused(folder, "-00002-of-.*, which is not there")


def test_pickles_are_not_loaded(folder):
    path = weights(folder, "transformer")
    path.rename(path.with_suffix(".bin"))
    refused(folder, r"has weights in diffusion_pytorch_model\.bin only; must be safetensors: .* can run any code")
    with pytest.raises(ValueError, match=r"use_safetensors=False: .*allowed: True"):
        FastCogVideoXPipeline.from_pretrained(folder, use_safetensors=False)


def test_files_of_a_variant(folder):
    for part in STEMS:
        path = weights(folder, part)
        path.rename(path.with_name(f"{STEMS[part]}.fp16.safetensors"))
    refused(folder, r"has no weights: neither diffusion_pytorch_model\.safetensors nor its index")
    assert FastCogVideoXPipeline.from_pretrained(folder, variant="fp16").transformer is not None


def test_either_name_of_a_tied_tensor_will_do(folder):
    path = weights(folder, "text_encoder")
    tensors = load_file(path)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, path, {"format": "pt"})
    both = FastCogVideoXPipeline.from_pretrained(folder, dtype=torch.float32).text_encoder
    assert torch.equal(both.shared.weight, both.encoder.embed_tokens.weight)


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_a_tokenizer_without_words(folder, name):
    for path in (folder / "tokenizer").glob("*"):
        if path.name in ("tokenizer.json", "spiece.model"):
            path.unlink()
    refused(folder, "has no tokenizer: neither")
    (folder / "tokenizer" / name).write_bytes(b"")
    refused(folder, f"{name}: is empty")


def test_a_tokenizer_of_special_tokens_alone(folder):
    from transformers import T5Tokenizer

    T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0).save_pretrained(
        folder / "tokenizer"
    )
    refused(folder, "its tokenizer is empty: every prompt would mean the same")


def test_a_tokenizer_that_knows_more_than_the_text_encoder(folder):
    tokenizer = toy.tokenizer()
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(folder / "tokenizer")
    refused(folder, "its tokenizer has 33 words, its text encoder 32")


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"version": 0}', b'{"decoder": 3}', b"null"])
def test_a_tokenizer_that_its_library_does_not_understand(folder, content):
    (folder / "tokenizer" / "tokenizer.json").write_bytes(content)
    with pytest.raises((ValueError, OSError)):
        FastCogVideoXPipeline.from_pretrained(folder)


@pytest.mark.parametrize("extra", [10**30, -1, "100", [], 1.5, None, True])
def test_a_tokenizer_that_would_make_words_without_end(changed, extra):
    refused(
        changed("tokenizer/tokenizer_config.json", extra_ids=extra), "has extra_ids=.*; must be a whole number of 0 to"
    )
