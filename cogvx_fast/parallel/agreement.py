"""What all processes must have in common before they make a clip together, and how they come to have it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

# Arguments that may differ: they do not change the clip.
_OF_THE_PROCESS = ("callback_on_step_end",)


def check_alike(arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError at every process, unless all were called with the same arguments.

    Where they differ, a clip would be put together of different ones, or processes would wait for each other for ever.

    Args:
        arguments: of the call, by name. Numbers, texts, tensors, pictures and the state of generators are compared.
    """
    own = {name: _digest(value) for name, value in arguments.items() if name not in _OF_THE_PROCESS}
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, own)
    names = {name for each in everybody for name in each}
    differing = sorted(name for name in names if len({each.get(name) for each in everybody}) > 1)
    if differing:
        raise ValueError(
            f"the processes were called with different arguments: {', '.join(differing)}; with EngineConfig.parallel"
            " all of them make the same call, with generators of the same seed"
        )


def share_noise(device: torch.device) -> None:
    """Set torch's own generators, of the CPU and of `device`, everywhere to what they are at the first process.

    A call without a generator draws from these; each process has seeded them by itself.
    """
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    dist.broadcast_object_list(states, src=0)
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def made_by_first(make: Callable[[], Any], device: torch.device) -> Any:
    """What `make` gives at the first process, at all of them; nowhere else it is called.

    Args:
        make: returns a tensor, None, or a tuple of these.
        device: where their tensors go.

    Raises:
        RuntimeError: at the others, if `make` has raised at the first.
    """
    said: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            said = [_moved(make(), torch.device("cpu"))]
        except BaseException as error:
            dist.broadcast_object_list([RuntimeError(f"the first process has failed: {error}")], src=0)
            raise
    dist.broadcast_object_list(said, src=0)
    if isinstance(said[0], RuntimeError):
        raise said[0]
    return _moved(said[0], device)


def _moved(made: Any, device: torch.device) -> Any:
    if isinstance(made, tuple):
        return tuple(_moved(part, device) for part in made)
    return made.to(device) if isinstance(made, torch.Tensor) else made


def _digest(value: Any) -> str:
    """Of what an argument is, the same for equal ones in any process."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        value = sorted(value.items())
    if isinstance(value, list | tuple):
        digest.update(struct.pack("q", len(value)))
        for part in value:
            _feed(digest, part)
        return
    digest.update(type(value).__name__.encode())
    if isinstance(value, torch.Generator):
        digest.update(value.get_state().numpy().tobytes())
    elif isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    elif hasattr(value, "tobytes"):  # pictures and arrays
        digest.update(str(getattr(value, "shape", getattr(value, "size", ""))).encode())
        digest.update(value.tobytes())
    elif isinstance(value, str | int | float | bool | bytes | type(None)):
        digest.update(repr(value).encode())
