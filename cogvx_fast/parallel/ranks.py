"""Who this process is among those that make one clip, and the groups in which they talk."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from .degrees import ALONE, ParallelConfig

# By torch's group of all processes, which a new start replaces.
_made: weakref.WeakKeyDictionary[Any, dict[tuple, Ranks]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Axis:
    """Processes that share out one thing among them.

    Attributes:
        size: how many they are.
        index: which of them this one is, from 0.
        group: by its name, as collectives within `torch.compile` take it; empty for one process.
    """

    size: int = 1
    index: int = 0
    group: str = ""


@dataclass(frozen=True)
class Ranks:
    """The place of this process.

    Attributes:
        config: the degrees.
        everyone: all processes; bands of the autoencoder are theirs.
        guidance, ulysses, ring: those that share the batch, the heads, and the keys and values.
        sequence: those that share the rows of the stream, of a ring's piece its ulysses' in a row.
    """

    config: ParallelConfig
    everyone: Axis = Axis()
    guidance: Axis = Axis()
    ring: Axis = Axis()
    ulysses: Axis = Axis()
    sequence: Axis = Axis()

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.everyone.index == 0


def processes() -> int:
    """How many processes `torch.distributed` has; 1 where it was not started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def ranks_of(config: ParallelConfig, device: torch.device) -> Ranks | None:
    """The place of this process, or None for one alone. All processes call it, with the same degrees.

    Neighbours by number are those that exchange most: on a machine they are nearest.

    Args:
        device: on which tensors are exchanged.
    """
    if config.processes == 1:
        return None
    world = dist.group.WORLD
    made = _made.setdefault(world, {})
    key = (config, device.type)
    if key not in made:
        shape = config.guidance, config.ring, config.ulysses
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("guidance", "ring", "ulysses"))
        sequence = mesh["ring", "ulysses"]._flatten("sequence") if config.sequence > 1 else None
        made[key] = Ranks(
            config,
            everyone=_axis(world),
            guidance=_axis(mesh.get_group("guidance")),
            ring=_axis(mesh.get_group("ring")),
            ulysses=_axis(mesh.get_group("ulysses")),
            sequence=Axis() if sequence is None else _axis(sequence.get_group()),
        )
    return made[key]


def _axis(group: dist.ProcessGroup | None) -> Axis:
    assert group is not None
    return Axis(group.size(), group.rank(), group.group_name)


__all__ = ["ALONE", "Axis", "Ranks", "processes", "ranks_of"]
