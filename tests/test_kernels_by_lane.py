"""Kernels as they are scheduled for ARM, whose products take one lane, in the instructions of this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path

import pytest
import torch
from kernel_checks import double, magnitude, pointwise_case, poisoned
from test_kernels_separable import Case, arguments, described, pack, truth
from torch import Tensor

from sepconv import reference
from sepconv.device.targets import TARGETS
from sepconv.kernels.halide.conv import pointwise, separable
from sepconv.kernels.halide.jit import machine_code, runtime
from sepconv.kernels.halide.jit.machine_code import Kernel
from sepconv.kernels.halide.schedule import gemm, machine

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())

ARM = TARGETS["arm-64-linux"].machine
CASES = [
    Case("rows_left_over", (1, 24, 13, 11), 20, residual=True),
    Case("one_row", (2, 16, 1, 7), 33),
    Case("one_pixel", (1, 8, 1, 1), 7, activations=("relu", "")),
    Case("stride_2_1_dilation_2", (1, 12, 29, 17), 16, stride=(2, 1), padding=((2, 1), (0, 3)), dilation=(2, 2)),
    Case("padding_larger_than_image", (1, 16, 5, 5), 16, (5, 5), padding=((9, 9), (9, 9)), activations=("gelu", "")),
    Case("multiplier_2", (1, 20, 7, 9), 24, (3, 5), padding=((1, 1), (2, 2)), multiplier=2),
    Case("many_channels", (1, 260, 5, 3), 36),
    Case("channels_not_in_lanes", (1, 17, 7, 5), 33),
]


@pytest.fixture(autouse=True)
def for_arm() -> Iterator[None]:
    def make(key: Hashable, build: runtime.Build, old: bool) -> Kernel:
        func, parameters = build()
        return Kernel(machine_code.compile_object(runtime.hl.Pipeline(func), parameters, runtime.native_target()))

    with machine.targeting(ARM), runtime.made_by(make):
        yield


def test_clamps_of_arm_keep_nan_in_two_instructions(tmp_path: Path) -> None:
    """``fmaxnm`` would drop it, comparisons take twice as many."""
    tile = gemm.Tile(4, 4, 5, 4)
    out, parameters = pointwise.build(pointwise.PointwiseSpec(True, None, None, tile, False, "pixels", "relu6", False))
    file = tmp_path / "kernel.s"
    out.compile_to_assembly(str(file), parameters, "kernel", runtime.target())
    found = set(re.findall(r"\b(fmax|fmaxnm|fmin|fminnm|fcm[a-z]+)\b", file.read_text()))
    assert found == {"fmax", "fmin"}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_separable_matches_definition(case: Case, assert_rounding: Callable[..., None]) -> None:
    tensors, geometry = arguments(case)
    found = separable.plan(described(tensors, case.activations, geometry))
    in_lanes = case.shape[1] % 4 == 0
    assert (found.spec.tile.terms, found.spec.copied > 0) == ((4, True) if in_lanes else (1, False))
    expected = truth(double(*tensors), case.activations, geometry)
    out, margins_untouched = poisoned(expected.float().contiguous(memory_format=torch.channels_last))
    x, residual = tensors[0], tensors[-1]
    assert x is not None
    added = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    separable.bind(found, x, pack(found, tensors), added, out)()
    sizes = truth(magnitude(*tensors), ("", ""), geometry) + expected.abs()
    assert_rounding(out, expected, sizes, case.kernel[0] * case.kernel[1] + case.shape[1] * case.multiplier)
    margins_untouched()


@pytest.mark.parametrize(
    ("channels", "out_channels", "pixels"), [(4, 3, 13), (20, 16, 1), (36, 33, 6), (256, 16, 5), (19, 16, 7)]
)
def test_pointwise_matches_definition(
    channels: int, out_channels: int, pixels: int, assert_rounding: Callable[..., None]
) -> None:
    x = torch.randn(1, channels, 1, pixels).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(out_channels, channels, 1, 1), torch.randn(out_channels)
    found = pointwise.plan(pointwise_case(x, weight, bias, "relu6"))
    assert found.spec.tile.terms == (4 if channels % 4 == 0 else 1)
    assert found.spec.streams == 1
    expected = _pointwise(*double(x, weight, bias), "relu6")
    out, margins_untouched = poisoned(expected.float().contiguous(memory_format=torch.channels_last))
    pointwise.bind(found, x, pointwise.pack(found, (weight, bias)), None, out)()
    sizes = _pointwise(*magnitude(x, weight, bias), "") + expected.abs()
    assert_rounding(out, expected, sizes, channels)
    margins_untouched()


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    return reference.ACTIVATIONS[activation](reference.pointwise_conv(x, weight, bias))


@pytest.mark.parametrize("wide", [1, 7, 16, 24, 33, 1000])
def test_sums_scalars_and_weights_fit_the_registers(wide: int) -> None:
    tile = gemm.gemm_tile(ARM, wide, 256, terms=gemm.terms_together(ARM, 256))
    assert tile.terms == 4
    assert tile.vectors * tile.scalars + tile.scalars + tile.vectors < ARM.registers
    assert tile.panels == (tile.wide, tile.wide)


@pytest.mark.parametrize(("channels", "together"), [(64, 4), (24, 2), (20, 1), (22, 0)])
def test_whole_vectors_are_copied_under_a_tile(channels: int, together: int) -> None:
    assert gemm.copied_together(ARM, channels) == together
    assert gemm.copied_together(machine.named("avx2"), channels) == 0
