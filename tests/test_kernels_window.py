"""The kernel for max and average pools against the definition in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from kernel_checks import image, poisoned
from torch import Tensor

from sepconv import reference
from sepconv.kernels import backends
from sepconv.kernels import case as cases
from sepconv.kernels.case import Case, Geometry, Window
from sepconv.kernels.halide.conv import window
from sepconv.kernels.halide.jit import runtime

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())


def walk(stride: int = 1, padding: int = 0, dilation: int = 1) -> Geometry:
    return Geometry((stride,) * 2, ((padding, padding),) * 2, (dilation,) * 2)


class Pool(NamedTuple):
    shape: tuple[int, int, int, int]
    over: Window
    geometry: Geometry
    beyond: tuple[int, int] = (0, 0)  # rows and columns of the result that begin inside and end beyond the padding


POOLS = {
    "maximum": Pool((1, 64, 13, 17), Window((3, 3)), walk(2, 1)),
    "maximum_of_few_channels": Pool((2, 5, 7, 11), Window((3, 3)), walk(1, 1)),
    "maximum_not_square": Pool((1, 19, 11, 7), Window((2, 5)), Geometry((1, 3), ((1, 1), (2, 2)), (1, 1))),
    "maximum_large": Pool((1, 17, 9, 10), Window((13, 13)), walk(1, 6)),
    "maximum_dilated": Pool((1, 33, 13, 12), Window((3, 3)), walk(2, 1, 2)),
    "maximum_of_nothing": Pool((1, 16, 4, 4), Window((2, 2)), walk(1, 1, 5)),
    "maximum_beyond": Pool((1, 16, 8, 6), Window((3, 3)), walk(2), (1, 1)),
    "mean": Pool((2, 65, 8, 6), Window((2, 2), mean=True), walk(2)),
    "mean_with_padding": Pool((1, 19, 7, 9), Window((3, 3), mean=True, counts_padding=True), walk(2, 1)),
    "mean_without_padding": Pool((1, 19, 7, 9), Window((3, 3), mean=True), walk(1, 1)),
    "mean_beyond": Pool((1, 8, 14, 12), Window((4, 4), mean=True, counts_padding=True), walk(3, 2), (1, 0)),
    "mean_by_five": Pool((1, 8, 12, 14), Window((3, 2), mean=True, divisor=5), walk(1, 1)),
    "one_pixel": Pool((1, 1, 1, 1), Window((1, 1)), walk()),
}


def described(pool: Pool, x: Tensor) -> Case:
    size = pool.geometry.output_size(pool.shape[2:], pool.over.size)
    out = torch.empty(*pool.shape[:2], *(a + b for a, b in zip(size, pool.beyond, strict=True)))
    return cases.window(x, out.contiguous(memory_format=torch.channels_last), pool.geometry, pool.over)


def truth(pool: Pool, x: Tensor, size: tuple[int, ...]) -> Tensor:
    (stride, padding, dilation), over = pool.geometry, pool.over
    if not over.mean:
        return reference.max_pool(x.double(), over.size, stride, padding, dilation, size)
    return reference.avg_pool(x.double(), over.size, stride, padding, size, over.counts_padding, over.divisor)


SHARES = [((13, 11), (7, 3)), ((5, 7), (1, 6)), ((2, 2), (7, 7)), ((17, 3), (4, 3)), ((7, 1), (3, 1))]


@pytest.mark.parametrize(("size", "out"), SHARES, ids=str)
@pytest.mark.parametrize("mean", [True, False])
def test_adaptive_pools_share_the_image_out(
    size: tuple[int, int], out: tuple[int, int], mean: bool, assert_rounding: Callable[..., None]
) -> None:
    x = image((2, 19, *size), True)
    largest = tuple(max(-(-(i + 1) * a // b) - i * a // b for i in range(b)) for a, b in zip(size, out, strict=True))
    steps = tuple(-(-a // b) for a, b in zip(size, out, strict=True))
    result = torch.empty(2, 19, *out).contiguous(memory_format=torch.channels_last)
    case = cases.window(x, result, Geometry(steps, ((0, 0),) * 2, (1, 1)), Window(largest, mean=mean, shares=out))
    assert backends.choose(case).backend.name == "halide"
    y, margins_untouched = poisoned(result)
    window.bind(window.plan(case), x, [], None, y)()
    margins_untouched()
    pooled = torch.nn.functional.adaptive_avg_pool2d if mean else torch.nn.functional.adaptive_max_pool2d
    if mean:
        assert_rounding(y, pooled(x.double(), out), pooled(x.double().abs(), out), sum(largest) + 2)
    else:
        assert torch.equal(y, pooled(x, out))
    torch.testing.assert_close(backends.BACKENDS["window"][-1].prepare(case)(x), y)


@pytest.mark.parametrize("name", POOLS)
def test_pools_match_the_definition(name: str, assert_rounding: Callable[..., None]) -> None:
    pool = POOLS[name]
    x = image(pool.shape, True)
    case = described(pool, x)
    assert backends.choose(case).backend.name == "halide"
    y = window.prepare(case)(x)
    expected = truth(pool, x, y.shape[2:])
    if pool.over.mean:
        assert_rounding(y, expected, truth(pool, x.abs(), y.shape[2:]), sum(pool.over.size) + 1)
    else:
        assert torch.equal(y.double(), expected)
    torch.testing.assert_close(backends.BACKENDS["window"][-1].prepare(case)(x), y)

    out, margins_untouched = poisoned(y)
    window.bind(window.plan(case), x, [], None, out)()
    assert torch.equal(out, y)
    margins_untouched()


def test_pools_keep_nan_and_infinities() -> None:
    x = torch.randn(1, 19, 7, 7)
    x[0, 3, 4, 5], x[0, 4, 0, 0], x[0, 5] = torch.nan, torch.inf, -torch.inf
    x[0, 6, 2, 2] = -torch.tensor(torch.nan)
    x[0, 7, 1:3, 1] = torch.tensor([torch.nan, torch.inf])
    x = x.contiguous(memory_format=torch.channels_last)
    for over in (Window((3, 3)), Window((3, 3), mean=True)):
        case = described(Pool((1, 19, 7, 7), over, walk(2, 1)), x)
        ours, pytorchs = window.prepare(case)(x), backends.BACKENDS["window"][-1].prepare(case)(x)
        torch.testing.assert_close(ours, pytorchs, equal_nan=True)


def test_pools_are_the_same_with_two_threads(threads: int) -> None:
    pool = POOLS["maximum"]
    x = image(pool.shape, True)
    several = window.prepare(described(pool, x))(x)
    torch.set_num_threads(1)
    assert torch.equal(several, window.prepare(described(pool, x))(x))


def test_pools_share_kernels() -> None:
    specs = {
        window.plan(described(pool, image(pool.shape, True))).spec for pool in POOLS.values() if pool.shape[1] > 63
    }
    assert len(specs) == 2  # maximum and mean


def test_pools_refuse_other_layouts() -> None:
    x = torch.randn(1, 8, 6, 6)
    pool = Pool((1, 8, 6, 6), Window((2, 2)), walk(2))
    assert "channels_last images only" in window.supports(described(pool, x))
    assert "float32" in window.supports(described(pool, x.double()))
    found = window.plan(described(pool, image(pool.shape, True)))
    with pytest.raises(ValueError, match=r"window\.bind: out must be channels_last"):
        window.bind(found, x.contiguous(memory_format=torch.channels_last), [], None, torch.empty(1, 8, 3, 3))
