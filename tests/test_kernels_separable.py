"""The separable kernel against the definition in double precision, on views and with poisoned outputs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from kernel_checks import double, image, magnitude, pointwise_case, poisoned, separable_case
from torch import Tensor

from sepconv import reference
from sepconv.kernels import layout
from sepconv.kernels.case import Geometry
from sepconv.kernels.halide.conv import pointwise, separable
from sepconv.kernels.halide.conv.separable_pipeline import room
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.schedule import machine

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())

Pairs = tuple[tuple[int, int], tuple[int, int]]
ONE: Pairs = ((1, 1), (1, 1))
NONE: Pairs = ((0, 0), (0, 0))


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int, int]
    out_channels: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: Pairs = ONE
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    activations: tuple[str, str] = ("relu6", "relu6")
    bias: bool = True
    residual: bool = False


CASES = [
    Case("one_output_pixel", (1, 2, 2, 2), 3, stride=(2, 2)),
    Case("channels_equal_tile", (1, 32, 14, 14), 64),
    Case("channels_prime", (2, 17, 7, 11), 33, residual=True),
    Case("channels_below_tile", (1, 3, 9, 7), 5, activations=("silu", ""), bias=False),
    Case("rows_left_over", (1, 24, 61, 53), 40),
    Case("stride_2", (1, 16, 13, 12), 24, stride=(2, 2), activations=("relu", "")),
    Case("stride_2_1_dilation_2", (1, 9, 29, 31), 16, stride=(2, 1), padding=((2, 2), (2, 2)), dilation=(2, 2)),
    Case("stride_1_2_kernel_3x5", (1, 48, 11, 13), 24, (3, 5), (1, 2), ((0, 2), (4, 0)), activations=("", "gelu")),
    Case("stride_3_dilation_3", (1, 8, 12, 12), 16, stride=(3, 3), padding=NONE, dilation=(3, 3)),
    Case("padding_larger_than_image", (2, 16, 5, 5), 16, (7, 7), padding=((9, 9), (9, 9)), activations=("gelu", "")),
    Case("image_smaller_than_kernel", (1, 8, 2, 3), 8, (5, 5), padding=((2, 2), (2, 2))),
    Case("multiplier_3", (1, 24, 13, 13), 40, (5, 5), (2, 2), ((1, 2), (1, 2)), multiplier=3),
    Case("multiplier_2_channels_prime", (1, 5, 7, 9), 11, multiplier=2, activations=("hardswish", "sigmoid")),
    Case("channels_below_shared_kernel", (1, 127, 5, 7), 33),
    Case("channels_of_shared_kernel", (2, 131, 7, 5), 64, residual=True),
    Case("channels_above_shared_kernel", (1, 257, 5, 3), 37, (1, 1), padding=NONE, activations=("relu", "")),
    Case("multiplier_2_of_shared_kernel", (1, 139, 4, 5), 19, multiplier=2),
    Case("signal_k15", (3, 8, 1, 203), 8, (1, 15), padding=((0, 0), (7, 7))),
    Case("kernel_13x1", (1, 8, 31, 3), 8, (13, 1), padding=((6, 6), (0, 0))),
]


def arguments(case: Case) -> tuple[list[Tensor | None], tuple[Any, ...]]:
    """x, weights, biases and residual; then what is not a tensor."""
    channels, out_channels = case.shape[1], case.out_channels
    depth = channels * case.multiplier
    x = image(case.shape, channels_last=True)
    depthwise_weight, pointwise_weight = torch.randn(depth, 1, *case.kernel), torch.randn(out_channels, depth, 1, 1)
    biases = [torch.randn(depth), torch.randn(out_channels)] if case.bias else [None, None]
    walk = (case.stride, case.padding, case.dilation)
    size = Geometry(*walk).output_size(case.shape[2:], case.kernel)
    residual = torch.randn(case.shape[0], out_channels, *size) if case.residual else None
    return [x, depthwise_weight, biases[0], pointwise_weight, biases[1], residual], walk


def described(tensors: list[Any], activations: tuple[str, str], walk: tuple[Any, ...]) -> Any:
    x, depthwise_weight, depthwise_bias, pointwise_weight, bias, residual = tensors
    first, second = (depthwise_weight, depthwise_bias, activations[0]), (pointwise_weight, bias, activations[1])
    return separable_case(x, first, second, walk, residual)


def pack(found: Any, tensors: list[Any]) -> Any:
    _, depthwise_weight, depthwise_bias, pointwise_weight, bias, _ = tensors
    return separable.pack(found, (depthwise_weight, pointwise_weight, depthwise_bias, bias))


def run(tensors: list[Any], activations: tuple[str, str], geometry: tuple[Any, ...]) -> Tensor:
    x, depthwise_weight, depthwise_bias, pointwise_weight, bias, residual = tensors
    known = described(tensors, activations, geometry)
    assert separable.supports(known) == ""
    return separable.prepare(known)(x, depthwise_weight, pointwise_weight, depthwise_bias, bias, residual)


def truth(tensors: list[Any], activations: tuple[str, str], geometry: tuple[Any, ...]) -> Tensor:
    x, depthwise_weight, depthwise_bias, pointwise_weight, bias, residual = tensors
    hidden = reference.depthwise_conv(x, depthwise_weight, depthwise_bias, *geometry)
    y = reference.pointwise_conv(reference.ACTIVATIONS[activations[0]](hidden), pointwise_weight, bias)
    return reference.ACTIVATIONS[activations[1]](y if residual is None else y + residual)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_separable_matches_definition(case: Case, assert_rounding: Callable[..., None]) -> None:
    tensors, geometry = arguments(case)
    y = run(tensors, case.activations, geometry)
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected = truth(double(*tensors), case.activations, geometry)
    sizes = truth(magnitude(*tensors), ("", ""), geometry) + expected.abs()
    terms = case.kernel[0] * case.kernel[1] + case.shape[1] * case.multiplier
    assert_rounding(y, expected, sizes, terms)

    x, residual = tensors[0], tensors[-1]
    assert x is not None
    found = separable.plan(described(tensors, case.activations, geometry))
    out, margins_untouched = poisoned(y)
    added = None if residual is None else layout.like(residual, out)
    separable.bind(found, x, pack(found, tensors), added, out)()
    assert torch.equal(out, y)
    margins_untouched()


@pytest.mark.parametrize("streams", [2, 4])
@pytest.mark.parametrize("multiplier", [1, 3])
def test_separable_sum_in_several_runs(streams: int, multiplier: int, assert_rounding: Callable[..., None]) -> None:
    case = Case("streams", (1, 20, 7, 11), 19, multiplier=multiplier)
    tensors, geometry = arguments(case)
    usual = run(tensors, case.activations, geometry)
    assert tensors[0] is not None
    found = separable.plan(described(tensors, case.activations, geometry))
    found = found._replace(spec=found.spec._replace(streams=streams))
    out, margins_untouched = poisoned(usual)
    separable.bind(found, tensors[0], pack(found, tensors), None, out)()
    expected = truth(double(*tensors), case.activations, geometry)
    sizes = truth(magnitude(*tensors), ("", ""), geometry) + expected.abs()
    assert_rounding(out, expected, sizes, 9 + 20 * multiplier)
    margins_untouched()


@pytest.mark.parametrize(
    ("shape", "out_channels", "parallel"), [((1, 16, 24, 24), 16, "rows"), ((1, 32, 1, 25), 128, "channels")]
)
def test_separable_shares_out_rows_or_channels(shape: Any, out_channels: int, parallel: str) -> None:
    case = Case(parallel, shape, out_channels)
    tensors, geometry = arguments(case)
    alone = run(tensors, case.activations, geometry)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    description = separable.describe(described(tensors, ("relu6", "relu6"), geometry))
    results = [run(tensors, case.activations, geometry) for _ in range(5)]
    torch.set_num_threads(before)
    assert description["parallel"] == parallel
    assert all(torch.equal(result, results[0]) for result in results)
    torch.testing.assert_close(results[0], alone, rtol=1e-4, atol=1e-4)


def test_separable_kernel_serves_every_image_size() -> None:
    kernels = []
    for height in range(40, 60, 3):
        case = Case("size", (1, 16, height, height + 7), 32)
        tensors, geometry = arguments(case)
        y = run(tensors, case.activations, geometry)
        expected = truth(double(*tensors), case.activations, geometry)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
        kernels.append(runtime.cached_kernels())
    assert kernels[-1] == kernels[0]


def test_separable_runs_in_many_threads_at_once() -> None:
    cases = [case for case in CASES if case.name in ("channels_prime", "stride_2", "multiplier_3", "rows_left_over")]
    prepared = [(case, *arguments(case)) for case in cases]
    expected = [run(tensors, case.activations, geometry) for case, tensors, geometry in prepared]
    wrong: list[str] = []

    def work(offset: int) -> None:
        for step in range(24):
            index = (offset + step) % len(prepared)
            case, tensors, geometry = prepared[index]
            if not torch.equal(run(tensors, case.activations, geometry), expected[index]):
                wrong.append(case.name)

    workers = [threading.Thread(target=work, args=(offset,)) for offset in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_separable_treats_special_numbers_as_the_definition(activation: str, special: float) -> None:
    x = torch.randn(1, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    x[0, 1, 2, 2] = special
    depthwise_weight, pointwise_weight = torch.rand(4, 1, 3, 3) + 0.1, torch.randn(8, 4, 1, 1)
    tensors = [x, depthwise_weight, None, pointwise_weight, None, None]
    activations, geometry = (activation, "relu6"), ((1, 1), NONE, (1, 1))
    expected = truth(double(*tensors), activations, geometry).float()
    torch.testing.assert_close(run(tensors, activations, geometry), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.randn(1, 4, 6, 6), "contiguous layout"),
        (torch.randn(1, 4, 6), "spatial dimensions"),
        (image((1, 4, 6, 6), True).double(), "float32"),
        (torch.randn(1, 9, 6, 6).contiguous(memory_format=torch.channels_last)[:, 1::2], "next to one another"),
    ],
)
def test_separable_says_what_it_does_not_support(x: Tensor, reason: str) -> None:
    dims = x.dim() - 2
    tensors = [x, torch.randn(4, 1, *[3] * dims), None, torch.randn(2, 4, *[1] * dims), None, None]
    assert reason in separable.supports(described(tensors, ("", ""), ((1,) * dims, ONE[:dims], (1,) * dims)))


def test_separable_empty_batch() -> None:
    x = torch.empty(0, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    first, second = torch.randn(4, 1, 3, 3), torch.randn(2, 4, 1, 1)
    known = separable_case(x, (first, None, ""), (second, None, ""), ((1, 1), ONE, (1, 1)))
    assert separable.prepare(known)(x, first, second).shape == (0, 2, 6, 6)


def test_separable_bind_refuses_an_output_in_another_layout() -> None:
    case = Case("layout", (1, 16, 24, 24), 16)
    tensors, geometry = arguments(case)
    found = separable.plan(described(tensors, ("relu6", "relu6"), geometry))
    assert tensors[0] is not None
    with pytest.raises(ValueError, match="out must be channels_last"):
        separable.bind(found, tensors[0], pack(found, tensors), None, torch.empty(1, 16, 24, 24))


def test_bind_refuses_a_residual_that_a_copy_would_freeze() -> None:
    """A copy made while binding would hold for ever what the residual was then: garbage, in an arena."""
    case = Case("layout", (1, 16, 24, 24), 16, residual=True)
    tensors, geometry = arguments(case)
    x, _, _, pointwise_weight, bias, _ = tensors
    assert x is not None
    assert pointwise_weight is not None
    found = separable.plan(described(tensors, ("relu6", "relu6"), geometry))
    out, residual = layout.new_output(x, 16, (24, 24)), torch.randn(1, 16, 24, 24)
    with pytest.raises(ValueError, match=r"separable\.bind: residual must be channels_last"):
        separable.bind(found, x, pack(found, tensors), residual, out)
    plan = pointwise.plan(pointwise_case(x, pointwise_weight, bias, "", residual))
    with pytest.raises(ValueError, match=r"pointwise\.bind: residual must have the layout of x"):
        pointwise.bind(plan, x, pointwise.pack(plan, (pointwise_weight, bias)), residual, out)


def test_bind_takes_a_residual_of_batch_one_with_any_step_between_images() -> None:
    case = Case("layout", (1, 16, 24, 24), 16, residual=True)
    tensors, geometry = arguments(case)
    x = tensors[0]
    assert x is not None
    found = separable.plan(described(tensors, ("relu6", "relu6"), geometry))
    out, residual = layout.new_output(x, 16, (24, 24)), layout.new_output(x, 16, (24, 24))
    odd = residual.as_strided(residual.shape, (16, *residual.stride()[1:]))
    call = separable.bind(found, x, pack(found, tensors), odd, out)
    residual.normal_()  # what counts is what it holds when the call runs
    call()
    assert torch.equal(out, run([*tensors[:-1], residual], ("relu6", "relu6"), geometry))


@pytest.mark.parametrize(("columns", "reason"), [(7, ""), (15, "filters wider than 7 columns")])
def test_separable_says_where_two_kernels_are_faster(columns: int, reason: str) -> None:
    tensors, geometry = arguments(Case("wide", (1, 8, 9, 25), 8, (3, columns)))
    found = separable.slower(described(tensors, ("", ""), geometry))
    assert reason in found
    assert bool(reason) == bool(found)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_separable_gives_each_thread_one_share(threads: int) -> None:
    """Of all tiles of all images, so that no thread comes back for more."""
    tensors, geometry = arguments(Case("shares", (5, 8, 23, 17), 8))
    found = separable.plan(replace(described(tensors, ("", ""), geometry), threads=threads))
    assert found.spec.parallel == "rows"
    for (_, _, tiles), share in zip(found.calls, found.share, strict=True):
        assert share == -(-5 * tiles // threads)


def planned(channels: int, out_channels: int) -> separable.SeparablePlan:
    shape = (1, channels, 14, 14)
    tensors, walk = arguments(Case("", shape, out_channels))
    return separable.plan(described(tensors, ("relu6", ""), walk))


@pytest.fixture
def avx512() -> Iterator[None]:
    with machine.targeting(replace(machine.named("avx512"), l1_bytes=48 << 10, l2_bytes=2 << 20)):
        yield


@pytest.mark.usefixtures("avx512")
def test_many_channels_share_a_kernel() -> None:
    specs = [planned(channels, 192).spec for channels in (273, 288, 389, 400)]
    assert len({spec._replace(tile=specs[0].tile) for spec in specs}) == 1
    assert (specs[0].channels, specs[0].out_channels, specs[0].room) == (None, None, 400)
    assert planned(401, 192).spec.room == 528
    few = planned(128, 33).spec
    assert (few.channels, few.out_channels, few.room) == (128, 33, 128)


@pytest.mark.parametrize("channels", [129, 144, 145, 256, 257, 272, 273, 960, 1024])
def test_pixels_of_the_scratch_array_do_not_displace_each_other(channels: int) -> None:
    assert channels <= room(channels) < channels * 1.5
    assert room(channels) % 32 == 16
