"""Pointwise convolution of bfloat16 images on the processor's tiles: right to one rounding, whatever the sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sepconv
from sepconv.kernels import case
from sepconv.kernels.case import Outline
from sepconv.kernels.halide.conv import pointwise_tiles as kernel
from sepconv.kernels.halide.conv import tiles
from sepconv.kernels.halide.jit import amx, machine_code, packing, runtime

needs_tiles = pytest.mark.skipif(
    bool(runtime.missing() or amx.missing()), reason=runtime.missing() or amx.missing() or ""
)
LAST = torch.channels_last


def image(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16().contiguous(memory_format=LAST)


def bound(exact: Tensor, products: Tensor, terms: int) -> Tensor:
    """Half a unit in the last of 8 bits, and float32's own error of so many products."""
    return exact.abs() * 2.0**-8 + products * terms * 2.0**-24 + 1e-30


def checked(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> None:
    given = [None if t is None else Outline.of(t) for t in (x, weight, bias, residual)]
    asked = case.pointwise(given[0], given[1], given[2], given[3], activation)  # type: ignore[arg-type]
    assert kernel.supports(asked) == ""
    y = kernel.prepare(asked)(x, weight, bias, residual)
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    sums = F.conv2d(wide[0], wide[1], wide[2])  # type: ignore[arg-type]
    sums = sums if wide[3] is None else sums + wide[3]
    products = F.conv2d(wide[0].abs(), wide[1].abs()) + 1  # type: ignore[union-attr]
    exact = {"": sums, "relu": sums.relu()}[activation]
    assert y.dtype is torch.bfloat16
    assert y.is_contiguous(memory_format=LAST)
    assert ((y.double() - exact).abs() <= bound(exact, products, x.shape[1])).all()


@needs_tiles
@pytest.mark.parametrize(
    ("channels", "out_channels", "side"),
    [(32, 16, (4, 4)), (64, 37, (7, 5)), (24, 128, (5, 3)), (96, 130, (17, 1)), (16, 1, (1, 1)), (40, 31, (6, 8))],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_size_is_right_to_one_rounding(
    channels: int, out_channels: int, side: tuple[int, int], batch: int
) -> None:
    x = image(batch, channels, *side)
    weight = torch.randn(out_channels, channels, 1, 1).bfloat16() / math.sqrt(channels)
    checked(x, weight, torch.randn(out_channels).bfloat16(), image(batch, out_channels, *side), "relu")
    checked(x, weight, None, None, "")


@needs_tiles
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_threads_share_the_pixels_out(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        checked(image(2, 48, 13, 11), torch.randn(80, 48, 1, 1).bfloat16(), None, None, "relu")
    finally:
        torch.set_num_threads(before)


@needs_tiles
def test_channels_of_a_larger_image_are_read_and_written_in_place() -> None:
    whole, out = image(1, 80, 5, 7), torch.full((1, 64, 5, 7), math.nan).bfloat16().contiguous(memory_format=LAST)
    x, y, weight = whole[:, 17:49], out[:, 20:43], torch.randn(23, 32, 1, 1).bfloat16()
    asked = case.pointwise(Outline.of(x), Outline.of(weight)).into(Outline.of(y))
    assert kernel.supports(asked) == ""
    found = kernel.plan(asked)
    kernel.bind(found, x, kernel.pack(found, [weight, None]), None, y)()
    exact = F.conv2d(x.double(), weight.double())
    assert ((y.double() - exact).abs() <= bound(exact, F.conv2d(x.double().abs(), weight.double().abs()), 32)).all()
    assert out[:, :20].isnan().all()
    assert out[:, 43:].isnan().all()


@needs_tiles
def test_not_a_number_stays_where_it_is() -> None:
    x = image(1, 32, 6, 6)
    x[0, 3, 2, 4] = math.nan
    x[0, 5, 0, 1] = math.inf
    weight = torch.randn(16, 32, 1, 1).bfloat16()
    asked = case.pointwise(Outline.of(x), Outline.of(weight), activation="relu")
    y = kernel.prepare(asked)(x, weight)
    wanted = F.conv2d(x.double(), weight.double()).relu()
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y.isinf(), wanted.isinf())
    assert int(y.isnan().any(1).sum()) == 1


@needs_tiles
def test_weights_that_change_are_seen() -> None:
    x, weight = image(1, 64, 16, 16), torch.randn(64, 64, 1, 1).bfloat16()
    run = kernel.prepare(case.pointwise(Outline.of(x), Outline.of(weight)))
    before = run(x, weight).clone()
    weight.data.mul_(2)
    assert torch.equal(run(x, weight), before * 2)


@needs_tiles
def test_functions_use_them_without_gradients_and_say_so() -> None:
    x, weight = image(1, 64, 32, 32), torch.randn(256, 64, 1, 1).bfloat16().requires_grad_()
    with torch.no_grad():
        [said] = sepconv.explain(sepconv.pointwise_conv2d, x, weight)
        assert (said.kernel, said.schedule["unit"]) == ("halide", "AMX")
        y = sepconv.pointwise_conv2d(x, weight)
        exact = F.conv2d(x.double(), weight.double())
        assert ((y.double() - exact).abs() <= bound(exact, F.conv2d(x.double().abs(), weight.double().abs()), 64)).all()
    [said] = sepconv.explain(sepconv.pointwise_conv2d, x, weight)
    assert said.kernel == "torch"
    assert sepconv.pointwise_conv2d(x, weight).requires_grad


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(1, 32, 4, 4), "no tensor is of it"),
        (torch.zeros(1, 32, 4, 4).half(), "no tensor is of it"),
        (torch.zeros(1, 32, 4, 4, dtype=torch.float64), "got torch.float64"),
        (torch.zeros(2, 32, 4, 4).bfloat16(), "reads images in channels_last"),
    ],
)
@needs_tiles
def test_what_they_cannot_compute_they_refuse(x: Tensor, reason: str) -> None:
    weight = torch.zeros(16, x.shape[1], 1, 1, dtype=torch.bfloat16 if x.dtype is torch.float64 else x.dtype)
    assert reason in kernel.supports(case.pointwise(Outline.of(x), Outline.of(weight)))


def test_without_tiles_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "missing", lambda stage=amx.BF16: "the processor has no tiles of bfloat16 (AMX)")
    monkeypatch.setattr(tiles, "unit", lambda: "")
    x, weight = image(1, 32, 4, 4), torch.zeros(16, 32, 1, 1).bfloat16()
    asked = case.pointwise(Outline.of(x), Outline.of(weight))
    assert kernel.supports(asked) in (runtime.missing(), tiles.missing())
    assert runtime.missing() or tiles.missing().endswith("(AMX), and it is not AMD's with AVX512-BF16")
    with pytest.raises(RuntimeError, match="the processor has no tiles"):
        machine_code._define_runtime(amx.BF16.name.encode())


def test_weights_in_tiles() -> None:
    weight = torch.arange(18 * 48).view(18, 48, 1, 1).to(torch.int16)
    packed = packing.pack_tiles(weight, 24)
    assert packed.shape == (2, 2, 12, 16, 2)
    assert packed[1, 1, 3, 1, 1] == weight[17, 24 + 7, 0, 0]
    assert not packed[1, :, :, 2:].any()


def test_hashes_of_16_bits_see_every_bit() -> None:
    weight = torch.zeros(5001).bfloat16()
    seen = {packing.fingerprint(weight)}
    for place in (0, 1, 4999, 5000):
        changed = weight.clone()
        changed.view(torch.int16)[place] = 1
        seen.add(packing.fingerprint(changed))
    assert len(seen) == 5
