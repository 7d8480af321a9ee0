"""Where PyTorch's depthwise kernels are expected to be as fast as ours, or faster.

PyTorch (oneDNN) is good at what MobileNets need most: few taps, no dilation, one filter per channel, data that stay in
the cache. Between the shapes where our kernels won clearly and those where they lost, the choice is PyTorch's kernel.
"""

from __future__ import annotations

from math import prod

from sepconv.kernels.depthwise_plan import Problem

_MANY_BYTES = 8 * 1024 * 1024
_SHORT_ROW = 24
_SMALL_PLANE = 64


def slower(p: Problem) -> str:
    """Why PyTorch's kernel is the better choice, in a sentence; the empty string if ours is."""
    taps = prod(p.kernel)
    if p.dims == 1:
        if p.which == "grad_input" and taps > 31:
            return f"PyTorch computes grad_input of a signal faster with {taps} taps"
        return ""
    if p.dims == 3 or p.multiplier > 1 or max(p.dilation) > 1:
        return ""
    return _slower_channels_last(p, taps) if p.channels_last else _slower_contiguous(p, taps)


def _slower_channels_last(p: Problem, taps: int) -> str:
    if p.which != "forward":
        return ""
    if prod(p.output) <= _SMALL_PLANE and taps <= 49:
        return f"PyTorch's forward kernel is faster on channels_last planes of {prod(p.output)} pixels"
    if taps <= 25 and p.bytes < _MANY_BYTES:
        return f"PyTorch's forward kernel is as fast with {taps} taps while channels_last data stay in the cache"
    return ""


def _slower_contiguous(p: Problem, taps: int) -> str:
    width, columns = p.output[0], p.kernel[0]
    if p.bytes >= _MANY_BYTES and width >= _SHORT_ROW:
        return ""
    if p.which == "grad_weight":
        return f"PyTorch has a grad_weight kernel of its own for filters {columns} wide" if columns <= 3 else ""
    if width < _SHORT_ROW and (taps > 9 or 1 in p.kernel[:2]):
        return f"rows of {width} pixels fill vectors badly; PyTorch converts to a blocked layout instead"
    if max(p.stride) > 1:
        return f"PyTorch's {p.which} kernel is faster with stride {max(p.stride)} on contiguous tensors"
    return ""
