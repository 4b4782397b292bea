"""What the packages make of nothing is what they say it is, whatever torch's defaults are.

`torch.set_default_dtype` and `torch.set_default_device` belong to the user: a tensor that takes them is of another size
than C++ was told, or on another device than the rest.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# torch's functions that make a tensor from sizes or from Python's numbers.
FACTORIES = frozenset(
    [
        *("empty", "empty_permuted", "empty_strided", "full", "ones", "zeros", "eye", "tril_indices", "triu_indices"),
        *("arange", "linspace", "logspace", "range", "rand", "randint", "randn", "randperm"),
        *("as_tensor", "asarray", "scalar_tensor", "tensor"),
        *(f"{name}_window" for name in ("bartlett", "blackman", "hamming", "hann", "kaiser")),
    ]
)
# Constructors that take the defaults and cannot be told otherwise.
LEGACY = frozenset(f"{kind}Tensor" for kind in ("", "Float", "Double", "Half", "BFloat16", "Int", "Long", "Byte"))


def offenders(source):
    """Where a factory is used without both names, and what is written there, by line."""
    tree = ast.parse(source)
    named = {"dtype", "device"}
    complete = {
        node.func
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and named <= {keyword.arg for keyword in node.keywords}
    }
    called = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            # Also where it is handed on without being called.
            if (node.attr in FACTORIES and node not in complete) or (node.attr in LEGACY and node in called):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            yield from ((node.lineno, f"from torch import {a.name}") for a in node.names if a.name in FACTORIES)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.empty(3, dtype=d, device=e)", []),
        ("torch.empty(3)\ntorch.zeros(3, dtype=d)\ntorch.full((), 1, device=e)", [1, 2, 3]),
        ("x.new_zeros(3); torch.empty_like(x); numpy.zeros(3); torch.Generator()", []),
        ("def f(x: torch.Tensor) -> torch.Tensor: return torch.FloatTensor(3)", [1]),
        ("map(torch.empty, sizes)", [1]),
        ("functools.partial(torch.empty, device=e)", [1]),
        ("torch.empty(3, **options)", [1]),
        ("from torch import nn\nfrom torch import arange, nn", [2]),
        ("torch.nn.Parameter(torch.tensor(1.0))", [1]),
    ],
)
def test_what_takes_the_defaults_is_seen(source, found):
    assert [line for line, _ in offenders(source)] == found


def test_every_factory_names_dtype_and_device():
    roots = (ROOT / "cogvx_fast", ROOT / "kernels" / "cogvx_kernels")
    paths = [path for root in roots for path in sorted(root.rglob("*.py"))]
    assert len(paths) > 100
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in paths
        for line, what in offenders(path.read_text(encoding="utf-8"))
    ]
    assert not found, "without dtype= and device=:\n" + "\n".join(found)
