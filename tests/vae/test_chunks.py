"""Spilled frames come back as they were, and a full disk is told before anything is computed."""

import errno
import os

import pytest
import torch

from cogvx_fast.vae import chunks

from .conftest import randn

SHAPE = (2, 3, 7, 5, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spilled", [False, True])
def test_rows_come_back_as_they_were(spilled, dtype):
    frames = randn(*SHAPE).to(dtype)
    kept = chunks.allocate_frames(SHAPE, frames, spilled)
    assert isinstance(kept, chunks.FramesInFile) == spilled
    # Rows of a wider buffer, as a convolution has them.
    wide = torch.zeros(2, 5, 9, 5, 4, dtype=dtype)
    wide[:, 1:4, 1:8] = frames
    for first, last in ((4, 7), (0, 4)):
        kept.write(first, wide[:, 1:4, 1 + first : 1 + last])
    for first, last in ((0, 7), (0, 1), (3, 6)):
        assert torch.equal(kept.read(first, last), frames[:, :, first:last])


def test_a_file_has_no_name_to_be_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks.tempfile, "tempdir", str(tmp_path))
    kept = chunks.allocate_frames(SHAPE, torch.zeros(1), spilled=True)
    assert kept.read(0, 7).shape == SHAPE
    assert not list(tmp_path.iterdir()) and str(tmp_path) in chunks.spill_target(torch.device("cpu"))


def test_a_full_disk_is_told_first(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for 0 MiB of frames in .*TMPDIR.*EngineConfig.vae_memory") as raised:
        chunks.allocate_frames(SHAPE, torch.zeros(1), spilled=True)
    assert raised.value.errno == errno.ENOSPC
