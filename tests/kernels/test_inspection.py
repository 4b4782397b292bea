"""How inspections are told apart, judged and put into tables."""

import dataclasses

import pytest
from cogvx_kernels._triton import why_unavailable

if why_unavailable() is not None:
    pytest.skip(why_unavailable(), allow_module_level=True)

from cogvx_kernels import targets
from cogvx_kernels.inspect import pipes, report
from cogvx_kernels.inspect.inspection import Inspection, LoopCost
from cogvx_kernels.inspect.machine_code import Resources
from cogvx_kernels.inspect.traffic import Traffic


def inspection(constants=None, loops=(), traffic=None, **overrides):
    resources = Resources(64, 0, 0, 2048, 8, "registers", {}, {"load 128": 2})
    one = Inspection("kernel", "sm_80", "4 warps", constants or {}, "float16", 4, resources, loops, traffic)
    return dataclasses.replace(one, **overrides)


def loop(tensor, special, address=16, instructions=10):
    cycles = dict.fromkeys(pipes.PIPES, 0.0) | {"tensor": tensor, "special": special}
    return LoopCost(address, pipes.Cost(instructions, cycles, macs=tensor * 1024, unknown={"FROB": 2}))


def test_labels_say_what_differs():
    first, second = (inspection({"DIM": 64, "OUT": out, "bias": None, "x": "int8"}) for out in (3, 512))
    assert report.label(first, [first]) == "kernel"
    assert report.label(first, [first, second]) == "kernel OUT 3"
    third = inspection({"DIM": 64, "OUT": 3, "bias": "float16", "x": "float16"})
    assert report.label(first, [first, third]) == "kernel no bias, x int8"


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
    _, rows = report.loop_rows([inspection(loops=(loop(60, 100),))])
    assert rows[0][-3:] == ["special", "60%", "2 FROB"]
    amd = inspection(target="gfx942", note="not known")
    assert report.loop_rows([amd])[1] == []
    assert report.markdown([amd]).endswith("gfx942: not known.")
    assert report.as_json([amd])[0]["tensor_ceiling"] is None


def test_boards_are_found_by_the_name_that_the_driver_gives():
    assert targets.board("NVIDIA A100-SXM4-80GB").bandwidth == 2039
    assert targets.board("NVIDIA A100-SXM4-40GB").bandwidth == 1555
    assert targets.board("NVIDIA A10").multiprocessors == 72 and targets.board("NVIDIA A10G") is None
    assert targets.board("NVIDIA H100 80GB HBM3").half == 989
    assert targets.board("NVIDIA H100 PCIe").half == 756 and targets.board("Some GPU") is None
    assert all(target.boards for target in targets.TARGETS.values() if target.rates is not None)


BOARDS = [(target.rates, board) for target in targets.TARGETS.values() for board in target.boards]


@pytest.mark.parametrize(("rates", "board"), BOARDS, ids=[board.matches for _, board in BOARDS])
def test_datasheets_agree_with_the_rates_of_a_multiprocessor(rates, board):
    """Multiply-adds a clock by multiprocessors and clock are the sheet's FLOP/s; GeForce sums fp32 at half the rate."""
    geforce = 2 if board.matches.startswith("RTX") else 1
    flop = 2 * board.multiprocessors * board.clock * 1e-3
    assert board.half == pytest.approx(flop * rates.macs["half"] / geforce, rel=0.02)
    assert board.int8 == pytest.approx(flop * rates.macs["int8"], rel=0.02)
