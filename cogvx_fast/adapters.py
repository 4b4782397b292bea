"""LoRA files of other trainers, in the names that diffusers loads; what cannot be mapped without guessing is refused.

diffusers takes keys `transformer.<module>.lora_A.weight` alone. Of others it loads nothing and goes on, and it passes
over the `alpha` beside them: W + (alpha / rank) B A is then another sum (section 4.1 of
https://arxiv.org/abs/2106.09685).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

_PREFIX = "transformer."
_WRAPPERS = ("base_model.model.", "diffusion_model.", "model.", _PREFIX)
_KOHYA = "lora_unet__"  # of VideoX-Fun and kohya's scripts: a module's path with "_" for "."
_HALVES = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_down": "lora_A",
    "lora_up": "lora_B",
    "lora.down": "lora_A",
    "lora.up": "lora_B",
}
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:(?P<half>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.(?P<adapter>\w+))?\.weight"
    r"|(?P<alpha>alpha|lora_alpha|lora\.alpha))"
)


def is_of_diffusers(keys: Collection[str]) -> bool:
    """Whether diffusers loads all of a file with these keys by itself."""
    own = re.compile(
        re.escape(_PREFIX)
        + r".+(\.lora_[AB]\.(weight|bias)|[._]lora\.(down|up)\.weight|\.lora_magnitude_vector(\.weight)?)"
    )
    return bool(keys) and all(own.fullmatch(key) for key in keys)


def to_diffusers(
    tensors: Mapping[str, torch.Tensor], transformer: nn.Module
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """The tensors under diffusers' names, and what peft's `LoraConfig` is to be told of them.

    Args:
        tensors: two matrices for each module, `(rank, in)` and `(out, rank)`, and perhaps its alpha, a number; keys as
            peft (`base_model.model.`), ComfyUI (`diffusion_model.`), kohya and VideoX-Fun (`lora_unet__`) write them,
            or without a prefix.

    Returns:
        The second is None where no alpha is there: then it is the rank, a scale of 1.

    Raises:
        ValueError: for a key that is none of these or names no module, and for half of a pair.
    """
    modules = _modules(transformer)
    shapes = _shapes(transformer)
    flat = {name.replace(".", "_"): name for name in modules}
    if not tensors:
        raise ValueError("the LoRA file is empty")
    named: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        module = None if match is None else _module(match["module"], modules, flat)
        if match is None or module is None:
            raise ValueError(_refusal(key))
        if match["half"] is None:
            if tensor.numel() != 1:
                raise ValueError(f"the LoRA file has {key!r} of shape {tuple(tensor.shape)}; must be one number")
            alphas[module] = float(tensor)
        else:
            named[f"{_PREFIX}{module}.{_HALVES[match['half']]}.weight"] = tensor
    ranks = _ranks(named)
    _check_shapes(named, shapes)
    lacking = sorted(alphas.keys() - ranks.keys())
    if lacking:
        raise ValueError(f"the LoRA file has an alpha for {lacking[0]} and no matrices")
    if not alphas:
        return named, None
    return named, _metadata(ranks, {module: alphas.get(module, float(rank)) for module, rank in ranks.items()})


def check_reaches(tensors: Mapping[str, torch.Tensor], transformer: nn.Module) -> None:
    """Raise a ValueError if a key that diffusers would take names no module of `transformer`, or one of another shape,
    as in a file for another member of the family."""
    modules = _modules(transformer)
    for key in tensors:
        name = re.split(r"\.lora", key.removeprefix(_PREFIX))[0]
        # An old form has the layer's name within: `attn1.processor.to_q_lora.down.weight`.
        if name not in modules and "_lora" not in key:
            raise ValueError(_refusal(key))
    pairs = {key: tensor for key, tensor in tensors.items() if key.endswith((".lora_A.weight", ".lora_B.weight"))}
    _ranks(pairs)
    _check_shapes(pairs, _shapes(transformer))


def _modules(transformer: nn.Module) -> set[str]:
    """Names of what can have an adapter; one that has lies below its own name."""
    return {
        name.removesuffix(".base_layer")
        for name, module in transformer.named_modules()
        if name and "lora_" not in name and hasattr(module, "weight")
    }


def _shapes(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """`(out, in)` of each linear, by its own name."""
    return {
        name.removesuffix(".base_layer"): (module.out_features, module.in_features)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    }


def _check_shapes(named: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise a ValueError for a matrix that does not fit the linear that it is for."""
    for key, tensor in named.items():
        module, half, _ = key.removeprefix(_PREFIX).rsplit(".", 2)
        if module not in shapes:
            continue
        out, inner = shapes[module]
        axis, size, expected = (1, inner, f"(rank, {inner})") if half == "lora_A" else (0, out, f"({out}, rank)")
        if tensor.ndim != 2 or tensor.shape[axis] != size:
            raise ValueError(
                f"the LoRA file has {half} of shape {tuple(tensor.shape)} for {module}; must be {expected}: it is for"
                " another model"
            )


def _module(path: str, modules: set[str], flat: Mapping[str, str]) -> str | None:
    if path.startswith(_KOHYA):
        return flat.get(path.removeprefix(_KOHYA))
    while path not in modules:
        wrapper = next((each for each in _WRAPPERS if path.startswith(each)), None)
        if wrapper is None:
            return None
        path = path.removeprefix(wrapper)
    return path


def _ranks(named: Mapping[str, torch.Tensor]) -> dict[str, int]:
    ranks: dict[str, int] = {}
    for key, tensor in named.items():
        module, half, _ = key.removeprefix(_PREFIX).rsplit(".", 2)
        other = f"{_PREFIX}{module}.{'lora_B' if half == 'lora_A' else 'lora_A'}.weight"
        if other not in named:
            raise ValueError(f"the LoRA file has {half} of {module} alone; a pair is lora_A and lora_B")
        if tensor.ndim < 2:
            raise ValueError(f"the LoRA file has {half} of shape {tuple(tensor.shape)} for {module}; must be a matrix")
        rank = tensor.shape[0 if half == "lora_A" else 1]
        if ranks.setdefault(module, rank) != rank:
            raise ValueError(f"the LoRA file has matrices of ranks {ranks[module]} and {rank} for {module}")
    return ranks


def _metadata(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """As diffusers writes it into the files of `save_lora_weights`."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        f"{_PREFIX}{name}": value
        for name, value in {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {f"^{module}": each for module, each in ranks.items() if each != rank},
            "alpha_pattern": {f"^{module}": each for module, each in alphas.items() if each != alpha},
            "target_modules": sorted(ranks),
        }.items()
    }


def _refusal(key: str) -> str:
    found = f"the LoRA file has {key!r}, "
    if key.startswith(("lora_te", "text_encoder")):
        return f"{found}of a text encoder; only the transformer can have adapters"
    if "matrix_A" in key or "matrix_B" in key:
        return f"{found}a name of SAT's; CogVideo's tools/export_sat_lora_weight.py converts such a file"
    return (
        f"{found}which is none of a pair of matrices of this transformer's; known are lora_A and lora_B, lora_down and"
        " lora_up, and alpha, after transformer., base_model.model., diffusion_model., lora_unet__ or nothing, and a"
        " module's name"
    )
