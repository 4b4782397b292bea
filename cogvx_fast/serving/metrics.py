"""What Prometheus reads. All of it is in the store, where every worker writes: nothing is kept here."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .context import Context
from .jobs import CANCELLED, COMPLETED, FAILED

_STAGE = "seconds_"


class _Collector:
    def __init__(self, context: Context) -> None:
        self._context = context

    def collect(self) -> Iterator[Metric]:
        store, workers = self._context.store, self._context.workers()
        totals, waiting, running = store.totals(), store.waiting(), store.running()
        # Of every model that is served, and of others that jobs wait for.
        served = dict.fromkeys([*self._context.models.names, *(job.model for job in [*waiting, *running])])
        jobs = GaugeMetricFamily("cogvx_jobs", "Jobs that have not ended", labels=["status", "model"])
        longest = GaugeMetricFamily("cogvx_longest_wait_seconds", "Since the oldest queued job came", labels=["model"])
        for model in served:
            waited = [time.time() - job.created_at for job in waiting if job.model == model]
            jobs.add_metric(["queued", model], len(waited))
            jobs.add_metric(["in_progress", model], sum(job.model == model for job in running))
            longest.add_metric([model], max(waited, default=0.0))
        yield jobs
        yield longest
        ends = CounterMetricFamily("cogvx_jobs_ended", "Jobs by their end", labels=["end"])
        for end in (COMPLETED, FAILED, CANCELLED):
            ends.add_metric([end], totals.get(end, 0.0))
        yield ends
        yield CounterMetricFamily("cogvx_jobs_requeued", "Jobs whose worker died", value=totals.get("requeued", 0.0))
        yield CounterMetricFamily("cogvx_steps", "Denoising steps of completed jobs", value=totals.get("steps", 0.0))
        stages = CounterMetricFamily("cogvx_stage_seconds", "Time in each stage, of completed jobs", labels=["stage"])
        for name, seconds in totals.items():
            if name.startswith(_STAGE):
                stages.add_metric([name.removeprefix(_STAGE)], seconds)
        yield stages
        states = GaugeMetricFamily("cogvx_workers", "Workers by state", labels=["state", "model"])
        for model in dict.fromkeys([*served, *(about.get("model", "") for about in workers.values())]):
            ready = [bool(about.get("ready")) for about in workers.values() if about.get("model", "") == model]
            states.add_metric(["ready", model], ready.count(True))
            states.add_metric(["loading", model], ready.count(False))
        yield states
        labels = ["worker", "device", "model"]
        memory = GaugeMetricFamily("cogvx_device_memory_bytes", "Reserved by a worker", labels=labels)
        for worker, about in workers.items():
            memory.add_metric([worker, about.get("device", ""), about.get("model", "")], about.get("memory", 0))
        yield memory


def metrics(context: Context) -> bytes:
    """The text that Prometheus reads."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(context))
    return generate_latest(registry)
