"""`--memory-limit` of `cogvx-fast generate`, and sizes that no limit is asked for."""

import json
import re
from pathlib import Path

import pytest

from cogvx_fast import FastCogVideoXPipeline, demo_checkpoint, machine

from .conftest import assert_usage_error

PROMPT = "a cat"


def test_a_memory_limit_chooses_or_says_what_fits(run, checkpoint, calls):
    order = ("generate", PROMPT, "-o", "out.gif", "--model", checkpoint, "--steps", 1, "--dtype", "bfloat16")
    assert_usage_error(run(*order, "--memory-limit", "10KiB"), "--memory-limit", "the smallest possible is")
    assert calls == []
    assert "engine exact" in run(*order, "--memory-limit", "1GiB").stdout
    exact = calls[0]["pipe"].engine_report()
    assert exact.tier == "exact" and exact.line("memory").detail.startswith("1.00 GiB for ")
    # What is asked for counts, not the model's own size.
    limit = f"{run_smallest(run, order)}B"
    assert run(*order, "--memory-limit", limit).exit_code == 0
    assert calls[1]["pipe"].engine_report().tier == "balanced"
    Path("out.gif").unlink()
    refused = run(*order, "--memory-limit", "10KiB", "--frames", 49)
    assert_usage_error(refused, "--memory-limit", "49 frames of 32x32")


def run_smallest(run, order):
    refused = " ".join(run(*order, "--memory-limit", "1KiB").stderr.split())
    return int(re.search(r"\((\d+) bytes\)", refused)[1])


@pytest.mark.parametrize("memory_limit", [[], ["--memory-limit", "1GiB"]])
def test_sizes_are_bounded_by_what_memory_holds(memory_limit, run, configuration, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 2**34)
    monkeypatch.setattr(FastCogVideoXPipeline, "from_pretrained", None)  # not loaded
    demo = ("--model", demo_checkpoint(), "--device", "cpu")
    for option, value in (
        ("--frames", "8" + "0" * 308 + "1"),
        ("--height", "16" + "0" * 308),
        ("--width", "16" + "0" * 30),
    ):
        refused = run("generate", PROMPT, *demo, *memory_limit, option, value)
        assert_usage_error(refused, f"error: {option} {value}: needs more than", "16.00 GiB are free", "what fits: ")
        assert len(refused.stderr.splitlines()) == 1
        for model in ([], demo):
            planned = run("doctor", *model, option, value, "--device", "cpu")
            assert planned.exit_code == 2 and f"error: {option} {value}: needs more than" in planned.stderr
    refused = run("generate", PROMPT, *demo, *memory_limit, "--frames", 8_000_000_001)
    assert_usage_error(refused, "needs" if not memory_limit else "too small for 8000000001 frames", "what fits: ")


def test_doctor_says_what_is_more_than_there_is(run, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 2**34)
    for model in ([], ["--model", demo_checkpoint()]):
        order = ("doctor", *model, "--device", "cpu", "--json", "--frames")
        assert json.loads(run(*order, 17).stdout)["memory"]["problem"] is None
        memory = json.loads(run(*order, 8_000_001).stdout)["memory"]
        assert re.match(r"needs .* for 8000001 frames of .* 16\.00 GiB are free; what fits: ", memory["problem"])
        assert memory["plans"]["decode"]["peak"] > 2**34
        assert "This is more than there is: needs" in run(*order[:-2], "--frames", 8_000_001).stdout


def test_frames_that_wait_for_their_file_count(run, checkpoint, monkeypatch):
    order = ("generate", PROMPT, "--model", checkpoint, "--steps", 1, "--device", "cpu", "--zoom", 16, "-o")
    kept = 9 * (32 * 16) ** 2 * 3
    monkeypatch.setattr(machine, "free_memory", lambda: kept)
    assert_usage_error(run(*order, "out.gif"), "--model", "needs ", "are free")
    assert_usage_error(run(*order, "out.mp4", "--sheet", "sheet.png"), "--model", "needs ", "are free")
    assert run(*order, "out.mp4").exit_code == 0
