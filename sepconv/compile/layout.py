"""Where a program's memory lies in one arena: pieces that are needed at different times share their place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sepconv.compile.program import Program
from sepconv.compile.slices import Slices, slice_batch

_ALIGNMENT = 64


@dataclass(frozen=True)
class Region:
    """The part of the arena that a piece of memory takes. ``images``: so many take turns in it, see ``slices``.

    ``first`` and ``last`` are the steps between which it must be kept.
    """

    bytes: int
    first: int
    last: int
    images: int = 1
    offset: int = 0

    def meets(self, other: Region) -> bool:
        """Whether both are needed at some time."""
        return other.first <= self.last and self.first <= other.last


@dataclass(frozen=True)
class Arena:
    """The regions of a program's memories, the size of all together, and which inputs are copied into theirs.

    The first ``slices.steps`` steps run for each of ``slices.images`` in turn.
    """

    regions: tuple[Region, ...]
    bytes: int
    copied: tuple[int, ...]
    slices: Slices


def lay_out(program: Program) -> Arena:
    """Choose a region for each of the program's memories."""
    copied, slices = _copied(program), slice_batch(program)
    unused = {place.memory for i, place in enumerate(program.inputs) if i not in copied}
    lives = lifetimes(program)
    regions = [Region(0 if i in unused else size, *lives[i]) for i, size in enumerate(program.memories)]
    return _assigned(_sliced(program, regions, slices), copied, slices)


def lifetimes(program: Program) -> list[tuple[int, int]]:
    """For each memory the step that writes it (-1 for the network's inputs) and the last that reads it."""
    first, last = ([-1] * len(program.memories) for _ in range(2))
    for i, step in enumerate(program.steps):
        for place in (*step.inputs, *step.outputs):
            if isinstance(place.memory, int):
                last[place.memory] = i
        for place in step.outputs:
            if isinstance(place.memory, int) and first[place.memory] < 0:
                first[place.memory] = i
    for output in program.outputs:
        if isinstance(output.place.memory, int):
            last[output.place.memory] = len(program.steps)
    return list(zip(first, last, strict=True))


def _copied(program: Program) -> tuple[int, ...]:
    """Inputs that any step but the direct one reads; the others need no memory."""
    steps = program.steps if program.direct is None else program.steps[1:]
    read = {place.memory for step in steps for place in step.inputs}
    read |= {output.place.memory for output in program.outputs}
    return tuple(i for i, place in enumerate(program.inputs) if place.memory in read)


def _sliced(program: Program, regions: Sequence[Region], slices: Slices) -> list[Region]:
    """Values that only steps see which run image by image take the memory of one image."""
    kept = {place.memory for place in (*program.inputs, *(output.place for output in program.outputs))}
    found = []
    for i, region in enumerate(regions):
        if region.first < slices.steps:
            if region.last < slices.steps and i not in kept:
                region = replace(region, bytes=region.bytes // slices.images, images=slices.images)
            else:
                # The first image's share is written, or still read, when the last image begins.
                region = replace(region, first=min(region.first, 0), last=max(region.last, slices.steps - 1))
        found.append(region)
    return found


def _assigned(regions: Sequence[Region], copied: tuple[int, ...], slices: Slices) -> Arena:
    """Offsets in one arena: large pieces first, each at the lowest place that is free while it is needed."""
    placed: dict[int, Region] = {}
    for i in sorted(range(len(regions)), key=lambda i: -regions[i].bytes):
        placed[i] = replace(regions[i], offset=_lowest(regions[i], placed.values()))
    size = max((region.offset + region.bytes for region in placed.values()), default=0)
    return Arena(tuple(placed[i] for i in range(len(regions))), size, copied, slices)


def _lowest(region: Region, placed: Iterable[Region]) -> int:
    offset = 0
    for other in sorted((other for other in placed if region.meets(other)), key=lambda other: other.offset):
        if offset + region.bytes <= other.offset:
            break
        offset = max(offset, -(-(other.offset + other.bytes) // _ALIGNMENT) * _ALIGNMENT)
    return offset
