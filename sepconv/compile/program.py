"""A network for inputs of one size, rewritten and put in order: what is computed from what, in which numbers.

Plain data: values lie in numbered pieces of memory that have a size and no address yet, and weights are constants known
by their keys. ``steps`` writes a program, ``layout`` gives its memory places in one arena, ``lower`` chooses a kernel
for every step, and ``bind`` alone makes calls of all that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from sepconv.compile.groups import ComputedGroup, Elementwise, Numbers
from sepconv.compile.numbers import NumberType
from sepconv.compile.store import Constant

NO_KERNEL = "no kernel for this operation"


@dataclass(frozen=True)
class TensorForm:
    """Size, steps in memory and number type of a value, wherever it lies."""

    shape: Numbers
    stride: Numbers
    number: NumberType

    @property
    def meta(self) -> Tensor:
        """A tensor of this form without memory."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.number.storage, device="meta")

    @property
    def span(self) -> int:
        """Numbers from the first to the last, those in between included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def bytes(self) -> int:
        """Of its numbers alone, without gaps between them."""
        return math.prod(self.shape) * self.number.storage.itemsize

    def __str__(self) -> str:
        return f"{self.number}[{'x'.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Place:
    """A value, and so an edge of the network: its form, and the memory (by number) or the constant that it lies in.

    ``offset``: numbers before it there.
    """

    form: TensorForm
    memory: int | Constant
    offset: int = 0

    def __str__(self) -> str:
        where = self.memory if isinstance(self.memory, Constant) else f"m{self.memory}"
        return f"{where}{f'+{self.offset}' if self.offset else ''}:{self.form}"


@dataclass(frozen=True)
class Input:
    """In the arguments of an operation: the step's input of that number."""

    number: int


@dataclass(frozen=True)
class Operation:
    """An operation that PyTorch computes.

    Attributes:
        target: what is called.
        args: its arguments, with :class:`Input` where a value belongs.
        results: which of several results are used; None where there is one.
        reason: why no kernel of ours does it.
    """

    target: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    results: tuple[int, ...] | None = None
    reason: str = NO_KERNEL


@dataclass(frozen=True)
class Copy:
    """The same numbers with other steps in memory. ``what``: the operation that this is, "" where it is none."""

    what: str = ""


Work = ComputedGroup | Operation | Copy


@dataclass(frozen=True)
class ProgramStep:
    """Something to compute from values into others. ``note``: why not in the numbers of the edges, "" if it is."""

    work: Work
    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]
    note: str = ""

    @property
    def group(self) -> ComputedGroup | None:
        return None if isinstance(self.work, (Operation, Copy)) else self.work

    @property
    def is_conversion(self) -> bool:
        """Whether nothing but the kind of numbers changes."""
        return isinstance(self.work, Elementwise) and self.work.is_conversion

    @property
    def kind(self) -> str:
        """The group's kind, "copy", or the name of the operation."""
        if isinstance(self.work, Copy):
            return "copy"
        return str(self.work.target) if isinstance(self.work, Operation) else self.work.kind

    def __str__(self) -> str:
        name = "" if self.group is None or not self.group.name else f" {self.group.name}"
        return f"{_listed(self.outputs)} = {self.kind}{name}({_listed(self.inputs)})"


@dataclass(frozen=True)
class Output:
    """A value that is returned, and the form in which the caller gets it."""

    place: Place
    form: TensorForm


@dataclass(frozen=True)
class Program:
    """The steps in order, and what goes in and out.

    Attributes:
        steps: what is computed.
        inputs: where the network's inputs lie once they are copied there.
        given: the forms in which the caller holds them.
        outputs: what is returned.
        memories: bytes of each piece of memory; a step or an input writes each number of it once.
        direct: the input that the first step reads where the caller holds it, if it does.
    """

    steps: tuple[ProgramStep, ...]
    inputs: tuple[Place, ...]
    given: tuple[TensorForm, ...]
    outputs: tuple[Output, ...]
    memories: tuple[int, ...]
    direct: int | None = None

    def is_direct(self, step: int) -> bool:
        return step == 0 and self.direct is not None

    @property
    def places(self) -> list[Place]:
        """The values of all edges."""
        inside = [place for step in self.steps for place in (*step.inputs, *step.outputs)]
        return [*self.inputs, *inside, *(output.place for output in self.outputs)]

    @property
    def last_step(self) -> float:
        """Of the numbers of 8 bits that are returned, the largest scale; 0 where there are none."""
        returned = {output.place.memory for output in self.outputs}
        found = [
            step.inputs[0].form.number.scale or 0.0
            for step in self.steps
            if step.is_conversion and step.outputs[0].memory in returned
        ]
        return max(found, default=0.0)

    @property
    def numbers(self) -> set[NumberType]:
        """In which values are kept, constants aside."""
        return {place.form.number for place in self.places if not isinstance(place.memory, Constant)}

    def __str__(self) -> str:
        returned = _listed([output.place for output in self.outputs])
        return "\n".join([f"inputs {_listed(self.inputs)}", *map(str, self.steps), f"outputs {returned}"])


def _listed(places: tuple[Place, ...] | list[Place]) -> str:
    return ", ".join(map(str, places))
