"""Bytes of the weights of a network, in the numbers in which each step is computed; nothing is read or made for it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch

from sepconv.compile.groups import Convolution, SeparableGroup
from sepconv.compile.lower import KernelStep, Lowered
from sepconv.compile.program import ProgramStep
from sepconv.compile.store import Constant
from sepconv.kernels.case import Case


class _Kept(NamedTuple):
    """A constant in one kind of numbers, and its bytes."""

    key: Hashable
    bytes: int


def weight_bytes(steps: Sequence[ProgramStep], lowered: Sequence[Lowered]) -> list[int]:
    """Of each step: weights, biases and what integers are scaled by. What two steps share counts with the first."""
    seen: set[Hashable] = set()
    found = []
    for step, how in zip(steps, lowered, strict=True):
        kept = {one.key: one.bytes for one in _of_step(step, how) if one.key not in seen}
        seen.update(kept)
        found.append(sum(kept.values()))
    return found


def _of_step(step: ProgramStep, lowered: Lowered) -> Iterator[_Kept]:
    for place in step.inputs:
        if isinstance(place.memory, Constant):
            yield _plain(place.memory)
    for kernel in lowered.kernels:
        yield from _of_kernel(kernel)
    if step.group is not None and not lowered.kernels:
        yield from map(_plain, filter(None, step.group.constants))


def _of_kernel(kernel: KernelStep) -> Iterator[_Kept]:
    group, known = kernel.group, kernel.case
    if isinstance(group, SeparableGroup):
        assert known.then is not None
        yield from _of_convolution(group.depthwise, known)
        yield from _of_convolution(group.pointwise, known.then)
    elif isinstance(group, Convolution):
        yield from _of_convolution(group, known)
    else:
        yield from map(_plain, filter(None, group.constants))


def _of_convolution(group: Convolution, known: Case) -> Iterator[_Kept]:
    for constant, outline in zip(group.constants, (known.weight, known.bias), strict=True):
        if constant is not None and outline is not None:
            yield _kept(constant, outline.dtype)
    if known.quantized:
        yield _Kept(("scale", group.weight.key), group.out_channels * torch.float32.itemsize)


def _plain(constant: Constant) -> _Kept:
    return _kept(constant, constant.number.storage)


def _kept(constant: Constant, numbers: torch.dtype) -> _Kept:
    return _Kept((constant.key, numbers), math.prod(constant.shape) * numbers.itemsize)
