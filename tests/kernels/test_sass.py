"""The reading of machine code, on snippets whose counts and cycles are known."""

import pytest
from cogvx_kernels.inspect import pipes, sass
from cogvx_kernels.targets import TARGETS

HEAD = '\t.section\t.text.kernel,"ax",@progbits\nkernel:\n.text.kernel:\n'


def code(*lines):
    """What nvdisasm prints: an instruction every 16 bytes, a line that ends in a colon is a label."""
    text, address = HEAD, 0
    for line in lines:
        if line.endswith(":"):
            text += f"{line}\n"
            continue
        guard = f"{line.split()[0]:>22} " if line.startswith("@") else " " * 23
        text += f"        /*{address:04x}*/{guard}{line.split(' ', 1)[1] if line.startswith('@') else line} ;\n"
        address += 16
    return text


# Two loops in an outer one, a loop that waits behind the end and jumps back, and a last branch to itself.
NESTED = code(
    "MOV R1, c[0x0][0x28]",
    ".L_outer:",
    "IADD3 R2, R2, 0x1, RZ",
    ".L_first:",
    "FFMA R3, R4, R5, R3",
    "@!PT LDS RZ, [RZ]",
    "@P0 BRA `(.L_first)",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR7+0x10200], R4",
    "@!P5 BRA `(.L_wait)",
    ".L_back:",
    "NOP",
    ".L_second:",
    "MUFU.EX2 R6, R6",
    "BRA.U UP0, `(.L_second)",
    "@P1 BRA `(.L_outer)",
    "EXIT",
    ".L_wait:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR7+0x10200], R4",
    "@!P5 BRA `(.L_wait)",
    "BRA `(.L_back)",
    ".L_end:",
    "BRA `(.L_end)",
    "NOP",
)


def priced(text, target="sm_80", num_warps=4):
    program = sass.parse(text)
    return pipes.cost(program.instructions, program, TARGETS[target].rates, num_warps)


def test_instructions():
    program = sass.parse(NESTED)
    assert [i.name for i in program.instructions[:4]] == ["MOV", "IADD3", "FFMA", "LDS"]
    assert program.instructions[2].address == 0x20 and program.instructions[2].operands == "R3, R4, R5, R3"
    assert program.instructions[3].guard == "@!PT" and not program.instructions[3].runs
    assert program.labels[".L_first"] == 2


def test_inner_loops_only():
    loops = sass.inner_loops(sass.parse(NESTED))
    assert [[i.name for i in loop.instructions] for loop in loops] == [["FFMA", "LDS", "BRA"], ["MUFU", "BRA"]]
    assert [loop.address for loop in loops] == [0x20, 0x80]


def test_a_branch_backwards_that_no_loop_needs_is_none():
    """Out of line, entered by a jump forward: its header does not dominate it."""
    text = code("@P0 BRA `(.L_far)", ".L_near:", "FADD R1, R1, R2", "EXIT", ".L_far:", "NOP", "BRA `(.L_near)")
    assert sass.inner_loops(sass.parse(text)) == []


def test_a_loop_left_by_a_call_goes_on_behind_it():
    text = code(
        "@!P2 CALL.REL.NOINC `(.L_out)", "BRA `(kernel)", ".L_out:", "FADD R1, R1, R2", "@P0 BRA `(.L_out)", "EXIT"
    )
    assert [len(loop.instructions) for loop in sass.inner_loops(sass.parse(text))] == [2, 2]


def test_what_is_no_machine_code_is_refused():
    with pytest.raises(ValueError, match="no instructions"):
        sass.parse("// nothing")
    with pytest.raises(ValueError, match="more than one kernel"):
        sass.parse(code("EXIT") + code("EXIT"))


@pytest.mark.parametrize(
    ("target", "instruction", "pipe", "cycles"),
    [
        # A warp has 32 lanes, four of them a program: 128 lanes over the published results of a clock.
        ("sm_80", "FFMA R1, R2, R3, R1", "fma", 2),
        ("sm_89", "FFMA R1, R2, R3, R1", "fma", 1),
        ("sm_100", "FFMA2 R2, R4.F32x2.HI_LO, R6.F32x2.HI_LO, R2.F32x2.HI_LO", "fma", 2),
        ("sm_80", "HADD2.F32 R1, -RZ, R2.H0_H0", "fma", 1),
        ("sm_89", "IMAD.WIDE R4, R1, R2, R4", "fma heavy", 2),
        ("sm_80", "LOP3.LUT R1, R2, R3, RZ, 0xc0, !PT", "alu", 2),
        ("sm_80", "F2FP.BF16.F32.PACK_AB R1, R2, R3", "alu", 2),
        ("sm_80", "MUFU.EX2 R1, R2", "special", 8),
        ("sm_80", "I2F R1, R2", "special", 8),
        ("sm_80", "I2F R1, R2", "conversion", 8),
        ("sm_90", "I2FP.F32.S32 R1, R2", "special", 0),
        ("sm_80", "SHFL.BFLY PT, R1, R2, 0x2, 0x1f", "lsu", 4),
        ("sm_80", "LDS.U.128 R4, [R1]", "lsu", 16),
        ("sm_80", "LDSM.16.MT88.4 R4, [R1]", "lsu", 16),
        ("sm_80", "LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64]", "lsu", 16),
        ("sm_80", "STG.E.U16 [R2.64], R1", "lsu", 4),
        # 16 x 8 x 16 for each warp; 64 x N x K for four; tcgen05 for the program, its shape in a descriptor.
        ("sm_80", "HMMA.16816.F32.BF16 R4, R8, R10, R4", "tensor", 4 * 2048 / 1024),
        ("sm_89", "IMMA.16832.S8.S8 R4, R8.ROW, R10.COL, R4", "tensor", 4 * 4096 / 1024),
        ("sm_89", "QMMA.16832.F32.E4M3.E4M3 R4, R8, R10, R4", "tensor", 4 * 4096 / 1024),
        ("sm_90", "HGMMA.64x128x16.F32 R24, R4, gdesc[UR8], R24", "tensor", 64 * 128 * 16 / 2048),
        ("sm_90", "HGMMA.64x128x16.F32 R24, R4, gdesc[UR8], R24", "lsu", 128 * 32 / 128),
        ("sm_90", "HGMMA.64x64x16.F32 R24, gdesc[UR8], R24, gsb0", "lsu", (64 + 64) * 32 / 128),
        ("sm_90", "IGMMA.64x128x32.S8.S8 R24, gdesc[UR8], R24", "tensor", 64 * 128 * 32 / 4096),
        ("sm_80", "BAR.SYNC.DEFER_BLOCKING 0x0", "issue", 1),
        ("sm_80", "UIADD3 UR4, UR4, 0x1, URZ", "issue", 1),
    ],
)
def test_cycles(target, instruction, pipe, cycles):
    found = priced(code(instruction), target)
    assert found.cycles[pipe] == cycles and found.unknown == {} and found.instructions == 1


def test_a_tcgen05_product_is_counted_once_and_read_from_its_descriptor():
    text = code(
        "UMOV UR35, 0x8100010",  # M 128, N 64
        "UTCHMMA gdesc[UR10], gdesc[UR14], tmem[UR24], tmem[UR34], idesc[UR35], !UPT",
        "UMOV UR35, 0x8110010",  # the same with B transposed
        "UTCHMMA tmem[UR10], gdesc[UR14], tmem[UR24], tmem[UR34], idesc[UR35], UPT",
    )
    found = priced(text, "sm_100", num_warps=8)
    assert found.macs == 2 * 128 * 64 * 16 and found.cycles["tensor"] == found.macs / 4096
    assert found.cycles["lsu"] == (128 + 64 + 64) * 32 / 128


def test_a_product_of_unknown_shape_is_unknown():
    found = priced(code("UTCHMMA gdesc[UR10], gdesc[UR14], tmem[UR24], tmem[UR34], idesc[UR35], UPT"), "sm_100")
    assert found.unknown == {"UTCHMMA": 1} and found.tensor_ceiling is None


def test_unknown_opcodes_are_counted_and_take_an_issue_slot():
    found = priced(code("FROB R1, R2", "FROB.X R1, R2", "FFMA R1, R2, R3, R1", "@!PT FROB R1"))
    assert found.unknown == {"FROB": 2} and found.instructions == 3 and found.cycles["issue"] == 3


def test_the_ceiling_is_what_the_busiest_pipe_leaves():
    text = code(*["HMMA.16816.F32 R4, R8, R10, R4"] * 4, *["MUFU.EX2 R1, R2"] * 5)
    found = priced(text)
    assert (found.limit, found.tensor_ceiling) == ("special", 32 / 40)
    assert priced(code(*["HMMA.16816.F32 R4, R8, R10, R4"] * 4)).tensor_ceiling == 1
