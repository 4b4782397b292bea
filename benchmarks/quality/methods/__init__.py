"""All methods of the comparison, by name. To add one, write a `Method` in a file of its own and add it here."""

from __future__ import annotations

from .diffusers_caches import CACHES
from .magcache import MAGCACHE
from .method import DIFFUSERS, FAST, Job, Method, Prepared, Unreachable
from .periodic import PERIODIC
from .plain import ALL, ALL_DIFFUSERS, FEWER_STEPS
from .teacache import TEACACHE
from .turbo import TURBO

# What the others are judged by, for each of the pipelines.
REFERENCES: dict[str, Method] = {FAST: ALL, DIFFUSERS: ALL_DIFFUSERS}

# In the order of tables.
METHODS: dict[str, Method] = {
    method.name: method for method in (TURBO, FEWER_STEPS, *PERIODIC, TEACACHE, MAGCACHE, *CACHES)
}

__all__ = ["DIFFUSERS", "FAST", "METHODS", "REFERENCES", "Job", "Method", "Prepared", "Unreachable"]
