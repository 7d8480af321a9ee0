"""From one kind of numbers to another, alone and around an expression: to the last bit what the definition says."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from kernel_checks import image, poisoned, stored_as, value_of
from torch import Tensor

from sepconv.kernels import backends, case
from sepconv.kernels.expression import IDENTITY, Expression, Term
from sepconv.kernels.halide.conv import elementwise
from sepconv.kernels.halide.jit import runtime

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())

KINDS = (torch.float32, torch.bfloat16, torch.uint8)
STEPS = ((0.0173, 131.0), (0.51, 7.0), (0.031, 0.0))
# relu(a * b + number)
FUSED = Expression(2, 1, (Term("mul", (0, 1)), Term("add", (3, 2)), Term("relu", (4,))))


def table_of(*tensors: Tensor) -> tuple[list[tuple[float, float]], list[Tensor]]:
    """The steps of each tensor, and the constant that a case with these tensors has, if it has one."""
    steps = [own if tensor.dtype is torch.uint8 else (1.0, 0.0) for tensor, own in zip(tensors, STEPS, strict=False)]
    return steps, [torch.tensor(steps)] if any(tensor.dtype is torch.uint8 for tensor in tensors) else []


def convert(x: Tensor, like: Tensor, table: list[Tensor]) -> Tensor:
    """By our kernel and by PyTorch's operations, which must agree to the bit, into poisoned memory."""
    out, check = poisoned(like)
    known = case.elementwise([x], out, IDENTITY).into(out)
    choice = backends.choose(known)
    assert choice.backend.name == "halide"
    found = elementwise.plan(known)
    elementwise.bind(found, x, elementwise.pack(found, [torch.zeros(0), *table]), [], out)()
    check()
    by_torch = backends.BACKENDS["elementwise"][-1].prepare(known)(x, torch.zeros(0), *table)
    torch.testing.assert_close(by_torch, out, rtol=0, atol=0, equal_nan=True)
    return out


@pytest.mark.parametrize(("read", "written"), list(product(KINDS, KINDS)), ids=lambda kind: str(kind)[6:])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 5, 7), (3, 15, 5, 1), (1, 17, 13, 11), (2, 97, 3, 5)], ids=str)
def test_every_kind_to_every_kind(read: torch.dtype, written: torch.dtype, shape: tuple[int, ...]) -> None:
    x = image(shape, True, read)
    like = torch.empty(shape, dtype=written).contiguous(memory_format=torch.channels_last)
    steps, table = table_of(x, like)
    expected = stored_as(value_of(x, steps[0]), written, steps[1])
    assert torch.equal(convert(x, like, table), expected)


NUMBERS = [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e38, -1e38, 3.4e38, 1e-40, -1e-40, 3.3895e38]


def test_every_special_number() -> None:
    """NaN is 0 of 8 bits and NaN of 16, halves go to the even neighbour, and what is too large to the last."""
    halves = torch.arange(-40, 300) + 0.5
    x = torch.cat([torch.tensor(NUMBERS), halves, halves.nextafter(torch.tensor(0.0)), torch.randn(4001) * 99])
    for scale, zero in ((1.0, 0.0), (1.0, 3.0), (0.5, 128.0), (2.0, 255.0), (1e-12, 7.0), (3e7, 1.0)):
        counted = convert(x, torch.empty(len(x), dtype=torch.uint8), [torch.tensor([[1.0, 0.0], [scale, zero]])])
        assert torch.equal(counted, stored_as(x, torch.uint8, (scale, zero)))
        assert counted[:4].tolist() == [0, 0, 255, 0]
    expected = x.to(torch.bfloat16)
    torch.testing.assert_close(
        convert(x, torch.empty(len(x), dtype=torch.bfloat16), []), expected, rtol=0, atol=0, equal_nan=True
    )


def test_every_number_of_8_and_16_bits() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        back = convert(bits, torch.empty(len(bits), dtype=dtype), [])
        torch.testing.assert_close(back, bits.to(dtype), rtol=0, atol=0, equal_nan=True)
    counts = torch.arange(256, dtype=torch.uint8)
    for scale, zero in ((0.1, 0.0), (1 / 3, 255.0), (1.7e-5, 100.0)):
        table = torch.tensor([[scale, zero], [scale, zero]])
        values = convert(counts, torch.empty(256), [table])
        assert torch.equal(values, value_of(counts, (scale, zero)))
        assert torch.equal(convert(counts, torch.empty(256, dtype=torch.uint8), [table]), counts)
        assert torch.equal(convert(values, torch.empty(256, dtype=torch.uint8), [table]), counts)


LAYOUTS = {
    "contiguous": ((2, 5, 7, 11), (2, 5, 1, 1), torch.contiguous_format),
    "gate": ((2, 37, 5, 7), (2, 37, 1, 1), torch.channels_last),
    "pixels": ((2, 19, 5, 7), (2, 1, 5, 7), torch.channels_last),
    "few": ((3, 3, 5, 7), (3, 3, 5, 7), torch.channels_last),
    "one": ((1, 17, 5, 7), (1,), torch.channels_last),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    "kinds",
    [
        (torch.uint8, torch.uint8, torch.uint8),
        (torch.uint8, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.uint8),
    ],
    ids=lambda kinds: "-".join(str(kind)[6:] for kind in kinds),
)
def test_an_expression_of_mixed_numbers(name: str, kinds: tuple[torch.dtype, ...]) -> None:
    """Each operation is rounded to float32 on its own, as PyTorch's are: none is contracted with a conversion."""
    first, second, form = LAYOUTS[name]
    a = image(first, form is torch.channels_last, kinds[0])
    values = torch.rand(second) * 256
    b = values.contiguous(memory_format=form if len(second) == 4 else torch.contiguous_format).to(kinds[1])
    out, check = poisoned(torch.empty(first, dtype=kinds[2]).contiguous(memory_format=form))
    steps, table = table_of(a, b, out)
    known, number = case.elementwise([a, b], out, FUSED).into(out), torch.tensor([0.25])
    assert backends.choose(known).backend.name == "halide"
    found = elementwise.plan(known)
    elementwise.bind(found, a, elementwise.pack(found, [number, *table]), [b], out)()
    check()
    expected = (value_of(a, steps[0]) * value_of(b, steps[1]) + number).relu()
    assert torch.equal(out, stored_as(expected, kinds[2], steps[2]))
    assert torch.equal(backends.BACKENDS["elementwise"][-1].prepare(known)(a, b, number, *table), out)


@pytest.mark.parametrize("threads", [1, 2, 8], indirect=True)
def test_threads_share_a_conversion(threads: int) -> None:
    for shape in ((1, 19, 13, 11), (5, 3, 7, 2), (2, 64, 29, 31)):
        x = image(shape, True)
        out = torch.empty(shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        steps, table = table_of(x, out)
        assert case.elementwise([x], out, IDENTITY).threads == threads
        assert torch.equal(convert(x, out, table), stored_as(x, torch.uint8, steps[1]))


def test_numbers_of_other_kinds_are_refused() -> None:
    x = torch.zeros(3, 5)
    for kind in (torch.float64, torch.int8, torch.float16):
        reason = elementwise.supports(case.elementwise([x], x.to(kind), IDENTITY))
        assert str(kind) in reason


def test_a_table_of_scales_comes_last_and_only_with_numbers_of_8_bits() -> None:
    x = torch.zeros(3, 5)
    for kind, arguments in ((torch.float32, 4), (torch.bfloat16, 4), (torch.uint8, 5)):
        found = elementwise.plan(case.elementwise([x], x.to(kind), IDENTITY))
        [_, inputs] = elementwise.build(found.spec)
        assert len(inputs) == arguments
