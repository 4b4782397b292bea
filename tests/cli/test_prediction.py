"""What the command says of memory before anything is loaded."""

import json

import pytest
from typer.testing import CliRunner

from cogvx_fast import demo_checkpoint
from cogvx_fast.cli import app


def doctor(*options):
    result = CliRunner().invoke(app, ["doctor", "--json", "--model", demo_checkpoint(), *options])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["memory"]["models"]


def test_doctor_plans_the_models_by_recipe():
    exact, int8 = (doctor("--dtype", "bfloat16", "--device", "cpu", *more) for more in ((), ("--recipe", "int8")))
    assert exact["recipe"] is None and int8["recipe"] == "int8"
    assert 0.5 < int8["transformer"] / exact["transformer"] < 0.8  # the modulation's weights stay as they are
    assert int8["text_encoder"] < exact["text_encoder"]
    assert int8["stages"]["decode"] < exact["stages"]["decode"]
    larger = doctor("--dtype", "bfloat16", "--device", "cpu", "--frames", "33")
    assert larger["activations"] > exact["activations"] and larger["transformer"] == exact["transformer"]


def test_doctor_shows_what_a_limit_leads_to():
    options = "--dtype", "bfloat16", "--device", "cpu", "--memory-limit"
    ample = doctor(*options, "1GiB")["choice"]
    assert ample.startswith("1.00 GiB for 17 frames of 128x128: transformer as it is, text encoder as it is")
    tight = doctor(*options, "26MiB")
    assert tight["recipe"] == "int8-weight" and max(tight["stages"].values()) <= 26 * 2**20
    assert "not transformer as it is" in tight["choice"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory-limit", "1GiB"], "--memory-limit '1GiB': needs --model"),
        (["--memory-limit", "much", "--model", demo_checkpoint()], "must be a number of bytes or a string"),
        (["--memory-limit", "1MiB", "--model", demo_checkpoint()], "memory_limit=1.00 MiB is too small for 17 frames"),
        (["--recipe", "int8"], "--recipe 'int8': needs --model"),
        (["--recipe", "int3", "--model", demo_checkpoint()], "is unknown; allowed: balanced, native, int8"),
        (["--recipe", "fp8", "--device", "cpu", "--model", demo_checkpoint()], "cannot work here: fp8 products need"),
    ],
)
def test_what_cannot_be_planned_is_said(options, message):
    result = CliRunner().invoke(app, ["doctor", *options])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
