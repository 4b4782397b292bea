"""Reading what the machine can do."""

from cogvx_fast import machine


def test_cpu_features_are_read_from_the_flags():
    cpuinfo = "model name : x with amx_int8 in its name\nflags : fpu avx2 avx512f avx512_bf16 amx_bf16\n"
    assert machine.cpu_features(cpuinfo) == ["AVX2", "AVX-512", "AVX512-BF16", "AMX-BF16"]
    assert machine.cpu_features("Features : fp asimd i8mm\n") == ["NEON", "INT8 matrices"]
    assert machine.cpu_features("") == []


def test_old_gpus_are_not_promised_new_precisions():
    assert machine.gpu_features((7, 5)) == ["fp16", "int8"]
    assert machine.gpu_features((8, 6)) == ["fp16", "int8", "bf16"]
