"""CogVideoX, fast and faithful: the same calls and checkpoints as diffusers, the same result.

Names load what they need when first used, so that `import cogvx_fast` itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_WHERE = {
    "FastCogVideoXPipeline": ".pipelines",
    "FastCogVideoXImageToVideoPipeline": ".pipelines",
    "FastCogVideoXVideoToVideoPipeline": ".pipelines",
    "FastCogVideoXFunControlPipeline": ".pipelines",
    "FastCogVideoXFunInpaintPipeline": ".pipelines",
    "accelerate": ".pipelines",
    "EngineConfig": ".config",
    "ParallelConfig": ".parallel.degrees",
    "demo_checkpoint": ".demo",
}
__all__ = [
    "EngineConfig",
    "FastCogVideoXFunControlPipeline",
    "FastCogVideoXFunInpaintPipeline",
    "FastCogVideoXImageToVideoPipeline",
    "FastCogVideoXPipeline",
    "FastCogVideoXVideoToVideoPipeline",
    "ParallelConfig",
    "accelerate",
    "demo_checkpoint",
]

if TYPE_CHECKING:
    from .config import EngineConfig
    from .demo import demo_checkpoint
    from .parallel.degrees import ParallelConfig
    from .pipelines import (
        FastCogVideoXFunControlPipeline,
        FastCogVideoXFunInpaintPipeline,
        FastCogVideoXImageToVideoPipeline,
        FastCogVideoXPipeline,
        FastCogVideoXVideoToVideoPipeline,
        accelerate,
    )


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'cogvx_fast' has no attribute {name!r}")
    from .quiet import quiet_imports

    with quiet_imports():
        value = getattr(importlib.import_module(_WHERE[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
