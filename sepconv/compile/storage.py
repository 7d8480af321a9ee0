"""In which numbers a group reads and writes: those of its edges where one kernel takes them all, else float32.

The list of backends says it, about a group on values of these sizes. What it does not take is converted before and
after the group, and the reason is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from sepconv.compile.groups import ComputedGroup, rounds_inside
from sepconv.compile.lower import TORCH, lower_group
from sepconv.compile.numbers import BFLOAT16, FLOAT32, NumberType
from sepconv.compile.program import TensorForm

Numbers = tuple[NumberType, ...]
# To convert a number takes as long as so many multiply-adds in float32 over those in bfloat16, and the call of a
# kernel as long as so many.
_MACS_PER_CONVERSION, _FEW_MACS = 32, 100_000


class Storage(NamedTuple):
    """The numbers of what a group reads and of its result, and why they are not those of the edges."""

    read: Numbers
    written: NumberType
    note: str = ""

    def noted(self, reason: str) -> str:
        """The note; where all is float32 for another ``reason``, that."""
        plain = {self.written, *self.read} == {FLOAT32}
        return self.note or (f"in float32: {reason}" if plain and reason else "")


def storage_for(group: ComputedGroup, read: Sequence[TensorForm], out: TensorForm) -> Storage | None:
    """How a group is computed on such edges; ``out`` has the numbers that its result is wanted in.

    None for one that rounds in the middle and that no kernel computes: it is more than one step.
    """
    given = tuple(form.number for form in read)
    plain = Storage((FLOAT32,) * len(given), FLOAT32)
    note = ""
    for storage in _ways(given, out.number, _pays(group, read, out)):
        if storage == plain and not rounds_inside(group):
            break
        forms = [replace(form, number=number) for form, number in zip(read, storage.read, strict=True)]
        lowered = lower_group(group, forms, replace(out, number=storage.written))
        if lowered.kernel != TORCH:
            lost = any(now == FLOAT32 != before for before, now in zip(given, storage.read, strict=True))
            return storage._replace(note=f"reads float32: {note}" if lost else "")
        note = note or lowered.reason
    if rounds_inside(group):
        return None
    return plain._replace(note=f"in float32: {note}" if note else "")


def _pays(group: ComputedGroup, read: Sequence[TensorForm], out: TensorForm) -> bool:
    """Whether a product of bfloat16 gains more than is lost where what it reads is brought to it first."""
    converted = sum(math.prod(form.shape) for form in read if form.number == FLOAT32)
    return group.macs(out.shape) > max(_FEW_MACS, _MACS_PER_CONVERSION * converted)


def _ways(given: Numbers, wanted: NumberType, pays: bool) -> Iterator[Storage]:
    """From the one with no conversions to that of converting everything."""
    yield Storage(given, wanted)
    halves = tuple(BFLOAT16 if number == FLOAT32 else number for number in given)
    if BFLOAT16 in (*given, wanted) and pays:
        yield Storage(halves, wanted)
        if wanted == FLOAT32:
            yield Storage(halves, BFLOAT16)
        elif wanted == BFLOAT16:
            yield Storage((BFLOAT16,) * len(given), BFLOAT16)
    yield Storage(given, FLOAT32)
    yield Storage((FLOAT32,) * len(given), wanted)
    yield Storage((FLOAT32,) * len(given), FLOAT32)
