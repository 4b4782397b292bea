"""What the bench times of turbo: the steps that are computed are those that the row says."""

import json

import pytest
import torch

from cogvx_fast.bench.contenders import CONTENDERS
from cogvx_fast.bench.turbo import TURBO
from cogvx_fast.bench.workloads import WORKLOADS
from tests import toy


def test_workloads_name_contenders_that_there_are():
    for name in ("demo-turbo", "dit-2b-turbo"):
        assert set(WORKLOADS[name].contenders) <= CONTENDERS.keys() | TURBO.keys()
        assert set(WORKLOADS[name].stages) <= set(TURBO["ours-turbo-17"].stages)


@pytest.mark.parametrize("evaluations", [25, 17])
def test_a_model_of_random_weights_takes_the_steps_that_the_row_says(evaluations):
    pipe = toy.pipeline()
    workload = WORKLOADS["dit-2b-turbo"]
    prepared = TURBO[f"ours-turbo-{evaluations}"].build(pipe, workload, "denoise")
    assert prepared.extras == {"evaluations": evaluations, "ideal_gain": 50 / evaluations}
    with torch.no_grad():
        prepared.pipeline(**toy.inputs(50, output_type="latent"))
    assert prepared.pipeline._ran.steps == evaluations
    assert "steps" in "".join(prepared.report())
    assert json.dumps(prepared.engine) and prepared.engine["schedule"] == "the demo's"
