"""Rows of sizes: measured in a process of their own at a size that tests can afford; what they say and refuse."""

import dataclasses
import json
import sys

import pytest
import torch

from cogvx_fast.bench import sizes
from cogvx_fast.bench.comparison import groups
from cogvx_fast.bench.report import report
from cogvx_fast.bench.rows import Row, RowError
from cogvx_fast.bench.stages import shapes
from cogvx_fast.bench.workloads import WORKLOADS, check_sizes
from cogvx_fast.quantization import RECIPES

from .conftest import row

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
SMALL = dataclasses.replace(
    WORKLOADS["dit-2b"],
    transformer={**WORKLOADS["dit-2b"].transformer, "num_attention_heads": 10, "num_layers": 1},
    steps=4,
)
FOUND = {
    "disk_bytes": 350_000_000,
    "loading_peak_bytes": 360_000_000,
    "running_peak_bytes": 510_000_000,
    "loading_predicted_bytes": 350_000_000,
    "running_predicted_bytes": 500_000_000,
    "running_peak_keeping_bytes": 600_000_000,
}


def sized(recipe=None, **changes):
    values = sizes._row(
        WORKLOADS["dit-2b"], f"ours{'' if recipe is None else '-' + recipe}", RECIPES.get(recipe), FOUND | changes
    )
    return row(**values)


def test_exact_and_each_recipe_get_a_row_and_two_processes(monkeypatch):
    monkeypatch.setattr(sizes, "_recipes", lambda dtype: [None, RECIPES["int8-weight"]])
    asked, told, rows = [], [], []

    def noted(order, environment):
        asked.append((order["recipe"], environment))
        assert json.loads(json.dumps(order))["workload"]["name"] == SMALL.name  # it goes to a process as text
        return {"loading_peak_bytes": 1, "running_peak_bytes": 2}

    monkeypatch.setattr(sizes, "_in_a_fresh_process", noted)
    made = sizes.run(SMALL, "bfloat16", "a command", rows.append, told.append)
    assert made == rows and [r.contender for r in made] == ["ours", "ours-int8-weight"] == told[1:]
    assert asked == [(recipe, setting) for recipe in (None, "int8-weight") for setting in (sizes._GIVES_BACK, {})]
    exact, quantized = (r.extras for r in made)
    assert quantized["disk_bytes"] < exact["disk_bytes"]
    # On disk are the weights; in memory, too, the table of positions, which no file has.
    assert exact["disk_bytes"] < exact["loading_predicted_bytes"] < exact["disk_bytes"] * 1.4
    assert Row.from_json(made[0].to_json()) == made[0]


@on_linux
def test_a_fresh_process_takes_what_is_predicted(tmp_path):
    recipe = RECIPES["int8-weight"]
    pipe = sizes._write(SMALL, torch.bfloat16, tmp_path / "large")
    sizes._write(sizes._smallest(SMALL), torch.bfloat16, tmp_path / "small")
    paths = {
        "folder": sizes._quantized(tmp_path / "large", recipe),
        "small": sizes._quantized(tmp_path / "small", recipe),
    }
    order = {"workload": dataclasses.asdict(SMALL), "dtype": "bfloat16", "recipe": recipe.name}
    found = sizes._in_a_fresh_process(order | {name: str(path) for name, path in paths.items()}, sizes._GIVES_BACK)
    predicted = sizes._predicted(SMALL, torch.bfloat16, recipe, shapes(SMALL, pipe))
    # Libraries' own buffers do not shrink with the model.
    assert found["loading_peak_bytes"] == pytest.approx(predicted["loading_predicted_bytes"], abs=2**24)
    assert found["running_peak_bytes"] == pytest.approx(predicted["running_predicted_bytes"], abs=2**24)


def test_the_gate_is_the_prediction():
    assert sized().gate == "green" and sized().error == pytest.approx(0.02)
    off = sized(running_peak_bytes=600_000_000)
    assert off.gate == "red" and "20.0% off its prediction, 10% allowed" in off.gate_detail
    with pytest.raises(RowError, match="a row of sizes has n and extras, and no times"):
        dataclasses.replace(sized(), p50_seconds=1.0)


def test_the_report_has_a_table_and_no_picture():
    rows = [sized(), sized("int8")]
    line = "| ours-int8 | 350.0 MB | 360.0 MB (350.0 MB) | 510.0 MB (500.0 MB) | +2.0% | 600.0 MB |"
    page = report(rows, "plots")
    assert line in page and ".png" not in page
    assert groups(rows)[0].title == "dit-2b, bfloat16, sizes"


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [("vae", "cpu", "needs one with a transformer of real layer sizes"), ("dit-2b", "cuda", "it needs --device cpu")],
)
def test_what_cannot_be_measured_is_refused(name, device, message):
    with pytest.raises(ValueError, match=message):
        check_sizes(WORKLOADS[name], device)


def test_every_recipe_that_a_cpu_can_run_is_measured():
    assert [r and r.name for r in sizes._recipes(torch.bfloat16)] == [None, "int8", "int8-weight", "fp8-weight"]
