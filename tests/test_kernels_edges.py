"""Pools, resizing, shuffles and norms of images whose numbers have 32, 16 and 8 bits, each its own, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from kernel_checks import image, poisoned, stored_as, value_of
from torch import Tensor
from torch.nn import functional as F

from sepconv import reference
from sepconv.kernels import backends, case
from sepconv.kernels.case import Case, Geometry, GroupNormDetail, Outline, ResizeDetail, Window
from sepconv.kernels.halide import edges
from sepconv.kernels.halide.conv import elementwise, pool, resize, shuffle, window
from sepconv.kernels.halide.jit import runtime

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())
EPS = torch.finfo(torch.float32).eps
F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
KINDS = [(U8, U8), (U8, F32), (F32, U8), (BF16, BF16)]
READ, WRITTEN = (0.0173, 131.0), (0.0131, 90.0)
WALK = Geometry((2, 1), ((1, 1), (1, 1)), (1, 1))


class Operation(NamedTuple):
    """``truth`` of a float64 image; ``make`` of x and the result."""

    truth: Callable[[Tensor], Tensor]
    make: Callable[[Outline, Outline], Case]
    constants: int = 0


def _pool(kind: str) -> Operation:
    truth = (lambda x: x.mean((2, 3))) if kind == "mean" else lambda x: x.square().sum((2, 3)).sqrt()
    return Operation(truth, lambda x, y: case.pool(x, y, kind))


def _window(over: Window) -> Operation:
    def truth(x: Tensor) -> Tensor:
        size = WALK.output_size(x.shape[2:], over.size)
        if over.mean:
            return reference.avg_pool(x, over.size, WALK.stride, WALK.padding, size, over.counts_padding, over.divisor)
        return reference.max_pool(x, over.size, WALK.stride, WALK.padding, WALK.dilation, size)

    return Operation(truth, lambda x, y: case.window(x, y, WALK, over))


def _resize(mode: str) -> Operation:
    detail = ResizeDetail(mode, False, (None, None))
    return Operation(lambda x: F.interpolate(x, (11, 9), mode=mode), lambda x, y: case.resize(x, y, detail))


def _rows(kind: str) -> Operation:
    def truth(x: Tensor) -> Tensor:
        if kind == "length":
            return F.normalize(x, dim=-1)
        return F.layer_norm(x, x.shape[-1:], *_factors(x.shape[-1]), 1e-5)

    return Operation(truth, lambda x, y: case.row_norm(x, y, kind, 1e-5), 2)


def _factors(count: int) -> list[Tensor]:
    return [torch.linspace(0.5, 1.5, count).double(), torch.linspace(-1, 1, count).double()]


OPERATIONS = {
    "mean": _pool("mean"),
    "length": _pool("length"),
    "maximum": _window(Window((3, 3))),
    "average": _window(Window((3, 2), mean=True, counts_padding=True)),
    "average_of_pixels": _window(Window((3, 3), mean=True)),
    "nearest": _resize("nearest"),
    "bilinear": _resize("bilinear"),
    "bicubic": _resize("bicubic"),
    "shuffle": Operation(lambda x: F.channel_shuffle(x, 2), lambda x, y: case.shuffle(x, None, y, 2)),
    "row_norm": _rows("layer"),
    "row_length": _rows("length"),
    "group_norm": Operation(
        lambda x: F.group_norm(x, 2, *_factors(x.shape[1])),
        lambda x, y: case.group_norm(x, y, GroupNormDetail(2, 1e-5)),
        2,
    ),
}
EXACT = ("maximum", "nearest", "shuffle")
"""What makes no new numbers."""


def image_of(name: str, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
    """A view, of rows where the operation is one of rows."""
    return image((shape[0] * shape[2], shape[1]) if name.startswith("row") else shape, not name.startswith("row"), kind)


def room(truth: Tensor, kind: torch.dtype) -> tuple[Tensor, Callable[[], None]]:
    """Poisoned memory for a result: channels_last where it is an image."""
    like = torch.empty_like(truth, dtype=kind)
    return poisoned(like.contiguous(memory_format=torch.channels_last) if like.dim() == 4 else like.contiguous())


def computed(known: Case, x: Tensor, out: Tensor, *constants: Tensor) -> Tensor:
    """Into ``out``, by our kernel."""
    choice = backends.choose(known)
    assert choice.backend.name == "halide", choice.reasons
    binder = choice.backend.binder
    assert binder is not None
    plan = binder.plan(known)
    binder.bind(plan, x, binder.pack(plan, constants), [] if binder.several else None, out)()
    return out


def agree(y: Tensor, truth: Tensor, steps: tuple[float, float], rounding: float) -> None:
    """``y`` is what is stored for the truth, but for ``rounding`` before it is rounded itself."""
    if y.dtype is U8:
        # A step of the truth's own, and 1/scale is rounded.
        count = truth / torch.tensor(steps[0]).double() + steps[1]
        allowed = 0.5 + rounding / steps[0] + 256 * EPS
        assert bool(((y.double() - count).abs() <= allowed)[(count > 0) & (count < 255)].all())
        assert bool((y[count <= -0.5 - allowed] == 0).all())
        assert bool((y[count >= 255.5 + allowed] == 255).all())
        return
    relative = torch.finfo(y.dtype).eps / 2
    assert bool(((y.double() - truth).abs() <= relative * truth.abs() + 2 * rounding).all())


SHAPES = [(1, 16, 5, 7), (3, 34, 7, 5), (1, 130, 4, 6), (2, 6, 5, 3)]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "-".join(str(kind)[6:] for kind in kinds))
def test_every_kind_to_every_kind(name: str, kinds: tuple[torch.dtype, torch.dtype]) -> None:
    """Sizes at and beside those of vectors; by PyTorch the same."""
    operation = OPERATIONS[name]
    steps = [own if kind is U8 else (1.0, 0.0) for kind, own in zip(kinds, (READ, WRITTEN), strict=True)]
    table = [torch.tensor(steps)] if U8 in kinds else []
    for shape in SHAPES if name in ("maximum", "shuffle") else SHAPES[:3:2]:
        x = image_of(name, shape, kinds[0])
        values = value_of(x, steps[0])
        truth = operation.truth(values.double())
        out, check = room(truth, kinds[1])
        known = operation.make(Outline.of(x), Outline.of(out)).into(out)
        constants = [own.float() for own in _factors(x.shape[1])[: operation.constants]]
        y = computed(known, x, out, *constants, *table)
        check()
        expected = stored_as(truth.float(), kinds[1], steps[1])
        if name in EXACT:
            assert torch.equal(y, expected)
        # Four roundings of a sum of so many.
        rounding = 4 * EPS * float(values.abs().max()) * max(4, sum(shape[1:]))
        agree(y, truth, steps[1], rounding)
        by_torch = backends.BACKENDS[known.op][-1].prepare(known)(x, *constants, *table)
        assert by_torch.dtype is kinds[1]
        agree(by_torch, truth, steps[1], rounding)


@pytest.mark.parametrize("name", ["mean", "average", "average_of_pixels"])
def test_sums_of_steps_are_exact(name: str) -> None:
    """A mean of 8 bits is its exact sum times the scale, and then divided: two roundings, however many pixels."""
    shape = (2, 17, 61, 67)
    x = image(shape, True, U8)
    count = 61 * 67 if name == "mean" else 9
    walk, over = Geometry((1, 1), ((0, 0), (0, 0)), (1, 1)), Window((3, 3), mean=True)
    out = torch.full((2, 17) if name == "mean" else (2, 17, 59, 65), torch.nan)
    out = out if name == "mean" else out.contiguous(memory_format=torch.channels_last)
    made = case.pool(x, out) if name == "mean" else case.window(x, out, walk, over)
    y = computed(made.into(out), x, out, torch.tensor([READ, (1.0, 0.0)]))
    pixels = x.double() - READ[1]
    total = pixels.sum((2, 3)) if name == "mean" else F.avg_pool2d(pixels, 3, 1) * 9
    scaled = (total.round() * torch.tensor(READ[0]).double()).float()
    assert torch.equal(y, (scaled.double() / count).float())


@pytest.mark.parametrize("name", EXACT)
def test_equal_steps_move_bytes(name: str) -> None:
    """No scale is read, nothing is computed: every byte comes out as it went in."""
    operation = OPERATIONS[name]
    for shape in SHAPES:
        x = image(shape, True, U8)
        truth = operation.truth(x.double()).to(U8)
        out, check = room(truth, U8)
        known = operation.make(Outline.of(x), Outline.of(out)).into(out)
        module = {"maximum": window, "nearest": resize, "shuffle": shuffle}[name]
        plan = module.plan(known)
        alike = torch.tensor([READ, READ])
        assert len(module.pack(plan, [alike])) == len(module.pack(plan, [torch.tensor([READ, WRITTEN])])) - 1
        assert torch.equal(computed(known, x, out, alike), truth)
        check()
        assert torch.equal(backends.BACKENDS[known.op][-1].prepare(known)(x, alike), truth)


def test_a_shuffle_of_two_images_reads_each_by_its_own_steps() -> None:
    a, b = image((2, 17, 5, 7), True, U8), image((2, 17, 5, 7), True, BF16)
    steps = [READ, (1.0, 0.0), WRITTEN]
    out, check = poisoned(torch.empty(2, 34, 5, 7, dtype=U8).contiguous(memory_format=torch.channels_last))
    known = case.shuffle(a, b, out, 2).into(out)
    plan = shuffle.plan(known)
    shuffle.bind(plan, a, shuffle.pack(plan, [torch.tensor(steps)]), b, out)()
    check()
    values = F.channel_shuffle(torch.cat([value_of(a, READ), value_of(b, steps[1])], 1), 2)
    assert torch.equal(out, stored_as(values, U8, WRITTEN))
    assert torch.equal(backends.BACKENDS["shuffle"][-1].prepare(known)(a, b, torch.tensor(steps)), out)


def test_a_nan_is_kept_by_16_bits_and_0_of_8() -> None:
    x = torch.zeros(1, 16, 6, 6, dtype=BF16).contiguous(memory_format=torch.channels_last)
    x[0, 3, 2, 2] = torch.nan
    for name in ("mean", "maximum", "average", "bilinear", "nearest", "shuffle", "group_norm"):
        operation = OPERATIONS[name]
        truth = operation.truth(x.double())
        for kind, table in ((BF16, []), (U8, [torch.tensor([(1.0, 0.0), WRITTEN])])):
            out, _ = room(truth, kind)
            known = operation.make(Outline.of(x), Outline.of(out)).into(out)
            y = computed(known, x, out, *[own.float() for own in _factors(16)[: operation.constants]], *table)
            # The kernel and the definition may differ in which weights of 0 make a NaN of it.
            assert bool((y.isnan() if kind is BF16 else y == 0)[truth.isnan()].all())
            assert truth.isnan().any()


@pytest.mark.parametrize("threads", [8], indirect=True)
def test_many_threads(threads: int) -> None:
    x = image((3, 34, 13, 11), True, U8)
    table, values = torch.tensor([READ, READ]), value_of(x, READ).double()
    for name, operation in OPERATIONS.items():
        if not operation.constants:
            truth = operation.truth(values)
            out, check = room(truth, U8)
            known = operation.make(Outline.of(x), Outline.of(out)).into(out)
            assert known.threads == threads, name
            agree(computed(known, x, out, table), truth, READ, 1e-4)
            check()


def test_refusals() -> None:
    image8 = Outline.channels_last_of((1, 16, 4, 4), U8)
    vast = Outline.channels_last_of((1, 16, 4096, 4096), U8)
    small = Outline.contiguous_of((1, 16))
    assert "pixels of 8 bits" in pool.supports(case.pool(vast, small))
    assert not pool.supports(case.pool(vast.to(BF16), small))
    for kind in (torch.float64, torch.int8, torch.float16):
        assert str(kind) in window.supports(case.window(image8.to(kind), image8, WALK, Window((3, 3))))
    plan = elementwise.plan(case.elementwise([image8], image8, elementwise.Expression(1, 0, ())))
    for constants in ([torch.zeros(0), torch.zeros(1, 2)], [None, None]):
        with pytest.raises(TypeError, match="a row \\(scale, zero point\\) each"):
            elementwise.pack(plan, constants)


def test_vectors_hold_as_many_numbers_as_their_size_allows() -> None:
    lanes = [edges.wide(kinds).lanes for kinds in (("float32", "uint8"), ("bfloat16",) * 2, ("uint8",) * 2)]
    assert [count // lanes[0] for count in lanes] == [1, 2, 4]
    found = window.plan(case.window(*[Outline.channels_last_of((1, 256, 8, 8), U8)] * 2, WALK, Window((3, 3))))
    assert found.spec.lanes == lanes[2]
