"""Which attention runs: the backends, what each can do, and the choice between them."""

from ..config import AttentionBackend
from .backends import CAPABILITIES, Capability, Resolution, check_available, resolve

__all__ = ["CAPABILITIES", "AttentionBackend", "Capability", "Resolution", "check_available", "resolve"]
