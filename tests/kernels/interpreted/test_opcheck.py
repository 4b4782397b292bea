"""The operations as torch sees them: schema, fake implementation and autograd registration.

That they can be traced into a graph is tested where they are not interpreted, in `test_graph.py`.
"""

import pytest
import torch

from tests.kernels.budget import randn
from tests.kernels.triton_operations import operation


@pytest.fixture(autouse=True)
def outputs():
    """The plain allocator: what torch checks here are the operations, and not what they write."""


def half(*shape, seed=0):
    return randn(*shape, dtype=torch.float16, seed=seed)


STREAM, VECTOR, TABLE = half(2, 5, 16), half(16), half(2, 2, 3, 16)
SHIFT, SCALE, GATE = TABLE.unbind(2)
QUERY, KEY, VALUE = half(2, 5, 3, 2, 64).unbind(2)
NUMBERS, CHANNELS = torch.ones(2, 5, 16, dtype=torch.int8), torch.ones(16)
LINEAR = (NUMBERS, torch.ones(2, 5), torch.ones(16, 16, dtype=torch.int8), CHANNELS, VECTOR, "gelu_tanh")
COSINES, SINES, AFFINE = torch.rand(3, 64), torch.rand(3, 64), half(64)
FRAMES, TABLES, INDEX = half(1, 2, 2, 2, 16), torch.rand(1, 1, 1, 1, 16), torch.zeros(2, dtype=torch.int64)
NORM = (STREAM, VECTOR, VECTOR, SHIFT, SCALE, 2, 1e-5)
GATED_NORM = (STREAM, STREAM.clone(), GATE, None, None, SHIFT, SCALE, 2, 1e-5)
CASES = {
    "layer_norm_modulate": (*NORM, torch.empty_like(STREAM), None),
    "layer_norm_modulate in 8 bits": (*NORM, NUMBERS.clone(), torch.empty(2, 5)),
    "gated_residual": (STREAM, STREAM.clone(), GATE, 2, torch.empty_like(STREAM)),
    "gated_residual_layer_norm_modulate": (*GATED_NORM, torch.empty_like(STREAM), torch.empty_like(STREAM), None),
    "gated_residual_layer_norm_modulate in 8 bits": (
        *(*GATED_NORM, torch.empty_like(STREAM)),
        *(NUMBERS.clone(), torch.empty(2, 5)),
    ),
    "norm_rope": (QUERY, AFFINE, AFFINE, COSINES, SINES, 2, 1e-6),
    "qk_norm_rope": (QUERY, KEY, AFFINE, AFFINE, None, None, None, None, 2, 1e-6),
    "attention": (QUERY, KEY, VALUE, 0.125),
    "group_norm_statistics": (FRAMES, 4, 1e-6),
    "group_norm_modulate_silu": (FRAMES, TABLES, TABLES.clone(), INDEX, INDEX, INDEX, torch.zeros_like(FRAMES)),
    "causal_conv3d": (FRAMES, half(3, 3, 3, 3, 16), half(3), FRAMES.clone(), None, half(1, 2, 1, 2, 3), 1),
    "upsample_conv2d": (FRAMES, half(2, 2, 5, 2, 2, 16), half(5), True),
    "quantize_rows": (STREAM, torch.int8, False),
    "scaled_linear": (*LINEAR, torch.empty_like(STREAM), None),
    "scaled_linear to 8 bits": (*LINEAR, NUMBERS.clone(), torch.empty(2, 5, 1)),
    "qk_norm_rope_int8": (QUERY, KEY, AFFINE, AFFINE, None, None, COSINES, SINES, 2, 1e-6, 0.18),
    "quantize_qk": (QUERY, KEY, 0.18),
    "quantize_value": (VALUE, torch.float8_e4m3fn, True),
    "int8_attention": (
        *operation("quantize_qk")(QUERY, KEY, 0.18),
        VALUE,
        torch.rand(2, 2, 64),
        torch.rand(2, 2, 64),
        torch.zeros(1, dtype=torch.int32),
        torch.float16,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operation(name.split()[0]), CASES[name], test_utils=tests)


@pytest.mark.parametrize("name", [name for name, arguments in CASES.items() if arguments[0] is not FRAMES])
def test_empty_tensors(name):
    arguments = [x[:0] if torch.is_tensor(x) and x.ndim > 2 and x is not COSINES else x for x in CASES[name]]
    output = operation(name.split()[0])(*arguments)
    outputs = output if isinstance(output, tuple) else () if output is None else (output,)
    assert all(o.numel() == 0 for o in outputs)
