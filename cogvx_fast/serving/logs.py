"""Logs for machines: a JSON object a line, with the job that it is about, whoever writes it."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from types import TracebackType
from typing import Any

logger = logging.getLogger("cogvx_fast.serving")
_FIELDS = ("job", "worker", "method", "path", "status", "seconds", "key")
_OTHERS = ("diffusers", "transformers", "huggingface_hub")  # which write plain text by handlers of their own


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= {name: record.__dict__[name] for name in _FIELDS if name in record.__dict__}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def set_up() -> None:
    """Write what is logged to standard error: all of this package and of uvicorn, warnings of others, and what ends a
    thread or the process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    root = logging.getLogger()
    root.handlers = [handler]
    for own in (logger, logging.getLogger("uvicorn")):
        own.setLevel(logging.INFO)
    for name in _OTHERS:
        other = logging.getLogger(name)
        other.handlers, other.propagate = [], True
    logging.captureWarnings(True)
    sys.excepthook = _ended
    threading.excepthook = lambda ended: _ended(ended.exc_type, ended.exc_value, ended.exc_traceback)


def is_set_up() -> bool:
    """Whether `set_up` was called in this process."""
    return any(isinstance(handler.formatter, _Lines) for handler in logging.getLogger().handlers)


def _ended(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if error is not None:
        logger.critical("ended by %s", kind.__name__, exc_info=(kind, error, trace))
