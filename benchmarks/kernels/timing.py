"""Where operations are timed, on what, and how: on a GPU in queues between two events, on a CPU call by call.

A call on a GPU is nothing without the calls around it: a synchronization after each would be most of a short one's
time. So the GPU is kept busy until many calls are queued behind an event, and waited for once, at a second event. What
a call reads must not lie in L2 from the call before, as it does not in a model: where its tensors are not twice as
large as L2, it takes turns through so many copies of them that they are.
"""

import math
import time

import torch

DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

# Tokens of a default clip; on a CPU those of the reduced clip `dit-2b`. With guidance there are two samples.
TOKENS = {"cuda": 17776, "cpu": 1216}
BATCH, TEXT = 2, 226
WIDTHS = {"2b": 1920, "5b": 3072}

# The elements of a sample that are compared with float64, where all of them would take longer than the measurement.
CHECKED = 128

ROUNDS = 10
_QUEUE_SECONDS, _FEWEST, _MOST = 0.02, 3, 50  # of a queue, and calls in it
_CLOCK = 2.5e9  # cycles a second, more than a GPU has: what keeps it busy must not end early


def stream(width, device=DEVICE):
    """Shape of the joint stream at the size for `device`: `(batch, tokens, dim)`."""
    return BATCH, TOKENS[device.type], WIDTHS[width]


def generator(seed, device=DEVICE):
    return torch.Generator(device).manual_seed(seed)


def randn(*shape, generator, dtype=torch.float32):
    """Normal numbers, made where they are used: hundreds of millions take a CPU seconds."""
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device=generator.device).to(dtype)


class GpuClock:
    """pytest-benchmark's timer: seconds of one call, added up by the queues; on a CPU the wall clock."""

    def __init__(self):
        self.seconds = None  # until a queue has run

    def __call__(self):
        return time.perf_counter() if self.seconds is None else self.seconds

    def add(self, seconds):
        self.seconds = (self.seconds or 0.0) + seconds


clock = GpuClock()


class Queue:
    """Calls of `function(**given)` between two events on `device`.

    Attributes:
        copies: of what is given, through which calls take turns.
        calls: how many are queued at a time.
    """

    def __init__(self, function, given, device):
        self.function, self.device = function, device
        self.l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.copies = [given, *(clone(given) for _ in range(number_of_copies(tensor_bytes(given), self.l2_bytes) - 1))]
        self.host_seconds = 0.0
        for copy in self.copies:  # whatever compiles or tries out configurations, does so now
            function(**copy)
        self.calls = _FEWEST
        self.calls = max(_FEWEST, min(_MOST, math.ceil(_QUEUE_SECONDS / self.seconds())))

    def seconds(self):
        """Of one call, over one queue."""
        with torch.cuda.device(self.device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # Busy for twice the time that queueing took before: the first call must not wait for the last to be queued.
            torch.cuda._sleep(int(2 * self.host_seconds * _CLOCK))
            started = time.perf_counter()
            begin.record()
            for number in range(self.calls):
                self.function(**self.copies[number % len(self.copies)])
            end.record()
            self.host_seconds = max(self.host_seconds, time.perf_counter() - started)
            torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1000 / self.calls

    def run(self):
        clock.add(self.seconds())


def number_of_copies(size, l2_bytes, most=16):
    """How many copies of `size` bytes together are twice as large as L2."""
    return max(1, min(most, math.ceil(2 * l2_bytes / max(size, 1))))


def timed(benchmark, function, given, device=DEVICE, **info):
    """Time `function(**given)`, and say in the benchmark's `extra_info` what was done."""
    benchmark.extra_info.update(device=str(device), **info)
    with torch.no_grad():
        if device.type == "cpu":
            benchmark.pedantic(function, kwargs=given, rounds=ROUNDS, iterations=3, warmup_rounds=3)
            return
        queue = Queue(function, given, device)
        clock.add(0.0)
        benchmark.extra_info.update(calls_between_events=queue.calls, copies=len(queue.copies), l2_bytes=queue.l2_bytes)
        benchmark.pedantic(queue.run, rounds=ROUNDS, iterations=1, warmup_rounds=1)


def clone(values):
    """Copies of all tensors in nested dictionaries and tuples."""
    if torch.is_tensor(values):
        return values.clone()
    if isinstance(values, dict):
        return {name: clone(value) for name, value in values.items()}
    return tuple(map(clone, values)) if isinstance(values, tuple) else values


def tensor_bytes(values):
    """Of all tensors in nested dictionaries and tuples."""
    if torch.is_tensor(values):
        return values.numel() * values.element_size()
    if isinstance(values, dict):
        values = tuple(values.values())
    return sum(map(tensor_bytes, values)) if isinstance(values, tuple) else 0


def error(outputs, expected):
    """The largest relative error of a tensor, or of several."""
    outputs, expected = (x if isinstance(x, tuple) else (x,) for x in (outputs, expected))
    return max(
        ((out.double() - truth).norm() / truth.norm()).item() for out, truth in zip(outputs, expected, strict=True)
    )
