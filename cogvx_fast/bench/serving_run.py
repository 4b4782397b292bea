"""A run of the load test: servers are started, judged, and asked at one rate after the other, in turns."""

from __future__ import annotations

import contextlib
import datetime
import json
import statistics
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .accuracy import Verdict
from .provenance import Provenance, collect
from .rows import Row
from .series import Sink, Tell
from .serving import BASELINE, OURS, Serving
from .serving_clients import Call, OursCall, PostCall, RequestError, by_hand, ours
from .serving_load import Load, arrivals, drive
from .workloads import PROMPTS

LOADS = (0.2, 0.5, 0.8, 1.0, 1.3)
_CALIBRATION = 5  # requests, one after the other
_MEASURES = {
    OURS: "one request: POST, its events to the end, the MP4 fetched",
    BASELINE: "one request: POST, which is answered with the MP4; the first event is the answer",
}


@dataclass(frozen=True)
class ServingPlan:
    """What to ask, how often, and of whom.

    Attributes:
        model: folder of the checkpoint; without effect on a server that runs already.
        dtype, device: of servers that are started.
        fields: of every request, but for prompt and seed.
        rates: requests a second; None: `loads` times what the baseline, or the server alone, can make.
        seconds: that a rate lasts.
        patience: seconds for which open requests are waited for after that.
        seed: of arrivals, prompts and videos.
        url, key: of a server that runs already; None: one is started.
        baseline: a program that is started as another server and takes turns; None: none.
    """

    model: str
    dtype: str
    device: str
    command: str
    fields: Mapping[str, Any]
    rates: Sequence[float] | None = None
    loads: Sequence[float] = LOADS
    seconds: float = 60.0
    patience: float = 60.0
    seed: int = 0
    url: str | None = None
    key: str | None = None
    baseline: Path | None = None

    def request(self, number: int) -> dict[str, Any]:
        return {"prompt": PROMPTS[number % len(PROMPTS)], "seed": self.seed + number, **self.fields}


@dataclass
class _Server:
    """One that is asked; `restart` brings it to rest where requests were given up."""

    name: str
    call: Callable[[], Call]
    restart: Callable[[], None]
    verdict: Verdict = field(default_factory=lambda: Verdict("none", "not judged: no baseline beside it"))
    extras: dict[str, float] = field(default_factory=dict)


def run(plan: ServingPlan, sink: Sink = lambda row: None, tell: Tell = lambda text: None) -> list[Row]:
    """Measure; every row goes to `sink` when it is made, and all are returned.

    Raises:
        RequestError: if a server does not come up, or does not make a single video.
    """
    with contextlib.ExitStack() as servers:
        return _Run(plan, sink, tell, servers).rows()


class _Run:
    def __init__(self, plan: ServingPlan, sink: Sink, tell: Tell, servers: contextlib.ExitStack) -> None:
        self._plan, self._sink, self._tell = plan, sink, tell
        self._provenance: Provenance = collect(plan.device)
        now = datetime.datetime.now(datetime.UTC)
        self._number = f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
        tell("starting")
        url = self._url = plan.url or servers.enter_context(ours(plan.model, plan.dtype, plan.device))
        self._model = _name_of_model(url, plan.key)
        self._servers = [_Server(OURS, lambda: OursCall(url, plan.key), lambda: None)]
        self._about: dict[str, Any] = {}  # what the server says of a job
        if plan.baseline is not None:
            self._servers.append(self._started(plan.baseline, servers))

    def _started(self, program: Path, servers: contextlib.ExitStack) -> _Server:
        running = servers.enter_context(contextlib.ExitStack())
        place = ""

        def restart() -> None:
            nonlocal place
            running.close()
            place = running.enter_context(by_hand(program, self._plan.model, self._plan.dtype, self._plan.device))

        restart()
        return _Server(BASELINE, lambda: PostCall(place), restart)

    def rows(self) -> list[Row]:
        self._judge()
        red = [server for server in self._servers if server.verdict.gate == "red"]
        if red:
            return [self._row(server, "no rate", {}, 0) for server in red]
        capacity, rates = None, self._plan.rates
        if rates is None:
            capacity = 1 / self._service_time(self._servers[-1])
            rates = [capacity * load for load in self._plan.loads]
        made = []
        for rate in sorted(rates):
            moments = arrivals(rate, self._plan.seconds, self._plan.seed)
            for server in self._servers:
                self._tell(f"{rate:.3g} a second: {server.name}, {len(moments)} requests")
                load = self._load(server, moments)
                figures = {"rate_per_second": rate, "duration_seconds": self._plan.seconds}
                figures |= {"patience_seconds": self._plan.patience, **load.figures(), **server.extras}
                if capacity is not None:
                    figures |= {"capacity_per_second": capacity}
                made.append(self._row(server, f"{rate:.3g}/s", figures, len(moments), load))
        return made

    def _load(self, server: _Server, moments: Sequence[float]) -> Load:
        requests = [self._plan.request(number) for number in range(len(moments))]
        load = drive(server.call, requests, moments, self._plan.seconds, self._plan.patience)
        if any(not outcome.error and outcome.done is None for outcome in load.outcomes):
            server.restart()
            self._one(server, 0)
        return load

    def _one(self, server: _Server, number: int) -> bytes:
        return server.call().make(self._plan.request(number), lambda: None)

    def _judge(self) -> None:
        """The first videos of each server: they warm it, and show whether it makes what it should."""
        requests = [self._plan.request(number) for number in range(len(PROMPTS))]
        videos: dict[str, list[bytes]] = {}
        for server in self._servers:
            self._tell(f"videos of {server.name}")
            videos[server.name] = [self._one(server, number) for number in range(len(requests))]
        asked = OursCall(self._url, self._plan.key)
        asked.make(requests[0], lambda: None)
        self._about = asked.answer()
        if len(self._servers) == 1:
            return
        from .serving_gate import compare

        self._tell("the videos that are expected")
        judged = compare(self._plan.model, self._plan.dtype, requests, videos[OURS], videos[BASELINE])
        beside = {
            "psnr_to_the_other_db": min(judged.psnr_db, 100.0),
            "largest_difference_levels": judged.max_difference,
        }
        for server, verdict in zip(self._servers, (judged.ours, judged.baseline), strict=True):
            server.verdict, server.extras = verdict, dict(beside)

    def _service_time(self, server: _Server) -> float:
        """Median seconds of a request that meets no other."""
        self._tell(f"how long a video takes {server.name}")
        times = []
        for number in range(_CALIBRATION):
            started = time.monotonic()
            self._one(server, number)
            times.append(time.monotonic() - started)
        return statistics.median(times)

    def _row(self, server: _Server, stage: str, extras: dict[str, float], n: int, load: Load | None = None) -> Row:
        plan, about = self._plan, self._about if server.name == OURS else {}
        said = [report for report in [about.get("engine_report")] if report]
        said += [] if load is None else [f"error: {text}" for text in dict.fromkeys(load.errors)][:3]
        row = Row(
            run=self._number,
            series=Serving.name,
            workload=f"serving-{self._model}",
            stage=stage,
            measures=_MEASURES[server.name] + ("" if plan.url is None else "; the machine is that which asked"),
            shapes={"batch": 1, **{name: value for name, value in plan.fields.items() if name != "fps"}},
            dtype=plan.dtype,
            contender=server.name,
            engine={"tier": about["engine"]} if about else None,
            engine_report=said,
            command=plan.command,
            gate=server.verdict.gate,
            gate_detail=server.verdict.detail,
            reference="diffusers, eager, a wider precision, the same writer",
            error=server.verdict.error,
            own_error=server.verdict.own_error,
            budget=server.verdict.budget,
            n=n,
            extras=extras,
            provenance=self._provenance,
        )
        self._sink(row)
        return row


def _name_of_model(url: str, key: str | None) -> str:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/models", headers=headers), timeout=30) as answer:
            return str(json.loads(answer.read())["data"][0]["id"])
    except (OSError, ValueError, LookupError, urllib.error.URLError) as error:
        raise RequestError(f"{url} is no server of videos that answers: {error}") from error
