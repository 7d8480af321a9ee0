"""Memory layouts that the kernels read in place: contiguous and channels_last, views included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` lies in memory pixel by pixel, views included; where both readings are possible it does not.

    Steps along a size of 1 say nothing.
    """
    if x.dim() not in (4, 5) or x.is_contiguous():
        return False
    shape, stride, least = x.shape, x.stride(), 0
    pixels = max(shape[2:])
    for d in (1, 3, 2, 0) if len(shape) == 4 else (1, 4, 3, 2, 0):
        if shape[d] == 1 and pixels > 1 and d != 1:
            continue
        if shape[d] == 0 or stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * max(shape[d], 1)
    return True


def pixel_step(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Numbers from one pixel of an image (N, C, H, W) to the next, where all lie evenly spaced and the channels of a
    pixel side by side: channels_last, or some of the channels of such an image. 0 where they do not.

    Steps along a size of 1 say nothing.
    """
    images, channels, height, width = shape
    if channels > 1 and stride[1] != 1:
        return 0
    step, pixels = 0, 1
    for size, given in ((width, stride[3]), (height, stride[2]), (images, stride[0])):
        if size > 1:
            step = step or given // pixels
            if step < channels or given != step * pixels:
                return 0
        pixels *= size
    return step or channels


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of ``x`` in PyTorch's words; that of a result is the same."""
    if not is_channels_last(x):
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def new_output(x: Tensor, channels: int, sizes: Sequence[int]) -> Tensor:
    """An empty output of an operation on ``x``, in the same layout."""
    shape, form = [x.shape[0], channels, *sizes], memory_format(x)
    if form is torch.contiguous_format:
        return x.new_empty(shape)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)


def array(tensor: Tensor) -> Any:
    """The tensor's memory as a NumPy array: views of it cost a fraction of the time of a tensor's."""
    return tensor.detach().numpy() if tensor.requires_grad else tensor.numpy()


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one size lie in memory alike; steps along a size of 1 say nothing."""
    if a.stride() == b.stride():
        return True
    return all(x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True) if size > 1)


def like(tensor: Tensor, out: Tensor) -> Tensor:
    """The tensor in the layout of ``out``, copied only where it is in another."""
    return tensor if alike(tensor, out) else torch.empty_like(out).copy_(tensor)
