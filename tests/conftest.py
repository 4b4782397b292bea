"""What has to be settled before torch or the command is imported."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker for each core: threads, and processes that compile, would only take turns. What tests start inherits it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # The terminal of the process that shows the dots: a console made with it would keep it, whatever a test sets.
    os.environ.pop("COLUMNS", None)
