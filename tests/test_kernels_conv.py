"""The stem kernel against the definition in double precision, from both layouts, with poisoned outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kernel_checks import double, image, magnitude, poisoned
from torch import Tensor

from sepconv import reference
from sepconv.kernels.case import Geometry, normal
from sepconv.kernels.halide.conv import stem
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.schedule import peak

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int, int]
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (2, 2)
    padding: tuple[tuple[int, int], ...] = ((1, 1), (1, 1))
    activation: str = "relu6"
    bias: bool = True


CASES = [
    Case("3x3s2", (1, 3, 32, 32), 32, (3, 3)),
    Case("3x3s2_padding_at_the_end", (2, 3, 33, 31), 24, (3, 3), padding=((0, 1), (0, 1)), activation="hardswish"),
    Case("5x5s1_one_channel", (1, 1, 7, 3), 5, (5, 5), (1, 1), ((2, 2), (2, 2)), "", bias=False),
    Case("7x7s21_four_channels", (1, 4, 9, 23), 17, (7, 7), (2, 1), ((3, 3), (3, 3)), "gelu"),
    Case("7x7s2_many_rows", (3, 3, 67, 29), 64, (7, 7), padding=((3, 3), (3, 3)), activation="relu"),
    Case("one_pixel", (1, 2, 1, 1), 3, (3, 3), (1, 1), activation=""),
    Case("no_padding", (1, 3, 11, 13), 8, (3, 3), (1, 1), ((0, 0), (0, 0)), "silu"),
]


def truth(tensors: list[Any], case: Case, activation: str) -> Tensor:
    y = reference.conv(*tensors, case.stride, case.padding, (1, 1))
    return reference.ACTIVATIONS[activation](y)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_conv_matches_definition(case: Case, channels_last: bool, assert_rounding: Callable[..., None]) -> None:
    x = image(case.shape, channels_last)
    weight = torch.randn(case.out_channels, case.shape[1], *case.kernel)
    bias = torch.randn(case.out_channels) if case.bias else None
    known = normal(x, weight, bias, None, Geometry(case.stride, case.padding, (1, 1)), case.activation)
    assert stem.supports(known) == ""
    y = stem.prepare(known)(x, weight, bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected = truth(double(x, weight, bias), case, case.activation)
    sizes = truth(magnitude(x, weight, bias), case, "") + expected.abs()
    assert_rounding(y, expected, sizes, weight[0].numel())

    found = stem.plan(known)
    out, margins_untouched = poisoned(y)
    stem.bind(found, x, stem.pack(found, (weight, bias)), None, out)()
    assert torch.equal(out, y)
    margins_untouched()


def test_conv_is_the_same_with_two_threads(threads: int) -> None:
    x, weight = image((1, 3, 61, 37), False), torch.randn(16, 3, 3, 3)
    geometry = Geometry((2, 2), ((1, 1), (1, 1)), (1, 1))
    run = stem.prepare(normal(x, weight, None, None, geometry, "relu"))
    results = [run(x, weight) for _ in range(3)]
    assert all(torch.equal(result, results[0]) for result in results)
    expected = reference.ACTIVATIONS["relu"](reference.conv(x, weight, None, *geometry))
    torch.testing.assert_close(results[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "channels", "reason"),
    [
        (torch.randn(1, 5, 6, 6), 5, "at most 4 channels"),
        (torch.randn(1, 4, 6, 6), 2, "groups"),
        (torch.randn(1, 3, 6), 3, "spatial dimensions"),
        (torch.randn(1, 3, 6, 6, dtype=torch.float64), 3, "float32"),
        (torch.randn(1, 3, 6, 12)[..., ::2], 3, "next to one another"),
    ],
)
def test_conv_says_what_it_does_not_support(x: Tensor, channels: int, reason: str) -> None:
    weight = torch.randn(4, channels, *[3] * (x.dim() - 2), dtype=x.dtype)
    dims = x.dim() - 2
    geometry = Geometry((1,) * dims, ((1, 1),) * dims, (1,) * dims)
    assert reason in stem.supports(normal(x, weight, None, None, geometry))


def test_conv_bind_refuses_an_output_in_another_layout() -> None:
    x, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    found = stem.plan(normal(x, weight, None, None, Geometry((2, 2), ((1, 1), (1, 1)), (1, 1))))
    with pytest.raises(ValueError, match="out must be channels_last"):
        stem.bind(found, x, stem.pack(found, (weight, None)), None, torch.empty(1, 4, 4, 4))


def test_fma_peak_is_positive_and_checks_its_arguments() -> None:
    threads = torch.get_num_threads()
    assert peak.fma_peak_gflops(1, repeats=2) > 1.0
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="threads and repeats must be at least 1, got 0"):
        peak.fma_peak_gflops(0)


def test_memory_speed_is_positive_and_checks_its_arguments() -> None:
    assert 0.1 < peak.copy_gb_per_s(1, repeats=1) < 10_000
    assert 0.1 < peak.copy_gb_per_s(2, repeats=1) < 10_000
    with pytest.raises(ValueError, match="threads and repeats must be at least 1, got 1 and 0"):
        peak.copy_gb_per_s(1, 0)
