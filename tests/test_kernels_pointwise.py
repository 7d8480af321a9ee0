"""The pointwise kernel against the definition in double precision, on views and with poisoned outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kernel_checks import double, image, magnitude, pointwise_case, pointwise_forward, poisoned
from torch import Tensor

from sepconv import reference
from sepconv.kernels import layout
from sepconv.kernels.halide.conv import pointwise
from sepconv.kernels.halide.jit import runtime

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]
    out_channels: int
    activation: str = ""
    bias: bool = True
    residual: bool = False


CASES = [
    Case("one_number", (1, 1, 1, 1), 1),
    Case("one_pixel", (1, 17, 1, 1), 5, bias=False),
    Case("one_pixel_of_each_image", (3, 17, 1, 1), 16),
    Case("fewer_pixels_than_one_tile", (1, 5, 1, 3), 33, "relu"),
    Case("pixels_prime", (1, 31, 13, 7), 17, "relu6"),
    Case("pixels_above_tile", (2, 8, 5, 7), 8, residual=True),
    Case("many_images", (5, 16, 3, 3), 24, "silu"),
    Case("channels_out_above_tile", (1, 16, 11, 11), 65, "hardswish"),
    Case("channels_out_prime", (1, 64, 7, 7), 131, "gelu", residual=True),
    Case("channels_in_1", (2, 1, 9, 11), 32, "sigmoid"),
    Case("several_chunks", (1, 257, 37, 41), 7, residual=True, bias=False),
    Case("signal", (2, 19, 101), 12, "relu"),
    Case("volume", (1, 6, 3, 5, 7), 20, "relu"),
]


def arguments(case: Case, channels_last: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    x = image(case.shape, channels_last)
    weight = torch.randn(case.out_channels, case.shape[1], *[1] * (x.dim() - 2))
    bias = torch.randn(case.out_channels) if case.bias else None
    residual = torch.randn(case.shape[0], case.out_channels, *case.shape[2:]) if case.residual else None
    return x, weight, bias, residual


def truth(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    y = reference.pointwise_conv(x, weight, bias)
    return reference.ACTIVATIONS[activation](y if residual is None else y + residual)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_pointwise_matches_definition(case: Case, channels_last: bool, assert_rounding: Callable[..., None]) -> None:
    if channels_last and len(case.shape) == 3:
        pytest.skip("signals have no channels_last layout in PyTorch")
    x, weight, bias, residual = arguments(case, channels_last)
    known = pointwise_case(x, weight, bias, case.activation, residual)
    assert pointwise.supports(known) == ""
    y = pointwise_forward(x, weight, bias, case.activation, residual)
    assert y.stride() == layout.new_output(x, case.out_channels, x.shape[2:]).stride()
    expected = truth(*double(x, weight, bias, residual), case.activation)
    sizes = truth(*magnitude(x, weight, bias, residual), "") + expected.abs()
    assert_rounding(y, expected, sizes, case.shape[1])

    out, margins_untouched = poisoned(y)
    found = pointwise.plan(known)
    added = None if residual is None else layout.like(residual, out)
    pointwise.bind(found, x, pointwise.pack(found, (weight, bias)), added, out)()
    assert torch.equal(out, y)
    margins_untouched()


@pytest.mark.parametrize("streams", [2, 4])
def test_pointwise_sum_in_several_runs(streams: int, assert_rounding: Callable[..., None]) -> None:
    x, weight = image((2, 44, 5, 7), True), torch.randn(37, 44, 1, 1)
    found = pointwise.plan(pointwise_case(x, weight))
    found = found._replace(spec=found.spec._replace(streams=streams))
    out, margins_untouched = poisoned(pointwise_forward(x, weight, None))
    pointwise.bind(found, x, pointwise.pack(found, (weight, None)), None, out)()
    assert_rounding(out, truth(*double(x, weight), None, None, ""), truth(*magnitude(x, weight), None, None, ""), 44)
    margins_untouched()


def test_large_weights_are_read_in_several_runs() -> None:
    x, weight = image((1, 512, 3, 3), True), torch.randn(2048, 512, 1, 1)
    assert pointwise.describe(pointwise_case(x, weight))["streams"] == 4
    assert pointwise.describe(pointwise_case(x, weight[:16]))["streams"] == 1


def test_one_kernel_serves_all_channels_and_whole_blocks() -> None:
    def spec(channels: int, out_channels: int) -> pointwise.PointwiseSpec:
        x = image((1, channels, 14, 14), channels_last=True)
        return pointwise.plan(pointwise_case(x, torch.randn(out_channels, channels, 1, 1))).spec

    assert spec(61, 192) == spec(67, 192) == spec(64, 384)
    assert (spec(61, 192).channels, spec(61, 192).out_channels) == (None, None)
    assert spec(61, 193).out_channels == 193
    assert spec(512, 1536).channels == 512  # in several runs


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_pointwise_is_the_same_with_any_threads(channels_last: bool) -> None:
    x, weight = image((1, 40, 23, 29), channels_last), torch.randn(64, 40, 1, 1)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(pointwise_forward(x, weight, None, "relu"))
    torch.set_num_threads(before)
    assert torch.equal(results[1], results[2])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-4)


def test_pointwise_shares_out_channels_when_there_are_few_pixels() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    x, weight = torch.randn(1, 64, 1, 1), torch.randn(256, 64, 1, 1)
    description = pointwise.describe(pointwise_case(x, weight))
    y = pointwise_forward(x, weight, None)
    torch.set_num_threads(before)
    assert description["parallel"] == "channels"
    torch.testing.assert_close(y, reference.pointwise_conv(x, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_pointwise_activations_treat_special_numbers_as_pytorch(activation: str) -> None:
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, -100.0, 100.0, -3.0, 3.0, 6.0, 7.0, -1e-30])
    x = special.repeat(4).view(1, 1, 6, 8)
    y = pointwise_forward(x, torch.ones(1, 1, 1, 1), None, activation)
    expected = reference.ACTIVATIONS[activation](x.double()).float()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-30, equal_nan=True)


def test_pointwise_empty_batch() -> None:
    x = torch.empty(0, 5, 3, 3).contiguous(memory_format=torch.channels_last)
    assert pointwise_forward(x, torch.randn(4, 5, 1, 1), None).shape == (0, 4, 3, 3)


def test_pointwise_reads_expanded_images() -> None:
    x, weight = torch.randn(1, 9, 5, 5).expand(3, 9, 5, 5), torch.randn(6, 9, 1, 1)
    torch.testing.assert_close(pointwise_forward(x, weight, None), reference.pointwise_conv(x, weight))


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.randn(1, 4, 6, 6)[..., ::2], "do not lie evenly spaced"),
        (torch.randn(1, 4, 6, 8)[..., :5], "do not lie evenly spaced"),
        (torch.randn(1, 4, 6, 6, dtype=torch.float64), "float32"),
        (torch.randn(1, 4, 6, 6, device="meta"), "cpu"),
    ],
)
def test_pointwise_says_what_it_does_not_support(x: Tensor, reason: str) -> None:
    weight = torch.randn(2, 4, 1, 1, dtype=x.dtype, device=x.device)
    assert reason in pointwise.supports(pointwise_case(x, weight))


def test_pointwise_plan_and_bind_refuse_wrong_memory() -> None:
    with pytest.raises(ValueError, match="do not lie evenly spaced"):
        pointwise.plan(pointwise_case(torch.randn(1, 4, 6, 6)[..., ::2], torch.randn(2, 4, 1, 1)))
    x = image((1, 4, 6, 6), True)
    found = pointwise.plan(pointwise_case(x, torch.randn(2, 4, 1, 1)))
    with pytest.raises(ValueError, match="layout of x"):
        pointwise.bind(found, x, pointwise.pack(found, (torch.randn(2, 4, 1, 1), None)), None, torch.empty(1, 2, 6, 6))


@pytest.mark.parametrize(
    ("shape", "out_channels", "reason"),
    [
        ((1, 16, 8, 8), 16, "16,384 multiply-adds"),
        ((1, 2048, 6, 6), 2048, "on 36 pixels"),
        ((1, 64, 112, 112), 64, ""),
    ],
)
def test_pointwise_says_where_pytorch_is_faster(shape: Any, out_channels: int, reason: str) -> None:
    x, weight = torch.empty(shape), torch.empty(out_channels, shape[1], 1, 1)
    sentence = pointwise.slower(pointwise_case(x, weight))
    assert reason in sentence
    assert bool(sentence) == bool(reason)


def test_pointwise_refuses_an_output_beyond_32_bits() -> None:
    x = torch.empty(1).expand(1, 1, 1 << 16, 1 << 14)
    assert "2147483648 elements" in pointwise.supports(pointwise_case(x, torch.empty(2, 1, 1, 1)))


@pytest.mark.parametrize(
    ("channels_last", "side", "channels", "expected"),
    [
        (True, 28, 64, ""),  # 3.2 M multiply-adds
        (True, 26, 64, "2,768,896 multiply-adds take less time"),
        (False, 28, 64, "3,211,264 multiply-adds take less time"),
        (False, 28, 96, ""),
        (True, 6, 512, "than is gained on 36 pixels"),
    ],
)
def test_pointwise_leaves_small_products_to_pytorch(
    channels_last: bool, side: int, channels: int, expected: str
) -> None:
    x, weight = image((1, channels, side, side), channels_last), torch.randn(channels, channels, 1, 1)
    reason = pointwise.slower(pointwise_case(x, weight))
    assert expected in reason
    assert bool(reason) == bool(expected)
