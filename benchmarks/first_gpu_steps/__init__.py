"""The steps of `first_gpu.py`, in the order in which their answers matter."""

from __future__ import annotations

from collections.abc import Callable

from .kernels import attention, eight_bits, profile
from .models import demo, dit, right, vae, whole
from .setting import Setting

STEPS: dict[str, Callable[[Setting], bool]] = {
    "right": right,
    "demo": demo,
    "attention": attention,
    "dit": dit,
    "vae": vae,
    "8bit": eight_bits,
    "profile": profile,
    "whole": whole,
}
