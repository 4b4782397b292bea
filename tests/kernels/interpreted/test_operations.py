"""What the tests on a GPU check there, interpreted: that they would pass with kernels that are right."""

import pytest
from cogvx_kernels import ops

from tests.kernels.operations import CASES, EVERY, HALF, Size

SIZE = Size(1, 37, 2, 5)


@pytest.mark.parametrize(("name", "dtype"), [case for case in EVERY if case[1] in HALF], ids=str)
def test_operation(name, dtype):
    case = CASES[name]
    case.assert_right(case.make(SIZE, dtype))


def test_no_operation_is_left_out():
    with_triton = {operation for operation, names in ops.IMPLEMENTATIONS.items() if "triton" in names}
    assert with_triton - {"quantized_attention"} <= CASES.keys()  # a part of `int8_attention`
