"""Several tensors number by number in one pass: right for every layout, size and special number."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from kernel_checks import poisoned
from torch import Tensor

from sepconv import reference
from sepconv.activations import ACTIVATIONS
from sepconv.kernels import backends, case
from sepconv.kernels.case import Outline
from sepconv.kernels.expression import ARITHMETIC, Expression, Term
from sepconv.kernels.halide.conv import elementwise
from sepconv.kernels.halide.jit import runtime

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())
EPS = torch.finfo(torch.float32).eps
# relu(a * b + number)
FUSED = Expression(2, 1, (Term("mul", (0, 1)), Term("add", (3, 2)), Term("relu", (4,))))


class Sizes(NamedTuple):
    """``cut``: channels of a wider memory that the first tensor is taken from, on both sides."""

    name: str
    first: tuple[int, ...]
    second: tuple[int, ...]
    channels_last: bool = True
    cut: int = 0


SIZES = [
    Sizes("gate", (2, 37, 5, 7), (2, 37, 1, 1)),
    Sizes("gate_contiguous", (2, 5, 7, 11), (2, 5, 1, 1), channels_last=False),
    Sizes("vector_contiguous", (1, 37, 5, 7), (37, 1, 1), channels_last=False),
    Sizes("pixels", (2, 19, 5, 7), (2, 1, 5, 7)),
    Sizes("same", (2, 17, 13, 11), (2, 17, 13, 11)),
    Sizes("same_of_batch_1", (2, 16, 5, 3), (1, 16, 5, 3)),
    Sizes("channels_below_vector", (2, 3, 5, 7), (2, 3, 1, 1)),
    Sizes("one_number", (2, 19, 5, 7), (1,)),
    Sizes("channels_cut", (2, 33, 5, 7), (2, 33, 1, 1), cut=3),
    Sizes("channels_cut_same", (1, 16, 5, 7), (1, 16, 5, 7), cut=16),
    Sizes("rows", (13, 5, 40), (5, 40), channels_last=False),
    Sizes("long_row", (1, 8209), (1, 8209), channels_last=False),
    Sizes("many_numbers", (3, 4099, 3), (3, 4099, 3), channels_last=False),
    Sizes("five_dimensions", (2, 3, 5, 7, 11), (2, 3, 5, 7, 11), channels_last=False),
    Sizes("single", (1, 1, 1, 1), (1, 1, 1, 1)),
]


def tensors_of(sizes: Sizes) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    wide = list(sizes.first)
    wide[1] += 2 * sizes.cut
    a, b = torch.randn(wide), torch.randn(sizes.second)
    if sizes.channels_last:
        a = a.contiguous(memory_format=torch.channels_last)
        b = b.contiguous(memory_format=torch.channels_last) if b.dim() == 4 else b
    return a[:, sizes.cut : sizes.cut + sizes.first[1]] if sizes.cut else a, b


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: sizes.name)
def test_any_sizes_and_layouts(sizes: Sizes) -> None:
    a, b = tensors_of(sizes)
    number = torch.tensor([0.25])
    out, check = poisoned(torch.empty_like(a.clone()))
    known = case.elementwise([a, b], out, FUSED).into(out)
    assert backends.choose(known).backend.name == "halide"
    found = elementwise.plan(known)
    elementwise.bind(found, a, elementwise.pack(found, [number]), [b], out)()
    truth = (a.double() * b.double() + 0.25).clamp_min(0)
    allowed = 2 * EPS * (a.double().abs() * b.double().abs() + 0.25)
    assert bool(((out - truth).abs() <= allowed).all())
    check()


def test_threads_share_rows(threads: int) -> None:
    """More rows than tasks, and images that are tasks of their own."""
    for shape in ((1, 19, 13, 11), (5, 3, 7, 2)):
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        gate, out = torch.randn(shape[0], shape[1], 1, 1), torch.empty_like(x)
        known = case.elementwise([x, gate], out, FUSED).into(out)
        assert known.threads == threads
        found = elementwise.plan(known)
        elementwise.bind(found, x, elementwise.pack(found, [torch.tensor([0.25])]), [gate], out.fill_(torch.nan))()
        torch.testing.assert_close(out, (x * gate + 0.25).relu())


SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 200.0, 88.8, 3.4e38, 1e-30]
SPECIAL += [-number for number in SPECIAL[5:]]
# Halide's exp gives no denormal numbers.
LEAST = 1e-37


def computed(operation: str, *tensors: Tensor) -> Tensor:
    expression = Expression(len(tensors), 0, (Term(operation, tuple(range(len(tensors)))),))
    known = case.elementwise(tensors, torch.empty_like(tensors[0]), expression)
    return elementwise.prepare(known)(*tensors, torch.zeros(0))


@pytest.mark.parametrize("name", [*list(ACTIVATIONS)[1:], "leaky_relu(-0.5)", "elu(0.5)", "softplus(2.0, 3.0)"])
def test_activations_are_pytorchs(name: str) -> None:
    """With NaN and infinities as PyTorch has them, and small numbers with all their digits."""
    steps = torch.linspace(-12, 12, 4001)
    x = torch.cat([torch.tensor(SPECIAL), steps, steps * 1e-3])
    # One by one: PyTorch's vectors have NaN for GELU of infinity.
    y, expected = computed(name, x), torch.cat([ACTIVATIONS[name].function(number) for number in x.split(1)])
    assert torch.equal(y.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(y[infinite], expected[infinite])
    truth = reference.ACTIVATIONS.get(name, ACTIVATIONS[name].function)(x.double())
    finite = truth.isfinite() & expected.isfinite()
    # A few roundings of exp or erf, whose argument is rounded itself; the latter are not exact where they are small.
    size = truth.abs() + (x.double().abs().clamp(max=16) if name in ("gelu", "gelu_tanh", "mish", "silu") else 0)
    error = (y.double() - truth).abs()[finite]
    assert bool((error <= 16 * EPS * size[finite] + LEAST).all()), (error / (EPS * size[finite])).max()


@pytest.mark.parametrize("name", ["silu", "sigmoid", "exp"])
def test_exponentials_keep_their_digits_wherever_there_are_numbers(name: str) -> None:
    """Two roundings each; up to the largest number that float32 has, and without denormal ones."""
    x = torch.linspace(-86.9, 88.7, 40009)
    truth = getattr(torch.nn.functional if name == "silu" else torch, name)(x.double())
    assert bool(((computed(name, x).double() - truth).abs() <= 2 * EPS * truth.abs()).all())


@pytest.mark.parametrize("name", [name for name in ARITHMETIC if name != "pow"])
def test_arithmetic_is_pytorchs(name: str) -> None:
    two = name in ("add", "sub", "mul", "div", "maximum", "minimum", "prelu")
    numbers = torch.cat([torch.tensor(SPECIAL), torch.linspace(-3, 3, 14)])
    pair = torch.cartesian_prod(numbers, numbers)
    given = [part.contiguous() for part in (pair.unbind(1) if two else [pair[:, 0]])]
    expected = ARITHMETIC[name].function(*given)
    torch.testing.assert_close(computed(name, *given), expected, equal_nan=True, rtol=4 * EPS, atol=LEAST)


@pytest.mark.parametrize("exponent", [1 / 3, 0.25, 1.5, -0.3, 2.7])
def test_powers_of_numbers_that_are_not_negative(exponent: float) -> None:
    """A logarithm's rounding counts as often as the exponential grows by it."""
    x = torch.cat([torch.tensor([0.0, 1.0, torch.inf, torch.nan, -2.0]), torch.logspace(-8, 8, 401)])
    y = computed("pow", x, torch.full_like(x, exponent))
    expected = x.double().pow(exponent)
    finite = expected.isfinite()
    assert torch.equal(y[~finite].nan_to_num(7.0), expected[~finite].float().nan_to_num(7.0))
    allowed = (8 + 2 * (exponent * x.double()[finite].clamp(1e-30, 1e30).log()).abs()) * EPS * expected[finite].abs()
    assert bool(((y.double() - expected).abs()[finite] <= allowed + LEAST).all())


def test_refusals() -> None:
    out = Outline.channels_last_of((2, 17, 5, 7))
    contiguous = Outline.contiguous_of((2, 17, 5, 7))
    assert "side by side" in elementwise.supports(case.elementwise([out, contiguous], out, FUSED))
    assert "float32" in elementwise.supports(case.elementwise([out.to(torch.float64), out], out, FUSED))
    assert "empty" in elementwise.supports(case.elementwise([out, out], Outline.contiguous_of((0, 3)), FUSED))
    apart = Outline((2, 3, 5, 7, 11), (9999, 2000, 300, 40, 1))
    assert "5 dimensions" in elementwise.supports(case.elementwise([apart, apart], apart, FUSED))


def test_functions_leave_single_operations_to_pytorch() -> None:
    a = torch.randn(3, 5)
    choice = backends.choose(case.elementwise([a, a], a, FUSED))
    assert choice.backend.name == "torch"
    assert "PyTorch's" in choice.reasons["halide"]
    torch.testing.assert_close(choice(a, a, torch.tensor([0.5])), (a * a + 0.5).relu())
    assert elementwise.describe(case.elementwise([a, a], a, FUSED).into(a))["spread"] == (False, False)
