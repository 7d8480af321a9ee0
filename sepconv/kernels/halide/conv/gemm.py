"""The matrix product inside pointwise, separable and stem convolution: packed weights and a tile of sums in registers.

``sums[v, s] = sum over k of vector[v, k] * scalar[s, k]``. ``v`` fills vector registers, every ``s`` is a number
broadcast to all lanes. Weights are packed in panels, one for each vector of the tile (or one for all scalars), in which
each step of ``k`` reads the next few bytes: processors fetch ahead along a run, and several runs bring more in time.
"""

from __future__ import annotations

from typing import Any

from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule.gemm import Tile


def dense(param: Any, *extents: int | None) -> None:
    """Fix the bounds and strides of an array without gaps, so that the compiler knows its addresses.

    What is None, and the strides beyond it, the array itself says in each call.
    """
    stride: int | None = 1
    for d, extent in enumerate(extents):
        param.dim(d).set_min(0)
        if stride is not None:
            param.dim(d).set_stride(stride)
        if extent is not None:
            param.dim(d).set_extent(extent)
        stride = None if extent is None or stride is None else stride * extent


def packed_param(name: str, panel: int, block: int, depth: int | None, length: int | None) -> Any:
    """The packed weights of ``length`` channels, ``depth`` numbers each, as ``packing.pack`` lays them."""
    param = hl.ImageParam(hl.Float(32), 3, name)
    dense(param, panel, depth, None if length is None else -(-length // block) * block // panel)
    return param


def packed(param: Any, panel: int, channel: Any, k: Any) -> Any:
    """The packed weight that output channel ``channel`` has for term ``k`` of its sum."""
    return param[channel % panel, k, channel // panel]


def ragged(channels: int, block: int) -> int | None:
    """Output channels that a kernel has to know: code for a last block that is not whole is half as long if it does."""
    return channels if channels % block else None


def bias_param(name: str, length: int | None) -> Any:
    """One number per output channel. Kernels add it last of all: LLVM takes sums for numbers, never NaN, and would
    simplify an activation of them; of a sum with something just loaded it knows nothing."""
    param = hl.ImageParam(hl.Float(32), 1, name)
    dense(param, length)
    return param


def in_streams(channels: Any, streams: int, *others: int) -> tuple[Any, Any]:
    """The reduction over the channels, in so many runs side by side (see ``schedule_gemm.streams``), and the channel.

    The first dimension is the number of the run, which is to be unrolled; ``others`` follow the channels.
    """
    k = hl.RDom([hl.Range(0, extent) for extent in (streams, channels // streams, *others)], "k")
    return k, k[1] + channels // streams * k[0]


def in_terms(channels: Any, terms: int, *others: int) -> tuple[Any, Any]:
    """The same for so many neighbouring channels at a time (see ``Tile.terms``)."""
    k = hl.RDom([hl.Range(0, extent) for extent in (terms, channels // terms, *others)], "k")
    return k, k[0] + terms * k[1]


def loaded_together(source: Any, at: list[Any]) -> Any:
    """``source[channel, ...]`` as products by lane read it, scheduled by :func:`keep_terms`."""
    scalars = hl.Func("scalars")
    scalars[at] = source[at]
    return scalars


def keep_terms(scalars: Any, s: Any, sums: Any, step: Any, tile: Tile) -> None:
    """Schedule what was ``loaded_together``: a vector of neighbouring channels for each scalar ``s``, in registers."""
    channel = scalars.args()[0]
    scalars.compute_at(sums, step).bound_extent(channel, tile.terms).bound_extent(s, tile.scalars)
    scalars.vectorize(channel).unroll(s)


def split_outputs(out: Any, o: Any, loops: tuple[Any, Any], size: int, channels: int | None) -> None:
    """The loop over output channels in blocks, the outer of two; of ``channels``, None where the blocks are whole."""
    if channels is None:
        out.split(o, *loops, size, hl.TailStrategy.RoundUp)
    else:
        out.bound(o, 0, channels).split(o, *loops, size, hl.TailStrategy.GuardWithIf)


def keep_in_registers(sums: Any, v: Any, s: Any, depth: list[Any], tile: Tile) -> None:
    """Schedule the sums: all of the tile in registers, the sum's dimensions outside it."""
    for stage in (sums, sums.update()):
        stage.vectorize(v, tile.lanes).unroll(v).unroll(s)
    sums.bound_extent(v, tile.wide)
    sums.update().reorder(v, s, *depth)
