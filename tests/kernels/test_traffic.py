"""Bytes moved, read from Triton IR whose numbers are known."""

import pytest
from cogvx_kernels.inspect.traffic import traffic

ROWS, DIM = 1000, 60
TENSORS = {"x_ptr": ((ROWS, DIM), 2), "weight_ptr": ((DIM,), 2), "output_ptr": ((ROWS, DIM), 2)}


def ir(*body):
    """Two rows of 64 columns a program, of which 60 are there."""
    head = """
      %a = tt.splat %x_ptr : !tt.ptr<f16> -> tensor<2x1x!tt.ptr<f16>> loc(#loc1)
      %b = tt.addptr %a, %r : tensor<2x1x!tt.ptr<f16>>, tensor<2x1xi64> loc(#loc1)
      %x = tt.broadcast %b : tensor<2x1x!tt.ptr<f16>> -> tensor<2x64x!tt.ptr<f16>> loc(#loc1)
      %w = tt.splat %weight_ptr : !tt.ptr<f16> -> tensor<1x64x!tt.ptr<f16>> loc(#loc1)
      %o = tt.splat %output_ptr : !tt.ptr<f16> -> tensor<2x64x!tt.ptr<f16>> loc(#loc1)
    """
    return head + "\n".join(body)


LOAD_X = "%1 = tt.load %x, %mask, %zero : tensor<2x64x!tt.ptr<f16>> loc(#loc1)"
LOAD_W = "%2 = tt.load %w, %mask : tensor<1x64x!tt.ptr<f16>> loc(#loc1)"
STORE = "tt.store %o, %3, %mask : tensor<2x64x!tt.ptr<f16>> loc(#loc1)"


def test_one_read_and_one_write():
    found = traffic(ir(LOAD_X, LOAD_W, STORE), TENSORS)
    assert found.moved == found.least == pytest.approx(4 + 2 / ROWS)
    assert found.requested == pytest.approx(2 + 1 + 2)  # the weights once for every two rows
    assert found.over_least == 1 and found.program == 2 * DIM


def test_a_second_read_of_the_stream_is_seen():
    found = traffic(ir(LOAD_X, LOAD_X.replace("%1", "%4"), STORE), TENSORS)
    assert found.moved == 6 and found.least == 4 and found.over_least == 1.5


def test_loads_in_a_loop_say_nothing():
    loop = ["%5 = scf.for %i = %c0 to %n step %c1 iter_args(%k = %x) -> (i32) {", LOAD_X, "scf.yield %k : i32", "}"]
    assert traffic(ir(*loop, STORE), TENSORS) is None
    assert traffic(ir("scf.if %c {", LOAD_X, "}", STORE), TENSORS) is not None


def test_a_kernel_that_stores_nothing_has_no_traffic():
    assert traffic(ir(LOAD_X), TENSORS) is None
