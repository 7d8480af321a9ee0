"""Run as a program: kernels of bytes read images that end where readable memory does, on both sides."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from quantized_checks import WAYS, Point, constants, truth
from torch import Tensor

from sepconv.kernels import case
from sepconv.kernels.case import Case, Geometry
from sepconv.kernels.halide.quantized import depthwise, normal, pointwise, product, separable

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
WALK = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))


def guarded(shape: tuple[int, int, int, int], at_end: bool) -> Tensor:
    """A channels_last image of bytes between pages that nobody may read, at the end of its own or at their start."""
    images, channels, height, width = shape
    size = images * channels * height * width
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    whole.random_(0, 256)
    for page in (0, pages + 1):
        assert _libc.mprotect(whole.data_ptr() + page * PAGE, PAGE, 0) == 0
    first = (pages + 1) * PAGE - size if at_end else PAGE
    return whole[first : first + size].view(images, height, width, channels).permute(0, 3, 1, 2)


def run(kernel: object, known: Case, x: Tensor, given: list[Tensor | None], way: str) -> Tensor:
    out = torch.zeros(known.result.shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    found = kernel.planned(known.into(out), way)  # type: ignore[attr-defined]
    kernel.bind(found, x, kernel.pack(found, given), None, out)()  # type: ignore[attr-defined]
    return out


def check(shape: tuple[int, int, int, int], at_end: bool, way: str) -> None:
    x, channels = guarded(shape, at_end), shape[1]
    mix, filters = constants((13, channels, 1, 1), Point()), constants((channels, 1, 3, 3), Point())
    full = constants((13, channels, 3, 3), Point())
    assert torch.equal(
        run(pointwise, case.pointwise(x, mix.weight, mix.bias), x, list(mix), way), truth(x, mix, Geometry.of_pixels(2))
    )
    known = case.normal(x, full.weight, full.bias, None, WALK)
    assert torch.equal(run(normal, known, x, list(full), way), truth(x, full, WALK))
    first = case.depthwise(x, filters.weight, filters.bias, WALK)
    hidden = truth(x, filters, WALK)
    if way != product.TILES:
        assert torch.equal(run(depthwise, first, x, list(filters), way), hidden)
    inner = mix._replace(numbers=torch.tensor([13.0, 0, 0, 1.6, 7]))
    both = [tensor for pair in zip(filters, inner, strict=True) for tensor in pair]
    known = case.separable(first, case.pointwise(first.y, inner.weight, inner.bias))
    assert torch.equal(run(separable, known, x, both, way), truth(hidden, inner, Geometry.of_pixels(2)))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for channels in map(int, sys.argv[1:]):
        for at_end in (True, False):
            for way in WAYS:
                check((1, channels, 5, 7), at_end, way)
    print("right")


if __name__ == "__main__":
    main()
