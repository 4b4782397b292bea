"""All methods of the comparison, by name. To add one, write a `Method` in a file of its own and add it here."""

from __future__ import annotations

from .diffusers_caches import CACHES
from .magcache import MAGCACHE
from .method import DIFFUSERS, FAST, Job, Method, Prepared, Unreachable
from .periodic import PERIODIC
from .plain import ALL, ALL_DIFFUSERS, FEWER_STEPS
from .teacache import TEACACHE

# What the others are judged by, for each of the pipelines.
REFERENCES: dict[str, Method] = {FAST: ALL, DIFFUSERS: ALL_DIFFUSERS}

# In the order of tables. The engine's own schedules belong between `fewer steps` and the periodic rules: a method on
# FAST whose `apply` yields a pipeline made with the schedule for `job.evaluations`, counted by `whole_calls`.
METHODS: dict[str, Method] = {method.name: method for method in (FEWER_STEPS, *PERIODIC, TEACACHE, MAGCACHE, *CACHES)}

__all__ = ["DIFFUSERS", "FAST", "METHODS", "REFERENCES", "Job", "Method", "Prepared", "Unreachable"]
