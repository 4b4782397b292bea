"""What nvidia-smi says of the GPU that is measured: what it is allowed, and its clocks, power and heat meanwhile."""

from __future__ import annotations

import contextlib
import datetime
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

EVERY_MS = 100
# The lowest clock that is none to speak of, as a part of the highest.
STEADY = 0.9
# Quantities of a row, each beside its field of nvidia-smi's.
QUANTITIES = {
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_watts": "power.draw",
    "temperature_celsius": "temperature.gpu",
}
# Drivers before 535 know the second name only.
_REASONS_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# At full load the power limit is what sets the clocks of most GPUs: that alone puts no time in doubt.
_POWER_LIMIT = 0x4
# Bits of that field, as nvml.h has them. What is left out holds no clock back: idleness, and clocks that were set.
_REASONS = {
    _POWER_LIMIT: "the power limit",
    0x8: "the hardware, slowed down",
    0x10: "a slower GPU that it is in step with",
    0x20: "its temperature, by the driver",
    0x40: "its temperature, by the hardware",
    0x80: "the power supply's brake",
}
_TIMEOUT = 60  # seconds; without persistence mode the driver is loaded first


def identifier(index: int) -> str:
    """The GPU that torch calls `cuda:index`, as nvidia-smi's `-i` takes it: CUDA_VISIBLE_DEVICES does not matter to it.

    Its UUID, or for a torch that has none its place on the PCI bus.
    """
    import torch

    properties: Any = torch.cuda.get_device_properties(index)
    uuid = str(getattr(properties, "uuid", "") or "")
    if uuid:
        return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    return f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def ask(name: str, fields: Sequence[str]) -> list[str] | None:
    """The fields of one GPU by nvidia-smi, as it writes them; None where it is not there or does not know them."""
    try:
        command = [*_query(name, fields)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        return None
    values = _values(lines[0])
    return values if len(values) == len(fields) else None


def number(text: str | None) -> float | None:
    """A number as nvidia-smi writes it; None for "[N/A]", where a GPU does not have it."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


@dataclass(frozen=True)
class Sample:
    """What was read at a time of the wall clock, in seconds; of `QUANTITIES` those that the GPU has."""

    at: float
    quantities: Mapping[str, float]
    reasons: int


@dataclass
class Watch:
    """What is read while calls are measured, and when each call was made.

    Attributes:
        why_none: why nothing is read, in words; empty where something is.
    """

    why_none: str = ""
    samples: list[Sample] = field(default_factory=list)
    _spans: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Note when a call of `name` was made: the block lasts as long as the GPU is at it."""
        started = time.time()
        yield
        self._spans.setdefault(name, []).append((started, time.time()))

    def state(self, name: str) -> dict[str, Any]:
        """Minimum, median and maximum of each quantity during the calls of `name`, for its row, and a warning.

        Where its calls are so short that less than two samples fall into them, those of all calls together.
        """
        if not self.samples:
            return {"samples": 0, "why_none": self.why_none or "nvidia-smi gave no sample in time"}
        own = self._within(self._spans.get(name, []))
        during = "the timed calls of this contender"
        if len(own) < 2:
            everything = [span for spans in self._spans.values() for span in spans]
            first, last = min(begin for begin, _ in everything), max(end for _, end in everything)
            own, during = self._within([(first, last)]), "the timed calls of all contenders"
        if not own:
            return {"samples": 0, "why_none": "the calls were over before nvidia-smi gave a sample"}
        found: dict[str, Any] = {"samples": len(own), "during": during}
        for quantity in QUANTITIES:
            values = [sample.quantities[quantity] for sample in own if quantity in sample.quantities]
            if values:
                found[quantity] = {"min": min(values), "median": statistics.median(values), "max": max(values)}
        reasons = 0
        for sample in own:
            reasons |= sample.reasons
        found["held_back_by"] = [what for bit, what in _REASONS.items() if reasons & bit]
        found["warning"] = _warning(found)
        return found

    def _within(self, spans: Sequence[tuple[float, float]]) -> list[Sample]:
        return [sample for sample in self.samples if any(begin <= sample.at <= end for begin, end in spans)]


@contextlib.contextmanager
def watched(device: torch.device) -> Iterator[Watch | None]:
    """Within the block the GPU `device` is sampled; None for a device that is none.

    Nothing fails where nvidia-smi does: the watch then says why it has no samples.
    """
    if device.type != "cuda":
        yield None
        return
    import torch

    index = torch.cuda.current_device() if device.index is None else device.index
    with sampled(identifier(index)) as watch:
        yield watch


@contextlib.contextmanager
def sampled(name: str) -> Iterator[Watch]:
    """Within the block the GPU that nvidia-smi calls `name` is sampled."""
    known = next((reasons for reasons in _REASONS_FIELDS if ask(name, [reasons]) is not None), None)
    fields = ["timestamp", *QUANTITIES.values(), *([] if known is None else [known])]
    watch = Watch()
    if ask(name, fields) is None:
        watch.why_none = f"nvidia-smi is not there, or does not know {name}"
        yield watch
        return
    process = subprocess.Popen(
        [*_query(name, fields), "-lms", str(EVERY_MS)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    reader = threading.Thread(target=_read, args=(process.stdout, len(fields), watch.samples), daemon=True)
    reader.start()
    try:
        yield watch
    finally:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(timeout=5)


def _query(name: str, fields: Sequence[str]) -> list[str]:
    return ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", name]


def _values(line: str) -> list[str]:
    return [value.strip() for value in line.split(",")]


def _read(lines: IO[str], count: int, samples: list[Sample]) -> None:
    for line in lines:
        values = _values(line)
        if len(values) == count:  # else a line that was cut off, or a message
            samples.append(_sample(values))
    lines.close()


def _sample(values: Sequence[str]) -> Sample:
    time_text, *rest = values
    try:
        # The driver's own time: lines may wait in a pipe.
        at = datetime.datetime.strptime(time_text, "%Y/%m/%d %H:%M:%S.%f").timestamp()
    except ValueError:
        at = time.time()
    numbers = zip(QUANTITIES, map(number, rest), strict=False)
    quantities = {quantity: value for quantity, value in numbers if value is not None}
    reasons = rest[len(QUANTITIES)] if len(rest) > len(QUANTITIES) else ""
    return Sample(at, quantities, int(reasons, 16) if reasons.startswith("0x") else 0)


def _warning(found: Mapping[str, Any]) -> str:
    """What puts times in doubt, in words; empty where nothing does."""
    parts = []
    for quantity, what in (("sm_clock_mhz", "multiprocessors'"), ("memory_clock_mhz", "memory's")):
        clock = found.get(quantity)
        if clock is not None and clock["min"] < STEADY * clock["max"]:
            parts.append(f"the {what} clock fell to {clock['min']:g} of {clock['max']:g} MHz")
    held_back_by = found["held_back_by"]
    if held_back_by and (parts or held_back_by != [_REASONS[_POWER_LIMIT]]):
        parts.append(f"clocks were held back by {', '.join(held_back_by)}")
    return "; ".join(parts)
