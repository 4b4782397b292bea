"""A clock that jumps, for processes that find this folder in PYTHONPATH: by the seconds that stand in a file.

Python imports a module of this name at its start, before anything can have kept `time.time`.
"""

import mmap
import os
import struct
import time

if path := os.environ.get("SOAK_CLOCK"):
    with open(path, "rb") as file:
        _ahead = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    _true = time.time

    def jumping() -> float:
        return _true() + struct.unpack_from("d", _ahead)[0]

    time.time = jumping
