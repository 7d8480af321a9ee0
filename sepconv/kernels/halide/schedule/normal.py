"""Loop sizes of the kernel for normal convolutions of many channels.

Its inner loop is the one of the matrix products (``gemm``): a tile of ``vectors`` registers of output channels by
``scalars`` neighbouring columns of a row. All scalars are read at fixed distances from one address, so that registers
alone limit their number; columns that are left over at the end of a row are computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from sepconv.kernels.halide.schedule.gemm import Tile, round_up, rounds
from sepconv.kernels.halide.schedule.machine import Machine

# Two multiply-add units of four cycles latency want so many sums that do not wait for one another.
_LEAST_SUMS = 10
_MOST_SCALARS = 14
_MOST_VECTORS = 4
# Time of a load over that of a multiply-add, as far as it shows, by where the weights of one block lie.
_L1_LOAD_COST, _L2_LOAD_COST, _FAR_LOAD_COST = 0.2, 0.5, 1.5
# Share of L2 for the rows of input under one task; the weights of a block lie there too.
_INPUT_SHARE = 6
# Time where threads share out output channels over that where they share out rows: all of them copy all of the input.
_SHARED_CHANNELS_COST = 1.1
_MOST_ROWS = 32
# Fewer input channels in a run of the sums, which lie in L2 in between: they would be read and written too often.
_LEAST_RUN = 16
# Time of a block whose last lanes must not be written, over that of a whole one.
_RAGGED_COST = 1.05


class NormalShape(NamedTuple):
    """What the loop sizes follow from: channels in and out of one group, taps of a filter, output rows and columns,
    bytes of input under one output row, and whether the input is copied: only then may sums be made in runs."""

    channels: int
    out_channels: int
    groups: int
    taps: int
    images: int
    rows: int
    columns: int
    row_bytes: int
    copied: bool = False


class NormalSchedule(NamedTuple):
    """``rows`` output rows in a task, and the blocks of output channels of all groups in ``parts``, one a task.

    ``run``: input channels whose products are summed up before those of the next ones.
    """

    tile: Tile
    rows: int
    parts: int
    run: int


def _tiles(machine: Machine, shape: NormalShape) -> Iterator[Tile]:
    for lanes in (machine.lanes, machine.lanes // 2, machine.lanes // 4):
        for vectors in range(1, _MOST_VECTORS + 1):
            most = min(_MOST_SCALARS, shape.columns, (machine.registers - vectors - 1) // vectors)
            if lanes >= 4 or lanes == machine.lanes:
                yield from (Tile(lanes, vectors, scalars) for scalars in range(1, most + 1))


def _tile_cost(tile: Tile, machine: Machine, shape: NormalShape) -> float:
    """Relative time per useful multiply-add."""
    block = 4 * tile.wide * shape.channels * shape.taps
    far = _L2_LOAD_COST if block <= machine.l2_bytes // 2 or shape.copied else _FAR_LOAD_COST
    vector_load = _L1_LOAD_COST if block <= machine.l1_bytes // 2 else far
    wasted = round_up(shape.out_channels, tile.wide) / shape.out_channels
    wasted *= _RAGGED_COST if shape.out_channels % tile.wide else 1.0
    wasted *= round_up(shape.columns, tile.scalars) / shape.columns
    waiting = max(1.0, _LEAST_SUMS / (tile.vectors * tile.scalars))
    shorter = machine.half_vector_cost ** (machine.lanes // tile.lanes).bit_length() / machine.half_vector_cost
    return wasted * waiting * shorter * (1.0 + vector_load / tile.scalars + machine.broadcast_cost / tile.vectors)


@lru_cache(maxsize=4096)
def normal_schedule(machine: Machine, shape: NormalShape, threads: int) -> NormalSchedule:
    """The tile with the least waste, and tasks that keep all threads equally busy."""
    tile = min(_tiles(machine, shape), key=lambda tile: _tile_cost(tile, machine, shape))
    most = min(shape.rows, _MOST_ROWS)
    if 4 * shape.groups * shape.out_channels * shape.channels * shape.taps <= machine.l2_bytes // 2:
        # Larger weights come from beyond L2 for every task: that counts for more than where the input lies.
        most = max(1, min(most, machine.l2_bytes // _INPUT_SHARE // shape.row_bytes))
    if _too_large(tile, machine, shape):
        most = max(1, min(most, machine.l2_bytes // 4 // (4 * tile.wide * shape.columns)))
    blocks = shape.groups * -(-shape.out_channels // tile.wide)

    def cost(rows: int, parts: int) -> float:
        tasks = shape.images * parts
        uneven = rounds(tasks * -(-shape.rows // rows), threads) * round_up(shape.rows, rows) / shape.rows
        return uneven * round_up(blocks, parts) / blocks * (_SHARED_CHANNELS_COST if parts > 1 else 1.0)

    choices = [(rows, parts) for rows in range(most, 0, -1) for parts in {1, min(threads, blocks)}]
    rows, parts = min(choices, key=lambda choice: (cost(*choice), choice[1], -choice[0]))
    return NormalSchedule(tile, rows, parts, _run(tile, machine, shape, rows))


def _too_large(tile: Tile, machine: Machine, shape: NormalShape) -> bool:
    """Whether L2 cannot keep the weights of a block, and the sums may be made in runs."""
    return shape.copied and 4 * tile.wide * shape.channels * shape.taps > machine.l2_bytes // 2


def _run(tile: Tile, machine: Machine, shape: NormalShape, rows: int) -> int:
    """As many channels as L2 keeps weights of, beside the input under a task; all of them where there is no need."""
    if not _too_large(tile, machine, shape):
        return shape.channels
    each = 4 * tile.wide * shape.taps + rows * shape.row_bytes // (shape.channels * shape.groups)
    whole = [run for run in range(_LEAST_RUN, shape.channels) if shape.channels % run == 0]
    return max(
        (run for run in whole if run * each <= machine.l2_bytes // 2), default=min(whole, default=shape.channels)
    )


# Share of L2 for the input rows of a task that computes one vector of several groups.
_SORTED_SHARE = 8


class GroupedSchedule(NamedTuple):
    """``columns`` neighbouring pixels in registers, ``rows`` output rows in a task."""

    columns: int
    rows: int


@lru_cache(maxsize=4096)
def grouped_schedule(
    machine: Machine, size: tuple[int, int], reach: tuple[int, int], row_bytes: int, vectors: int, threads: int
) -> GroupedSchedule:
    """For the kernel of few channels in a group: ``size`` of the result; input rows from one output row to the next and
    from the first tap to the last, each of ``row_bytes`` for one vector; vectors of all images."""
    rows, columns = size
    counts = range(1, min(columns, _MOST_SCALARS, machine.registers - 3) + 1)
    most = min(counts, key=lambda count: round_up(columns, count) / min(count, _LEAST_SUMS) * (1 + 0.2 / count))
    fitting = max(1, (machine.l2_bytes // _SORTED_SHARE // row_bytes - reach[1]) // reach[0])
    parts = max(-(-rows // fitting), -(-threads // vectors))
    return GroupedSchedule(most, max(1, -(-rows // parts)))
