"""In which numbers a group reads and writes: those of its edges where one kernel takes them all, else float32.

The list of backends says it, about a group on values of these sizes. What it does not take is converted before and
after the group, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from sepconv.compile.groups import ComputedGroup, Convolution, SeparableGroup
from sepconv.compile.lower import TORCH, lower_group
from sepconv.compile.numbers import BFLOAT16, FLOAT32, NumberType
from sepconv.compile.program import TensorForm

Numbers = tuple[NumberType, ...]


class Storage(NamedTuple):
    """The numbers of what a group reads and of its result, and why they are not those of the edges."""

    read: Numbers
    written: NumberType
    note: str = ""


def storage_for(group: ComputedGroup, read: Sequence[TensorForm], out: TensorForm) -> Storage:
    """How a group is computed on such edges; ``out`` has the numbers that its result is wanted in."""
    given = tuple(form.number for form in read)
    plain = Storage((FLOAT32,) * len(given), FLOAT32)
    note = ""
    for storage in _ways(group, given, out.number):
        if storage == plain:
            break
        forms = [replace(form, number=number) for form, number in zip(read, storage.read, strict=True)]
        lowered = lower_group(group, forms, replace(out, number=storage.written))
        if lowered.kernel != TORCH:
            return storage
        note = note or lowered.reason
    return plain._replace(note=f"in float32: {note}" if note else "")


def _ways(group: ComputedGroup, given: Numbers, wanted: NumberType) -> Iterator[Storage]:
    """From the one with no conversions to that of converting everything."""
    yield Storage(given, wanted)
    low = BFLOAT16 in (*given, wanted)
    if low and isinstance(group, (Convolution, SeparableGroup)):
        halves = tuple(BFLOAT16 if number == FLOAT32 else number for number in given)
        yield Storage(halves, wanted)
        if wanted == FLOAT32:
            yield Storage(halves, BFLOAT16)
    yield Storage(given, FLOAT32)
    yield Storage((FLOAT32,) * len(given), wanted)
    yield Storage((FLOAT32,) * len(given), FLOAT32)
