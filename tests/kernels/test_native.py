"""Which CPU `-march=native` means, by the kernel and by compilers."""

import pytest
from cogvx_kernels._cpp import native

from tests.kernels.compiling import GXX, forget, needs_compiler

CORE = "processor\t: {}\nvendor_id\t: AuthenticAMD\nmodel\t: {}\ncpu MHz\t: {}\nflags\t: {}\n\n"
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: {}\nCPU implementer\t: 0x41\nCPU part\t: {}\n\n"


@pytest.fixture
def cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_CPUINFO", tmp_path / "cpuinfo")

    def cpu(text):
        (tmp_path / "cpuinfo").write_text(text)
        forget()
        return native.cpu()

    yield cpu
    forget()


def test_a_cpu_is_its_model_and_its_instructions(cpu):
    one = cpu(CORE.format(0, 17, 2596.1, "fpu avx2 avx512f"))
    assert one is not None and "avx512f" in one
    assert one == cpu(CORE.format(0, 17, 3100.9, "avx2 fpu avx512f") + CORE.format(1, 17, 800.0, "fpu"))
    assert one != cpu(CORE.format(0, 17, 2596.1, "fpu avx2"))
    assert one != cpu(CORE.format(0, 18, 2596.1, "fpu avx2 avx512f"))
    arm = cpu(ARM.format("asimd bf16", "0xd4f"))
    assert arm != cpu(ARM.format("asimd", "0xd4f")) and arm != cpu(ARM.format("asimd bf16", "0xd0c"))


@pytest.mark.parametrize("text", ["", "processor\t: 0\nmodel\t: 17\n\n"])
def test_a_model_alone_is_no_cpu(cpu, text):
    assert cpu(text) is None


def test_this_machine_has_one():
    assert native.cpu() is not None


@needs_compiler
def test_a_compiler_says_what_native_is():
    resolved = native.resolved(GXX)
    assert "-march=native" not in resolved and len(resolved.split()) > 1
    assert resolved == native.resolved.__wrapped__(GXX)  # no names of temporary files


@pytest.mark.parametrize(
    ("says", "resolved"),
    [
        ('"clang" "-cc1" "-target-cpu" "znver4" "-target-feature" "+avx2"', True),
        ("unknown option", False),
        ('"-march=native"', False),
    ],
)
def test_what_other_compilers_say(tmp_path, says, resolved):
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\necho '{says}' >&2\n")
    compiler.chmod(0o755)
    answer = native.resolved(str(compiler))
    assert ("znver4" in answer and "+avx2" in answer) if resolved else answer is None
    assert native.resolved(str(tmp_path / "missing")) is None
