"""A network's program bound to memory of this process, with kernels scheduled for another machine.

Kernels are made twice of the same schedule. Their code for this machine says, before anything is written, whether they
fit their arguments, how much memory they take in between, and whether the network computes what the model does; the
addresses that they were bound to say where on the device their arguments lie.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.compile.bind import bind_step
from sepconv.compile.groups import Convolution
from sepconv.compile.instance import empty
from sepconv.compile.layout import lay_out
from sepconv.compile.lower import TORCH, lower
from sepconv.compile.memory import ArenaMemory, in_order
from sepconv.compile.program import Copy, Program, ProgramStep
from sepconv.compile.store import Store
from sepconv.device import loops
from sepconv.device.copies import copy_call, normalise_call
from sepconv.device.scratch import BLOCK, Scratch
from sepconv.kernels.halide.jit import code_cache, machine_code, runtime
from sepconv.kernels.halide.jit.buffers import Buffer
from sepconv.kernels.halide.jit.machine_code import Bound, Chain, Kernel
from sepconv.kernels.halide.jit.runtime import Build, hl
from sepconv.kernels.halide.schedule import machine

ARENA, WEIGHTS, INPUT, OUTPUT, PIXELS = "arena", "weights", "input", "output", "pixels"
ALIGNMENT = 64
_BEYOND = 128
"""Kernels may read a vector beyond what they were given."""


class Pointer(NamedTuple):
    """Memory on the device: one of four kinds, which of several inputs or outputs, and bytes from its start."""

    kind: str
    number: int
    offset: int


class BufferArgument(NamedTuple):
    """Where it lies, Halide's code of its numbers, and from, extent, stride and flags of each dimension."""

    where: Pointer
    code: int
    dimensions: tuple[int, ...]


class DeviceCall(NamedTuple):
    """One kernel, by number, with what it is given in order."""

    kernel: int
    arguments: tuple[BufferArgument | int | float, ...]


class KernelRecipe(NamedTuple):
    """What a kernel is made of, as ``runtime.compiled`` takes it."""

    key: Hashable
    build: Build
    old: bool


@dataclass(frozen=True)
class Recording:
    """A network as calls of kernels: plain data, and how the kernels are made.

    Attributes:
        calls: in order.
        normalise: makes the input of an image of bytes, where the network has one.
        weights: all that kernels read and nobody writes.
        arena: bytes of memory for all that is written, scratch memory at its end included.
        scratch: where that begins; each of the threads has so many bytes of it.
        image: where the input lies that ``normalise`` makes.
    """

    program: Program
    recipes: tuple[KernelRecipe, ...]
    calls: tuple[DeviceCall, ...]
    normalise: DeviceCall | None
    weights: bytes
    arena: int
    scratch: int
    scratch_bytes: int
    threads: int = 1
    image: int = 0


class Normalisation(NamedTuple):
    """How images become the network's input: ``(pixel / 255 - mean) / std``, channels reversed where it is ``bgr``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False


class Refused(NamedTuple):
    """A step that no kernel computes, by what the user knows: the operation, where it is, and why."""

    what: str
    name: str
    reason: str


class _StandIn(Kernel):
    """A kernel that is scheduled for another machine and compiled for this one."""

    recipe: KernelRecipe


class Recorder:
    """Binds the steps of a program, and remembers what was bound."""

    def __init__(self, program: Program, store: Store) -> None:
        self.program, self._store = program, store
        self.scratch = Scratch()
        # One thread after the other, so that the memory of each can be counted.
        self._functions = {**self.scratch.addresses, "halide_do_par_for": loops.alone()}
        self._kernels: dict[tuple[Hashable, bool], _StandIn] = {}
        self.bound: list[Bound] = []
        self._normalise: Bound | None = None
        self._pixels: list[Tensor] = []
        with runtime.made_by(self._make):
            self.arena = lay_out(program)
            self.lowered = lower(program, self.arena.slices)

    def refused(self) -> list[Refused]:
        steps = zip(self.program.steps, self.lowered, strict=True)
        return [
            Refused(_called(step), step.group.name if step.group else "", lowered.reason)
            for step, lowered in steps
            if lowered.kernel == TORCH
        ]

    def bind(self, normalisation: Normalisation | None = None) -> None:
        """
        Raises:
            RuntimeError: a kernel cannot be built or does not fit.
        """
        with runtime.made_by(self._make):
            self._memory = ArenaMemory(self.arena)
            self._given = [empty(form) for form in self.program.given]
            self._results = [torch.empty(output.form.shape) for output in self.program.outputs]
            self._holds: list[Any] = []
            for i in self.arena.copied:
                self._copy(self._given[i], self._memory.tensor(self.program.inputs[i]))
            for i, image in in_order(self.program, self.arena):
                self._step(i, image)
            for output, result in zip(self.program.outputs, self._results, strict=True):
                self._copy(self._memory.tensor(output.place), result)
            if normalisation is not None:
                self._bind_image(normalisation)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The network's outputs, by the kernels that stand in for those of the other machine."""
        for given, x in zip(self._given, inputs, strict=True):
            given.copy_(x)
        for result in self._results:
            result.fill_(float("nan"))
        for bound in self.bound:
            bound()
        return [result.clone() for result in self._results]

    def recording(self, threads: int = 1) -> Recording:
        """``threads``: those that share out the loops of kernels."""
        every = [*self.bound, *filter(None, [self._normalise])]
        spaces = _Spaces(self._memory.whole, self._given, self._results, self._pixels)
        image = spaces.more(self._given[0].nbytes) if self._normalise else 0
        for bound in every:
            spaces.written(_last_buffer(bound))
        for bound in every:
            for item in bound.prepared.given:
                if isinstance(item, Buffer):
                    spaces.read(item)
        weights = spaces.weights()
        numbers = {id(kernel): number for number, kernel in enumerate(self._kernels.values())}
        calls = [
            DeviceCall(numbers[id(bound.kernel)], tuple(map(spaces.argument, bound.prepared.given))) for bound in every
        ]
        normalise = None if self._normalise is None else _moved(calls.pop(), image)
        scratch = _aligned(spaces.arena)
        each = _aligned(self.scratch.most and self.scratch.most + 2 * BLOCK)
        arena = scratch + threads * each + _BEYOND
        recipes = tuple(kernel.recipe for kernel in self._kernels.values())
        return Recording(self.program, recipes, tuple(calls), normalise, weights, arena, scratch, each, threads, image)

    def _step(self, i: int, image: int | None) -> None:
        step, lowered = self.program.steps[i], self.lowered[i]
        outputs = [self._memory.tensor(place, image) for place in step.outputs]
        if self.program.is_direct(i):
            given = self._given[self.program.direct or 0]
            inputs = [given if image is None else given[image : image + 1]]
        else:
            inputs = [self._memory.tensor(place, image) for place in step.inputs]
        if isinstance(step.work, Copy):
            self._copy(inputs[0], outputs[0])
            return
        bound = bind_step(step, lowered, inputs, outputs, self._store)
        if not isinstance(bound.run, (Bound, Chain)):
            raise RuntimeError(f"{step.kind} {step.group.name if step.group else ''}: {bound.reason}")
        self._holds.append(bound)
        self.bound += bound.run.bound if isinstance(bound.run, Chain) else [bound.run]

    def _bind_image(self, found: Normalisation) -> None:
        [image] = self._given
        n, c, h, w = image.shape
        pixels = torch.empty(n, h, w, c, dtype=torch.uint8)
        scales = [1.0 / (255.0 * std) for std in found.std]
        shifts = [-mean / std for mean, std in zip(found.mean, found.std, strict=True)]
        factors = torch.tensor(scales), torch.tensor(shifts)
        self._pixels, self._normalise = [pixels], normalise_call(pixels, factors, image, found.bgr)

    def _copy(self, source: Tensor, target: Tensor) -> None:
        self.bound.append(copy_call(source, target))

    def _make(self, key: Hashable, build: Build, old: bool) -> Kernel:
        found = self._kernels.get((key, old))
        if found is None:
            native = runtime.native_target()
            native = runtime.without_products_of_bytes(native) if old else native
            place = ("scheduled for", str(machine.host()), key, old, runtime.is_shared())
            file = code_cache.path(place, str(native))
            code = None if file is None else code_cache.read(file)
            if code is None:
                func, arguments = build()
                code = machine_code.compile_object(hl.Pipeline(func), arguments, native)
                if file is not None:
                    code_cache.write(file, code)
            found = self._kernels[key, old] = _StandIn(code, str(key)[:60], self._functions)
            found.recipe = KernelRecipe(key, build, old)
        return found


def _called(step: ProgramStep) -> str:
    """What a step is called where it is refused."""
    is_convolution = isinstance(step.group, Convolution) and step.group.dims > 0
    return f"a {step.kind} convolution" if is_convolution else step.kind


def _moved(call: DeviceCall, image: int) -> DeviceCall:
    """The call that writes the network's input into the arena instead."""
    *given, last = call.arguments
    assert isinstance(last, BufferArgument)
    return call._replace(arguments=(*given, last._replace(where=Pointer(ARENA, 0, image + last.where.offset))))


def _last_buffer(bound: Bound) -> Buffer:
    """What a kernel writes."""
    return [item for item in bound.prepared.given if isinstance(item, Buffer)][-1]


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


class _Space(NamedTuple):
    start: int
    end: int
    where: Pointer


class _Spaces:
    """Where on the device the memory lies that kernels were bound to here."""

    def __init__(
        self, arena: Tensor, given: Sequence[Tensor], results: Sequence[Tensor], pixels: Sequence[Tensor]
    ) -> None:
        self.arena = arena.nbytes
        self._spaces = [_space(arena, Pointer(ARENA, 0, 0))]
        self._spaces += [_space(tensor, Pointer(INPUT, i, 0)) for i, tensor in enumerate(given)]
        self._spaces += [_space(tensor, Pointer(OUTPUT, i, 0)) for i, tensor in enumerate(results)]
        self._spaces += [_space(tensor, Pointer(PIXELS, i, 0)) for i, tensor in enumerate(pixels)]
        self._constants: list[tuple[int, int]] = []

    def written(self, buffer: Buffer) -> None:
        """What is written and lies elsewhere, such as what two kernels of one step hand on, is part of the arena."""
        if self._find(buffer.host) is None:
            where = Pointer(ARENA, 0, self.more(buffer.extent_bytes))
            self._spaces.append(_Space(buffer.host, buffer.host + buffer.extent_bytes, where))

    def more(self, count: int) -> int:
        """Where so many bytes lie that the arena has besides what it had."""
        start = _aligned(self.arena)
        self.arena = start + count
        return start

    def read(self, buffer: Buffer) -> None:
        if self._find(buffer.host) is None:
            self._constants.append((buffer.host, buffer.host + buffer.extent_bytes))

    def weights(self) -> bytes:
        """Everything else that is read, in the order in which it is; what overlaps lies together."""
        content, joined = bytearray(), _joined(self._constants)
        for begin, _ in self._constants:
            if self._find(begin) is not None:
                continue
            start, end = next(found for found in joined if found[0] <= begin < found[1])
            content += bytes(_aligned(len(content)) - len(content))
            self._spaces.append(_Space(start, end, Pointer(WEIGHTS, 0, len(content))))
            content += ctypes.string_at(start, end - start)
        return bytes(content) + bytes(_BEYOND)

    def argument(self, given: Buffer | int | float) -> BufferArgument | int | float:
        if not isinstance(given, Buffer):
            return given
        space = self._find(given.host)
        if space is None:
            raise RuntimeError("a kernel was bound to memory that is not known")
        where = space.where._replace(offset=space.where.offset + given.host - space.start)
        return BufferArgument(where, given.code, tuple(given.dimensions()))

    def _find(self, address: int) -> _Space | None:
        return next((space for space in self._spaces if space.start <= address < space.end), None)


def _space(tensor: Tensor, where: Pointer) -> _Space:
    return _Space(tensor.data_ptr(), tensor.data_ptr() + max(tensor.untyped_storage().nbytes(), 1), where)


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for start, end in sorted(set(ranges)):
        if found and start < found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found
