"""Memory for one call of a network at a time: the arena, and the values that lie in it."""

from __future__ import annotations

import torch
from torch import Tensor

from sepconv.compile.layout import Arena
from sepconv.compile.program import Place, Program


class ArenaMemory:
    """One arena in this process. ``whole``: all of its bytes."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self.whole = torch.empty(arena.bytes, dtype=torch.uint8)

    def tensor(self, place: Place, image: int | None = None) -> Tensor:
        """The value that lies there, or one image of it."""
        form = place.form
        if not isinstance(place.memory, int):
            memory = place.memory.tensor
            return memory.as_strided(form.shape, form.stride, memory.storage_offset() + place.offset)
        region = self._arena.regions[place.memory]
        memory = self.whole[region.offset : region.offset + region.bytes].view(form.number.storage)
        offset = memory.storage_offset() + place.offset
        if image is None and region.images == 1:
            return memory.as_strided(form.shape, form.stride, offset)
        if region.images == 1:
            offset += (image or 0) * form.stride[0]
        return memory.as_strided((1, *form.shape[1:]), form.stride, offset)


def in_order(program: Program, arena: Arena) -> list[tuple[int, int | None]]:
    """The steps in the order in which they run, with the image that each is for where they run image by image."""
    images, sliced = arena.slices
    found: list[tuple[int, int | None]] = [(i, image) for image in range(images) for i in range(sliced)]
    return found + [(i, None) for i in range(sliced, len(program.steps))]
