"""The depthwise kernels against the reference in float64: every pass, layout, edge and activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES, Case, arranged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import depthwise_case, depthwise_forward, depthwise_grad_input, depthwise_grad_weight
from torch import Tensor

from sepconv import reference
from sepconv.kernels import layout
from sepconv.kernels.case import Geometry
from sepconv.kernels.halide.conv import depthwise, depthwise_choice, depthwise_taps
from sepconv.kernels.halide.conv import depthwise_weight_grad as weight_grad
from sepconv.kernels.halide.conv.depthwise_gather import GatherSpec, build
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule.depthwise import GatherTile, WeightTile
from sepconv.kernels.torch import aten

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_LAYOUTS = ["contiguous", "channels_last", "sliced"]
Check = Callable[..., None]


def _arrange(tensor: Tensor, how: str) -> Tensor:
    """The same values in another layout; "sliced" is a misaligned view into a larger tensor full of NaN."""
    if how == "channels_last" and tensor.dim() in _FORMATS:
        return tensor.contiguous(memory_format=_FORMATS[tensor.dim()])
    if how == "sliced":
        large = tensor.new_full([size + 3 for size in tensor.shape], float("nan"))
        view = large[tuple(slice(1, 1 + size) for size in tensor.shape)]
        view.copy_(tensor)
        return view
    return tensor


def _tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    filters = case.channels * case.multiplier
    x = torch.randn(case.batch, case.channels, *case.image)
    return x, torch.randn(filters, 1, *case.kernel), torch.randn(filters)


def _walk(case: Case) -> tuple[Any, Any, Any]:
    return case.geometry.stride, case.geometry.padding, case.geometry.dilation


def _gradients(x: Tensor, weight: Tensor, grad: Tensor, walk: tuple[Any, Any, Any]) -> tuple[Tensor, Tensor]:
    """Gradients of the reference, by autograd in float64."""
    leaves = x.double().requires_grad_(), weight.double().requires_grad_()
    y = reference.depthwise_conv(*leaves, None, *walk)
    x_grad, weight_grad = torch.autograd.grad(y, leaves, grad.double())
    return x_grad, weight_grad


@pytest.mark.parametrize(("case", "how"), arranged(CASES, {how: how for how in _LAYOUTS}))
def test_forward_is_the_reference(case: Case, how: str, assert_rounding: Check) -> None:
    x, weight, bias = _tensors(case)
    walk = _walk(case)
    y = depthwise_forward(_arrange(x, how), weight, bias, *walk)
    truth = reference.depthwise_conv(x.double(), weight.double(), bias.double(), *walk)
    magnitude = reference.depthwise_conv(*(t.double().abs() for t in (x, weight, bias)), *walk)
    assert_rounding(y, truth, magnitude)
    assert layout.is_channels_last(y) == layout.is_channels_last(_arrange(x, how)) or y.is_contiguous()


@pytest.mark.parametrize(("case", "how"), arranged(CASES, {how: how for how in _LAYOUTS}))
def test_gradients_are_the_reference(case: Case, how: str, assert_rounding: Check) -> None:
    x, weight, _ = _tensors(case)
    walk = _walk(case)
    grad = torch.randn_like(reference.depthwise_conv(x, weight, None, *walk))
    x_grad = depthwise_grad_input(_arrange(grad, how), weight, x.shape, *walk)
    filter_grad = depthwise_grad_weight(_arrange(grad, how), _arrange(x, how), weight.shape, *walk)
    truth = _gradients(x, weight, grad, walk)
    magnitude = _gradients(x.abs(), weight.abs(), grad.abs(), walk)
    assert_rounding(x_grad, truth[0], magnitude[0])
    assert_rounding(filter_grad, truth[1], magnitude[1])


@st.composite
def _any_case(draw: Any) -> Case:
    dims = draw(st.integers(1, 3))
    size = st.integers(1, 9 if dims == 3 else 19)
    walk = [tuple(draw(st.integers(1, most)) for _ in range(dims)) for most in (6 if dims < 3 else 3, 3, 3)]
    kernel, stride, dilation = walk
    padding = tuple(draw(st.integers(0, 4)) for _ in range(dims))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    image = tuple(max(draw(size), smallest) for smallest in least)
    channels, multiplier = draw(st.integers(1, 37)), draw(st.integers(1, 3))
    return Case("any", channels, image, kernel, draw(st.integers(1, 3)), multiplier, stride, padding, dilation)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=_any_case(), how=st.sampled_from(_LAYOUTS))
def test_any_shape(case: Case, how: str, assert_rounding: Check) -> None:
    test_forward_is_the_reference(case, how, assert_rounding)
    test_gradients_are_the_reference(case, how, assert_rounding)


@pytest.mark.parametrize("size", [31, *(pytest.param(size, marks=pytest.mark.slow) for size in (15, 63))])
def test_long_filters(size: int, assert_rounding: Check) -> None:
    case = Case("long", 5, (size // 2, 19), (size, 3), padding=(size // 2, 1))
    test_forward_is_the_reference(case, "channels_last", assert_rounding)
    test_gradients_are_the_reference(case, "contiguous", assert_rounding)


_SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -200.0, 200.0, 3.0, -3.0, 6.0, 0.5, -0.5]


@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activation_of_special_values(activation: str, how: str) -> None:
    x = torch.tensor(_SPECIAL * 4).reshape(1, 4, 1, 11)
    y = depthwise_forward(_arrange(x, how), torch.ones(4, 1, 1, 1), None, (1, 1), ((0, 0), (0, 0)), (1, 1), activation)
    # In float64: in float32 PyTorch's own gelu of infinity depends on where in the tensor it stands.
    truth = reference.ACTIVATIONS[activation](x.double()).float()
    torch.testing.assert_close(y, truth, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
def test_nan_reaches_what_reads_it_and_nothing_else(how: str) -> None:
    x, weight = torch.randn(1, 8, 9, 11), torch.randn(8, 1, 3, 3)
    walk = (1, 1), ((1, 1), (1, 1)), (1, 1)
    for row, column in [(0, 0), (4, 5), (8, 10), (3, 10)]:
        broken = x.clone()
        broken[:, :, row, column] = float("nan")
        y = depthwise_forward(_arrange(broken, how), weight, None, *walk)
        assert torch.equal(y.isnan(), torch.conv2d(broken, weight, None, 1, 1, 1, 8).isnan())
        grad = torch.ones_like(y)
        filter_grad = depthwise_grad_weight(_arrange(grad, how), _arrange(broken, how), weight.shape, *walk)
        wanted = _gradients(broken, weight, grad, walk)[1]
        assert torch.equal(filter_grad.isnan(), _touched(row, column)) or torch.equal(
            filter_grad.isnan(), wanted.isnan()
        )


def _touched(row: int, column: int) -> Tensor:
    """The taps of a 3x3 filter, padding 1, that meet pixel (row, column) of a 9x11 image."""
    rows = torch.tensor([0 <= row + 1 - k < 9 for k in range(3)])
    columns = torch.tensor([0 <= column + 1 - k < 11 for k in range(3)])
    return (rows[:, None] & columns).expand(8, 1, 3, 3)


def test_nothing_is_written_outside_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    guards, empty = [], torch.empty

    def guarded(shape: Any, **kwargs: Any) -> Tensor:
        if "device" in kwargs:  # asked for strides only
            return empty(shape, **kwargs)
        whole = torch.full((torch.Size(shape).numel() + 128,), float("nan"))
        guards.append(whole)
        inner = whole[64:-64].view(shape if kwargs["memory_format"] is torch.contiguous_format else _permuted(shape))
        return inner if kwargs["memory_format"] is torch.contiguous_format else inner.movedim(-1, 1)

    monkeypatch.setattr(depthwise.torch, "empty", guarded)
    for how in ("contiguous", "channels_last"):
        x = _arrange(torch.randn(2, 19, 13, 11), how)
        y = depthwise_forward(x, torch.randn(19, 1, 3, 3), None, (2, 1), ((1, 1), (1, 1)), (1, 1))
        assert not y.isnan().any()
    for whole in guards:
        assert whole[:64].isnan().all()
        assert whole[-64:].isnan().all()
    assert len(guards) == 2


def _permuted(shape: Any) -> list[int]:
    return [shape[0], *shape[2:], shape[1]]


@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
def test_results_do_not_depend_on_the_threads(how: str) -> None:
    x = _arrange(torch.randn(5, 24, 29, 31), how)
    grad, weight = _arrange(torch.randn(5, 24, 29, 31), how), torch.randn(24, 1, 3, 3)
    walk = (1, 1), ((1, 1), (1, 1)), (1, 1)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            filter_grad = depthwise_grad_weight(grad, x, weight.shape, *walk)
            results.append((depthwise_forward(x, weight, None, *walk), filter_grad))
    finally:
        torch.set_num_threads(before)
    for y, filter_grad in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(filter_grad, results[0][1])


def test_one_kernel_serves_every_size_of_image_and_batch() -> None:
    runtime.clear_cache()
    weight = torch.randn(32, 1, 3, 3)
    for side in range(40, 70):
        x = torch.randn(side % 3 + 1, 32, side, side).contiguous(memory_format=torch.channels_last)
        depthwise_forward(x, weight, None, (1, 1), ((1, 1), (1, 1)), (1, 1))
    assert runtime.cached_kernels() <= 3


def test_expanded_and_transposed_inputs(assert_rounding: Check) -> None:
    weight, walk = torch.randn(8, 1, 3, 3), ((1, 1), ((1, 1), (1, 1)), (1, 1))
    for x in (torch.randn(1, 8, 1, 1).expand(2, 8, 5, 7), torch.randn(2, 8, 7, 5).transpose(2, 3)):
        truth = reference.depthwise_conv(x.double(), weight.double(), None, *walk)
        magnitude = reference.depthwise_conv(x.double().abs(), weight.double().abs(), None, *walk)
        assert_rounding(depthwise_forward(x, weight, None, *walk), truth, magnitude)


def test_asymmetric_padding(assert_rounding: Check) -> None:
    walk = (2, 1), ((0, 2), (3, 0)), (1, 2)
    x, weight = torch.randn(2, 9, 8, 11), torch.randn(9, 1, 3, 2)
    truth = reference.depthwise_conv(x.double(), weight.double(), None, *walk)
    grad = torch.randn(truth.shape)
    for how in _LAYOUTS:
        y = depthwise_forward(_arrange(x, how), weight, None, *walk)
        assert_rounding(y, truth, reference.depthwise_conv(x.double().abs(), weight.double().abs(), None, *walk))
        x_grad = depthwise_grad_input(_arrange(grad, how), weight, x.shape, *walk)
        magnitude = _gradients(x.abs(), weight.abs(), grad.abs(), walk)[0]
        assert_rounding(x_grad, _gradients(x, weight, grad, walk)[0], magnitude)


def test_what_is_not_supported_is_said() -> None:
    x, weight, walk = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3), ((1, 1), ((1, 1), (1, 1)), (1, 1))
    assert depthwise.supports(depthwise_case("forward", x, weight, *walk)) == ""
    assert "float32" in depthwise.supports(depthwise_case("forward", x.double(), weight, *walk))
    assert "32 bits" in depthwise.supports(
        depthwise_case("forward", x[:, :, :, :1].expand(1, 4, 5, 2**29), weight, *walk)
    )
    with pytest.raises(ValueError, match="which must be one of"):
        depthwise.supports(replace(depthwise_case("forward", x, weight, *walk), which="backward"))


def test_slower_names_a_reason() -> None:
    walk = (1, 1), ((1, 1), (1, 1)), (1, 1)
    small = torch.randn(1, 64, 7, 7).contiguous(memory_format=torch.channels_last)
    batch = torch.randn(128, 64, 7, 7).contiguous(memory_format=torch.channels_last)
    assert depthwise.slower(depthwise_case("forward", small, torch.randn(64, 1, 3, 3), *walk)) == ""
    assert "9 taps" in depthwise.slower(depthwise_case("forward", batch, torch.randn(64, 1, 3, 3), *walk))
    assert depthwise.slower(depthwise_case("forward", batch, torch.randn(128, 1, 3, 3), *walk)) == ""
    around = (1, 1), ((3, 3), (3, 3)), (1, 1)
    assert "49 pixels" in depthwise.slower(depthwise_case("forward", batch, torch.randn(64, 1, 7, 7), *around))
    strided = (2, 2), ((1, 1), (1, 1)), (1, 1)
    assert "stride 2" in depthwise.slower(
        depthwise_case("grad_input", small, torch.randn(64, 1, 3, 3), *strided, size=(1, 64, 13, 13))
    )
    assert depthwise.slower(depthwise_case("forward", small.contiguous(), torch.randn(64, 1, 3, 3), *strided)) == ""
    assert depthwise.slower(depthwise_case("forward", batch.contiguous(), torch.randn(64, 1, 3, 3), *walk)) == ""
    assert "rows of 7" in depthwise.slower(
        depthwise_case("forward", batch.contiguous(), torch.randn(64, 1, 7, 7), *around)
    )
    assert depthwise.slower(depthwise_case("grad_weight", small, small, *walk, size=(64, 1, 3, 3))) == ""
    assert depthwise.slower(depthwise_case("forward", small, torch.randn(128, 1, 3, 3), *walk)) == ""
    assert "wide" in depthwise.slower(
        depthwise_case("grad_weight", small.contiguous(), small.contiguous(), *walk, size=(64, 1, 3, 3))
    )
    large = torch.randn(1, 8, 28, 28)
    assert depthwise.slower(depthwise_case("grad_weight", large, large, *walk, size=(8, 1, 3, 3))) == ""


@pytest.mark.parametrize(
    ("processor", "shape", "kernel", "dilation", "by_pytorch"),
    [
        ("avx512", (32, 128, 56, 56), 3, 1, True),
        ("avx2", (32, 128, 56, 56), 3, 1, False),
        ("avx512", (1, 128, 56, 56), 3, 1, False),
        ("avx512", (64, 512, 14, 14), 3, 1, False),
        ("avx512", (32, 128, 56, 56), 5, 1, False),
        ("avx512", (32, 128, 56, 56), 3, 2, False),
    ],
)
def test_gradients_of_filters_on_wide_rows(
    processor: str, shape: Any, kernel: int, dilation: int, by_pytorch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depthwise_choice, "host", lambda: machine.named(processor))
    x = torch.empty(shape, device="meta", dtype=torch.float32).to(memory_format=torch.channels_last)
    walk = (1, 1), ((dilation * (kernel // 2),) * 2,) * 2, (dilation, dilation)
    reason = depthwise.slower(depthwise_case("grad_weight", x, x, *walk, size=(shape[1], 1, kernel, kernel)))
    assert reason == (
        f"PyTorch's grad_weight kernel is faster with 9 taps on rows of 56 pixels, {8 * x.numel()} bytes" * by_pytorch
    )


@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
def test_pytorch_is_told_the_layout_of_x(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its choice of a kernel for the gradient of the input depends on it."""
    given, backward = [], aten._BACKWARD
    monkeypatch.setattr(aten, "_BACKWARD", lambda *arguments: given.append(arguments[1]) or backward(*arguments))
    grad = _arrange(torch.randn(2, 8, 5, 7), how)
    run = aten.prepare_grad_input((2, 8, 5, 7), Geometry((1, 1), ((1, 1), (1, 1)), (1, 1)))
    y = run(grad, torch.randn(8, 1, 3, 3))
    assert [x.shape for x in given] == [y.shape]
    assert given[0].stride() == y.stride()
    assert layout.is_channels_last(given[0]) == (how == "channels_last")


def test_describe_names_layout_and_copies() -> None:
    walk = (1, 1), ((1, 1), (1, 1)), (1, 1)
    x, weight = torch.randn(1, 64, 9, 9), torch.randn(64, 1, 3, 3)
    told = depthwise.describe(depthwise_case("forward", x.transpose(2, 3), weight, *walk))
    assert told["layout"] == "contiguous"
    assert told["copied_tensors"] == 1
    wide = x.contiguous(memory_format=torch.channels_last)
    assert (
        depthwise.describe(depthwise_case("grad_weight", wide, wide, *walk, size=(64, 1, 3, 3)))["layout"]
        == "channels_last"
    )


@given(
    size=st.integers(1, 9),
    stride=st.integers(1, 5),
    dilation=st.integers(1, 5),
    low=st.integers(0, 9),
    x=st.integers(0, 30),
)
def test_transposed_taps_invert_the_forward_rule(size: int, stride: int, dilation: int, low: int, x: int) -> None:
    phase = depthwise_taps.transposed_taps(size, stride, dilation, low)[x % stride]
    source = x // stride + low // stride + phase.offset
    found = {(phase.first + j * phase.skip, source + j * phase.advance) for j in range(phase.count)}
    wanted = {(k, y) for k in range(size) for y in range(-50, 50) if y * stride + k * dilation - low == x}
    assert found == wanted


_TARGETS = {"avx2": ("ymm", 8, 16), "avx512": ("zmm", 16, 32), "neon": (".4s", 4, 32)}


@pytest.mark.parametrize("numbers", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("which", "name"),
    [
        ("forward", "avx512"),
        ("forward", "neon"),
        ("grad_weight", "avx2"),
        ("grad_weight", "neon"),
        pytest.param("forward", "avx2", marks=pytest.mark.slow),
        pytest.param("grad_weight", "avx512", marks=pytest.mark.slow),
    ],
)
def test_other_processors_get_wide_multiply_adds(name: str, which: str, numbers: str, tmp_path: Any) -> None:
    import halide as hl

    register, lanes, _ = _TARGETS[name]
    target = machine.named(name)
    assert target.lanes == lanes
    taps = tuple(depthwise_taps.forward_taps(size, 1) for size in (3, 3, 1))
    if which == "forward":
        tile = GatherTile(lanes, lanes, 4, 1, 16)
        func, arguments = build(GatherSpec(2, True, False, taps, (1, 1, 1), 1, False, "", tile, numbers))
    else:
        tile_of_weight = WeightTile(lanes, lanes, 3, 1, 4, 1)
        spec = weight_grad.WeightSpec(2, True, (3, 3, 1), (1, 1, 1), (1, 1, 1), 1, tile_of_weight, numbers)
        func, arguments = weight_grad.build(spec)
    path = tmp_path / "kernel.s"
    hl.Pipeline(func).compile_to_assembly(str(path), arguments, "kernel", hl.Target(target.target))
    fused = [line for line in path.read_text().splitlines() if "vfmadd" in line or "fmla" in line]
    assert sum(register in line for line in fused) >= 4 * 3


def test_whole_numbers_are_for_other_kernels() -> None:
    x, weight = torch.zeros(1, 8, 5, 5), torch.zeros(8, 1, 3, 3)
    known = depthwise_case("forward", x, weight, (1, 1), ((1, 1), (1, 1)), (1, 1))
    whole = known.y._replace(dtype=torch.uint8)
    for asked in (known.into(whole), replace(known, x=known.x._replace(dtype=torch.uint8)).into(known.y)):
        assert runtime.missing() or "torch.uint8" in depthwise.supports(asked)
