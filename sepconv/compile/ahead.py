"""All kernels of a network at once, before the first is bound: several processes compile them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sepconv.compile.bind import BoundStep, ask_for
from sepconv.compile.instance import empty
from sepconv.compile.layout import Arena
from sepconv.compile.lower import Lowered
from sepconv.compile.memory import ArenaMemory
from sepconv.compile.program import Program
from sepconv.compile.store import Store
from sepconv.kernels.halide.jit import ahead


@contextmanager
def built_ahead(program: Program, arena: Arena, lowered: Sequence[Lowered], store: Store) -> Iterator[None]:
    """Weights that are packed on the way are there for those who bind in this context."""
    memory = ArenaMemory(arena)
    held: list[BoundStep | None] = []
    with ahead.noted() as asked:
        for i, (step, how) in enumerate(zip(program.steps, lowered, strict=True)):
            image = 0 if i < arena.slices.steps else None
            read = [memory.tensor(place, image) for place in step.inputs if not program.is_direct(i)]
            if program.is_direct(i):
                given = empty(program.given[program.direct or 0])
                read = [given if image is None else given[:1]]
            held.append(ask_for(how, read, memory.tensor(step.outputs[0], image), store))
    ahead.build(asked)
    yield
