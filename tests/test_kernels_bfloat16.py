"""Normal convolutions whose images are bfloat16, or some of them: exact but for the last rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from kernel_checks import whole_numbers, within
from torch import Tensor
from torch.nn import functional as F

from sepconv.kernels import backends, case
from sepconv.kernels.case import Case, Geometry, Outline
from sepconv.kernels.halide.conv import grouped, normal, normal_tiles, stem
from sepconv.kernels.halide.jit import amx, runtime

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())

BF16, F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Problem:
    """``numbers``: of x, of the result and of the residual, if there is one."""

    name: str
    kernel: ModuleType
    shape: tuple[int, int, int, int]
    out_channels: int
    numbers: tuple[torch.dtype, ...]
    size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: int = 1
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    contiguous: bool = False
    threads: int = 1


PROBLEMS = [
    Problem("stem_writes_bfloat16", stem, (1, 3, 17, 23), 32, (F32, BF16), stride=(2, 2)),
    Problem("stem_planes_of_float32", stem, (2, 3, 13, 19), 16, (F32, BF16), stride=(2, 2), contiguous=True),
    Problem("stem_planes_of_bfloat16", stem, (1, 1, 9, 33), 7, (BF16, F32), contiguous=True),
    Problem("stem_reads_bfloat16", stem, (1, 4, 9, 11), 17, (BF16, BF16), size=(7, 7), padding=3),
    Problem("normal", normal, (2, 17, 9, 11), 33, (BF16, BF16, BF16)),
    Problem("normal_in_place", normal, (1, 8, 9, 7), 16, (BF16, BF16), padding=0, stride=(2, 1)),
    Problem("normal_from_float32", normal, (1, 12, 7, 9), 20, (F32, BF16, F32), dilation=(2, 2), padding=2),
    Problem("normal_to_float32", normal, (1, 24, 8, 8), 48, (BF16, F32, BF16), groups=2),
    Problem("grouped", grouped, (1, 32, 9, 7), 32, (BF16, BF16, BF16), groups=8),
    Problem("grouped_to_float32", grouped, (2, 16, 5, 7), 16, (BF16, F32), groups=4, stride=(2, 2)),
]
ON_TILES = [
    Problem("tiles", normal_tiles, (2, 32, 9, 11), 48, (BF16, BF16, BF16)),
    Problem("tiles_odd", normal_tiles, (1, 17, 7, 9), 33, (BF16, BF16, BF16), stride=(2, 2)),
    Problem("tiles_from_float32", normal_tiles, (1, 12, 8, 9), 20, (F32, BF16, F32), dilation=(2, 2), padding=2),
    Problem("tiles_to_float32", normal_tiles, (1, 8, 5, 7), 16, (BF16, F32, BF16), size=(5, 3), padding=3),
    Problem("tiles_share_channels", normal_tiles, (1, 10, 3, 5), 66, (BF16, BF16), threads=2),
    Problem("tiles_threads", normal_tiles, (3, 10, 13, 5), 34, (BF16, BF16), size=(2, 2), padding=0, threads=8),
]
needs_tiles = pytest.mark.skipif(bool(runtime.missing() or amx.missing()), reason=runtime.missing() or amx.missing())


def arguments(p: Problem, weights: torch.dtype) -> tuple[list[Tensor | None], Tensor, Case]:
    """x, weight, bias and residual; the result, full of NaN: both but planes are channels of wider images."""
    images, channels, *size = p.shape
    x = within(whole_numbers((images, channels + 2, *size), 9, p.numbers[0]), 1, channels)
    x = x.contiguous() if p.contiguous else x
    weight = whole_numbers((p.out_channels, channels // p.groups, *p.size), 3, weights)
    bias, around = whole_numbers((p.out_channels,), 9, weights), ((p.padding,) * 2,) * 2
    geometry = Geometry(p.stride, around, p.dilation)
    shape = (images, p.out_channels + 2, *geometry.output_size(size, p.size))
    y = within(torch.full(shape, math.nan, dtype=p.numbers[1]), 1, p.out_channels)
    residual = within(whole_numbers(shape, 9, p.numbers[2]), 1, p.out_channels) if len(p.numbers) > 2 else None
    return [x, weight, bias, residual], y, case.normal(x, weight, bias, residual, geometry, "relu").into(Outline.of(y))


def checked(p: Problem, weights: torch.dtype) -> None:
    tensors, y, known = arguments(p, weights)
    x, weight, bias, residual = tensors
    assert p.kernel.supports(known) == ""
    found = p.kernel.plan(known)
    given = (x, p.kernel.pack(found, [weight, bias]), residual, y)
    p.kernel.bind(found, *given)()
    wide = [None if t is None else t.double() for t in tensors]
    exact = F.conv2d(wide[0], wide[1], wide[2], p.stride, p.padding, p.dilation, p.groups)  # type: ignore[arg-type]
    exact = exact if wide[3] is None else exact + wide[3]
    assert torch.equal(y, exact.relu().to(y.dtype))
    whole = y._base
    assert whole is not None
    assert whole[:, 0].isnan().all()
    assert whole[:, -1].isnan().all()


@pytest.mark.parametrize("weights", [F32, BF16])
@pytest.mark.parametrize("p", PROBLEMS, ids=[p.name for p in PROBLEMS])
def test_whole_numbers_are_exact_but_for_the_last_rounding(p: Problem, weights: torch.dtype) -> None:
    checked(p, weights)


@needs_tiles
@pytest.mark.parametrize("p", ON_TILES, ids=[p.name for p in ON_TILES])
def test_whole_numbers_are_exact_on_tiles(p: Problem) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(p.threads)
    try:
        assert backends.choose(arguments(p, F32)[2]).backend.describe is normal_tiles.describe
        checked(p, F32)
    finally:
        torch.set_num_threads(before)


@needs_tiles
def test_what_tiles_cannot_compute_is_said() -> None:
    reasons = {p.name: normal_tiles.supports(arguments(p, F32)[2]) for p in PROBLEMS}
    assert "in one group, got 8" in reasons["grouped"]
    assert "channels_last images only" in reasons["stem_planes_of_float32"]
    few = arguments(PROBLEMS[3], F32)[2]
    assert normal_tiles.supports(few) == ""
    assert "less than 8 channels" in normal_tiles.slower(few)
    x, weight = torch.zeros(1, 8, 5, 5).bfloat16(), torch.zeros(8, 8, 3, 3)
    unbound = case.normal(x, weight, None, None, Geometry((1, 1), ((1, 1), (1, 1)), (1, 1)))
    assert "memory that is given" in normal_tiles.supports(unbound)
