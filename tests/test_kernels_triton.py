"""Triton's depthwise kernels against the reference in float64, on a GPU or interpreted: every pass, layout and edge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES, Case
from kernel_checks import depthwise_case
from torch import Tensor
from triton_checks import DEVICE, forward, grad_input, grad_weight, kernel, needs_triton, small

from sepconv import reference
from sepconv.kernels import layout
from sepconv.kernels.triton import plan
from sepconv.kernels.triton.forms import Patch, Schedule

pytestmark = needs_triton

Check = Callable[..., None]
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_BY_NAME = {case.name: case for case in CASES if case.batch}
_LAYOUTS = ("contiguous", "channels_last", "sliced")
# An interpreted case takes seconds. One of each kind is in the default run, in one layout, with one image.
_SHORT = {
    ("channels_above_tile", "channels_last"),
    ("image_smaller_than_kernel", "contiguous"),
    ("stride_1_2", "sliced"),
    ("dilation_2", "channels_last"),
    ("multiplier_2", "contiguous"),
    ("signal_k4", "sliced"),
    ("volume", "channels_last"),
}
_ARRANGED = [
    *(pytest.param(replace(_BY_NAME[name], batch=1), how, id=f"{name}-{how}-1") for name, how in sorted(_SHORT)),
    *(
        pytest.param(case, how, marks=pytest.mark.slow, id=f"{name}-{how}")
        for name, case in _BY_NAME.items()
        for how in _LAYOUTS
    ),
]


def _arrange(tensor: Tensor, how: str) -> Tensor:
    """On the device, in this layout; "sliced" is a misaligned view into a larger tensor full of NaN."""
    tensor = tensor.to(DEVICE)
    if how == "channels_last" and tensor.dim() in _FORMATS:
        return tensor.contiguous(memory_format=_FORMATS[tensor.dim()])
    if how == "sliced":
        large = tensor.new_full([size + 3 for size in tensor.shape], float("nan"))
        view = large[tuple(slice(1, 1 + size) for size in tensor.shape)]
        view.copy_(tensor)
        return view
    return tensor


def _walk(case: Case) -> tuple[Any, Any, Any]:
    return case.geometry.stride, case.geometry.padding, case.geometry.dilation


def _gradients(x: Tensor, weight: Tensor, grad: Tensor, walk: tuple[Any, Any, Any]) -> tuple[Tensor, Tensor]:
    leaves = x.double().requires_grad_(), weight.double().requires_grad_()
    x_grad, weight_grad = torch.autograd.grad(reference.depthwise_conv(*leaves, None, *walk), leaves, grad.double())
    return x_grad, weight_grad


def _within_rounding(y: Tensor, truth: Tensor, magnitude: Tensor) -> None:
    """Summed in float32, rounded once more to what is stored."""
    eps = torch.finfo(torch.float32).eps
    last = 0.0 if y.dtype is torch.float32 else torch.finfo(y.dtype).eps
    limit = 10 * eps * magnitude.double() + last * truth.abs() + 1e-30
    excess = (y.cpu().double() - truth).abs() / limit
    assert bool((excess <= 1).all()), f"error is {float(excess.max()):.3g} times the rounding bound"


def _check(case: Case, how: str, dtype: torch.dtype = torch.float32) -> None:
    filters, walk = case.channels * case.multiplier, _walk(case)
    x = torch.randn(case.batch, case.channels, *case.image).to(dtype)
    weight, bias = torch.randn(filters, 1, *case.kernel).to(dtype), torch.randn(filters).to(dtype)
    truth = reference.depthwise_conv(x.double(), weight.double(), bias.double(), *walk)
    magnitude = reference.depthwise_conv(*(t.double().abs() for t in (x, weight, bias)), *walk)
    grad = torch.randn(truth.shape).to(dtype)
    there = _arrange(x, how), weight.to(DEVICE), bias.to(DEVICE)
    y = forward(*there, *walk)
    _within_rounding(y, truth, magnitude)
    assert layout.is_channels_last(y) == layout.is_channels_last(there[0]) or y.is_contiguous()
    exact, sizes = _gradients(x, weight, grad, walk), _gradients(x.abs(), weight.abs(), grad.abs(), walk)
    _within_rounding(grad_input(_arrange(grad, how), there[1], x.shape, *walk), exact[0], sizes[0])
    _within_rounding(grad_weight(_arrange(grad, how), there[0], weight.shape, *walk), exact[1], sizes[1])


@pytest.mark.parametrize(("case", "how"), _ARRANGED)
def test_every_pass_is_the_reference(case: Case, how: str) -> None:
    _check(case, how)


@pytest.mark.parametrize("how", ["channels_last", pytest.param("contiguous", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_numbers_of_16_bits_are_summed_in_float32(dtype: torch.dtype, how: str) -> None:
    _check(Case("half", 8, (5, 6), (3, 3), batch=1, padding=1), how, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "dtype"), [("contiguous", torch.float16), ("channels_last", torch.bfloat16)], ids=["float16", "bfloat16"]
)
@pytest.mark.parametrize("case", _BY_NAME.values(), ids=_BY_NAME.keys())
def test_every_case_in_numbers_of_16_bits(case: Case, how: str, dtype: torch.dtype) -> None:
    """Either kind in one layout: what differs between the two kinds is the rounding of what is stored."""
    _check(case, how, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["forward", "grad_input", "grad_weight"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_tile_that_is_tried_is_right(which: str, channels_last: bool) -> None:
    how = "channels_last" if channels_last else "contiguous"
    walk = (1, 1), ((1, 1), (1, 1)), (1, 1)
    x, weight = torch.randn(2, 19, 12, 13), torch.randn(19, 1, 3, 3)
    grad = torch.randn(2, 19, 12, 13)
    there = {"forward": (x, weight), "grad_input": (grad, weight), "grad_weight": (grad, x)}[which]
    size = {"forward": None, "grad_input": x.shape, "grad_weight": weight.shape}[which]
    given = [_arrange(t, how) for t in there]
    known = depthwise_case(which, *given, *walk, size=size)
    truth = _gradients(x, weight, grad, walk)
    wanted = {"forward": torch.conv2d(x.double(), weight.double(), None, 1, 1, 1, 19)}
    wanted |= {"grad_input": truth[0], "grad_weight": truth[1]}
    assert len(plan.schedules(known)) > 1
    for schedule in plan.schedules(known):
        y = kernel(known, schedule)(*given).cpu().double()
        torch.testing.assert_close(y, wanted[which], rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("channels", "rows", "columns"), [(15, 9, 7), (16, 8, 8), (17, 7, 9), (32, 16, 17), (31, 17, 16)]
)
def test_sizes_around_the_edges_of_tiles(channels: int, rows: int, columns: int, how: str) -> None:
    """Tiles are of 16 channels, 8 rows and 8 columns here."""
    _check(Case("edge", channels, (rows, columns), (3, 3), batch=1, padding=1), how)


# Above 7 rows, and above 9 or 27 taps, there are loops over taps; of a gradient several programs share them. A square
# of 63 is interpreted for a minute.
_SQUARES = (*range(1, 16), 17, 23, 31, 47, 63)
_SIZES = [
    *[((size,), "contiguous") for size in range(1, 64)],
    *[((size, size), how) for size in _SQUARES for how in ("channels_last", "contiguous")],
    *[((size, 2), "channels_last") for size in range(1, 64)],
    *[((2, size), "contiguous") for size in range(1, 64)],
]
_SHORT_SIZES = [((1,), "contiguous"), ((11,), "contiguous"), ((8, 2), "channels_last")]


@pytest.mark.parametrize(
    ("size", "how"),
    [
        pytest.param(*one, id=f"{'x'.join(map(str, one[0]))}-{one[1]}", marks=[pytest.mark.slow] * (not short))
        for one in _SIZES
        for short in [one in _SHORT_SIZES]
    ],
)
def test_filters_of_every_size(size: tuple[int, ...], how: str) -> None:
    """On images that are smaller than most of them."""
    image = (size[0] // 2 + 3, 5)[: len(size)]
    _check(Case("swept", 3, image, size, batch=1, padding=tuple(k // 2 for k in size)), how)


def test_asymmetric_padding() -> None:
    walk = (2, 1), ((0, 2), (3, 0)), (1, 2)
    x, weight = torch.randn(1, 3, 6, 7), torch.randn(3, 1, 3, 2)
    truth = reference.depthwise_conv(x.double(), weight.double(), None, *walk)
    grad = torch.randn(truth.shape)
    there = _arrange(x, "contiguous"), weight.to(DEVICE)
    torch.testing.assert_close(forward(*there, None, *walk).cpu().double(), truth, rtol=1e-5, atol=1e-5)
    exact = _gradients(x, weight, grad, walk)
    found = (
        grad_input(grad.to(DEVICE), there[1], x.shape, *walk),
        grad_weight(grad.to(DEVICE), there[0], weight.shape, *walk),
    )
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-5, atol=1e-5)


_SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -200.0, 200.0, 3.0, -3.0, 6.0, 0.5, -0.5]


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activation_of_special_values(activation: str) -> None:
    x = torch.tensor(_SPECIAL).reshape(1, 1, 1, 11)
    walk = (1, 1), ((0, 0), (0, 0)), (1, 1)
    y = forward(x.to(DEVICE), torch.ones(1, 1, 1, 1, device=DEVICE), None, *walk, activation)
    truth = reference.ACTIVATIONS[activation](x.double()).float()
    torch.testing.assert_close(y.cpu(), truth, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_activations_take_their_parameters() -> None:
    x, walk = torch.randn(1, 1, 1, 11), ((1, 1), ((0, 0), (0, 0)), (1, 1))
    for name, function in {
        "leaky_relu(0.2)": lambda z: torch.where(z < 0, 0.2 * z, z),
        "elu(0.5)": lambda z: torch.where(z > 0, z, 0.5 * torch.expm1(z)),
        "softplus(2.0, 1.0)": lambda z: torch.where(2 * z > 1, z, torch.log1p(torch.exp(2 * z)) / 2),
        "clamp(-0.5, 0.25)": lambda z: z.clamp(-0.5, 0.25),
    }.items():
        y = forward(x.to(DEVICE), torch.ones(1, 1, 1, 1, device=DEVICE), None, *walk, name)
        torch.testing.assert_close(y.cpu(), function(x.double()).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("stride", "bad"), [(1, float("nan")), pytest.param(2, float("inf"), marks=pytest.mark.slow)], ids=["nan", "inf"]
)
def test_what_is_no_number_reaches_what_reads_it_and_nothing_else(how: str, stride: int, bad: float) -> None:
    """Also where a tile has rows that the image has not, and phases have taps that others have not."""
    x, weight = torch.ones(1, 2, 6, 7), torch.ones(2, 1, 3, 3)
    walk = (stride, stride), ((1, 1), (1, 1)), (1, 1)
    for row, column in [(0, 0), (5, 6)]:
        broken = x.clone()
        broken[:, :, row, column] = bad
        y = forward(_arrange(broken, how), weight.to(DEVICE), None, *walk).cpu()
        assert torch.equal(y.isfinite(), torch.conv2d(broken, weight, None, stride, 1, 1, 2).isfinite())
        grad = torch.ones_like(y)
        filters = grad_weight(_arrange(grad, how), _arrange(broken, how), weight.shape, *walk).cpu()
        taps = [
            [_meets(row, kh, stride, y.shape[2]) and _meets(column, kw, stride, y.shape[3]) for kw in range(3)]
            for kh in range(3)
        ]
        assert torch.equal(~filters.isfinite(), torch.tensor(taps).expand(2, 1, 3, 3))
        place = min(row, y.shape[2] - 1), min(column, y.shape[3] - 1)
        grad[:, :, place[0], place[1]] = bad
        found = grad_input(_arrange(grad, how), weight.to(DEVICE), x.shape, *walk).cpu()
        rows = [any(place[0] * stride + k - 1 == i for k in range(3)) for i in range(6)]
        columns = [any(place[1] * stride + k - 1 == j for k in range(3)) for j in range(7)]
        wanted = torch.tensor(rows)[:, None] & torch.tensor(columns)
        assert torch.equal(~found.isfinite(), wanted.expand(1, 2, 6, 7))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_phases_that_no_tap_meets_read_nothing() -> None:
    """Of every other row; also of an image that goes on beyond the row that stands for none."""
    x, weight = torch.zeros(1, 1, 2101, 1), torch.ones(1, 1, 2, 1)
    walk = (2, 1), ((0, 0), (0, 0)), (2, 1)
    grad = torch.ones(1, 1, 1050, 1)
    grad[0, 0, 0] = float("nan")
    known = depthwise_case("grad_input", grad.to(DEVICE), weight.to(DEVICE), *walk, size=x.shape)
    schedule = Schedule(Patch(1, 512, 1, 2, 4), plan.schedules(known)[0].taps)
    found = kernel(known, schedule)(grad.to(DEVICE), weight.to(DEVICE)).cpu().flatten()
    assert found.isnan().nonzero().flatten().tolist() == [0, 2]
    assert found[1::2].count_nonzero() == 0


def _meets(pixel: int, tap: int, stride: int, outputs: int) -> bool:
    """Whether a tap reads this pixel for any of the outputs; padding 1."""
    return (pixel + 1 - tap) % stride == 0 and 0 <= (pixel + 1 - tap) // stride < outputs


def test_expanded_and_transposed_tensors() -> None:
    weight, walk = torch.randn(8, 1, 3, 3), ((1, 1), ((1, 1), (1, 1)), (1, 1))
    bias = torch.randn(1).to(DEVICE).expand(8)
    pixel, image = torch.randn(1, 8, 1, 1).to(DEVICE), torch.randn(1, 8, 5, 3).to(DEVICE)
    for x in (pixel.expand(2, 8, 3, 5), image.transpose(2, 3)):
        y = forward(x, weight.to(DEVICE), bias, *walk)
        truth = reference.depthwise_conv(x.cpu().double(), weight.double(), bias.cpu().double(), *walk)
        torch.testing.assert_close(y.cpu().double(), truth, rtol=1e-5, atol=1e-5)
    # Of a sum the gradient is one number.
    grad, x = torch.full((), 1.5), torch.randn(1, 8, 3, 5)
    exact = _gradients(x, weight, grad.expand(x.shape), walk)
    spread = grad.to(DEVICE).expand(x.shape)
    found = (
        grad_input(spread, weight.to(DEVICE), x.shape, *walk),
        grad_weight(spread, x.to(DEVICE), weight.shape, *walk),
    )
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_all_is_written_and_nothing_beside_it(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, guards = torch.empty_strided, []

    def guarded(size: Any, stride: Any, **options: Any) -> Tensor:
        if "dtype" not in options or options["device"] != DEVICE:
            return empty(size, stride, **options)
        whole = torch.full((torch.Size(size).numel() + 128,), float("nan"), device=options["device"])
        guards.append(whole)
        return whole.as_strided(size, stride, 64)

    x, weight = torch.randn(1, 9, 5, 7), torch.randn(9, 1, 3, 3).to(DEVICE)
    x = _arrange(x, "channels_last" if channels_last else "contiguous")
    walk = (1, 1), ((1, 1), (1, 1)), (1, 1)
    monkeypatch.setattr(torch, "empty_strided", guarded)
    results = (
        forward(x, weight, None, *walk),
        grad_input(x, weight, x.shape, *walk),
        grad_weight(x, x, (9, 1, 3, 3), *walk),
    )
    monkeypatch.setattr(torch, "empty_strided", empty)
    assert len(guards) == 3
    for whole, y in zip(guards, results, strict=True):
        assert not y.isnan().any()
        assert whole[:64].isnan().all()
        assert whole[-64:].isnan().all()


_FAR = 2**30 + 64
"""Two of these steps are beyond what 32 bits hold."""
_ALONG = [
    pytest.param(at, id=name, marks=[pytest.mark.slow] * (name != "depth"))
    for at, name in enumerate(("image", "channel", "depth", "row", "column"))
]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("which", ["forward", "grad_input", "grad_weight"])
@pytest.mark.parametrize("along", _ALONG)
def test_offsets_of_64_bits(along: int, which: str) -> None:
    """A view whose last numbers lie beyond 2^31, of memory of which nothing is there but the pages that it touches."""
    size, steps = (3, 3, 3, 3, 3), [81, 27, 9, 3, 1]
    steps[along] = _FAR
    read = torch.empty(2 * _FAR + 4096, dtype=torch.float16, device=DEVICE).as_strided(size, steps)
    weight = torch.randn(3, 1, 1, 3, 2).half().to(DEVICE)
    values, filters = read.copy_(torch.randn(size)).cpu().double(), weight.cpu().double()
    walk = (1, 1, 1), ((0, 0), (1, 1), (1, 0)), (1, 1, 1)
    second, wanted = {"forward": (weight, None), "grad_input": (weight, size), "grad_weight": (read, weight.shape)}[
        which
    ]
    known = depthwise_case(which, read, second, *walk, size=wanted)
    assert plan.launch(known, small(known)).form.wide
    truth = dict(zip(("grad_input", "grad_weight"), _gradients(values, filters, values, walk), strict=True))
    truth["forward"] = reference.depthwise_conv(values, filters, None, *walk)
    torch.testing.assert_close(kernel(known)(read, second).cpu().double(), truth[which], rtol=2e-3, atol=2e-3)
