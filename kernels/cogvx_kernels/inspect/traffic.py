"""How many bytes a kernel moves for each element of its result, from its Triton IR: for kernels bound by memory.

A program's loads and stores are counted for each tensor. A result is written once, so that its elements over what one
program stores is the number of programs, with tiles beyond the ends of a tensor left out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

# A tensor up to this share of the largest result is taken to stay in L2 between the programs that read it: expert
# vectors, weights of norms, rotary tables, modulation at latent resolution.
CACHED_SHARE = 0.25

_ASSIGNED = re.compile(r"^\s*(%[\w#]+)(?::\d+)? = ([\w.]+) (%[\w#]+)")
_LOAD = re.compile(r"= tt\.(?:descriptor_)?load (%[\w#]+).*?: (.*?)(?: loc\(|$)")
_STORE = re.compile(r"^\s*tt\.(?:descriptor_)?store (%[\w#]+).*?: (.*?)(?: loc\(|$)")
_POINTERS = frozenset(["tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.make_tensor_descriptor"])
_LOOP = re.compile(r"\bscf\.(for|while)\b")
_TENSOR = re.compile(r"tensor<((?:\d+x)*)(?:!tt\.ptr<)?(\w+)")
_BITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Traffic:
    """Bytes for each element of the largest result.

    Attributes:
        requested: by loads and stores, from and to whatever level.
        moved: to and from device memory if what is small against the result stays in L2.
        least: every tensor once.
        program: elements of the largest result that one program makes.
    """

    requested: float
    moved: float
    least: float
    program: float

    @property
    def over_least(self) -> float:
        return self.moved / self.least


def traffic(ttir: str, tensors: Mapping[str, tuple[tuple[int, ...], int]]) -> Traffic | None:
    """The traffic of a kernel in Triton IR.

    Args:
        tensors: shape, and bytes of an element, of what each pointer argument points to.

    Returns:
        None where loads stand in a loop (how often it runs is not in the code), or nothing is stored to a tensor.
    """
    loaded, stored, widths, in_loop = _accesses(ttir)
    sizes = {name: (math.prod(shape), itemsize) for name, (shape, itemsize) in tensors.items()}
    results = [name for name in stored if name in sizes]
    if in_loop or not results:
        return None
    largest = max(results, key=lambda name: math.prod(sizes[name]))
    elements, itemsize = sizes[largest]
    programs = elements / stored[largest]
    requested = moved = least = 0.0
    for name in {*loaded, *stored} & set(sizes):
        once, asked = math.prod(sizes[name]), (loaded[name] + stored[name]) * programs * sizes[name][1]
        cached = name not in stored and once <= CACHED_SHARE * elements * itemsize
        requested, moved, least = requested + asked, moved + (once if cached else asked), least + once
    # A tile is as wide as the power of two above the last axis.
    there = min(1.0, tensors[largest][0][-1] / widths[largest])
    return Traffic(requested / elements, moved / elements, least / elements, stored[largest] * there)


def _accesses(ttir: str) -> tuple[Counter[str], Counter[str], dict[str, int], bool]:
    """Elements one program loads and stores of each argument, its tiles' last axis, and whether any is in a loop."""
    source: dict[str, str] = {}
    widths: dict[str, int] = {}
    loaded: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    depth, loops, in_loop = 0, [], False
    for line in ttir.splitlines():
        code = line.split(" loc(")[0]
        if _LOOP.search(code) and code.rstrip().endswith("{"):
            loops.append(depth)
        depth += code.count("{") - code.count("}")
        while loops and depth <= loops[-1]:
            loops.pop()
        if assigned := _ASSIGNED.match(line):
            if assigned[2] in _POINTERS:
                source[assigned[1]] = source.get(assigned[3], assigned[3])
            if access := _LOAD.search(line):
                in_loop |= bool(loops)
                loaded[_argument(access[1], source)] += math.prod(_tile(access[2]))
        elif access := _STORE.match(line):
            in_loop |= bool(loops)
            name, tile = _argument(access[1], source), _tile(access[2])
            stored[name] += math.prod(tile)
            widths[name] = tile[-1]
    return loaded, stored, widths, in_loop


def _argument(pointer: str, source: Mapping[str, str]) -> str:
    return source.get(pointer, pointer).removeprefix("%")


def _tile(types: str) -> list[int]:
    found = _TENSOR.search(types)
    return list(map(int, _BITS.findall(found[1]))) if found else [1]
