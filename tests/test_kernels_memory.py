"""No kernel computes with memory that nobody has written, not even what it drops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import poison
import pytest
import torch
from kernel_checks import depthwise_case, pointwise_case, separable_case

from sepconv.kernels.case import Geometry, normal
from sepconv.kernels.halide.conv import depthwise, pointwise, separable, stem
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import buffer

if runtime.missing() or not poison.possible:
    pytest.skip(runtime.missing() or "reads flags of x86 processors", allow_module_level=True)


@pytest.fixture(autouse=True, scope="module")
def _poisoned() -> Iterator[None]:
    with poison.poisoned():
        yield


def _same(kernel: tuple[int, ...], dilation: int = 1) -> list[tuple[int, int]]:
    return [(dilation * (k - 1) // 2,) * 2 for k in kernel]


_FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
# Channels, image, kernel, stride, dilation, multiplier.
_DEPTHWISE = [
    (32, (23, 17), (3, 3), 1, 1, 1),
    (5, (9, 11), (3, 3), 1, 1, 1),
    (17, (13, 5), (5, 5), 1, 1, 1),
    (33, (7, 19), (3, 3), 2, 1, 1),
    (48, (14, 14), (7, 7), 1, 1, 1),
    (24, (13, 15), (3, 3), 1, 2, 1),
    (20, (1, 1), (3, 3), 1, 1, 1),
    (8, (11, 13), (3, 3), 1, 1, 3),
    (16, (28, 28), (31, 31), 1, 1, 1),
    (20, (47,), (5,), 1, 1, 1),
    (7, (5, 6, 9), (3, 3, 3), 1, 1, 1),
]


# By default each in one of its layouts, in turn.
_LAYOUTS = [
    pytest.param(case, last, marks=[pytest.mark.slow] * (last == i % 2 or case[2] == (31, 31)))
    for i, case in enumerate(_DEPTHWISE)
    for last in (False, True)
    if len(case[1]) > 1 or not last
]


@pytest.mark.parametrize(("case", "channels_last"), _LAYOUTS, ids=str)
def test_depthwise(case: Any, channels_last: bool) -> None:
    channels, image, kernel, step, reach, multiplier = case
    dims = len(image)
    layout = _FORMATS[dims] if channels_last else torch.contiguous_format
    x = torch.randn(2, channels, *image).contiguous(memory_format=layout)
    weight = torch.randn(channels * multiplier, 1, *kernel)
    geometry = (step,) * dims, _same(kernel, reach), (reach,) * dims
    forward = depthwise.prepare(depthwise_case("forward", x, weight, *geometry))
    grad = torch.randn_like(forward(x, weight))
    grad_input = depthwise.prepare(depthwise_case("grad_input", grad, weight, *geometry, size=x.shape))
    grad_weight = depthwise.prepare(depthwise_case("grad_weight", grad, x, *geometry, size=weight.shape))
    assert not poison.meets_tiny_numbers(lambda: forward(x, weight))
    assert not poison.meets_tiny_numbers(lambda: grad_input(grad, weight))
    assert not poison.meets_tiny_numbers(lambda: grad_weight(grad, x))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("channels", "outputs", "size"), [(7, 5, (5, 7)), (64, 48, (14, 14)), (33, 17, (1, 1))])
def test_pointwise(channels: int, outputs: int, size: tuple[int, int], channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, weight = torch.randn(2, channels, *size).contiguous(memory_format=layout), torch.randn(outputs, channels, 1, 1)
    prepared = pointwise.prepare(pointwise_case(x, weight, None, "relu"))
    prepared(x, weight)
    assert not poison.meets_tiny_numbers(lambda: prepared(x, weight))


@pytest.mark.parametrize(
    ("channels", "outputs", "size", "stride", "multiplier"),
    [
        (7, 5, (5, 7), 1, 1),
        (32, 48, (15, 13), 2, 1),
        (96, 24, (14, 14), 1, 1),
        (8, 16, (9, 9), 1, 3),
        (16, 16, (1, 1), 1, 1),
    ],
)
def test_separable(channels: int, outputs: int, size: tuple[int, int], stride: int, multiplier: int) -> None:
    x = torch.randn(2, channels, *size).contiguous(memory_format=torch.channels_last)
    dw, pw = torch.randn(channels * multiplier, 1, 3, 3), torch.randn(outputs, channels * multiplier, 1, 1)
    walk = (stride, stride), ((1, 1), (1, 1)), (1, 1)
    prepared = separable.prepare(separable_case(x, (dw, None, "relu"), (pw, None, ""), walk))
    prepared(x, dw, pw)
    assert not poison.meets_tiny_numbers(lambda: prepared(x, dw, pw))


@pytest.mark.parametrize(("size", "kernel", "stride"), [((9, 11), 3, 1), ((32, 32), 3, 2), ((17, 23), 5, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_stem(size: tuple[int, int], kernel: int, stride: int, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, weight = torch.randn(2, 3, *size).contiguous(memory_format=layout), torch.randn(20, 3, kernel, kernel)
    geometry = Geometry((stride, stride), _same((kernel, kernel)), (1, 1))
    known = normal(x, weight, None, None, geometry, "relu")
    out, found = torch.empty(known.y.shape, memory_format=torch.channels_last), stem.plan(known)
    run = stem.bind(found, x, stem.pack(found, (weight, None)), None, out)
    run()
    assert not poison.meets_tiny_numbers(run)


def test_the_check_sees_tiny_numbers() -> None:
    ones = torch.ones(64)
    assert poison.flagged(lambda: ones * 1e-40)
    assert not poison.flagged(lambda: ones * 1e-30)


def test_fresh_memory_is_full_of_them() -> None:
    """A tile of which half is never written."""
    import halide as hl

    def build() -> tuple[Any, list[Any]]:
        x, source = hl.Var("x"), hl.ImageParam(hl.Float(32), 1, "source")
        tile, out = hl.Func("tile"), hl.Func("out")
        tile[x] = hl.undef(hl.Float(32))
        tile[hl.RDom([hl.Range(0, 8)], "r").x] = source[0]
        out[x] = tile[x] * 2.0
        tile.compute_root().store_in(hl.MemoryType.Heap)
        return out, [source]

    kernel = runtime.compiled("half a tile", build)
    given = buffer(torch.ones(8)), buffer(torch.empty(16))
    assert poison.meets_tiny_numbers(lambda: kernel(*given))
