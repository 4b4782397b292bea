"""Triton decides when a kernel is defined whether it is interpreted: the tests of `interpreted` run in processes of
their own, for which `make test` sets TRITON_INTERPRET."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
