"""Memory for one call of a prepared network at a time, and the calls that are bound to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.compile.bind import BoundStep, bind_direct, bind_step
from sepconv.compile.layout import Arena
from sepconv.compile.lower import Lowered
from sepconv.compile.memory import ArenaMemory, in_order
from sepconv.compile.program import Place, Program, TensorForm
from sepconv.compile.store import Store
from sepconv.kernels.halide.jit.machine_code import in_chains
from sepconv.system.timing import seconds


class _Run(NamedTuple):
    """A call in the order in which they are made, its step, and whether it takes the caller's own image."""

    step: int
    call: Callable[..., Any]
    direct: bool


class Instance:
    """One arena and the calls that are bound to it."""

    def __init__(self, program: Program, arena: Arena, lowered: Sequence[Lowered], store: Store) -> None:
        self._program, self._arena, self._store = program, arena, store
        self._memory, self._direct = ArenaMemory(arena), program.direct or 0
        images, sliced = arena.slices
        # By step: one call for each image where the step runs image by image, else one for all of them.
        parts = [range(images) if i < sliced else (None,) for i in range(len(program.steps))]
        bound = [[self.bind(i, lowered[i], image) for image in part] for i, part in enumerate(parts)]
        self.calls = [calls[0] for calls in bound]
        in_turn = [(i, bound[i][image or 0]) for i, image in in_order(program, arena)]
        self._runs = [_Run(i, call.run, program.is_direct(i)) for i, call in in_turn]
        self._chains: list[tuple[Callable[..., Any], bool]] = []
        for direct, group in groupby(self._runs, lambda run: run.direct):
            runs = [run.call for run in group]
            self._chains += [(run, direct) for run in (runs if direct else in_chains(runs))]
        self._copied = [(i, self.tensor(program.inputs[i])) for i in arena.copied]
        self._results = [(self.tensor(output.place), output.form) for output in program.outputs]

    def bind(self, i: int, lowered: Lowered, image: int | None = None) -> BoundStep:
        """The call of a step, for one image where the step runs image by image (the first if none is named)."""
        if image is None and i < self._arena.slices.steps:
            image = 0
        step = self._program.steps[i]
        outputs = [self.tensor(place, image) for place in step.outputs]
        if self._program.is_direct(i):
            return self._bind_direct(i, lowered, outputs[0], image)
        return bind_step(step, lowered, [self.tensor(place, image) for place in step.inputs], outputs, self._store)

    def _bind_direct(self, i: int, lowered: Lowered, out: Tensor, image: int | None) -> BoundStep:
        step, like = self._program.steps[i], empty(self._program.given[self._direct])
        if image is None:
            return bind_direct(step, lowered, like, out, self._store)
        part = slice(image, image + 1)
        call = bind_direct(step, lowered, like[part], out, self._store)
        return call._replace(run=lambda given: call.run(given[part]))

    def example(self) -> Tensor:
        """An input like the one that the first step reads where the caller holds it."""
        return filled(self._program.given[self._direct])

    def fill(self) -> None:
        """Random numbers wherever a step writes: what lies in new memory may be slow to compute with."""
        for place in self._program.places:
            if isinstance(place.memory, int) and self._arena.regions[place.memory].bytes:
                _randomise(self.tensor(place, None if self._arena.regions[place.memory].images == 1 else 0))

    def tensor(self, place: Place, image: int | None = None) -> Tensor:
        """The value that lies there, or one image of it."""
        return self._memory.tensor(place, image)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The network's outputs, in memory of their own."""
        for i, place in self._copied:
            place.copy_(inputs[i])
        for run, direct in self._chains:
            if direct:
                run(inputs[self._direct])
            else:
                run()
        outputs = [empty(form) for _, form in self._results]
        for out, (tensor, _) in zip(outputs, self._results, strict=True):
            out.copy_(tensor)
        return outputs

    def measure(self, inputs: Sequence[Tensor], repeats: int) -> list[float]:
        """Median seconds of each step, run in the network's order."""
        samples: list[list[float]] = []
        for _ in range(repeats):
            self.run(inputs)
            times = [0.0] * len(self.calls)
            for i, run, direct in self._runs:
                times[i] += seconds(partial(run, *([inputs[self._direct]] if direct else [])))
            samples.append(times)
        return [median(times) for times in zip(*samples, strict=True)]


def empty(form: TensorForm) -> Tensor:
    return torch.empty_strided(form.shape, form.stride, dtype=form.number.storage)


def filled(form: TensorForm) -> Tensor:
    """Random numbers of that form, zeros where they are whole."""
    return _randomise(empty(form))


def _randomise(x: Tensor) -> Tensor:
    return x.normal_(generator=torch.Generator().manual_seed(0)) if x.is_floating_point() else x.zero_()
