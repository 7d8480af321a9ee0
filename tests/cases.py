"""Named edge cases of depthwise convolutions, as data. Sizes are primes or a vector width +-1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from sepconv.kernels.case import Geometry
from sepconv.ops.geometry import resolve


@dataclass(frozen=True)
class Case:
    """One depthwise convolution: x is (batch, channels, *image), the weight (channels*multiplier, 1, *kernel)."""

    name: str
    channels: int
    image: tuple[int, ...]
    kernel: tuple[int, ...]
    batch: int = 2
    multiplier: int = 1
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | str = 0
    dilation: int | tuple[int, ...] = 1

    @property
    def dims(self) -> int:
        return len(self.image)

    @property
    def geometry(self) -> Geometry:
        return resolve(self.name, self.dims, self.kernel, self.stride, self.padding, self.dilation)


CASES = [
    Case("channels_1", 1, (7, 11), (3, 3), padding=1),
    Case("channels_below_tile", 7, (7, 11), (3, 3), padding=1),
    Case("channels_equal_tile", 8, (7, 11), (3, 3), padding=1),
    Case("channels_above_tile", 17, (7, 11), (3, 3), padding=1),
    Case("one_pixel", 5, (1, 1), (3, 3), padding=1),
    Case("image_smaller_than_kernel", 5, (2, 3), (5, 5), padding=2),
    Case("padding_larger_than_image", 5, (2, 3), (3, 3), padding=4),
    Case("stride_2", 9, (13, 11), (3, 3), stride=2, padding=1),
    Case("stride_skips_last_column", 9, (13, 12), (3, 3), stride=2),
    Case("stride_1_2", 9, (13, 11), (3, 3), stride=(1, 2), padding=1),
    Case("stride_3_above_kernel", 9, (13, 11), (2, 2), stride=3),
    Case("dilation_2", 9, (13, 11), (3, 3), padding=2, dilation=2),
    Case("dilation_4_stride_2", 9, (19, 17), (3, 3), stride=2, padding=4, dilation=4),
    Case("kernel_1x7", 9, (5, 13), (1, 7), padding=(0, 3)),
    Case("kernel_7x1", 9, (13, 5), (7, 1), padding=(3, 0)),
    Case("kernel_1x1", 9, (5, 7), (1, 1)),
    Case("even_kernel_same", 9, (7, 11), (4, 2), padding="same"),
    Case("kernel_5x5", 17, (11, 13), (5, 5), padding=2),
    Case("kernel_7x7", 17, (11, 13), (7, 7), padding=3),
    Case("kernel_13x13", 3, (17, 19), (13, 13), padding=6),
    Case("multiplier_2", 5, (7, 11), (3, 3), multiplier=2, padding=1),
    Case("multiplier_3_stride_2", 5, (7, 11), (3, 3), multiplier=3, stride=2, padding=1),
    Case("batch_0", 5, (7, 11), (3, 3), batch=0, padding=1),
    Case("batch_1", 5, (7, 11), (3, 3), batch=1, padding=1),
    Case("signal_k4", 7, (23,), (4,), padding="same"),
    Case("signal_k15", 17, (31,), (15,), padding=7),
    Case("signal_k63_dilation_2", 3, (29,), (63,), padding=62, dilation=2),
    Case("volume", 5, (3, 5, 7), (3, 3, 3), padding=1),
    Case("volume_stride_2", 9, (5, 7, 5), (3, 3, 3), stride=2, padding=1),
]

# Each layout is a kernel of its own to compile. Of the cases of a kind (strides, dilations, sizes of filters,
# multipliers, volumes) some are in this layout by default and some in that; the long tests have all in both.
_CONTIGUOUS_IS_LONG = (
    "image_smaller_than_kernel", "stride_skips_last_column", "stride_3_above_kernel", "dilation_2", "kernel_7x1",
    "kernel_1x1", "kernel_5x5", "multiplier_3_stride_2", "volume",
)  # fmt: skip
_CHANNELS_LAST_IS_LONG = (
    "padding_larger_than_image", "stride_2", "stride_1_2", "dilation_4_stride_2", "kernel_1x7", "even_kernel_same",
    "kernel_7x7", "multiplier_2", "volume_stride_2",
)  # fmt: skip


def arranged(cases: Sequence[Case], layouts: Mapping[str, Any]) -> list[Any]:
    """Parameters of a test: every case with the value of every layout, and what is long marked as slow."""
    return [
        pytest.param(case, value, marks=[pytest.mark.slow] * _is_long(case, layout), id=f"{case.name}-{layout}")
        for layout, value in layouts.items()
        for case in cases
    ]


def _is_long(case: Case, layout: str) -> bool:
    return case.name in (_CHANNELS_LAST_IS_LONG if layout == "channels_last" else _CONTIGUOUS_IS_LONG)
