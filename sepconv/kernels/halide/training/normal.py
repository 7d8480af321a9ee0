"""Normal stages in training: PyTorch's convolution and its gradients, between passes over the rows that they read and
write.

What the convolution reads is made in memory that all such stages share, and the statistics of its result in one pass.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.case import Geometry, Outline
from sepconv.kernels.halide.jit.calls import Strided
from sepconv.kernels.halide.training import blocks
from sepconv.kernels.halide.training.blocks import PixelRows, Slab, spec
from sepconv.kernels.halide.training.passes import Passes, Room, memory_for
from sepconv.kernels.halide.training.rows import PassSpec
from sepconv.kernels.prologue import Prologue, StageCase, StageOutput
from sepconv.kernels.torch import aten


class NormalStage:
    """The sizes of a stage, and its passes, which each thread has for itself."""

    def __init__(self, case: StageCase) -> None:
        assert case.weight is not None
        assert case.geometry is not None
        self.case, self.dtype, self.x = case, case.x.dtype, PixelRows.of(case.x)
        self.geometry: Geometry = case.geometry
        self.groups = case.x.shape[1] // max(1, case.weight.shape[1])
        self.y = PixelRows.dense(case.y.elements // max(1, case.y.shape[1]), case.y.shape[1])
        self.inner, self.outer = blocks.kind_of(self.dtype, self.x), blocks.kind_of(self.dtype, self.y)
        self.room = Room()
        self._local = threading.local()

    def passes(self) -> tuple[Passes, Passes]:
        """Before the convolution and behind it."""
        found: tuple[Passes, Passes] | None = getattr(self._local, "passes", None)
        if found is None:
            before, after = [Passes(specs, self.layouts()) for specs in (self.before(), self.after())]
            found = self._local.passes = before, after
        return found

    def before(self) -> list[PassSpec]:
        raise NotImplementedError

    def after(self) -> list[PassSpec]:
        raise NotImplementedError

    def layouts(self) -> dict[str, Strided | int]:
        raise NotImplementedError

    def whole(self, rows: PixelRows, kind: str) -> dict[str, Strided | int]:
        """Numbers and sums of an image that goes through at once."""
        slab = Slab(0, rows.pixels)
        return {
            **blocks.numbers(rows.pixels, slab, self.case.threads),
            **blocks.sums(rows.pixels, slab, rows.channels, kind),
        }

    def share(self, rows: PixelRows) -> Strided | int:
        """Pixels of each thread."""
        return blocks.numbers(rows.pixels, Slab(0, rows.pixels), self.case.threads)["share"]

    def image(self, memory: Tensor, name: str, outline: Outline) -> Tensor:
        """What lies in this memory, of that size."""
        size, stride = outline.shape, Outline.channels_last_of(outline.shape).stride
        return self.room.view(memory, name).as_strided(size, stride)


class NormalForward(NormalStage):
    """The stage for images of these sizes and strides."""

    def __init__(self, case: StageCase) -> None:
        super().__init__(case)
        self.room.add("h", 0 if case.prologue is None else self.x.pixels * self.x.channels, self.dtype)
        self.room.add("parts", blocks.parts(self.y.pixels) * 2 * self.y.channels, torch.float32)
        self.passes()

    def before(self) -> list[PassSpec]:
        activation = self.case.prologue
        return [] if activation is None else [spec("normalise", self.inner, self.x.channels, activation)]

    def after(self) -> list[PassSpec]:
        passes = ("moments", "merge") if self.case.statistics else ()
        return [spec(what, self.outer, self.y.channels) for what in passes]

    def layouts(self) -> dict[str, Strided | int]:
        return {
            **self.whole(self.y, self.outer),
            "share": self.share(self.x),
            **blocks.vectors(self.x.channels, *blocks.PROLOGUE),
            "x": self.x.layout(self.inner),
            "h": PixelRows.dense(*self.x[:2]).layout(self.inner),
            "y": self.y.layout(self.outer),
        }

    def __call__(self, x: Tensor, prologue: Prologue | None, weight: Tensor, bias: Tensor | None) -> StageOutput:
        before, after = self.passes()
        memory = memory_for(self.room.size)
        places = self.room.places(memory) | {"x": x.data_ptr()}
        held = [] if prologue is None else blocks.place(places, blocks.PROLOGUE, prologue[:3])
        before(places)
        h = x if prologue is None else self.image(memory, "h", self.case.x)
        added = None if bias is None else bias.to(self.dtype)
        y = aten.conv(h, weight.to(self.dtype), added, self.geometry, groups=self.groups)
        y = y.to(self.dtype, memory_format=torch.channels_last)  # of autocast it may be another
        result = torch.empty(2, self.y.channels) if self.case.statistics else None
        if result is None:
            return StageOutput(y, None, None)
        after(places | {"y": y.data_ptr(), "all_parts": places["parts"], "result": result.data_ptr()})
        del held
        return StageOutput(y, *result.unbind())


def supports(case: StageCase) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    return blocks.unsuitable_forward(case)


def slower(case: StageCase) -> str:
    """Why PyTorch's operations are the faster way here; the empty string if they are not."""
    return ""


def describe(case: StageCase) -> dict[str, Any]:
    """What computes."""
    return {"convolution": "torch"}


prepare = NormalForward
