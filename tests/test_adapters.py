"""LoRA files as trainers write them: the same weights under each name give the same video, and alpha counts."""

import itertools
import re

import pytest
import torch
from safetensors.torch import save_file

from cogvx_fast import FastCogVideoXPipeline
from tests import toy

MODULES = [
    "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.1.attn1.to_out.0",
    "transformer_blocks.2.ff.net.0.proj",
]
RANKS = dict(zip(MODULES, (2, 2, 3), strict=True))
HALVES = {
    "A": ("lora_A.weight", "lora_B.weight"),
    "default": ("lora_A.default.weight", "lora_B.default.weight"),
    "down": ("lora_down.weight", "lora_up.weight"),
    "dotted": ("lora.down.weight", "lora.up.weight"),
}
PREFIXES = ["transformer.", "", "diffusion_model.", "base_model.model.", "base_model.model.transformer.", "lora_unet__"]


def matrices():
    model, generator = toy.transformer(), torch.Generator().manual_seed(3)
    for name, rank in RANKS.items():
        out, inner = model.get_submodule(name).weight.shape
        yield name, torch.randn(rank, inner, generator=generator) / 4, torch.randn(out, rank, generator=generator) / 4


def file(prefix, halves, alphas=None):
    """Tensors by the names of one trainer."""
    tensors = {}
    for name, down, up in matrices():
        module = prefix + (name.replace(".", "_") if prefix == "lora_unet__" else name)
        tensors |= dict(zip((f"{module}.{half}" for half in HALVES[halves]), (down, up), strict=True))
        if alphas is not None and name in alphas:
            tensors[f"{module}.alpha"] = torch.tensor(float(alphas[name]))
    return tensors


def latents(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**toy.inputs(num_steps=2, output_type="latent")).frames


def fast():
    return FastCogVideoXPipeline(**toy.pipeline().components)


def merged(scales):
    """The same sums, made by hand: W + scale * B A."""
    reference = toy.pipeline()
    with torch.no_grad():
        for name, down, up in matrices():
            reference.transformer.get_submodule(name).weight += scales[name] * up @ down
    return latents(reference)


def assert_close(output, expected):
    assert (output - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize(("prefix", "halves"), list(itertools.product(PREFIXES, HALVES)))
def test_each_form_without_an_alpha_has_a_scale_of_one(prefix, halves, tmp_path):
    save_file(file(prefix, halves), tmp_path / "lora.safetensors")
    pipe, plain = fast(), latents(fast())
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="one")
    output = latents(pipe)
    assert_close(output, merged(dict.fromkeys(MODULES, 1.0)))
    assert (output - plain).norm() / plain.norm() > 1e-2
    assert pipe.get_list_adapters() == {"transformer": ["one"]}
    pipe.unload_lora_weights()
    assert_close(latents(pipe), plain)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "alphas",
    [dict.fromkeys(MODULES, 1), dict(zip(MODULES, (1, 3, 6), strict=True)), {MODULES[0]: 5}],
    ids=["same", "each its own", "one alone"],
)
def test_alpha_is_the_scale_times_the_rank(prefix, alphas):
    pipe = fast()
    pipe.load_lora_weights(file(prefix, "down", alphas))
    assert_close(latents(pipe), merged({name: alphas.get(name, rank) / rank for name, rank in RANKS.items()}))


def test_two_adapters_of_two_forms_side_by_side():
    pipe = fast()
    pipe.load_lora_weights(file("lora_unet__", "down", dict.fromkeys(MODULES, 1)), adapter_name="kohya")
    pipe.load_lora_weights(file("", "A"), adapter_name="peft")
    pipe.set_adapters(["kohya", "peft"], [0.5, 0.25])
    assert_close(latents(pipe), merged({name: 0.5 / rank + 0.25 for name, rank in RANKS.items()}))


def with_key(key, shape=(2, 64)):
    return file("", "A") | {key: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "the LoRA file is empty"),
        (with_key("lora_te_encoder_block_0.lora_down.weight"), "of a text encoder; only the transformer"),
        (with_key("text_encoder.a.lora_A.weight"), "of a text encoder; only the transformer"),
        (
            with_key("model.diffusion_model.transformer.layers.0.attention.query_key_value.matrix_A.0"),
            "export_sat_lora",
        ),
        (with_key("transformer_blocks.0.attn1.to_q.diff"), "which is none of a pair of matrices"),
        (with_key("transformer_blocks.9.attn1.to_q.lora_A.weight"), "'transformer_blocks.9.attn1.to_q.lora_A.weight'"),
        (with_key("lora_unet__no_such_module.lora_down.weight"), "which is none of a pair of matrices"),
        (
            with_key("transformer_blocks.1.attn1.to_q.lora_A.weight"),
            "has lora_A of transformer_blocks.1.attn1.to_q alone",
        ),
        (
            with_key("transformer_blocks.1.attn1.to_q.alpha", ()),
            "has an alpha for transformer_blocks.1.attn1.to_q and no",
        ),
        (file("", "A") | {f"{MODULES[0]}.lora_B.weight": torch.zeros(64, 5)}, "matrices of ranks 2 and 5"),
        (file("", "A") | {f"{MODULES[0]}.alpha": torch.ones(2)}, "alpha' of shape (2,); must be one number"),
        (file("", "A") | {f"{MODULES[0]}.lora_A.weight": torch.zeros(())}, "has lora_A of shape () for"),
        (
            file("transformer.", "A") | {f"transformer.{MODULES[0]}.lora_A.weight": torch.zeros(2, 5)},
            f"has lora_A of shape (2, 5) for {MODULES[0]}; must be (rank, 64): it is for another model",
        ),
        (
            file("lora_unet__", "A") | {f"{MODULES[0]}.lora_B.weight": torch.zeros(7, 2)},
            f"has lora_B of shape (7, 2) for {MODULES[0]}; must be (64, rank): it is for another model",
        ),
        ({f"transformer.{MODULES[0]}.lora_A.weight": torch.zeros(2, 64)}, f"has lora_A of {MODULES[0]} alone"),
        (
            {
                "transformer.blocks.0.lora_A.weight": torch.zeros(2, 4),
                "transformer.blocks.0.lora_B.weight": torch.zeros(4, 2),
            },
            "'transformer.blocks.0.lora_A.weight', which is none",
        ),
    ],
)
def test_what_cannot_be_mapped_is_refused_and_nothing_is_loaded(tensors, message):
    pipe = fast()
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe.load_lora_weights(tensors)
    assert pipe.get_list_adapters() == {}
