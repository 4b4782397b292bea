"""`--memory-limit` of `cogvx-fast generate`."""

import re
from pathlib import Path

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
