"""Steps and pieces of memory, one after the other, while a program is written; copies and conversions where needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sepconv.compile.groups import conversion
from sepconv.compile.looks import ValueLook, broadcastable, meta_of
from sepconv.compile.numbers import NumberType
from sepconv.compile.program import Copy, ProgramStep, Work
from sepconv.kernels.case import Outline
from sepconv.kernels.halide.conv.elementwise import unreadable
from sepconv.kernels.layout import alike


class Writer:
    """What is written so far.

    Attributes:
        steps: in order.
        memories: bytes of each piece of memory.
    """

    def __init__(self) -> None:
        self.steps: list[ProgramStep] = []
        self.memories: list[int] = []
        # By the value, the numbers and the strides that it got: whoever needs the same takes that.
        self._converted: dict[tuple[object, ...], ValueLook] = {}

    def new(self, size: Tensor, strides: Tensor, number: NumberType) -> ValueLook:
        """A value that lies nowhere else."""
        look = ValueLook(meta_of(size, strides, number.storage), len(self.memories), number)
        self.memories.append(look.form.span * number.storage.itemsize)
        return look

    def step(self, work: Work, read: Sequence[ValueLook], outputs: list[ValueLook], note: str = "") -> list[ValueLook]:
        inputs, written = (tuple(look.place for look in looks) for looks in (read, outputs))
        self.steps.append(ProgramStep(work, inputs, written, note))
        return outputs

    def in_layout(self, look: ValueLook, like: Tensor) -> ValueLook:
        """The value with the strides of ``like``, copied only where it has others.

        Steps along a size of 1 become those of ``like``: they say nothing, but kernels compare them.
        """
        if alike(look.meta, like):
            return look.seen_as(look.meta.as_strided(like.shape, like.stride(), look.meta.storage_offset()))
        key = (look.place, look.number, tuple(like.stride()))
        if key not in self._converted:
            self._converted[key] = self.step(Copy(), [look], [self.new(look.meta, like, look.number)])[0]
        return self._converted[key]

    def converted(self, look: ValueLook, number: NumberType, like: Tensor | None = None) -> ValueLook:
        """The value in other numbers, with the strides of ``like`` if they are given; computed once."""
        if look.number == number:
            return look if like is None else self.in_layout(look, like)
        strides = _dense_like(look.meta if like is None else like)
        key = (look.place, number, tuple(strides.stride()))
        if key not in self._converted:
            self._converted[key] = self.put(look, self.new(look.meta, strides, number))
        return self._converted[key]

    def put(self, look: ValueLook, home: ValueLook) -> ValueLook:
        """The value at its place, copied or converted if it lies elsewhere."""
        if look.number == home.number:
            there = look.memory == home.memory and look.meta.storage_offset() == home.meta.storage_offset()
            return home if there and alike(look.meta, home.meta) else self.step(Copy(), [look], [home])[0]
        if unreadable([Outline.of(look.meta)], Outline.of(home.meta)):
            look = self.in_layout(look, broadcastable(look.meta, home.meta))
        return self.step(conversion(), [look], [home])[0]


def _dense_like(x: Tensor) -> Tensor:
    """Its numbers in their order, without gaps between them; numbers that several places share have one each."""
    return torch.empty_like(x, memory_format=torch.preserve_format)
