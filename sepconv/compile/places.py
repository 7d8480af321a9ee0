"""Where values lie: the data that ``layout`` chooses and ``plan`` binds calls to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sepconv.compile.constants import Constant


@dataclass(eq=False)
class Root:
    """Memory that one step writes; ``first`` and ``last`` are the steps between which it must be kept.

    ``images``: so many images take turns in it, see ``slices``.
    """

    bytes: int
    first: int
    last: int
    offset: int = 0
    images: int = 1


@dataclass
class Place:
    """A value: a tensor on the meta device that has its size and strides, and the root or the constant it lies in."""

    meta: Tensor
    root: Root | Constant


@dataclass
class Step:
    """Something to compute. ``target`` is a group, an ATen operation, or None for a copy into another layout."""

    target: Any
    args: Any
    kwargs: Any
    outputs: list[Place]


@dataclass
class Layout:
    """The steps of a graph in order, with the places of what they read and write.

    ``direct`` is the number of the input that the first step reads where the caller holds it, if it does; ``given`` has
    the strides in which the caller holds them, and ``copied`` lists the inputs that are copied to their places. The
    first ``sliced`` steps run for each of ``images`` in turn.
    """

    steps: list[Step] = field(default_factory=list)
    direct: int | None = None
    inputs: list[Place] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)
    outputs: list[tuple[Place, Tensor]] = field(default_factory=list)
    roots: list[Root] = field(default_factory=list)
    bytes: int = 0
    images: int = 1
    sliced: int = 0


def is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
