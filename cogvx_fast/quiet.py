"""Keeps log lines of third-party libraries that a user cannot act on out of sight while those libraries load."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

# What is said on import, to no one's benefit: torchao about GPU libraries that were built for another
# torch, torch about torchao's enums, diffusers about tensor classes that torchao no longer has.
_LOGGERS = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer", "root")
# And later, when torch compiles what torchao quantized.
_LATER = r"\w+ does not implement _stable_hash_for_caching"


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Within the block, the loggers above show errors only and warnings nothing; after it, not those of `_LATER`."""
    loggers = [logging.getLogger(None if name == "root" else name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        warnings.filterwarnings("ignore", _LATER, UserWarning)
