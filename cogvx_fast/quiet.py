"""Keeps log lines of third-party libraries that a user cannot act on out of sight while those libraries load."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

# What is said on import, to no one's benefit: torchao about GPU libraries that were built for another
# torch, torch about torchao's enums, diffusers about tensor classes that torchao no longer has.
_LOGGERS = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
# And later, when torch compiles what torchao quantized.
_LATER = r"\w+ does not implement _stable_hash_for_caching"

_lock = threading.Lock()
_inside = 0  # blocks of all threads
_restoring = contextlib.ExitStack()


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Within the block, the loggers above and what is said to none show errors only and warnings nothing; after it, not
    those of `_LATER`.

    Levels and filters are all threads': the first block of several at a time sets them, the last one puts them back.
    What others say in the meantime is heard.
    """
    global _inside
    with _lock:
        if not _inside:
            _hush()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _restoring.close()
                warnings.filterwarnings("ignore", _LATER, UserWarning)


def _hush() -> None:
    for logger in map(logging.getLogger, _LOGGERS):
        _restoring.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
    # torchao speaks by the root logger, whose level is everyone's; its filters are for what is said by it alone.
    root = logging.getLogger()
    _restoring.callback(root.removeFilter, _is_error)
    root.addFilter(_is_error)
    _restoring.enter_context(warnings.catch_warnings())
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.simplefilter("ignore", category)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
