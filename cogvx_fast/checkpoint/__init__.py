"""A checkpoint in diffusers format as its files describe it, checked before a weight is read."""

from .description import Checkpoint, describe, folder_reader, read_json
from .errors import CheckpointError
from .tensors import Stored, stored_dtype, stored_tensors

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Stored",
    "describe",
    "folder_reader",
    "read_json",
    "stored_dtype",
    "stored_tensors",
]
