"""Products of bfloat16 in vectors of pairs, as on processors without tiles: the same answers, to the last bit."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from kernel_checks import whole_numbers, within
from torch import Tensor
from torch.nn import functional as F

from sepconv import reference
from sepconv.kernels import case
from sepconv.kernels.case import Case, Geometry, Outline
from sepconv.kernels.halide.conv import normal_tiles, pointwise_tiles, separable_tiles, tiles
from sepconv.kernels.halide.jit import amx, llvm, runtime
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule.tiles import TilesSchedule, in_vectors

has_vectors = not runtime.missing() and llvm.host_has("avx512bf16")
needs_vectors = pytest.mark.skipif(not has_vectors, reason="the processor has no products of pairs of bfloat16")

BF16, F32 = torch.bfloat16, torch.float32
ONE = ((1, 1), (1, 1))


@pytest.fixture
def vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "unit", lambda: "AVX512-BF16")


def run(kernel: ModuleType, known: Case, x: Tensor, weights: list[Any], y: Tensor) -> None:
    assert kernel.supports(known) == ""
    assert kernel.describe(known)["unit"] == "AVX512-BF16"
    found = kernel.plan(known)
    kernel.bind(found, x, kernel.pack(found, weights), None, y)()


@needs_vectors
@pytest.mark.parametrize(
    ("shape", "out_channels", "numbers"),
    [
        ((1, 32, 7, 9), 64, (BF16, BF16)),
        ((3, 34, 5, 5), 33, (BF16, BF16)),
        ((1, 17, 3, 1), 16, (BF16, F32)),
        ((1, 40, 1, 1), 100, (F32, BF16)),
    ],
)
def test_pointwise(
    vectors: None, shape: tuple[int, ...], out_channels: int, numbers: tuple[torch.dtype, torch.dtype]
) -> None:
    x = within(whole_numbers((shape[0], shape[1] + 2, *shape[2:]), 9, numbers[0]), 2, shape[1])
    y = within(torch.full((shape[0], out_channels + 3, *shape[2:]), math.nan, dtype=numbers[1]), 1, out_channels)
    weight, bias = whole_numbers((out_channels, shape[1], 1, 1), 3, BF16), whole_numbers((out_channels,), 9)
    run(pointwise_tiles, case.pointwise(x, weight, bias, None, "relu").into(Outline.of(y)), x, [weight, bias], y)
    assert torch.equal(y, F.conv2d(x.double(), weight.double(), bias.double()).relu().to(y.dtype))
    whole = y._base
    assert whole is not None
    assert whole[:, 0].isnan().all()
    assert whole[:, -2:].isnan().all()


@needs_vectors
@pytest.mark.parametrize(("channels", "out_channels", "rows"), [(32, 48, 13), (7, 16, 5), (64, 40, 1)])
def test_separable(vectors: None, channels: int, out_channels: int, rows: int) -> None:
    x = within(whole_numbers((2, channels, rows, 9), 3, BF16), 0, channels)
    dw, pw = whole_numbers((channels, 1, 3, 3), 1), whole_numbers((out_channels, channels, 1, 1), 3)
    y = torch.full((2, out_channels, rows, 9), math.nan, dtype=BF16).contiguous(memory_format=torch.channels_last)
    first = case.depthwise(x, dw, None, Geometry((1, 1), ONE, (1, 1)), "relu")
    known = case.separable(first, case.pointwise(first.y, pw)).into(Outline.of(y))
    run(separable_tiles, known, x, [dw, pw, None, None], y)
    hidden = reference.depthwise_conv(x.double(), dw.double(), None, (1, 1), ONE, (1, 1)).relu()
    assert torch.equal(y, reference.pointwise_conv(hidden, pw.double(), None).to(BF16))


@needs_vectors
def test_normal(vectors: None) -> None:
    x, weight = within(whole_numbers((1, 12, 11, 7), 9, BF16), 0, 12), whole_numbers((33, 12, 3, 3), 3)
    y = torch.full((1, 33, 6, 4), math.nan, dtype=BF16).contiguous(memory_format=torch.channels_last)
    known = case.normal(x, weight, None, None, Geometry((2, 2), ONE, (1, 1))).into(Outline.of(y))
    run(normal_tiles, known, x, [weight, None], y)
    assert torch.equal(y, F.conv2d(x.double(), weight.double(), None, 2, 1).to(BF16))


def test_registers_hold_the_sums_and_no_part_is_smaller() -> None:
    found = in_vectors(TilesSchedule(4, 224, 128), 128, tiles.PAIR, 200)
    assert (found.wide, found.tall) == (64, 6)
    assert in_vectors(found, 96, tiles.PAIR, 200)[2:4] == (32, 12)
    assert in_vectors(found, 16, amx.ROWS, 5)[2:4] == (16, 5)


@pytest.mark.parametrize(
    ("name", "target", "unit"),
    [
        ("AMD EPYC 9654", "x86-64-linux-avx512-avx512_zen4", "AVX512-BF16"),
        ("AMD EPYC 7763", "x86-64-linux-avx2", ""),
        ("Intel(R) Xeon(R) without tiles", "x86-64-linux-avx512-avx512_sapphirerapids", ""),
    ],
)
def test_vectors_multiply_where_that_is_faster_than_float32(
    monkeypatch: pytest.MonkeyPatch, name: str, target: str, unit: str
) -> None:
    monkeypatch.setattr(amx, "missing", lambda: "no tiles")
    monkeypatch.setattr(machine, "host", lambda: machine.Machine(name, target, 16, 32))
    if not runtime.missing():
        assert tiles.unit() == unit
        assert tiles.missing() == ("" if unit else "no tiles, and it is not AMD's with AVX512-BF16")


@needs_vectors
def test_functions_leave_products_without_tiles_to_pytorch(vectors: None) -> None:
    x, weight = torch.zeros(1, 64, 40, 40, dtype=BF16), torch.zeros(64, 64, 1, 1, dtype=BF16)
    asked = case.pointwise(x.contiguous(memory_format=torch.channels_last), weight)
    assert "PyTorch's product of bfloat16" in pointwise_tiles.slower(asked)
