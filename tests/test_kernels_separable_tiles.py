"""The separable kernel in bfloat16 on tiles: exact where all sums are, right to its roundings elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from kernel_checks import double, separable_case, whole_numbers, within
from torch import Tensor

from sepconv import reference
from sepconv.kernels import backends
from sepconv.kernels.case import Case, Outline
from sepconv.kernels.halide.conv import separable, separable_tiles, tiles
from sepconv.kernels.halide.jit import amx, runtime

pytestmark = pytest.mark.skipif(bool(runtime.missing() or amx.missing()), reason=runtime.missing() or amx.missing())

BF16, F32 = torch.bfloat16, torch.float32
LAST = torch.channels_last
Pairs = tuple[tuple[int, int], tuple[int, int]]
ONE: Pairs = ((1, 1), (1, 1))


@dataclass(frozen=True)
class Problem:
    """``numbers``: of x, of the result and of the residual, if there is one."""

    name: str
    shape: tuple[int, int, int, int]
    out_channels: int
    numbers: tuple[torch.dtype, ...] = (BF16, BF16)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: Pairs = ONE
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    activations: tuple[str, str] = ("relu", "relu")
    shift: int = 0
    threads: int = 1


PROBLEMS = [
    Problem("channels_equal_tile", (1, 32, 14, 14), 64),
    Problem("channels_prime", (3, 17, 7, 11), 33, (BF16, BF16, BF16)),
    Problem("one_pixel", (1, 2, 2, 2), 1, stride=(2, 2)),
    Problem("above_tile", (1, 66, 9, 5), 34, (BF16, BF16, BF16), activations=("", "")),
    Problem("odd_steps", (1, 64, 6, 7), 16, (BF16, BF16, BF16), shift=1),
    Problem("from_float32", (1, 24, 13, 12), 40, (F32, BF16, BF16), stride=(2, 2)),
    Problem("to_float32", (1, 24, 8, 12), 31, (BF16, F32, BF16)),
    Problem("all_float32_but_weights", (2, 9, 8, 5), 12, (F32, F32, F32)),
    Problem("residual_float32", (1, 16, 5, 9), 48, (BF16, BF16, F32), shift=2),
    Problem("multiplier_3_5x5", (1, 12, 13, 13), 40, (BF16, BF16), (5, 5), (2, 2), ((1, 2), (1, 2)), multiplier=3),
    Problem("dilation_2", (1, 20, 29, 17), 16, (BF16, BF16), (3, 3), (2, 1), ((2, 2), (2, 2)), (2, 2)),
    Problem("padding_larger_than_image", (2, 16, 5, 5), 16, kernel=(7, 7), padding=((9, 9), (9, 9))),
    Problem("threads_share_channels", (1, 48, 7, 5), 130, (BF16, BF16, BF16), threads=3),
    Problem("threads", (3, 32, 19, 9), 64, (BF16, BF16, BF16), threads=8),
]


def arguments(p: Problem, weights: torch.dtype) -> tuple[list[Tensor | None], Tensor, Case]:
    """x, weights, biases and residual; the result, full of NaN; both lie ``shift`` channels inside larger images."""
    depth, margin = p.shape[1] * p.multiplier, p.shift + 2
    x = within(whole_numbers((p.shape[0], p.shape[1] + margin, *p.shape[2:]), 3, p.numbers[0]), p.shift, p.shape[1])
    dw, pw = whole_numbers((depth, 1, *p.kernel), 1, weights), whole_numbers((p.out_channels, depth, 1, 1), 3, weights)
    biases = whole_numbers((depth,), 2), whole_numbers((p.out_channels,), 9)
    walk = (p.stride, p.padding, p.dilation)
    known = separable_case(x, (dw, biases[0], p.activations[0]), (pw, biases[1], p.activations[1]), walk)
    size = (known.result.shape[0], p.out_channels + margin, *known.result.shape[2:])
    y = within(torch.full(size, math.nan, dtype=p.numbers[1]), p.shift, p.out_channels)
    residual = within(whole_numbers(size, 9, p.numbers[2]), p.shift, p.out_channels) if len(p.numbers) > 2 else None
    given = (pw, biases[1], p.activations[1])
    known = separable_case(x, (dw, biases[0], p.activations[0]), given, walk, residual).into(Outline.of(y))
    return [x, dw, pw, *biases, residual], y, known


def truth(tensors: list[Any], p: Problem) -> Tensor:
    x, dw, pw, dw_bias, pw_bias, residual = double(*tensors)
    hidden = reference.depthwise_conv(x, dw, dw_bias, p.stride, p.padding, p.dilation)
    y = reference.pointwise_conv(reference.ACTIVATIONS[p.activations[0]](hidden), pw, pw_bias)
    return reference.ACTIVATIONS[p.activations[1]](y if residual is None else y + residual)


def run(known: Case, tensors: list[Any], y: Tensor) -> None:
    x, *weights, residual = tensors
    assert separable_tiles.supports(known) == ""
    found = separable_tiles.plan(known)
    separable_tiles.bind(found, x, separable_tiles.pack(found, weights), residual, y)()


@pytest.mark.parametrize("p", PROBLEMS, ids=[p.name for p in PROBLEMS])
def test_whole_numbers_are_exact_but_for_the_last_rounding(p: Problem) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(p.threads)
    try:
        tensors, y, known = arguments(p, BF16 if p.numbers[:2] == (F32, F32) else F32)
        run(known, tensors, y)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, truth(tensors, p).to(y.dtype))
    whole = y._base
    assert whole is not None
    assert whole[:, : p.shift].isnan().all()
    assert whole[:, p.shift + p.out_channels :].isnan().all()


def test_threads_share_channels_where_there_are_few_rows() -> None:
    known = {p.name: replace(arguments(p, F32)[2], threads=p.threads) for p in PROBLEMS if p.threads > 1}
    said = {name: separable_tiles.describe(case)["parallel"] for name, case in known.items()}
    assert said == {"threads_share_channels": "channels", "threads": "rows"}


@pytest.mark.parametrize("activations", [("relu6", ""), ("hardswish", "silu"), ("gelu", "sigmoid")])
def test_activations_are_computed_in_float32(activations: tuple[str, str]) -> None:
    p = Problem("", (1, 32, 9, 7), 24, activations=activations)
    tensors, y, known = arguments(p, F32)
    scaled = [tensors[0], *[None if t is None else torch.randn(t.shape) / 4 for t in tensors[1:5]], None]
    scaled[2] = scaled[2].bfloat16().float()  # type: ignore[union-attr]
    run(known, scaled, y)
    exact = truth(scaled, p)
    hidden = truth(
        [*scaled[:2], torch.eye(32)[:, :, None, None], scaled[3], None, None],
        Problem("", p.shape, 32, activations=(activations[0], "")),
    )
    # One rounding of each depthwise result, and of the sum; no activation is steeper than 1.5.
    weighed = reference.pointwise_conv(hidden.abs(), scaled[2].double().abs(), None)  # type: ignore[union-attr]
    assert ((y.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1.5 * weighed * 2.0**-8 + 1e-5).all()
    assert (y.double() - exact).abs().mean() <= 0.003


def test_not_a_number_and_infinity_reach_what_they_touch() -> None:
    p = Problem("", (1, 32, 9, 8), 16, (BF16, BF16, BF16), activations=("relu6", "relu"))
    tensors, y, known = arguments(p, F32)
    x, residual = tensors[0], tensors[5]
    assert x is not None
    assert residual is not None
    x[0, 3, 4, 4], x[0, 5, 0, 1], residual[0, 7, 8, 7] = math.nan, math.inf, math.nan
    last = torch.tensor([-1], dtype=torch.int16).view(BF16)  # the NaN of which rounding up would make a number
    residual[0, 8, 8, 0] = last[0]
    tensors[1].abs_().add_(1)  # type: ignore[union-attr]
    run(known, tensors, y)
    assert torch.equal(y.isnan(), truth(tensors, p).isnan())
    assert y[0, :, 3:6, 3:6].isnan().all()


def test_the_list_takes_it_where_a_tensor_is_bfloat16() -> None:
    _, _, known = arguments(PROBLEMS[0], F32)
    choice = backends.choose(known)
    assert choice.backend.describe is separable_tiles.describe
    assert choice.backend.describe(known)["numbers"] == ["bfloat16 pairs"] * 3
    assert separable.supports(known) == "the kernel computes in float32 but got torch.bfloat16"
    float32 = separable_case(
        torch.randn(1, 8, 5, 5),
        (torch.randn(8, 1, 3, 3), None, ""),
        (torch.randn(8, 8, 1, 1), None, ""),
        ((1, 1), ONE, (1, 1)),
    )
    assert "no tensor is of it" in separable_tiles.supports(float32)


def test_what_it_cannot_compute_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, y, known = arguments(PROBLEMS[0], F32)
    x, dw, pw = tensors[:3]
    walk = ((1, 1), ONE, (1, 1))
    unbound = separable_case(x, (dw, None, ""), (pw, None, ""), walk)  # type: ignore[arg-type]
    assert "memory that is given" in separable_tiles.supports(unbound)
    apart = torch.zeros(1, 32, 14, 14, dtype=BF16)
    there = separable_case(apart, (dw, None, ""), (pw, None, ""), walk).into(Outline.of(y))
    assert "must lie next to one another" in separable_tiles.supports(there)
    wide = Problem("", (1, 32, 4, 40), 8, kernel=(1, 9), padding=((0, 0), (4, 4)))
    assert "filters wider than 7 columns" in separable_tiles.slower(arguments(wide, F32)[2])
    found = separable_tiles.plan(known)
    packed = separable_tiles.pack(found, tensors[1:5])
    with pytest.raises(ValueError, match=r"separable_tiles\.bind: an image must be channels_last"):
        separable_tiles.bind(found, x, packed, None, torch.empty(y.shape, dtype=BF16))  # type: ignore[arg-type]
    monkeypatch.setattr(amx, "missing", lambda: "the processor has no tiles of bfloat16 (AMX)")
    monkeypatch.setattr(tiles, "unit", lambda: "")
    assert separable_tiles.supports(known).startswith("the processor has no tiles of bfloat16 (AMX), and")
