"""Loop sizes of the products of bfloat16 on the processor's tiles.

A product on tiles is so fast that the way to and from the cache counts for more: sizes follow from where the weights,
the numbers that are multiplied and their sums lie.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from sepconv.kernels.halide.schedule.gemm import round_up
from sepconv.kernels.halide.schedule.machine import Machine

_TILE = 16
# Output channels of one block of sums: fewer blocks read x again less often, wider ones gain no more.
_WIDEST = 128
# Pixels of one part of the sums: the weights are read once for each part, and its sums stay in L2.
_MOST_PIXELS = 256
# Share of L2 for the depthwise results of a task and the input under them; all but a fifth where the weights lie beyond
# L2, from where they come once for each task.
_TILE_SHARE = 5
# Time to bring the weights from L2, or from beyond it, in pixels that are multiplied meanwhile (Granite Rapids, where a
# core gets 2.6 bytes in a cycle from beyond L2).
_NEAR_WEIGHTS, _FAR_WEIGHTS = 25, 400
# Time where threads share out output channels, over that where they share out rows: each reads what others wrote.
_SHARED_CHANNELS_COST = 1.2
# Time of a second call for rows that are left over.
_SECOND_CALL_COST = 1.02

# In vectors: output channels of a block, its sums in registers, and pixels, each of which needs an address.
_BLOCKS = (64, 32, 16)
_SUMS, _MOST_SCALARS = 24, 12


class TilesSchedule(NamedTuple):
    """``rows`` output rows in a task, ``pixels`` in one part of the sums, ``wide`` output channels in a block; ``tall``
    pixels in registers where vectors multiply, 0 on tiles; ``parallel``: whether threads share out rows or channels."""

    rows: int
    pixels: int
    wide: int
    tall: int = 0
    parallel: str = "rows"


def wide_of(out_channels: int, together: int) -> int:
    """Output channels of a block, in multiples of ``together``."""
    return min(_WIDEST, round_up(out_channels, together))


def in_vectors(found: TilesSchedule, out_channels: int, together: int, fewest: int) -> TilesSchedule:
    """The same where vectors of pairs multiply: a block is what registers hold; ``fewest`` pixels are in any part."""
    blocks = [wide for wide in _BLOCKS if wide % together == 0]
    wide = min(blocks, key=lambda wide: (round_up(out_channels, wide), -wide))
    return found._replace(wide=wide, tall=min(_SUMS * _TILE // wide, _MOST_SCALARS, fewest))


def pixels_of(count: int, most: int = _MOST_PIXELS) -> int:
    """Of one part, where there are so many: nearly equal parts, in whole tiles."""
    parts = -(-count // most)
    return min(count, round_up(-(-count // parts), _TILE))


class TilesShape(NamedTuple):
    """What the loop sizes follow from.

    Attributes:
        row_bytes: of one output row of what is multiplied, and of the input under it.
        weight_bytes: of all weights.
    """

    images: int
    rows: int
    columns: int
    row_bytes: int
    weight_bytes: int
    out_channels: int
    together: int


def shared_wide(out_channels: int, together: int, threads: int) -> int:
    """Output channels of a block where threads share out blocks."""
    return wide_of(-(-out_channels // threads), together)


@lru_cache(maxsize=4096)
def tiles_schedule(machine: Machine, shape: TilesShape, threads: int) -> TilesSchedule:
    """As many rows in a task as the cache holds and as keep all threads busy, or shared channels where that is less."""
    near = shape.weight_bytes <= machine.l2_bytes // 2
    room = machine.l2_bytes * 4 // 5
    budget = machine.l2_bytes // _TILE_SHARE if near else room
    most, weights = min(shape.rows, max(1, budget // shape.row_bytes)), _NEAR_WEIGHTS if near else _FAR_WEIGHTS

    def cost(rows: int) -> float:
        tasks, left = divmod(shape.rows, rows)
        last = -(-shape.images // threads) * (left * shape.columns + weights) if left else 0
        time = -(-shape.images * tasks // threads) * (rows * shape.columns + weights) + last
        return time * (_SECOND_CALL_COST if left else 1.0)

    rows = min(range(most, 0, -1), key=cost)
    if threads > 1 and shape.images == 1 and shape.rows * shape.row_bytes <= room:
        wide, whole = shared_wide(shape.out_channels, shape.together, threads), shape.rows * shape.columns
        share = -(-shape.out_channels // (wide * threads)) * wide / shape.out_channels
        if _SHARED_CHANNELS_COST * share * (whole + weights) < cost(rows):
            return TilesSchedule(shape.rows, pixels_of(whole), wide, parallel="channels")
    wide = wide_of(shape.out_channels, shape.together)
    return TilesSchedule(rows, pixels_of(rows * shape.columns), wide)
