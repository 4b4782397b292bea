"""What has to be settled before torch or the command is imported."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker for each core: threads, and processes that compile, would only take turns. What tests start inherits it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # The terminal of the process that shows the dots: a console made with it would keep it, whatever a test sets.
    os.environ.pop("COLUMNS", None)


def pytest_collection_modifyitems(items):
    """Clusters and pairs of servers take minutes to start on old CPUs: there they are left out, and say so."""
    from pathlib import Path

    import pytest

    cpuinfo = Path("/proc/cpuinfo")
    quick = not cpuinfo.exists() or "avx512f" in cpuinfo.read_text()
    if quick or os.environ.get("COGVX_ALL_TESTS"):
        return
    reason = "starts several servers, minutes on a CPU without AVX-512; COGVX_ALL_TESTS=1 runs it"
    for item in items:
        if item.get_closest_marker("servers"):
            item.add_marker(pytest.mark.skip(reason=reason))
