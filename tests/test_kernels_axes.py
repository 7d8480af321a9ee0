"""Kernels along any dimensions (reductions, softmax, numbers from other places) against double precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from kernel_checks import poisoned
from torch import Tensor
from torch.nn import functional as F

from sepconv.kernels import axes, backends
from sepconv.kernels.axes import REDUCTIONS, SOFTMAXES, GatherDetail, ReduceDetail
from sepconv.kernels.case import Case, Outline
from sepconv.kernels.halide.conv import gather, product, reduce, softmax
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.schedule import machine

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())
EPS = torch.finfo(torch.float32).eps
KERNELS: dict[str, Any] = {"reduce": reduce, "softmax": softmax, "gather": gather}


def laid(shape: tuple[int, ...], order: tuple[int, ...], cut: int = 0) -> Tensor:
    """Random numbers whose dimensions lie in memory in this order, the last side by side; of a wider memory if cut."""
    wide = [shape[d] + (2 * cut if d == order[-1] else 0) for d in order]
    whole = torch.randn(wide).permute([order.index(d) for d in range(len(shape))])
    return whole.narrow(order[-1], cut, shape[order[-1]])


def computed(case: Case, x: Tensor, *scales: Tensor) -> Tensor:
    """By the kernel, into memory full of NaN whose margins stay so; PyTorch's entry agrees."""
    kernel = KERNELS[case.op]
    out, margins_untouched = poisoned(case.result.meta())
    case = case.into(out)
    assert backends.choose(case).backend.name == "halide"
    found = kernel.plan(case)
    kernel.bind(found, x, kernel.pack(found, scales), None, out)()
    margins_untouched()
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if out.is_floating_point() else {"rtol": 0, "atol": 1}
    torch.testing.assert_close(
        backends.BACKENDS[case.op][-1].prepare(case)(x, *scales), out, equal_nan=True, **tolerance
    )
    return out


class Sizes(NamedTuple):
    """A tensor: its size, the order of its dimensions in memory, how much wider that is, and what is reduced."""

    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    dims: tuple[int, ...]
    cut: int = 0


PIXELS = (0, 2, 3, 1)
SIZES = [
    Sizes("image", (2, 37, 11, 13), PIXELS, (2, 3)),
    Sizes("channels", (2, 37, 5, 7), PIXELS, (1,)),
    Sizes("channels_cut", (2, 37, 5, 7), PIXELS, (1,), 3),
    Sizes("channels_fewer_than_a_vector", (2, 3, 5, 7), PIXELS, (1,)),
    Sizes("image_cut", (2, 19, 5, 7), PIXELS, (2, 3), 5),
    Sizes("rows_of_images", (3, 17, 5, 7), PIXELS, (0, 2)),
    Sizes("columns_and_channels", (3, 17, 5, 7), PIXELS, (1, 3)),
    Sizes("contiguous", (2, 5, 11, 13), (0, 1, 2, 3), (2, 3)),
    Sizes("contiguous_channels", (2, 5, 11, 13), (0, 1, 2, 3), (1,)),
    Sizes("radix", (2, 3, 19, 5, 7), (0, 3, 4, 1, 2), (1,)),
    Sizes("all", (2, 5, 3, 7), (0, 1, 2, 3), (0, 1, 2, 3)),
    Sizes("long_row", (1, 4099), (0, 1), (1,)),
    Sizes("long_column", (2053, 33), (0, 1), (0,)),
    Sizes("tokens", (2, 49, 67), (0, 1, 2), (1,)),
    Sizes("one_number", (1,), (0,), (0,)),
    Sizes("of_size_one", (3, 1, 5), (0, 1, 2), (1,)),
]


def reduction(x: Tensor, detail: ReduceDetail, keepdim: bool = True) -> Case:
    """Into a result whose dimensions lie in the order of those of x."""
    order = sorted(range(x.dim()), key=lambda d: -x.stride(d))
    out = laid(tuple(1 if d in detail.dims else size for d, size in enumerate(x.shape)), tuple(order))
    return axes.reduce(x, out if keepdim else out.squeeze(detail.dims), detail)


@pytest.mark.parametrize("what", REDUCTIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: sizes.name)
def test_reductions(sizes: Sizes, what: str) -> None:
    torch.manual_seed(0)
    x, detail = laid(sizes.shape, sizes.order, sizes.cut), ReduceDetail(what, sizes.dims)
    keepdim = what in ("sum", "amax")
    y = computed(reduction(x, detail, keepdim), x)
    truth = getattr(torch, what)(x.double(), dim=sizes.dims, keepdim=keepdim)
    if what.startswith("a"):
        assert torch.equal(y.double(), truth)
    else:
        terms = getattr(torch, what)(x.double().abs(), dim=sizes.dims, keepdim=keepdim)
        # Of several dimensions sums of sums are made.
        roundings = 2 + (sizes.shape[0] if sizes.name == "long_column" else 64)
        assert bool(((y - truth).abs() <= roundings * EPS * terms).all())


def test_reductions_write_where_they_are_told() -> None:
    """Into a part of something larger."""
    x, whole = laid((2, 17, 5, 7), PIXELS), torch.full((2, 7, 40), torch.nan)
    out = whole[:, :, 3:20].transpose(1, 2)
    case = axes.reduce(x, out, ReduceDetail("sum", (2,))).into(out)
    reduce.bind(reduce.plan(case), x, [], None, out)()
    torch.testing.assert_close(out, x.sum(2), rtol=1e-5, atol=1e-5)
    assert int(whole.isnan().sum()) == 2 * 7 * 23


def test_extremes_keep_nan_and_infinities() -> None:
    x = torch.randn(19, 40)
    x[1, 3], x[2, 39], x[3, 0], x[4], x[5, 17] = torch.nan, torch.nan, -torch.inf, -torch.inf, torch.inf
    x[6, :2] = torch.tensor([torch.nan, torch.inf])
    for what in ("amax", "amin"):
        for dims in ((1,), (0,)):
            y = computed(reduction(x, ReduceDetail(what, dims)), x)
            assert torch.equal(y.nan_to_num(7.0), getattr(torch, what)(x, dim=dims, keepdim=True).nan_to_num(7.0))
            assert torch.equal(y.isnan(), getattr(torch, what)(x, dim=dims, keepdim=True).isnan())


ROWS = [(3, 5, 37), (2, 7, 16), (11, 3), (1, 1), (2, 3, 5, 131), (1009,), (2, 1, 17)]


@pytest.mark.parametrize("kind", SOFTMAXES)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_softmax(shape: tuple[int, ...], kind: str) -> None:
    torch.manual_seed(0)
    x = 4 * laid(shape, tuple(range(len(shape))), cut=3)
    y = computed(axes.softmax(x, torch.empty(shape), kind), x)
    truth = getattr(torch, kind)(x.double(), -1)
    size = truth.abs() + (x.abs().max() if kind == "log_softmax" else 0)
    # The argument of the exponential is rounded as numbers of its own size are.
    assert bool(((y - truth).abs() <= (16 + 2 * float(x.abs().max())) * EPS * size).all())


def test_softmax_of_unusual_numbers() -> None:
    big, low = 3e38, -torch.inf
    rows = [[big, big, 0.0], [low, 1.0, 2.0], [low] * 3, [torch.nan, 1.0, 2.0], [torch.inf, 1.0, 2.0], [-big, big, 0.0]]
    x = torch.tensor(rows)
    for kind in SOFTMAXES:
        y = computed(axes.softmax(x, torch.empty_like(x), kind), x)
        torch.testing.assert_close(y, getattr(torch, kind)(x, -1), equal_nan=True)


def padded(size: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(i if 0 <= i < size else -1 for i in range(-low, size + high))


class Places(NamedTuple):
    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    detail: GatherDetail
    expected: Callable[[Tensor], Tensor]


PLACES = [
    Places(
        "pad",
        (2, 19, 5, 7),
        PIXELS,
        GatherDetail((None, None, padded(5, 1, 2), padded(7, 3, 0)), 0.5),
        lambda x: F.pad(x, (3, 0, 1, 2), value=0.5),
    ),
    Places(
        "pad_channels",
        (2, 5, 3, 7),
        PIXELS,
        GatherDetail((None, padded(5, 2, 11), None, None)),
        lambda x: F.pad(x, (0, 0, 0, 0, 2, 11)),
    ),
    Places(
        "cut_by_padding",
        (2, 5, 7),
        (0, 1, 2),
        GatherDetail((None, padded(5, -1, 2), padded(7, 2, -3))),
        lambda x: F.pad(x, (2, -3, -1, 2)),
    ),
    Places(
        "minus_infinity",
        (1, 3, 5, 5),
        PIXELS,
        GatherDetail((None, None, padded(5, 1, 1), None), -torch.inf),
        lambda x: F.pad(x, (0, 0, 1, 1), value=-torch.inf),
    ),
    Places(
        "turned", (2, 19, 5, 7), PIXELS, GatherDetail((None, None, None, tuple(range(6, -1, -1)))), lambda x: x.flip(3)
    ),
    Places(
        "turned_channels",
        (2, 19, 5, 7),
        PIXELS,
        GatherDetail((None, tuple(range(18, -1, -1)), None, None)),
        lambda x: x.flip(1),
    ),
    Places(
        "chosen",
        (3, 37),
        (0, 1),
        GatherDetail((None, (36, 0, 0, 17, 5))),
        lambda x: x[:, [36, 0, 0, 17, 5]],
    ),
    Places("one", (5, 33), (0, 1), GatherDetail(((3,), None)), lambda x: x[3:4]),
    Places(
        "shifted",
        (2, 5, 7, 17),
        (0, 1, 2, 3),
        GatherDetail((None, (2, 3, 4, 0, 1), (6, 0, 1, 2, 3, 4, 5), None)),
        lambda x: x.roll((3, 1), (1, 2)),
    ),
    Places("as_it_is", (2, 3, 5), (0, 1, 2), GatherDetail((None, None, None)), lambda x: x),
]


@pytest.mark.parametrize("given", PLACES, ids=lambda given: given.name)
def test_numbers_from_other_places(given: Places) -> None:
    torch.manual_seed(0)
    x = laid(given.shape, given.order, cut=3)
    expected = given.expected(x)
    out = laid(tuple(expected.shape), given.order)
    assert torch.equal(computed(axes.gather(x, out, given.detail), x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_other_numbers_are_moved_as_they_are(dtype: torch.dtype) -> None:
    whole = torch.randint(0, 255, (2, 7, 5, 67), dtype=torch.uint8)
    x = (whole if dtype is torch.uint8 else whole.to(dtype) / 8).permute(0, 3, 1, 2)
    scales = [torch.tensor([[0.25, 3.0], [0.25, 3.0]])] if dtype is torch.uint8 else []
    turned = GatherDetail((None, None, tuple(range(6, -1, -1)), None))
    out = torch.empty_like(x)
    assert torch.equal(computed(axes.gather(x, out, turned), x, *scales), x.flip(2))
    wide = GatherDetail((None, None, padded(7, 1, 1), None), 0.0)
    out = torch.empty(2, 9, 5, 67, dtype=dtype).permute(0, 3, 1, 2)
    y = computed(axes.gather(x, out, wide), x, *scales)
    zero = 3 if dtype is torch.uint8 else 0
    assert torch.equal(y, F.pad(x.float(), (0, 0, 1, 1), value=zero).to(dtype))


def test_counts_are_reduced_to_values() -> None:
    """uint8 with a scale of its own on either side."""
    x = torch.randint(0, 256, (3, 41), dtype=torch.uint8)
    scales = torch.tensor([[0.25, 100.0], [0.5, 10.0]])
    values = (x.double() - 100) * 0.25
    out = torch.empty(3, 1, dtype=torch.uint8)
    y = computed(axes.reduce(x, out, ReduceDetail("mean", (1,))), x, scales)
    expected = (values.mean(1, keepdim=True) / 0.5 + 10).clamp(0, 255)
    assert bool(((y.double() - expected).abs() <= 0.5 + 1e-3).all())
    probabilities = torch.empty(3, 41)
    y = computed(axes.softmax(x, probabilities, "softmax"), x, torch.tensor([[0.25, 100.0], [1.0, 0.0]]))
    torch.testing.assert_close(y, values.softmax(1).float(), rtol=1e-4, atol=1e-7)


def test_threads_share_results(threads: int) -> None:
    x = laid((3, 37, 11, 13), PIXELS)
    for case in (
        reduction(x, ReduceDetail("sum", (2, 3))),
        reduction(x, ReduceDetail("mean", (1,))),
        axes.gather(x, laid((3, 37, 13, 13), PIXELS), GatherDetail((None, None, padded(11, 1, 1), None))),
    ):
        assert case.threads == threads
        computed(case, x)
    rows = torch.randn(29, 37)
    computed(axes.softmax(rows, torch.empty_like(rows), "softmax"), rows)


def test_what_pytorch_computes_faster() -> None:
    """In given memory; on a machine that has no PyTorch the kernels do it all the same."""
    x = laid((1, 19, 60, 60), PIXELS)
    wide = laid((1, 3, 80, 80), PIXELS)
    padding = GatherDetail((None, None, padded(80, 1, 1), padded(80, 1, 1)))
    cases = [
        (reduction(x, ReduceDetail("amax", (1,))), "extremes of many numbers"),
        (axes.gather(wide, laid((1, 3, 82, 82), PIXELS), padding), "few numbers side by side"),
    ]
    for case, reason in cases:
        case = case.into(case.result)
        choice = backends.choose(case)
        assert choice.backend.name == "torch"
        assert reason in choice.reasons["halide"]
        with machine.targeting(machine.named("avx2")):
            assert backends.choose(case).backend.name == "halide"
    out, margins_untouched = poisoned(laid((1, 3, 82, 82), PIXELS))
    case = axes.gather(wide, out, padding).into(out)
    gather.bind(gather.plan(case), wide, gather.pack(gather.plan(case), []), None, out)()
    margins_untouched()
    assert torch.equal(out, F.pad(wide, (1, 1, 1, 1)))


def test_refusals() -> None:
    out = Outline.contiguous_of((2, 3))
    apart = Outline((2, 3, 40), (1000, 2, 10))
    assert "side by side" in reduce.supports(axes.reduce(apart, out, ReduceDetail("sum", (2,))))
    assert "float32" in reduce.supports(axes.reduce(apart.to(torch.float64), out, ReduceDetail("sum", (2,))))
    assert "empty" in reduce.supports(axes.reduce(Outline.contiguous_of((2, 3, 0)), out, ReduceDetail("sum", (2,))))
    same = GatherDetail((None, None, None))
    assert "side by side" in gather.supports(axes.gather(apart, Outline.contiguous_of((2, 3, 40)), same))
    assert "empty" in gather.supports(axes.gather(Outline.contiguous_of((2, 3, 0)), out, same))
    assert "side by side" in softmax.supports(axes.softmax(Outline((2, 3), (1, 2)), out, "softmax"))
    five = Outline((2, 3, 5, 7, 11), (9999, 2000, 300, 40, 1))
    every = GatherDetail(tuple(tuple(range(size)) for size in five.shape))
    assert "5 dimensions" in gather.supports(axes.gather(five, five, every))


@pytest.mark.parametrize("op", KERNELS)
def test_functions_leave_single_operations_to_pytorch(op: str) -> None:
    x = torch.randn(3, 5)
    made = {
        "reduce": axes.reduce(x, torch.empty(3), ReduceDetail("sum", (1,))),
        "softmax": axes.softmax(x, x, "softmax"),
        "gather": axes.gather(x, x, GatherDetail((None, (4, 3, 2, 1, 0)))),
    }
    choice = backends.choose(made[op])
    assert choice.backend.name == "torch"
    assert "PyTorch's" in choice.reasons["halide"]
    torch.testing.assert_close(KERNELS[op].prepare(made[op])(x), choice(x))
    assert KERNELS[op].describe(made[op])


class Matrices(NamedTuple):
    """``turned``: the rows of the first lie apart."""

    batch: int
    rows: int
    depth: int
    columns: int
    turned: bool = False


MATRICES = [
    Matrices(3, 7, 19, 37),
    Matrices(1, 1, 1, 1),
    Matrices(2, 13, 5, 48, turned=True),
    Matrices(1, 49, 32, 49),
    Matrices(5, 2, 131, 3),
    Matrices(2, 6, 1, 16),
    Matrices(1, 5, 67, 211, turned=True),
]


@pytest.mark.parametrize("sizes", MATRICES, ids=str)
def test_products_of_matrices(sizes: Matrices) -> None:
    torch.manual_seed(0)
    batch, rows, depth, columns, turned = sizes
    x = laid((batch, rows, depth), (0, 2, 1) if turned else (0, 1, 2), cut=3)
    other = laid((batch, depth, columns), (0, 1, 2), cut=2)
    out, margins_untouched = poisoned(torch.empty(batch, rows, columns))
    case = axes.product(x, other, out).into(out)
    assert backends.choose(case).backend.name == "halide"
    product.bind(product.plan(case), x, [], [other], out)()
    margins_untouched()
    allowed = (depth + 1) * EPS * (x.double().abs() @ other.double().abs())
    assert bool(((out - x.double() @ other.double()).abs() <= allowed).all())
    torch.testing.assert_close(backends.BACKENDS["product"][-1].prepare(case)(x, other), out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(product.prepare(case)(x, other), out)


def test_products_of_other_numbers(threads: int) -> None:
    x, other = torch.randn(3, 5, 17).bfloat16(), torch.randn(3, 17, 41)
    out = torch.empty(3, 5, 41, dtype=torch.bfloat16)
    case = axes.product(x, other, out).into(out)
    product.bind(product.plan(case), x, [], [other], out)()
    torch.testing.assert_close(out, (x.float() @ other).bfloat16(), rtol=2e-2, atol=1e-2)
    assert "empty" in product.supports(axes.product(x[:, :0], other, out[:, :0]))
    assert "side by side" in product.supports(axes.product(x, other.transpose(1, 2).contiguous().mT, out))
    assert "PyTorch's" in product.slower(axes.product(x, other, out))
    assert "multiply-adds" in product.slower(replace(case, x=Outline.contiguous_of((3, 5, 500_000))))
    with machine.targeting(machine.named("avx512")):
        assert product.describe(case)["rows"] == 5
