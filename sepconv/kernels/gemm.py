"""The matrix product inside pointwise, separable and stem convolution: packed weights and a tile of sums in registers.

``sums[v, s] = sum over k of vector[v, k] * scalar[s, k]``. ``v`` fills vector registers, every ``s`` is a number
broadcast to all lanes. Weights are packed in blocks so that each step of ``k`` reads the next few bytes of memory.
"""

from __future__ import annotations

from typing import Any

from sepconv.kernels.runtime import hl
from sepconv.kernels.schedule_gemm import Tile


def dense(param: Any, *extents: Any) -> None:
    """Fix the bounds and strides of an array without gaps, so that the compiler knows its addresses."""
    stride = 1
    for d, extent in enumerate(extents):
        param.dim(d).set_min(0).set_extent(extent).set_stride(stride)
        stride *= extent


def packed_param(name: str, block: int, depth: int, length: int) -> Any:
    """The packed weights of ``length`` channels, ``depth`` numbers each: [block][k][channel in block]."""
    param = hl.ImageParam(hl.Float(32), 3, name)
    dense(param, block, depth, -(-length // block))
    return param


def bias_param(name: str, length: int) -> Any:
    """One number per output channel. Kernels add it last of all: LLVM takes sums for numbers, never NaN, and would
    simplify an activation of them; of a sum with something just loaded it knows nothing."""
    param = hl.ImageParam(hl.Float(32), 1, name)
    dense(param, length)
    return param


def keep_in_registers(sums: Any, v: Any, s: Any, depth: list[Any], tile: Tile) -> None:
    """Schedule the sums: all of the tile in registers, the sum's dimensions outside it."""
    for stage in (sums, sums.update()):
        stage.vectorize(v, tile.lanes).unroll(v).unroll(s)
    sums.bound_extent(v, tile.wide)
    sums.update().reorder(v, s, *depth)
