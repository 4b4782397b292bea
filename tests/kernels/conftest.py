"""Kernels are interpreted in a process of their own (see test_triton.py): triton decides it when they are defined."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
