"""A machine of a test's making: what it lacks of the implementations of operations."""

from collections.abc import Mapping

import pytest
from cogvx_kernels import ops


def set_missing(monkeypatch: pytest.MonkeyPatch, reasons: Mapping[str | tuple[str, str], str | None]) -> None:
    """What `ops.why_unavailable` says from now on.

    Args:
        reasons: by implementation, or by operation and implementation, which counts for more; None: it is there. What
            is in neither is as it was.
    """
    before = ops.why_unavailable

    def why_unavailable(operation, impl, device=None):
        for key in ((operation, impl), impl):
            if key in reasons:
                return reasons[key]
        return before(operation, impl, device)

    monkeypatch.setattr(ops, "why_unavailable", why_unavailable)
