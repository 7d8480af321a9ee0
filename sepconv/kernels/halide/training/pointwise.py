"""Pointwise stages in training: PyTorch's product, between passes over the rows that it reads and writes.

Of so many numbers PyTorch's product is as fast as the processor; what costs are norms, activations and their statistics
around it. An image goes through in blocks of pixels that stay in the cache: what the product reads is made in front of
it, statistics are gathered behind it, and nothing else is ever written to memory. Where PyTorch's product can be called
as kernels are, all blocks are one call.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.halide.jit.calls import Strided
from sepconv.kernels.halide.jit.products import GemmCall
from sepconv.kernels.halide.schedule.machine import host
from sepconv.kernels.halide.schedule.training import forward_block
from sepconv.kernels.halide.training import blocks
from sepconv.kernels.halide.training.blocks import PixelRows, Slab, spec
from sepconv.kernels.halide.training.passes import Passes, ProductBetween, Room, arena, multiplied
from sepconv.kernels.halide.training.rows import PART, PassSpec
from sepconv.kernels.prologue import Prologue, StageCase, StageOutput


class _Walk(NamedTuple):
    """One block: what goes on before and behind its product, and where that reads."""

    block: Slab
    before: Passes
    after: Passes
    h: Tensor


class _Blocks(NamedTuple):
    """Blocks of one size, with all that is done in them, and the pixels before them."""

    start: int
    passes: Passes


class _Made(NamedTuple):
    """What one thread needs, in this memory; there are walks or blocks."""

    memory: Tensor
    places: dict[str, int]
    walks: list[_Walk]
    blocks: list[_Blocks]
    end: Passes


class PointwiseForward:
    """The stage for images of these sizes and strides."""

    def __init__(self, case: StageCase) -> None:
        assert case.weight is not None
        self.case, self.x, self.dtype = case, PixelRows.of(case.x), case.x.dtype
        self.y = PixelRows.dense(self.x.pixels, case.weight.shape[0])
        self.inner, self.outer = blocks.kind_of(self.dtype, self.x), blocks.kind_of(self.dtype, self.y)
        channels = self.x.channels + self.y.channels
        self.blocks = blocks.blocks(
            self.x.pixels, channels * self.dtype.itemsize, forward_block(self.dtype, case.threads)
        )
        self.room = Room()
        self.room.add(
            "h",
            max(block.size for block in self.blocks) * self.x.channels if case.prologue is not None else 0,
            self.dtype,
        )
        self.room.add("parts", blocks.parts(self.x.pixels) * 2 * self.y.channels, torch.float32)
        self._local = threading.local()
        self._made()

    def _made(self) -> _Made:
        memory = arena(self.room.size)
        made: _Made | None = getattr(self._local, "made", None)
        if made is None or made.memory is not memory:
            made = self._local.made = self._make(memory)
        return made

    def _make(self, memory: Tensor) -> _Made:
        end = Passes(self._end() if len(self.blocks) > 1 else [], self._layouts(self.blocks[0]))
        places = self.room.places(memory)
        if multiplied(self.dtype):
            return _Made(memory, places, [], [self._as_one(*group) for group in blocks.alike(self.blocks)], end)
        return _Made(memory, places, self._walks(memory), [], end)

    def _as_one(self, block: Slab, times: int) -> _Blocks:
        left = ("x", self.x.step) if self.case.prologue is None else ("h", self.x.channels)
        size, steps = (block.size, self.y.channels, self.x.channels), (left[1], self.x.channels, self.y.channels)
        product = GemmCall(size, steps, (False, True), add=self.case.bias)
        filled = [spec("fill", self.outer, self.y.channels)] if self.case.bias else []
        passes: list[PassSpec | ProductBetween] = [
            *self._before(),
            *filled,
            ProductBetween(product, (left[0], "weight", "y")),
            *self._after(),
        ]
        return _Blocks(block.start, Passes(passes, self._layouts(block), times, self._steps(block.size)))

    def _walks(self, memory: Tensor) -> list[_Walk]:
        h = self.room.view(memory, "h").view(-1, self.x.channels)
        known: dict[int, tuple[Passes, Passes]] = {}
        for block in self.blocks:
            if block.size not in known:
                layouts = self._layouts(block)
                known[block.size] = Passes(self._before(), layouts), Passes(self._after(), layouts)
        return [_Walk(block, *known[block.size], block.first(h)) for block in self.blocks]

    def _steps(self, pixels: int) -> dict[str, int]:
        """Bytes that so many pixels take."""
        size = pixels * self.dtype.itemsize
        parts = pixels // PART * blocks.part_bytes(self.y.channels)
        return {"x": size * self.x.step, "y": size * self.y.step, "parts": parts}

    def _before(self) -> list[PassSpec]:
        activation = self.case.prologue
        return [] if activation is None else [spec("normalise", self.inner, self.x.channels, activation)]

    def _after(self) -> list[PassSpec]:
        if not self.case.statistics:
            return []
        own = [spec("moments", self.outer, self.y.channels)]
        return own if len(self.blocks) > 1 else own + self._end()

    def _end(self) -> list[PassSpec]:
        return [spec("merge", self.outer, self.y.channels)] if self.case.statistics else []

    def _layouts(self, block: Slab) -> dict[str, Strided | int]:
        x, y = self.x._replace(pixels=block.size), self.y._replace(pixels=block.size)
        return {
            **blocks.numbers(self.x.pixels, block, self.case.threads),
            **blocks.vectors(x.channels, *blocks.PROLOGUE),
            **blocks.vectors(y.channels, "added"),
            **blocks.sums(self.x.pixels, block, y.channels, self.outer),
            "x": x.layout(self.inner),
            "h": PixelRows.dense(*x[:2]).layout(self.inner),
            "y": y.layout(self.outer),
            "weight": Strided((y.channels, x.channels), (x.channels, 1)),
        }

    def __call__(self, x: Tensor, prologue: Prologue | None, weight: Tensor, bias: Tensor | None) -> StageOutput:
        made, case = self._made(), self.case
        y = torch.empty_strided(case.y.shape, case.y.stride, dtype=self.dtype)
        places = made.places | {"x": x.data_ptr(), "y": y.data_ptr()}
        places["all_parts"] = places["parts"]
        held = [] if prologue is None else blocks.place(places, blocks.PROLOGUE, prologue[:3])
        result = torch.empty(2, self.y.channels) if case.statistics else None
        places["result"] = 0 if result is None else result.data_ptr()
        matrix = blocks.factors(weight, self.y.channels, self.x.channels, self.dtype)
        if made.blocks:
            held += self._place_factors(places, matrix, bias)
            for start, passes in made.blocks:
                passes(self._moved(places, start) if start else places)
        else:
            self._multiply(made, places, self.x.view(x) if prologue is None else None, self.y.view(y), matrix, bias)
        made.end(places)
        del held
        return StageOutput(y, None, None) if result is None else StageOutput(y, *result.unbind())

    @staticmethod
    def _place_factors(places: dict[str, int], matrix: Tensor, bias: Tensor | None) -> list[Tensor]:
        matrix = matrix.contiguous()
        places["weight"] = matrix.data_ptr()
        return [matrix, *([] if bias is None else blocks.place(places, ("added",), (bias,)))]

    def _moved(self, places: dict[str, int], pixels: int) -> dict[str, int]:
        """Behind so many pixels."""
        return places | {name: places[name] + step for name, step in self._steps(pixels).items()}

    def _multiply(
        self, made: _Made, places: dict[str, int], x: Tensor | None, y: Tensor, matrix: Tensor, bias: Tensor | None
    ) -> None:
        """Block by block; ``x``: None where the product reads what is made of it."""
        added = None if bias is None else bias.to(self.dtype)
        for block, before, after, h in made.walks:
            here = self._moved(places, block.start)
            before(here)
            source = h if x is None else block.of(x)
            if added is None:
                torch.mm(source, matrix.t(), out=block.of(y))
            else:
                torch.addmm(added, source, matrix.t(), out=block.of(y))
            after(here)


def supports(case: StageCase) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    return blocks.unsuitable_forward(case)


def slower(case: StageCase) -> str:
    """Why PyTorch's operations are the faster way here; the empty string if they are not."""
    return blocks.slower(case)


def pays_bare() -> bool:
    """Whether a large stage of float32 with neither norm nor activation is worth its two products on the way back.

    Forward and back 1.05 to 1.35 times the speed of PyTorch's convolution on Granite Rapids, 0.76 to 0.93 on Zen 3,
    where Intel's products are the slower ones.
    """
    return multiplied(torch.float32) and host().whole_avx512


def describe(case: StageCase) -> dict[str, Any]:
    """The schedule in words and numbers."""
    found = PointwiseForward(case).blocks
    return {"product": "torch.mm", "blocks": len(found), "pixels": found[0].size}


prepare = PointwiseForward
