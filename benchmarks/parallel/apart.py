"""What two processes on one machine cost where they exchange nothing: the part of splitting that no code can save.

    torchrun --nproc-per-node 2 benchmarks/parallel/apart.py [WORKLOAD] [--toy]

One process decodes a workload's clip on all threads; two decode it in bands; two decode half of its rows each, knowing
nothing of each other. What the bands take beyond the halves is the exchange and what is computed twice; what the halves
take beyond the whole is what two processes lose to each other: caches, memory, each its own copy of the weights.
"""

import argparse
import dataclasses
import os
import statistics
import time

import torch
import torch.distributed as dist

from cogvx_fast import EngineConfig, ParallelConfig, accelerate
from cogvx_fast.bench.reference import STAGES, build_pipeline
from cogvx_fast.bench.workloads import WORKLOADS

RUNS, DECODE = 3, STAGES["vae-decode"]


def main() -> None:
    """Measure in turns; the first process prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "workload", nargs="?", default="vae-tall", choices=[n for n in WORKLOADS if n.startswith("vae")]
    )
    parser.add_argument("--toy", action="store_true", help="a rehearsal, whose times say nothing")
    arguments = parser.parse_args()
    workload = WORKLOADS[arguments.workload]
    workload = workload.rehearsal() if arguments.toy else workload
    half = dataclasses.replace(workload, height=workload.height // 2)
    cores = os.cpu_count() or 1
    dist.init_process_group("gloo")
    size, is_first = dist.get_world_size(), dist.get_rank() == 0
    if size != 2:
        parser.error(f"{size} processes; must be 2: torchrun --nproc-per-node 2")
    pipe = build_pipeline(workload, torch.float32, torch.device("cpu"))
    alone = accelerate(pipe, engine=EngineConfig())
    together = accelerate(pipe, engine=EngineConfig(parallel=ParallelConfig(guidance=2)))
    calls = {
        "one process": DECODE.make(alone, workload, torch.float32),
        "2 bands": DECODE.make(together, workload, torch.float32),
        "2 halves apart": DECODE.make(alone, half, torch.float32),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(1 + RUNS):
        for name, call in calls.items():
            whole = name == "one process"
            torch.set_num_threads(cores if whole else max(1, cores // 2))
            dist.barrier()
            started = time.perf_counter()
            if is_first or not whole:
                call(number)
            dist.barrier()
            if number > 0:  # the first one warms up
                times[name].append(time.perf_counter() - started)
    if is_first:
        for name, taken in times.items():
            seconds = statistics.median(taken)
            print(f"{name}: {seconds:.2f} s, {seconds / statistics.median(times['2 halves apart']):.2f} of the halves")
    dist.destroy_process_group()


if __name__ == "__main__":
    with torch.no_grad():
        main()
