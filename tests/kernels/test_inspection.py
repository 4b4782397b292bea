"""How inspections are told apart, judged and put into tables."""

import dataclasses

import pytest
from cogvx_kernels.triton import why_unavailable

if why_unavailable() is not None:
    pytest.skip(why_unavailable(), allow_module_level=True)

from cogvx_kernels import boards, inspection_report, pipes
from cogvx_kernels.inspection import Inspection, LoopCost
from cogvx_kernels.machine_code import Resources
from cogvx_kernels.traffic import Traffic


def inspection(constants=None, loops=(), traffic=None, **overrides):
    resources = Resources(64, 0, 0, 2048, 8, "registers", {}, {"load 128": 2})
    one = Inspection("kernel", "sm_80", "4 warps", constants or {}, "float16", 4, resources, loops, traffic)
    return dataclasses.replace(one, **overrides)


def loop(tensor, special, address=16, instructions=10):
    cycles = dict.fromkeys(pipes.PIPES, 0.0) | {"tensor": tensor, "special": special}
    return LoopCost(address, pipes.Cost(instructions, cycles, macs=tensor * 1024, unknown={"FROB": 2}))


def test_labels_say_what_differs():
    first, second = (inspection({"DIM": 64, "OUT": out, "bias": None, "x": "int8"}) for out in (3, 512))
    assert inspection_report.label(first, [first]) == "kernel"
    assert inspection_report.label(first, [first, second]) == "kernel OUT 3"
    third = inspection({"DIM": 64, "OUT": 3, "bias": "float16", "x": "float16"})
    assert inspection_report.label(first, [first, third]) == "kernel no bias, x int8"


def test_the_main_loop_is_the_one_with_the_products():
    one = inspection(loops=(loop(0, 500, instructions=99), loop(60, 100), loop(50, 10)))
    assert one.tensor_ceiling == 0.6 and one.meets_goal is False
    assert inspection(loops=(loop(70, 100),)).meets_goal is True


def test_a_kernel_without_products_is_judged_by_its_bytes():
    moved = Traffic(requested=9, moved=4.4, least=4, program=128)
    assert inspection(loops=(loop(0, 5),), traffic=moved).meets_goal is True
    assert inspection(loops=(loop(0, 5),), traffic=dataclasses.replace(moved, moved=4.5)).meets_goal is False
    assert inspection(loops=(loop(0, 5),)).meets_goal is None


def test_tables_name_unknown_opcodes_and_missing_pipes():
    _, rows = inspection_report.loop_rows([inspection(loops=(loop(60, 100),))])
    assert rows[0][-3:] == ["special", "60%", "2 FROB"]
    amd = inspection(target="gfx942", note="not known")
    assert inspection_report.loop_rows([amd])[1] == []
    assert inspection_report.markdown([amd]).endswith("gfx942: not known.")
    assert inspection_report.as_json([amd])[0]["tensor_ceiling"] is None


def test_boards_are_found_by_the_name_that_the_driver_gives():
    assert boards.board("NVIDIA A100-SXM4-80GB").bandwidth == 2039
    assert boards.board("NVIDIA A100-SXM4-40GB").bandwidth == 1555
    assert boards.board("NVIDIA A10").target == "sm_86" and boards.board("NVIDIA A10G") is None
    assert boards.board("NVIDIA H100 80GB HBM3").half == 989
    assert boards.board("NVIDIA H100 PCIe").half == 756 and boards.board("Some GPU") is None
    assert {boards.board(name).target for name in boards.REFERENCE.values()} == set(pipes.RATES)


@pytest.mark.parametrize("board", boards.BOARDS, ids=lambda board: board.matches)
def test_datasheets_agree_with_the_rates_of_a_multiprocessor(board):
    """Multiply-adds a clock by multiprocessors and clock are the sheet's FLOP/s; GeForce sums fp32 at half the rate."""
    rates = pipes.RATES[board.target].macs
    geforce = 2 if board.matches.startswith("RTX") else 1
    flop = 2 * board.multiprocessors * board.clock * 1e-3
    assert board.half == pytest.approx(flop * rates["half"] / geforce, rel=0.02)
    assert board.int8 == pytest.approx(flop * rates["int8"], rel=0.02)
