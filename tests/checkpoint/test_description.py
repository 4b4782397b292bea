"""What a checkpoint's JSON files may say, and what is refused before anything is built of it."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from cogvx_fast import FastCogVideoXPipeline
from cogvx_fast.checkpoint import (
    CheckpointError,
    describe,
    folder_reader,
    read_json,
    stored_dtype,
    stored_tensors,
)
from cogvx_fast.checkpoint.check import check_scheduler
from cogvx_fast.checkpoint.description import check_config, check_vocabulary
from cogvx_fast.family import Variant

TRANSFORMER = "transformer/config.json"
FILES = ["model_index.json", TRANSFORMER, "text_encoder/config.json", "vae/config.json"]
FILES += ["scheduler/scheduler_config.json"]
SOME_USER = 65534


def described(folder):
    return describe(str(folder), folder_reader(folder))


def refused(folder, message):
    """Whoever asks is told the same: the description, and the pipeline before it loads."""
    for ask in (described, FastCogVideoXPipeline.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            ask(folder)


def test_a_good_one(folder):
    checkpoint, configs = described(folder)
    assert checkpoint.variant == Variant.of(configs["transformer"]) and checkpoint.pipeline_class == "CogVideoXPipeline"
    assert set(configs) == {"transformer", "text_encoder", "vae", "scheduler"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing(folder, name):
    (folder / name).unlink()
    refused(folder, rf"toy: has no {re.escape(name)}; must be a CogVideoX checkpoint")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[]", "it is not a JSON object"),
        (b"\xff\xfe{}", "it is not text in UTF-8"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "its JSON is nested too deep"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "Exceeds the limit"),
    ],
    ids=["empty", "cut", "list", "no utf-8", "deep", "digits"],
)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_broken(folder, name, content, message):
    (folder / name).write_bytes(content)
    refused(folder, f"toy: its {re.escape(name)} cannot be read .*{message}")


def test_a_file_that_may_not_be_read(folder, monkeypatch):
    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", denied)
    with pytest.raises(CheckpointError, match=r"its model_index\.json cannot be read \(Permission denied\)"):
        described(folder)


@pytest.mark.parametrize("name", [*FILES, "transformer/diffusion_pytorch_model.safetensors"])
def test_what_is_no_file_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}:? .*is no file"):
        FastCogVideoXPipeline.from_pretrained(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize(
    ("name", "ask"),
    [
        (".", described),
        (".", lambda folder: stored_tensors(folder, "transformer")),
        ("transformer", described),
        ("transformer", lambda folder: stored_tensors(folder, "transformer")),
        ("tokenizer", check_vocabulary),
    ],
)
def test_a_folder_that_may_not_be_looked_into(whole, name, ask):
    # Not in the folder of the tests, into which nobody else may look.
    shared = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    try:
        folder = shutil.copytree(whole, shared / "toy")
        shared.chmod(0o755)
        (folder / name).chmod(0)
        os.seteuid(SOME_USER)
        try:
            assert stored_dtype(folder) in (None, "float16")
            with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\)"):
                ask(folder)
        finally:
            os.seteuid(0)
    finally:
        subprocess.run(["rm", "-r", str(shared)], check=True)


def test_a_file_that_is_too_large(folder, monkeypatch):
    monkeypatch.setattr("cogvx_fast.checkpoint.description._LARGEST_JSON", 100)
    with pytest.raises(CheckpointError, match="bytes, more than any such file"):
        read_json(folder / TRANSFORMER)


def test_a_byte_order_mark_is_no_content(folder):
    path = folder / TRANSFORMER
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert described(folder)[0].variant.num_layers == 3


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (TRANSFORMER, {"num_layers": 10**30}, "num_layers=10000.*must be a whole number of 1 to 1000"),
        (TRANSFORMER, {"num_layers": 0}, "num_layers=0; must be"),
        (TRANSFORMER, {"num_layers": True}, "num_layers=True; must be"),
        (TRANSFORMER, {"num_attention_heads": "30"}, "num_attention_heads=30; must be a whole number"),
        (TRANSFORMER, {"patch_size": None}, "patch_size=None; must be"),
        (
            TRANSFORMER,
            {"sample_frames": 16000, "sample_height": 4096, "sample_width": 4096},
            "sample_frames.*the table of positions",
        ),
        (TRANSFORMER, {"use_rotary_positional_embeddings": 1}, "use_rotary.*=1; must be true or false"),
        (TRANSFORMER, {"norm_eps": float("nan")}, "norm_eps=nan; must be finite"),
        (TRANSFORMER, {"_class_name": "SD3Transformer2DModel"}, "SD3Transformer2DModel; must be a CogVideoXTransf"),
        ("text_encoder/config.json", {"num_layers": 10**30}, "num_layers=1000.*must be a whole number"),
        ("text_encoder/config.json", {"d_model": -1}, "d_model=-1; must be"),
        ("vae/config.json", {"block_out_channels": 8}, "block_out_channels=8; must be"),
        ("vae/config.json", {"block_out_channels": [10**30]}, "block_out_channels=.*; must be"),
        ("vae/config.json", {"layers_per_block": 10**6}, "layers_per_block=1000000; must be"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "num_train_timesteps=.*must be"),
        ("scheduler/scheduler_config.json", {"beta_end": float("inf")}, "beta_end=inf; must be finite"),
        ("scheduler/scheduler_config.json", {"snr_shift_scale": 0}, "snr_shift_scale=0; must be above 0"),
        ("vae/config.json", {"scaling_factor": 0.0}, r"scaling_factor=0\.0; must be above 0"),
        ("vae/config.json", {"temporal_compression_ratio": 3.5}, "temporal_compression_ratio=3.5; must be a whole"),
        (TRANSFORMER, {"spatial_interpolation_scale": 0}, "spatial_interpolation_scale=0; must be above 0"),
        ("text_encoder/config.json", {"layer_norm_epsilon": -5.0}, "layer_norm_epsilon=-5.0; must be above 0"),
    ],
)
def test_a_value_that_cannot_be(changed, name, values, message):
    says = "is of a" if "_class_name" in values else "has"
    refused(changed(name, **values), f"toy: its {re.escape(name)} {says} {message}")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, "is a StableDiffusionPipeline; must be a CogVideoX"),
        ({"_class_name": ["pipeline", "CogVideoXMine"]}, "must be a CogVideoX checkpoint"),
        ({"tokenizer": ["transformers", "AutoTokenizer"]}, "its tokenizer is a AutoTokenizer; must be a T5Tokenizer"),
        ({"text_encoder": ["transformers", "AutoModel"]}, "its text_encoder is a AutoModel; must be a T5EncoderModel"),
        ({"transformer": ["mine", "CogVideoXTransformer3DModel"]}, "must be a CogVideoXTransformer3DModel"),
        ({"scheduler": ["os", "system"]}, "its scheduler is a system of os; must be diffusers'"),
        ({"vae": "AutoencoderKLCogVideoX"}, r"vae=AutoencoderKLCogVideoX; must be \[library, class\]"),
        ({"vae": ["diffusers", 3]}, r"must be \[library, class\]"),
    ],
)
def test_a_class_that_is_not_the_familys(changed, entry, message):
    refused(changed("model_index.json", **entry), message)


def test_a_part_that_the_index_lacks(folder):
    index = json.loads((folder / "model_index.json").read_text())
    del index["vae"]
    (folder / "model_index.json").write_text(json.dumps(index))
    refused(folder, r"its model_index\.json has no vae")


def test_parts_that_are_none_or_given_need_no_files(changed):
    folder = changed("model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    (folder / "text_encoder" / "config.json").unlink()
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert described(folder)[1].keys() == {"transformer", "vae", "scheduler"}
    absent = {"text_encoder": None, "tokenizer": None}
    pipe = FastCogVideoXPipeline.from_pretrained(folder, dtype=torch.float32, **absent)
    assert pipe.text_encoder is None and pipe.tokenizer is None
    (folder / "vae" / "config.json").write_text("{")
    assert FastCogVideoXPipeline.from_pretrained(folder, dtype=torch.float32, vae=None, **absent).vae is None


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (TRANSFORMER, {"norm_eps": "x"}, "norm_eps='x'; must be a number"),
        (TRANSFORMER, {"freq_shift": []}, r"freq_shift=\[\]; must be a number"),
        (TRANSFORMER, {"flip_sin_to_cos": 1}, "flip_sin_to_cos=1; must be true or false"),
        (TRANSFORMER, {"activation_fn": None}, "activation_fn=None; must be text"),
        ("vae/config.json", {"scaling_factor": "1"}, "scaling_factor='1'; must be a number"),
        ("text_encoder/config.json", {"layer_norm_epsilon": True}, "layer_norm_epsilon=True; must be a number"),
        ("text_encoder/config.json", {"feed_forward_proj": 3}, "feed_forward_proj=3; must be text"),
        ("scheduler/scheduler_config.json", {"clip_sample": "no"}, "clip_sample='no'; must be true or false"),
        ("scheduler/scheduler_config.json", {"steps_offset": "1"}, "steps_offset='1'; must be a number"),
    ],
)
def test_a_value_of_another_kind_than_its_default(changed, name, values, message):
    """Some would be used in a step only."""
    with pytest.raises(CheckpointError, match=f"toy: its {re.escape(name)} has {message}"):
        FastCogVideoXPipeline.from_pretrained(changed(name, **values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trained_betas": [0.1, 0.2]}, "IndexError: index 999 is out of bounds"),
        ({"timestep_spacing": "wide"}, "ValueError: wide is not supported"),
        ({"prediction_type": "noise"}, "ValueError: prediction_type given as noise must be one of"),
    ],
)
@pytest.mark.parametrize("scheduler", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_a_scheduler_that_would_fail_in_a_step(changed, scheduler, values, message):
    changed("model_index.json", scheduler=["diffusers", scheduler])
    folder = changed("scheduler/scheduler_config.json", **values)
    with pytest.raises(
        CheckpointError, match=f"toy: its scheduler/scheduler_config.json makes no {scheduler} .{message}"
    ):
        FastCogVideoXPipeline.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy's, of diffusers
@pytest.mark.parametrize("scheduler", sorted(cls.__name__ for cls in CogVideoXDDIMScheduler().compatibles))
def test_what_any_scheduler_of_diffusers_saves_may_be(tmp_path, scheduler):
    """As in a pipeline whose scheduler was replaced, and that was saved: some have infinite limits."""
    try:
        made = getattr(diffusers, scheduler).from_config(CogVideoXDDIMScheduler().config)
    except ImportError as error:  # torchsde, scipy
        pytest.skip(str(error))
    made.save_pretrained(tmp_path)
    config = read_json(tmp_path / "scheduler_config.json")
    check_config("scheduler", config)
    check_scheduler(scheduler, config, tmp_path)
