"""Loop sizes of the products of bfloat16 on the processor's tiles.

A product on tiles is so fast that the way to and from the cache counts for more: sizes follow from where the weights,
the numbers that are multiplied and their sums lie.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from sepconv.kernels.halide.schedule.gemm import round_up, rounds
from sepconv.kernels.halide.schedule.machine import Machine

_TILE = 16
# Output channels of one block of sums: fewer blocks read x again less often, wider ones gain no more.
_WIDEST = 128
# Pixels of one part of the sums: the weights are read once for each part, and its sums stay in L2.
_MOST_PIXELS = 256
# Share of L2 for the depthwise results of a task and the input under them; all but a fifth where the weights lie beyond
# L2, from where they come once for each task.
_TILE_SHARE = 5
# Time of a second call for rows that are left over, and of a task, over that of a row.
_SECOND_CALL_COST, _TASK_COST = 1.02, 0.1


# In vectors: output channels of a block, its sums in registers, and pixels, each of which needs an address.
_BLOCKS = (64, 32, 16)
_SUMS, _MOST_SCALARS = 24, 12


class TilesSchedule(NamedTuple):
    """``rows`` output rows in a task, ``pixels`` in one part of the sums, ``wide`` output channels in a block; ``tall``
    pixels in registers where vectors multiply, 0 on tiles."""

    rows: int
    pixels: int
    wide: int
    tall: int = 0


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


@lru_cache(maxsize=4096)
def tiles_schedule(machine: Machine, shape: TilesShape, threads: int) -> TilesSchedule:
    """As many rows in a task as the cache holds and as keep all threads busy."""
    near = shape.weight_bytes <= machine.l2_bytes // 2
    budget = machine.l2_bytes // _TILE_SHARE if near else machine.l2_bytes * 4 // 5
    most = min(shape.rows, max(1, budget // shape.row_bytes))

    def cost(rows: int) -> float:
        tasks, left = divmod(shape.rows, rows)
        uneven = rounds(shape.images * tasks, threads) * tasks * rows + rounds(shape.images, threads) * left
        return uneven / shape.rows * (_SECOND_CALL_COST if left else 1.0) * (1 + _TASK_COST / rows)

    rows = min(range(most, 0, -1), key=cost)
    wide = wide_of(shape.out_channels, shape.together)
    return TilesSchedule(rows, pixels_of(rows * shape.columns), wide)
