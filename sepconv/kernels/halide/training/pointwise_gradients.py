"""Gradients of pointwise stages: PyTorch's two products, with passes in front, between and behind them.

Block by block of the pixels, dz is made of the gradient that came and of the result, dh is a product with the weights,
the gradient of x and the sums for its norm are made of dh in the cache, and so is h again, which the weights' gradient
needs: it is a product over pixels, added up in the order of the blocks. Where PyTorch's product can be called as
kernels are, all blocks are one call.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.case import Outline
from sepconv.kernels.halide.jit.calls import Strided
from sepconv.kernels.halide.jit.products import GemmCall
from sepconv.kernels.halide.schedule.training import gradient_block
from sepconv.kernels.halide.training import blocks
from sepconv.kernels.halide.training.blocks import PixelRows, Slab, spec
from sepconv.kernels.halide.training.passes import Passes, ProductBetween, Room, arena, multiplied
from sepconv.kernels.halide.training.rows import PART, PassSpec
from sepconv.kernels.prologue import Deviation, Prologue, StageCase, StageGradients

# Measured on Granite Rapids: 0.7 to 0.85 of the time from thousands of pixels on, more than 1 of a few hundred.
_LEAST_TURNED = 2048


class _Behind(NamedTuple):
    """Pixels that stay in the cache behind a product, where its block does not."""

    slab: Slab
    passes: Passes


class _Walk(NamedTuple):
    """One block: what goes on before its first product and behind it, and what these and the second read."""

    block: Slab
    before: Passes
    after: list[_Behind]
    dz: Tensor
    dh: Tensor
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


class _Images(NamedTuple):
    """Rows of all pixels; None where those in the arena take their place."""

    grad: Tensor | None
    x: Tensor | None
    grad_x: Tensor | None


class PointwiseGradients:
    """Those of the stage for images of these sizes and strides."""

    def __init__(self, case: StageCase) -> None:
        assert case.weight is not None
        self.case, self.dtype, self.x = case, case.x.dtype, PixelRows.of(case.x)
        self.y = PixelRows.dense(self.x.pixels, case.weight.shape[0])
        given = PixelRows.of(case.y)
        self.grad = given if given.step else self.y
        self.inner = blocks.kind_of(self.dtype, self.x)
        self.outer = blocks.kind_of(self.dtype, self.y, self.grad)
        self.needs_x, self.needs_weight, self.needs_bias = case.need
        self.back = self.needs_x and case.prologue is not None
        self.sums = self.back and case.normed
        self._x_stride = Outline.channels_last_of(case.x.shape).stride
        self.as_one = multiplied(self.dtype)
        channels = 2 * self.x.channels + self.y.channels
        if self.as_one:
            channels = max(channels, 4 * self.x.channels)  # what is between the two products, and behind the first
        most = gradient_block(self.dtype, case.threads)
        self.blocks = blocks.blocks(self.x.pixels, channels * self.dtype.itemsize, most)
        self._at_once = len(self.blocks) == 1 and (self.as_one or len(self._slabs(self.blocks[0])) == 1)
        self._make_room()
        self._local = threading.local()
        self._made()

    def _make_room(self) -> None:
        self.room, count = Room(), max(block.size for block in self.blocks)
        again = self.needs_weight and self.case.prologue is not None
        self.room.add("dz", count * self.y.channels if self.case.deviated else 0, self.dtype)
        self.room.add("dh", count * self.x.channels if self.back else 0, self.dtype)
        self.room.add("h", count * self.x.channels if again else 0, self.dtype)
        self.room.add("parts", blocks.parts(self.x.pixels) * 2 * self.x.channels if self.sums else 0, torch.float32)
        biased = self.needs_bias and self.as_one
        self.room.add("y_parts", blocks.parts(self.x.pixels) * 2 * self.y.channels if biased else 0, torch.float32)

    def _made(self) -> _Made:
        memory = arena(self.room.size)
        made: _Made | None = getattr(self._local, "made", None)
        if made is None or made.memory is not memory:
            made = self._local.made = self._make(memory)
        return made

    def _make(self, memory: Tensor) -> _Made:
        last = [] if self._at_once else self._end()
        if self.as_one and self.needs_bias:
            last.append(spec("level total", self.outer, self.y.channels))
        end = Passes(last, self._layouts(self.blocks[0]))
        places = self.room.places(memory)
        if self.as_one:
            return _Made(memory, places, [], [self._in_turn(*group) for group in blocks.alike(self.blocks)], end)
        return _Made(memory, places, self._walks(memory), [], end)

    def _in_turn(self, block: Slab, times: int) -> _Blocks:
        x, y, pixels = self.x.channels, self.y.channels, block.size
        passes: list[PassSpec | ProductBetween] = [*self._before()]
        step = y if self.case.deviated else self.grad.step
        if self.needs_bias:
            passes.append(spec("level", self.outer, y))
        if self.needs_x:
            back = GemmCall((pixels, x, y), (step, x, x), (False, False))
            passes.append(ProductBetween(back, ("dz", "weight", "dh" if self.back else "grad_x")))
        passes += self._after()
        if self.needs_weight:
            read = ("x", self.x.step) if self.case.prologue is None else ("h", x)
            product = GemmCall((y, x, pixels), (step, read[1], x), (True, False), add=len(self.blocks) > 1)
            passes.append(ProductBetween(product, ("dz", read[0], "of_weight")))
        return _Blocks(block.start, Passes(passes, self._layouts(block), times, self._steps(pixels)))

    def _steps(self, pixels: int) -> dict[str, int]:
        """Bytes that so many pixels take."""
        steps = {"grad": self.grad.step, "y": self.y.channels, "x": self.x.step, "grad_x": self.x.channels}
        steps |= {} if self.case.deviated else {"dz": self.grad.step}
        parts, y_parts = [pixels // PART * blocks.part_bytes(rows.channels) for rows in (self.x, self.y)]
        return {
            "parts": parts,
            "y_parts": y_parts,
            **{name: pixels * step * self.dtype.itemsize for name, step in steps.items()},
        }

    def _walks(self, memory: Tensor) -> list[_Walk]:
        views = [
            self.room.view(memory, name).view(-1, rows.channels)
            for name, rows in (("dz", self.y), ("dh", self.x), ("h", self.x))
        ]
        known: dict[int, Passes] = {}
        walks = []
        for block in self.blocks:
            before = Passes(self._before(), self._layouts(block))
            walks.append(_Walk(block, before, self._behind(block, known), *[block.first(view) for view in views]))
        return walks

    def _behind(self, block: Slab, known: dict[int, Passes]) -> list[_Behind]:
        found = []
        for start, size in self._slabs(block):
            if size not in known:
                known[size] = Passes(self._after(), self._layouts(Slab(start, size)))
            found.append(_Behind(Slab(block.start + start, size), known[size]))
        return found

    def _slabs(self, block: Slab) -> list[Slab]:
        """Parts of a block in which dh, x, h and the gradient of x stay in the cache."""
        most = gradient_block(torch.float32, self.case.threads)
        return blocks.blocks(block.size, 4 * self.x.channels * self.dtype.itemsize, most)

    def _before(self) -> list[PassSpec]:
        return [spec("deviate", self.outer, self.y.channels)] if self.case.deviated else []

    def _after(self) -> list[PassSpec]:
        if self.case.prologue is None:
            return []
        passes = ["sums"] if self.sums else []
        passes += {(True, True): ["both"], (True, False): ["gradient"], (False, True): ["normalise"]}.get(
            (self.needs_x, self.needs_weight), []
        )
        own = [spec(what, self.inner, self.x.channels, self.case.prologue) for what in passes]
        return own + self._end() if self._at_once else own

    def _end(self) -> list[PassSpec]:
        return [spec("total", self.inner, self.x.channels)] if self.sums else []

    def _layouts(self, block: Slab) -> dict[str, Strided | int]:
        x, y, grad = [rows._replace(pixels=block.size) for rows in (self.x, self.y, self.grad)]
        inner = PixelRows.dense(*x[:2]).layout(self.inner)
        outer = PixelRows.dense(*y[:2]).layout(self.outer)
        return {
            **blocks.numbers(self.x.pixels, block, self.case.threads),
            **blocks.vectors(x.channels, *blocks.PROLOGUE),
            **blocks.vectors(y.channels, *blocks.DEVIATION),
            **blocks.sums(self.x.pixels, block, x.channels, self.inner),
            "x": x.layout(self.inner),
            "grad": grad.layout(self.outer),
            **dict.fromkeys(("weight", "of_weight"), Strided((y.channels, x.channels), (x.channels, 1))),
            **dict.fromkeys(("h", "dh", "grad_x"), inner),
            "y": outer,
            "dz": outer if self.case.deviated else grad.layout(self.outer),
            **self._layouts_of_bias(block),
        }

    def _layouts_of_bias(self, block: Slab) -> dict[str, Strided | int]:
        found = blocks.sums(self.x.pixels, block, self.y.channels, self.outer)
        return {"y_parts": found["parts"], "all_y_parts": found["all_parts"], "of_bias": found["result"]}

    def __call__(
        self, grad: Tensor, deviation: Deviation | None, x: Tensor, prologue: Prologue | None, weight: Tensor
    ) -> StageGradients:
        made, case = self._made(), self.case
        grad = blocks.dense(grad) if self.grad is self.y else grad
        places = made.places | {"x": x.data_ptr(), "grad": grad.data_ptr()}
        places |= {"all_parts": places["parts"], "all_y_parts": places["y_parts"]}
        held = [grad]
        if deviation is None:
            places["dz"] = places["grad"]
        if prologue is not None:
            held += blocks.place(places, blocks.PROLOGUE, prologue[:3])
        if deviation is not None:
            held += blocks.place_deviation(places, deviation)
        grad_x = torch.empty_strided(case.x.shape, self._x_stride, dtype=self.dtype) if self.needs_x else None
        places["grad_x"] = 0 if grad_x is None else grad_x.data_ptr()
        result = torch.empty(2, self.x.channels) if self.sums else None
        places["result"] = 0 if result is None else result.data_ptr()
        images = _Images(
            self.grad.view(grad) if deviation is None else None,
            self.x.view(x) if prologue is None else None,
            self.x._replace(step=self.x.channels).view(grad_x) if grad_x is not None and prologue is None else None,
        )
        matrix = blocks.factors(weight, self.y.channels, self.x.channels, self.dtype)
        multiply = self._run_blocks if made.blocks else self._multiply
        of_weight, of_bias = multiply(made, places, images, matrix)
        of_weight = None if of_weight is None else of_weight.view(weight.shape).to(weight.dtype)
        total, deviation_total = (None, None) if result is None else result.unbind()
        return StageGradients(grad_x, total, deviation_total, of_weight, of_bias)

    def _run_blocks(
        self, made: _Made, places: dict[str, int], images: _Images, matrix: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """All that :meth:`_multiply` does, without Python between blocks."""
        matrix = matrix.contiguous()
        make = torch.empty if len(self.blocks) == 1 else torch.zeros
        of_weight = make(matrix.shape, dtype=torch.float32) if self.needs_weight else None
        places |= {"weight": matrix.data_ptr(), "of_weight": 0 if of_weight is None else of_weight.data_ptr()}
        for start, passes in made.blocks:
            there = self._steps(start).items() if start else ()
            passes(places | {name: places[name] + step for name, step in there if name in places})
        of_bias = torch.empty(2, self.y.channels) if self.needs_bias else None
        made.end(places | {"of_bias": 0 if of_bias is None else of_bias.data_ptr()})
        return of_weight, None if of_bias is None else of_bias[0]

    def _multiply(
        self, made: _Made, places: dict[str, int], images: _Images, matrix: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Block by block; the gradients of weight and bias."""
        starts, weight, bias = dict(places), _Sum(self.dtype), _Sum(torch.float32)
        for block, before, after, dz, dh, h in made.walks:
            if block.start:
                self._move(places, starts, block.start, {"grad": self.grad.step, "y": self.y.channels})
            before(places)
            if images.grad is not None:
                dz = block.of(images.grad)
            if self.needs_x:
                torch.mm(dz, matrix, out=dh if images.grad_x is None else block.of(images.grad_x))
            for slab, passes in after:
                if slab.start:
                    self._move_behind(places, starts, slab, block)
                passes(places)
            if self.needs_weight:
                weight.add_product(dz, h if images.x is None else block.of(images.x))
            if self.needs_bias:
                bias.add(torch.sum(dz, 0, dtype=torch.float32))
        made.end(starts)
        return weight.total, bias.total

    def _move_behind(self, places: dict[str, int], starts: dict[str, int], slab: Slab, block: Slab) -> None:
        self._move(places, starts, slab.start, {"x": self.x.step, "grad_x": self.x.channels})
        self._move(places, starts, slab.start - block.start, {"dh": self.x.channels, "h": self.x.channels})
        places["parts"] = starts["parts"] + slab.start // PART * blocks.part_bytes(self.x.channels)

    def _move(self, places: dict[str, int], starts: dict[str, int], pixels: int, steps: dict[str, int]) -> None:
        """On to the memory that so many pixels come before, of images with these steps from one to the next."""
        for name, step in steps.items():
            if name in starts:
                places[name] = starts[name] + pixels * step * self.dtype.itemsize


class _Sum:
    """A sum over blocks, in float32 where there are several."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.total: Tensor | None = None

    def add(self, more: Tensor) -> None:
        self.total = more if self.total is None else self.total.float().add_(more)

    def add_product(self, dz: Tensor, h: Tensor) -> None:
        """``dz.t() @ h``."""
        if self.dtype is torch.bfloat16:
            self.add(_product(dz, h))
        elif self.total is None:  # in given memory, whose numbers autocast leaves alone
            self.total = torch.mm(dz.t(), h, out=dz.new_empty(dz.shape[1], h.shape[1]))
        else:
            torch.addmm(self.total, dz.t(), h, out=self.total)


def _product(dz: Tensor, h: Tensor) -> Tensor:
    """PyTorch's product of bfloat16 turns its first matrix over, which costs less of the narrower one."""
    if h.shape[1] < dz.shape[1] and len(h) >= _LEAST_TURNED:
        return torch.mm(h.t(), dz).t().contiguous()
    return torch.mm(dz.t(), h)


def supports(case: StageCase) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    return blocks.unsuitable(case)


def slower(case: StageCase) -> str:
    """Why PyTorch's operations are the faster way here; the empty string if they are not."""
    return blocks.slower(case)


def describe(case: StageCase) -> dict[str, Any]:
    """The schedule in words and numbers."""
    found = PointwiseGradients(case).blocks
    return {"product": "torch.mm", "blocks": len(found), "pixels": found[0].size}


prepare = PointwiseGradients
