"""Depthwise convolution into given memory whose images are bfloat16, or some of them: exact but for one rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from kernel_checks import whole_numbers, within
from torch import Tensor

from sepconv import reference
from sepconv.kernels import backends, case
from sepconv.kernels.case import Case, Geometry, Outline
from sepconv.kernels.halide.conv import depthwise, depthwise_direct
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.numbers import PAIRS
from sepconv.kernels.halide.schedule import machine

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())

BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
Pairs = tuple[tuple[int, int], tuple[int, int]]
ONE: Pairs = ((1, 1), (1, 1))


@dataclass(frozen=True)
class Problem:
    """``numbers``: of x and of the result; ``margin``: channels to both sides in their memory, ``odd``: one more."""

    name: str
    shape: tuple[int, int, int, int]
    numbers: tuple[torch.dtype, torch.dtype] = (BF16, BF16)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: Pairs = ONE
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    margin: int = 0
    odd: bool = False
    contiguous: bool = False
    threads: int = 1


DIRECT = [
    Problem("channels_equal_tile", (1, 32, 14, 14)),
    Problem("channels_of_a_vector", (1, 16, 7, 9)),
    Problem("odd_channels", (1, 17, 7, 11), margin=1),
    Problem("odd_steps", (1, 32, 7, 11), margin=1, odd=True),
    Problem("to_float32", (1, 16, 7, 11), (BF16, F32), margin=1),
    Problem("above_tile", (3, 34, 7, 11), margin=2, threads=8),
    Problem("one_pixel", (1, 2, 1, 1)),
    Problem("narrow", (2, 6, 9, 3), kernel=(5, 5), padding=((2, 2), (2, 2))),
    Problem("from_float32", (1, 12, 13, 17), (F32, BF16), stride=(2, 2), margin=1),
    Problem("dilation_2", (1, 16, 19, 13), dilation=(2, 2), padding=((2, 2), (3, 1)), stride=(1, 2)),
    Problem("padding_larger_than_image", (1, 8, 5, 5), kernel=(7, 7), padding=((9, 9), (9, 9))),
]
OTHERS = [
    Problem("multiplier_2", (2, 5, 9, 8), (F32, BF16), multiplier=2, stride=(2, 2)),
    Problem("contiguous", (2, 5, 13, 19), (BF16, F32), contiguous=True),
    Problem("float16", (1, 9, 6, 7), (F16, BF16), kernel=(1, 9), padding=((0, 0), (4, 4))),
]


def arguments(p: Problem, weights: torch.dtype) -> tuple[list[Tensor], Tensor, Case]:
    images, channels, *size = p.shape
    outputs, geometry = channels * p.multiplier, Geometry(p.stride, p.padding, p.dilation)
    weight, bias = whole_numbers((outputs, 1, *p.kernel), 3, weights), whole_numbers((outputs,), 9, weights)
    x = within(whole_numbers((images, channels + 2 * p.margin + p.odd, *size), 9, p.numbers[0]), p.margin, channels)
    shape = (images, outputs + 2 * p.margin + p.odd, *geometry.output_size(size, p.kernel))
    y = within(torch.full(shape, math.nan, dtype=p.numbers[1]), p.margin, outputs)
    if p.contiguous:
        x, y = x.contiguous(), y.contiguous()
    known = case.depthwise(x, weight, bias, geometry, "relu").into(Outline.of(y))
    return [x, weight, bias], y, known


def run(kernel: ModuleType, known: Case, tensors: list[Tensor], y: Tensor) -> None:
    found = kernel.plan(known)
    kernel.bind(found, tensors[0], kernel.pack(found, tensors[1:]), None, y)()


@pytest.mark.parametrize("weights", [F32, BF16])
@pytest.mark.parametrize("p", [*DIRECT, *OTHERS], ids=[p.name for p in (*DIRECT, *OTHERS)])
def test_whole_numbers_are_exact_but_for_the_last_rounding(p: Problem, weights: torch.dtype) -> None:
    kernel = depthwise_direct if p in DIRECT else depthwise
    before = torch.get_num_threads()
    torch.set_num_threads(p.threads)
    try:
        tensors, y, known = arguments(p, weights)
        choice = backends.choose(known)
        assert choice.backend.describe is kernel.describe, choice.reasons
        run(kernel, known, tensors, y)
    finally:
        torch.set_num_threads(before)
    exact = reference.depthwise_conv(*[t.double() for t in tensors], p.stride, p.padding, p.dilation).relu()
    assert torch.equal(y, exact.to(y.dtype))
    if p.margin:
        whole: Any = y._base
        assert whole[:, : p.margin].isnan().all()
        assert whole[:, p.margin + y.shape[1] :].isnan().all()


def test_pairs_keep_what_is_not_a_number() -> None:
    tensors, y, known = arguments(DIRECT[0], F32)
    x, weight, bias = tensors
    x[0, 3, 4, 4], x[0, 8, 0, 1] = math.nan, math.inf
    bias[20] = torch.tensor([-1], dtype=torch.int32).view(F32)[0]  # a NaN of which rounding up would make a number
    weight.abs_().add_(1)
    run(depthwise_direct, known, tensors, y)
    exact = reference.depthwise_conv(*[t.double() for t in tensors], (1, 1), ONE, (1, 1)).relu()
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y.isinf(), exact.isinf())
    assert y[0, 20].isnan().all()


@pytest.mark.parametrize("activation", ["hardswish", "silu", "gelu", "sigmoid"])
def test_activations_are_computed_in_float32(activation: str) -> None:
    x, weight = within(torch.randn(1, 16, 9, 8).bfloat16(), 0, 16), torch.randn(16, 1, 3, 3)
    y = torch.full_like(x, math.nan)
    known = case.depthwise(x, weight, None, Geometry((1, 1), ONE, (1, 1)), activation).into(Outline.of(y))
    assert depthwise_direct.supports(known) == ""
    found = depthwise_direct.plan(known)
    depthwise_direct.bind(found, x, depthwise_direct.pack(found, [weight, None]), None, y)()
    exact = reference.ACTIVATIONS[activation](
        reference.depthwise_conv(x.double(), weight.double(), None, (1, 1), ONE, (1, 1))
    )
    assert ((y.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-5).all()


def test_what_is_not_read_directly_is_said() -> None:
    reasons = {p.name: depthwise_direct.supports(arguments(p, F32)[2]) for p in OTHERS}
    assert "one filter for each channel" in reasons["multiplier_2"]
    assert "channels_last images only" in reasons["contiguous"]
    assert "got torch.float16" in reasons["float16"]
    x, weight = torch.zeros(1, 8, 5, 5).bfloat16(), torch.zeros(8, 1, 3, 3)
    unbound = case.depthwise(x, weight, None, Geometry((1, 1), ONE, (1, 1)))
    assert "memory that is given" in depthwise_direct.supports(unbound)
    wide = Problem("", (1, 8, 3, 20), kernel=(1, 9), padding=((0, 0), (4, 4)))
    assert "filters wider than 7 columns" in depthwise_direct.slower(arguments(wide, F32)[2])


def test_pairs_are_written_where_they_fill_vectors() -> None:
    with machine.targeting(machine.named("avx512")):
        written = {p.name: depthwise_direct.describe(arguments(p, F32)[2])["written"] for p in DIRECT}
    assert written["channels_equal_tile"] == PAIRS
    assert written["channels_of_a_vector"] == written["odd_steps"] == "bfloat16"
    assert written["to_float32"] == "float32"
