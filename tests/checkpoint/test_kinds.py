"""A checkpoint in the wrong pipeline is named, with the class that takes it, before a weight is read or a step done."""

import json
import re

import pytest
import torch

import cogvx_fast
from cogvx_fast.checkpoint import CheckpointError
from cogvx_fast.checkpoint.kinds import why_not
from tests import toy

TEXT, IMAGE, VIDEO, CONTROL = (
    f"CogVideoX{kind}Pipeline" for kind in ("", "ImageToVideo", "VideoToVideo", "FunControl")
)
TAKEN = {
    "2b": {TEXT, VIDEO},
    "5b": {TEXT, VIDEO},
    "5b-i2v": {IMAGE},
    "1.5-5b": {TEXT},
    "1.5-5b-i2v": {IMAGE},
    "fun": {CONTROL},
}


def fast(name):
    return getattr(cogvx_fast, f"Fast{name}")


@pytest.fixture(scope="module", params=TAKEN)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds") / request.param
    toy.pipeline(request.param).save_pretrained(folder)
    return request.param, folder


@pytest.mark.parametrize("pipeline", [TEXT, IMAGE, VIDEO, CONTROL])
def test_each_checkpoint_in_each_pipeline(checkpoint, pipeline):
    variant, folder = checkpoint
    if pipeline in TAKEN[variant]:
        assert fast(pipeline).from_pretrained(folder, dtype=torch.float32).transformer is not None
        return
    takes = re.escape(" or ".join(f"Fast{name}" for name in (TEXT, VIDEO, IMAGE, CONTROL) if name in TAKEN[variant]))
    with pytest.raises(CheckpointError, match=f"{takes} takes it, not Fast{pipeline}"):
        fast(pipeline).from_pretrained(folder)


def test_a_transformer_that_is_given_is_what_counts(checkpoint):
    variant, folder = checkpoint
    if variant != "5b":
        pytest.skip("one is enough")
    pipe = fast(IMAGE).from_pretrained(folder, dtype=torch.float32, transformer=toy.transformer("5b-i2v"))
    assert pipe.transformer.config.in_channels == 32


def test_a_published_control_checkpoint_that_names_another_class(tmp_path):
    """Whose shapes alone do not tell what it is."""
    toy.pipeline("fun").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "CogVideoX_Fun_Pipeline_Control"}))
    assert fast(CONTROL).from_pretrained(tmp_path, dtype=torch.float32).transformer is not None


def test_first_and_last_frame_has_a_pipeline_of_its_own():
    reason = why_not(TEXT, {"in_channels": 33, "out_channels": 16})
    assert "is of the Fun family for first and last frames (InP): FastCogVideoXFunInpaintPipeline takes it" in reason
    assert why_not("CogVideoXFunInpaintPipeline", {"in_channels": 33, "out_channels": 16}) is None
    assert why_not("SomebodysPipeline", {"in_channels": 33, "out_channels": 16}) is None


@pytest.mark.parametrize(("variant", "pipeline"), [("1.5-5b", VIDEO), ("5b-i2v", TEXT), ("2b", IMAGE)])
def test_a_pipeline_made_of_parts_says_so_at_the_call(variant, pipeline):
    pipe = fast(pipeline)(**toy.pipeline(variant).components)
    with pytest.raises(ValueError, match=f"this pipeline cannot run its transformer: .* not Fast{pipeline}"):
        pipe(prompt="a cat")


@pytest.mark.parametrize(("strength", "steps"), [(0.01, 50), (0.0, 4), (0.3, 3)])
def test_a_strength_that_leaves_no_step(strength, steps):
    pipe = fast(VIDEO)(**toy.pipeline().components)
    with pytest.raises(
        ValueError, match=rf"strength={strength} of num_inference_steps={steps} leaves no step; must be"
    ):
        pipe(prompt="a cat", video=[torch.zeros(3, 32, 32)] * 9, strength=strength, num_inference_steps=steps)
