"""Where PyTorch's depthwise kernels are expected to be as fast as ours, or faster.

PyTorch (oneDNN) is good at what MobileNets need most: few taps, one filter per channel, channels_last. A call of it
costs more, so small tensors are ours. Between the shapes where our kernels won clearly and those where they lost, the
choice is PyTorch's kernel.

For numbers of 16 bits PyTorch has fewer good kernels: for most gradients it has none.
"""

from __future__ import annotations

from math import prod

from sepconv.kernels.halide.conv.depthwise_plan import DepthwiseProblem, copied
from sepconv.kernels.halide.schedule.machine import host

_FEW_BYTES = 5 * 512 * 1024
_FEW_BYTES_CONTIGUOUS = 3 * 512 * 1024
_SHORT_ROW = 24
_SMALL_PLANE = 64
_MANY_TAPS = 25
_MANY_BYTES = 16 * 1024 * 1024
_WIDE_ROW = 28
# What is compiled in, not looped over, makes code of its own each: more takes the compiler from seconds to minutes.
_MOST_PHASES, _LONGEST_STEP, _MOST_FILTERS = 16, 8, 8
# Numbers copied into a tile for each result: from here on the copy takes longer than PyTorch's kernel.
_MOST_COPIED, _MOST_COPIED_OF_TAPS = 128, 4
_NARROW_ROW, _TINY_PLANE, _MANY_CHANNELS = 2, 4, 128
# Numbers of x up to which the calls of PyTorch's three passes cost more than they gain.
_FEW_TRAINED = 1 << 16


def slower(p: DepthwiseProblem, bound: bool = False) -> str:
    """Why PyTorch's kernel is the better choice, in a sentence; the empty string if ours is.

    ``bound``: the result goes to memory that is given, into which PyTorch's would have to be copied.
    """
    taps = prod(p.kernel)
    if reason := _slower_compiled(p) or _slower_copied(p, taps):
        return reason
    if p.dims == 1:
        if p.which == "grad_input" and taps > 31 and p.numbers == "float32":
            return f"PyTorch computes grad_input of a signal faster with {taps} taps"
        return _slower_short_rows(p) if p.channels >= _MANY_CHANNELS and p.numbers == "float32" else ""
    if p.multiplier > 1:
        return ""
    if p.numbers != "float32" and p.channels_last:
        if bound:
            return ""
        return _slower_forward_in_16_bits(p, taps) if p.which == "forward" else ""
    if p.channels_last and p.which == "forward":
        return _slower_forward_channels_last(p, taps, bound)
    if p.channels_last:
        return _slower_strided(p, taps) or _slower_wide_rows(p, taps)
    if p.dims == 3 or max(p.dilation) > 1:
        return ""
    return _slower_short_rows(p) or _slower_contiguous(p, taps)


def slower_trained(p: DepthwiseProblem) -> str:
    """Why all three passes of a layer are PyTorch's where it is trained, in a sentence; the empty string if not.

    Measured on Granite Rapids with 3 x 3 taps of float32, forward and both gradients with the Python around them: 0.73
    to 0.95 of PyTorch's speed from 72 thousand numbers on, 0.95 to 1.26 below. On Zen 4 only steps of 2 are slower.
    """
    plain = p.dims == 2 and p.channels_last and p.numbers == p.written == "float32" and p.multiplier == 1
    if not plain or max(p.kernel) > 3 or max(p.dilation) > 1 or (max(p.stride) == 1 and not host().whole_avx512):
        return ""
    if p.batch * p.channels * prod(p.image) <= _FEW_TRAINED:
        return ""
    return f"forward and back PyTorch's kernels take less time with {prod(p.kernel)} taps on channels_last tensors"


def _slower_compiled(p: DepthwiseProblem) -> str:
    phases = prod(p.stride)
    if p.which == "grad_input" and phases > _MOST_PHASES:
        return f"each of the {phases} remainders of the stride would be code of its own"
    if p.which == "grad_weight" and not p.channels_last and p.stride[0] > _LONGEST_STEP:
        return f"each of the {p.stride[0]} remainders of the stride along a row would be code of its own"
    if p.channels_last and p.multiplier > _MOST_FILTERS:
        return f"each of the {p.multiplier} filters of a channel would be code of its own on channels_last tensors"
    return ""


def _slower_copied(p: DepthwiseProblem, taps: int) -> str:
    most = max(_MOST_COPIED, _MOST_COPIED_OF_TAPS * taps)
    alone = prod(d * (k - 1) + s for d, k, s in zip(p.dilation, p.kernel, p.stride, strict=True))
    if alone <= most or (spread := copied(p)) <= most:
        return ""
    return f"the taps lie so far apart that {spread:.0f} numbers would be copied into the cache for each result"


def _slower_short_rows(p: DepthwiseProblem) -> str:
    if p.multiplier > 1 or max(p.dilation) > 1:
        return ""
    width, columns = p.output[0], p.kernel[0]
    if p.which == "grad_weight":
        if columns <= 3 and width < _SHORT_ROW and (p.dims == 1 or prod(p.output) > _TINY_PLANE):
            return f"PyTorch has a grad_weight kernel of its own for filters {columns} wide"
    elif 1 < columns <= 3 and width <= _NARROW_ROW and p.channels >= _MANY_CHANNELS:
        return f"rows of {width} pixels fill vectors badly; PyTorch converts {p.channels} channels to a blocked layout"
    return ""


def _slower_forward_channels_last(p: DepthwiseProblem, taps: int, bound: bool) -> str:
    if p.bytes <= _FEW_BYTES or (bound and taps < 49):
        return ""
    if taps < 49:
        return f"PyTorch's forward kernel is as fast with {taps} taps on channels_last tensors of {p.bytes} bytes"
    if prod(p.output) <= _SMALL_PLANE:
        return f"PyTorch's forward kernel is faster on channels_last planes of {prod(p.output)} pixels"
    return ""


def _slower_forward_in_16_bits(p: DepthwiseProblem, taps: int) -> str:
    if p.bytes <= _FEW_BYTES or max(p.dilation) > 1:
        return ""
    if p.dims == 2 and taps >= _MANY_TAPS and prod(p.output) > _SMALL_PLANE:
        return ""
    return f"PyTorch's forward kernel is as fast with {taps} taps on channels_last tensors of {p.numbers}"


def _slower_strided(p: DepthwiseProblem, taps: int) -> str:
    if p.dims == 2 and taps <= 9 and max(p.stride) > 1 and max(p.dilation) == 1:
        return f"PyTorch's {p.which} kernel is faster with {taps} taps and stride {max(p.stride)}"
    return ""


def _slower_wide_rows(p: DepthwiseProblem, taps: int) -> str:
    """Where multiply-adds cost least, PyTorch's kernel reads large images at memory's speed: it takes 0.7 to 0.9 of
    our time on Granite Rapids, and 1.1 to 1.6 times as long on Zen 4."""
    if p.which != "grad_weight" or p.dims != 2 or taps > 9 or max(p.dilation) > 1 or not host().whole_avx512:
        return ""
    if p.bytes > _MANY_BYTES and p.output[0] >= _WIDE_ROW:
        return (
            f"PyTorch's grad_weight kernel is faster with {taps} taps on rows of {p.output[0]} pixels, {p.bytes} bytes"
        )
    return ""


def _slower_contiguous(p: DepthwiseProblem, taps: int) -> str:
    width = p.output[0]
    if width >= _SHORT_ROW or p.which == "grad_weight":
        return ""
    if (taps > 9 or 1 in p.kernel[:2]) and p.bytes > _FEW_BYTES_CONTIGUOUS:
        return f"rows of {width} pixels fill vectors badly; PyTorch converts to a blocked layout instead"
    return ""
