"""Gradients of normal stages: PyTorch's, between passes in front of what they read and behind the gradient of x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.halide.jit.calls import Strided
from sepconv.kernels.halide.training import blocks
from sepconv.kernels.halide.training.blocks import PixelRows, spec
from sepconv.kernels.halide.training.normal import NormalStage
from sepconv.kernels.halide.training.passes import memory_for
from sepconv.kernels.halide.training.rows import PassSpec
from sepconv.kernels.prologue import Deviation, Prologue, StageCase, StageGradients
from sepconv.kernels.torch import aten


class NormalGradients(NormalStage):
    """Those of the stage."""

    def __init__(self, case: StageCase) -> None:
        super().__init__(case)
        self.needs_x, self.needs_weight, self.needs_bias = case.need
        self.back = self.needs_x and case.prologue is not None
        self.again = self.needs_weight and case.prologue is not None
        given = PixelRows.of(case.y)
        self.grad = given if given.step else self.y
        self.outer = blocks.kind_of(self.dtype, self.y, self.grad)
        self.room.add("dz", self.y.pixels * self.y.channels if case.deviated else 0, self.dtype)
        self.room.add("h", self.x.pixels * self.x.channels if self.again else 0, self.dtype)
        self.room.add("parts", blocks.parts(self.x.pixels) * 2 * self.x.channels if self.back else 0, torch.float32)
        self.passes()

    def before(self) -> list[PassSpec]:
        own = [spec("deviate", self.outer, self.y.channels)] if self.case.deviated else []
        activation = self.case.prologue
        if self.again and activation is not None:
            own.append(spec("normalise", self.inner, self.x.channels, activation))
        return own

    def after(self) -> list[PassSpec]:
        passes: Sequence[str] = ("sums", "gradient", "total") if self.back else ()
        return [spec(what, self.inner, self.x.channels, self.case.prologue or "") for what in passes]

    def layouts(self) -> dict[str, Strided | int]:
        inner = PixelRows.dense(*self.x[:2]).layout(self.inner)
        outer = PixelRows.dense(*self.y[:2]).layout(self.outer)
        return {
            **self.whole(self.x, self.inner),
            **blocks.vectors(self.x.channels, *blocks.PROLOGUE),
            **blocks.vectors(self.y.channels, *blocks.DEVIATION),
            "y_share": self.share(self.y),
            "x": self.x.layout(self.inner),
            "grad": self.grad.layout(self.outer),
            **dict.fromkeys(("h", "dh", "grad_x"), inner),
            **dict.fromkeys(("y", "dz"), outer),
        }

    def __call__(
        self, grad: Tensor, deviation: Deviation | None, x: Tensor, prologue: Prologue | None, weight: Tensor
    ) -> StageGradients:
        before, after = self.passes()
        memory = memory_for(self.room.size)
        grad = blocks.dense(grad) if self.grad is self.y else grad
        places = self.room.places(memory) | {"x": x.data_ptr(), "grad": grad.data_ptr()}
        held = [] if prologue is None else blocks.place(places, blocks.PROLOGUE, prologue[:3])
        if deviation is not None:
            held += blocks.place_deviation(places, deviation)
        before(places)
        dz = grad if deviation is None else self.image(memory, "dz", self.case.y)
        h = self.image(memory, "h", self.case.x) if self.again else x
        need = self.needs_x, self.needs_weight
        dh, of_weight = aten.convolution_gradients(dz, h, weight.to(self.dtype), self.geometry, need)
        of_bias = torch.sum(dz, (0, 2, 3), dtype=torch.float32) if self.needs_bias else None
        of_weight = None if of_weight is None else of_weight.to(weight.dtype)
        if dh is None or not self.back:
            return StageGradients(dh, None, None, of_weight, of_bias)
        dh, result = blocks.dense(dh), torch.empty(2, self.x.channels)
        grad_x = torch.empty_like(dh)
        places |= {"dh": dh.data_ptr(), "grad_x": grad_x.data_ptr(), "result": result.data_ptr()}
        after(places | {"all_parts": places["parts"]})
        del held
        total, of_deviation = result.unbind()
        return StageGradients(grad_x, total, of_deviation, of_weight, of_bias)


def supports(case: StageCase) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    return blocks.unsuitable(case)


def slower(case: StageCase) -> str:
    """Why PyTorch's operations are the faster way here; the empty string if they are not."""
    return ""


def describe(case: StageCase) -> dict[str, Any]:
    """What computes."""
    return {"convolution": "torch"}


prepare = NormalGradients
