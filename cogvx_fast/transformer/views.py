"""Several weights in one piece of memory, of which each becomes a view: no copy is left."""

from __future__ import annotations

import torch


@torch.no_grad()
def as_views(parameters: list[torch.Tensor | None]) -> torch.Tensor | None:
    """One tensor of all `parameters`, one after another along their first axis; each becomes a view of it.

    Parameters that are neighbours in memory already stay where they are. None where there are none.
    """
    if parameters[0] is None:
        return None
    first, size = parameters[0], parameters[0].numel() * parameters[0].element_size()
    places = [p.data_ptr() for p in parameters]
    same_memory = len({p.untyped_storage().data_ptr() for p in parameters}) == 1
    if same_memory and places == [places[0] + i * size for i in range(len(parameters))]:
        rows = sum(p.shape[0] for p in parameters)
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
    whole = torch.cat([p.detach() for p in parameters])
    for parameter, part in zip(parameters, whole.split([p.shape[0] for p in parameters]), strict=True):
        parameter.data = part
    return whole
