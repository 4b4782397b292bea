from pathlib import Path

import pytest
import torch

from cogvx_fast.bench import memory

CPU = torch.device("cpu")


def test_sees_what_a_call_takes_and_gives_back():
    held = torch.ones(4_000_000)  # what is there before does not count
    small, kind = memory.peak_memory(lambda: held.sum(), CPU)
    if small is None:
        pytest.skip(kind)
    large, kind = memory.peak_memory(lambda: torch.ones(20_000_000).sum(), CPU)
    assert "resident" in kind
    assert small < 8_000_000 and 70_000_000 < large < 110_000_000


def test_says_why_it_could_not_measure(monkeypatch):
    def refuse(self, text):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    peak, kind = memory.peak_memory(lambda: None, CPU)
    assert peak is None and "clear_refs cannot be written (Permission denied)" in kind
    assert memory.peak_memory(lambda: None, torch.device("mps"))[1] == "not measured: no peak counter is known for mps"
