"""Reading what the machine can do."""

import ctypes
import platform
import re
from pathlib import Path

import pytest

from cogvx_fast import machine


def test_cpu_features_are_read_from_the_flags():
    cpuinfo = "model name : x with amx_int8 in its name\nflags : fpu avx2 avx512f avx512_bf16 amx_bf16\n"
    assert machine.cpu_features(cpuinfo) == ["AVX2", "AVX-512", "AVX512-BF16", "AMX-BF16"]
    assert machine.cpu_features("Features : fp asimd i8mm\n") == ["NEON", "INT8 matrices"]
    assert machine.cpu_features("") == []


def test_old_gpus_are_not_promised_new_precisions():
    assert machine.gpu_features((7, 5)) == ["fp16", "int8"]
    assert machine.gpu_features((8, 6)) == ["fp16", "int8", "bf16"]


def test_free_memory_counts_swap_and_a_container_s_limit(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 900 kB\nMemAvailable:  100 kB\nSwapFree: 20 kB\n"}
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    assert machine.free_memory() == 120 * 1024
    group = "/sys/fs/cgroup/memory"
    files |= {f"{group}.max": "max\n", f"{group}.current": "5000\n", f"{group}.stat": "anon 1\ninactive_file 1000\n"}
    assert machine.free_memory() == 120 * 1024
    files[f"{group}.max"] = "9000\n"
    assert machine.free_memory() == 5000
    files[f"{group}.max"] = "3000\n"
    assert machine.free_memory() == 0
    files["/proc/meminfo"] = ""
    assert machine.free_memory() is None


def resident():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_the_heap_keeps_goes_back():
    libc, page = ctypes.CDLL(None), 4096
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(24 * page) for _ in range(1000)]  # below the size that is mapped on its own
    for block in blocks:
        ctypes.memset(block, 1, 24 * page)
    for block in blocks[:-1]:  # the last one keeps the others from being the heap's end, which goes back by itself
        libc.free(block)
    held = resident()
    machine.return_freed_memory()
    assert held - resident() > 80 * 2**20
    libc.free(blocks[-1])
