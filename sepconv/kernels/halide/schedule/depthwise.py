"""Loop sizes of the depthwise kernels, by rule from shape, layout and machine.

Nothing here is tuned to one machine: every rule speaks of lanes, registers and cache sizes. The tiles are compiled
into a kernel and take few values, so that one kernel serves many sizes; boxes are arguments and fit each size.
Sizes are in the order x, y, z.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from sepconv.kernels.halide.schedule.machine import Machine

Sizes = tuple[int, int, int]

# Multiply-adds of straight-line code in one innermost body: enough to hide the loop, few enough to stay in registers
# (of longer bodies the compiler moves the loads away from their use).
_BODY = 128
# Channels of a block in bytes: several cache lines, so that memory is read in long runs.
_BLOCK_BYTES = 512
# Parts that the weight gradient is cut into at least. A constant, so that results do not depend on the threads.
_CHUNKS = 16
# Stores of the tile that are made before it is read; processors queue 44 to 112.
_STORE_QUEUE = 256
# Tasks per thread: few enough to cost nothing, enough to level out what other programs take.
_TASKS_PER_THREAD = 8


class GatherTile(NamedTuple):
    """Loop sizes compiled into a forward or grad_input kernel.

    Attributes:
        lanes: float32 values in a vector.
        block: channels of one task; 1 at contiguous.
        columns, rows: results kept in registers, in positions of one phase.
        unrolled_taps: most taps in straight-line code.
    """

    lanes: int
    block: int
    columns: int
    rows: int
    unrolled_taps: int


class WeightTile(NamedTuple):
    """Loop sizes compiled into a grad_weight kernel.

    Attributes:
        lanes: float32 values in a vector.
        block: channels of one task; 1 at contiguous.
        taps_x, taps_y: the group of taps that is kept in registers.
        columns: neighbouring pixels of straight-line code at channels_last.
        rows: neighbouring rows of straight-line code at contiguous.
    """

    lanes: int
    block: int
    taps_x: int
    taps_y: int
    columns: int
    rows: int


@dataclass(frozen=True)
class GatherShape:
    """The sizes that a forward or grad_input schedule depends on.

    ``image`` is the result's size, ``phases`` and ``taps`` (the most of a phase) describe the filter, ``reach`` is how
    far the taps of one position lie apart in the source, ``step`` how far those of neighbouring positions do.
    """

    channels: int
    image: Sizes
    phases: Sizes
    taps: Sizes
    reach: Sizes
    step: Sizes
    multiplier: int


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _floor_power_of_two(value: int) -> int:
    return 1 << (value.bit_length() - 1)


def _least_waste(total: int, candidates: list[int], overhead: float) -> int:
    """The part size that covers ``total`` most cheaply, if each part costs ``overhead`` besides its size."""
    return min(candidates, key=lambda part: (ceil_div(total, part) * (part + overhead), -part))


def _channel_block(channels: int, reach: Sizes, step: Sizes, image: Sizes, machine: Machine) -> tuple[int, int]:
    """Lanes and block at channels_last. The last block is shifted to end with the last channel.

    A block is as large as memory likes, but small enough that the cache holds more rows than a filter reaches.
    """
    lanes = min(machine.lanes, _floor_power_of_two(channels))
    across = (image[0] * step[0] + reach[0]) * (1 + reach[2])
    rows = min(2 * reach[1], (image[1] - 1) * step[1] + reach[1]) + 1
    most = min(_BLOCK_BYTES, machine.l2_bytes // 2 // (across * rows)) // (4 * lanes)
    most = min(max(1, most), channels // lanes)
    return lanes, lanes * _least_waste(ceil_div(channels, lanes), list(range(1, most + 1)), 0.5)


def _row_lanes(width: int, machine: Machine) -> int:
    """Lanes at contiguous: narrower vectors where a whole row does not fill half of one."""
    lanes = machine.lanes
    while lanes > 4 and width <= lanes // 2:
        lanes //= 2
    return lanes


def gather_tile(shape: GatherShape, channels_last: bool, machine: Machine) -> GatherTile:
    phases, multiplier = prod(shape.phases), shape.multiplier
    width, height = (ceil_div(shape.image[d], shape.phases[d]) for d in (0, 1))
    if channels_last:
        lanes, block = _channel_block(shape.channels, shape.reach, shape.step, shape.image, machine)
        room = max(1, machine.registers * 5 // 8 // (phases * multiplier))
        columns = _least_waste(width, [c for c in (1, 2, 4, 7, 8) if c <= min(room, machine.registers // 2 - 1)], 0.3)
        body = columns * multiplier
        return GatherTile(lanes, block, columns, 1, max(1, _BODY // body))
    lanes = _row_lanes(width, machine)
    room = max(1, machine.registers // 2 // phases)
    rows = 1
    if shape.taps[1] > 1:
        rows = _least_waste(height, [r for r in (1, 2, 4) if r <= room], 0.6)
    vectors = min(_floor_power_of_two(ceil_div(width, lanes)), max(1, room // rows), 4)
    return GatherTile(lanes, 1, lanes * vectors, rows, max(1, _BODY // (rows * vectors)))


def gather_alternatives(
    shape: GatherShape, usual: GatherTile, channels_last: bool, machine: Machine
) -> Iterator[GatherTile]:
    """Tiles near the usual one, that the tuner tries."""
    if channels_last:
        most = machine.registers // 2 - 1
        blocks = [usual.lanes * n for n in (1, 2, 4, 8) if usual.lanes * n <= shape.channels]
        runs = [(columns, 1) for columns in (1, 2, 4, 7, 8) if columns <= most]
    else:
        blocks = [1]
        runs = [(usual.lanes * vectors, rows) for vectors in (1, 2, 4) for rows in (1, 2, 4)]
    for block in blocks:
        for columns, rows in runs:
            body = columns * shape.multiplier if channels_last else rows * columns // usual.lanes
            if body * prod(shape.phases) <= machine.registers:
                yield GatherTile(usual.lanes, block, columns, rows, max(1, _BODY // body))


def _units(shape: GatherShape, tile: GatherTile) -> list[int]:
    """Positions that the registers hold."""
    return [tile.columns * shape.phases[0], tile.rows * shape.phases[1], shape.phases[2]]


def size_of(shape: GatherShape, tile: GatherTile, boxes: Sizes) -> Sizes:
    """Positions of the result in one box."""
    x, y, z = (box * unit for box, unit in zip(boxes, _units(shape, tile), strict=True))
    return x, y, z


def boxes_in(shape: GatherShape, tile: GatherTile, boxes: Sizes) -> int:
    """Boxes of one image."""
    return prod(map(ceil_div, shape.image, size_of(shape, tile, boxes)))


def gather_boxes(shape: GatherShape, tile: GatherTile, channels_last: bool, machine: Machine) -> Sizes:
    """Pixels of a task, in units of the tile: as many rows as fill a part of the cache.

    A quarter leaves room for what streams by; it was faster than a half by 5 to 20 % on Granite Rapids.
    """
    units = _units(shape, tile)
    counts = [ceil_div(size, unit) for size, unit in zip(shape.image, units, strict=True)]
    cell = 4 * tile.block * (shape.multiplier if channels_last else 1)
    steps = [shape.step[d] * units[d] // shape.phases[d] for d in range(3)]
    return _fit_box(counts, steps, shape.reach, cell, machine.l2_bytes // 4)


def planes(shape: GatherShape, tile: GatherTile, boxes: Sizes) -> int:
    """Channels that are copied one after the other before the first is computed, at contiguous.

    A load that takes from two stores waits until both have left the processor's queue of stores. So many stores lie
    between the copy of a small channel and its use that the queue has gone through (Granite Rapids: 1.1 to 1.2 times
    the speed at 7x7 and 14x14 pixels).
    """
    units = _units(shape, tile)
    box = [boxes[d] * units[d] * shape.step[d] // shape.phases[d] + shape.reach[d] for d in range(3)]
    stores = 2 * ceil_div(box[0], tile.lanes) * box[1] * box[2]
    return ceil_div(_STORE_QUEUE, stores)


def _fit_box(counts: list[int], steps: list[int], reach: Sizes, cell: int, budget: int) -> Sizes:
    """The largest box, whole rows first, whose input fits into ``budget`` bytes; equal parts of the whole."""
    limit = budget // cell
    best: list[int] = []
    other = (1 + reach[1]) * (1 + reach[2])
    best.append(_balanced(counts[0], (limit // other - reach[0]) // steps[0]))
    used = best[0] * steps[0] + reach[0]
    best.append(_balanced(counts[1], (limit // (used * (1 + reach[2])) - reach[1]) // steps[1]))
    used *= best[1] * steps[1] + reach[1]
    best.append(_balanced(counts[2], (limit // used - reach[2]) // steps[2]))
    return best[0], best[1], best[2]


def _balanced(count: int, most: int) -> int:
    """A part of at most ``most`` (at least 1): equal parts if they need not be half as small, else nearly equal ones.

    What the last part has too much is computed from memory that nobody wrote, and dropped.
    """
    nearly = ceil_div(count, ceil_div(count, max(1, min(most, count))))
    return next((part for part in range(nearly, nearly // 2, -1) if count % part == 0), nearly)


def items_per_task(blocks: int, others: int, threads: int) -> int:
    """Channels (or blocks of them) of one task, where ``others`` tasks exist for each anyway."""
    return max(1, min(blocks, blocks * others // (threads * _TASKS_PER_THREAD)))


@dataclass(frozen=True)
class WeightShape:
    """The sizes that a grad_weight schedule depends on; see GatherShape. ``image`` is the size of grad_output."""

    channels: int
    batch: int
    image: Sizes
    kernel: Sizes
    reach: Sizes
    step: Sizes
    multiplier: int


def weight_tile(shape: WeightShape, channels_last: bool, machine: Machine) -> WeightTile:
    (width, height, _), kernel, multiplier = shape.image, shape.kernel, shape.multiplier
    room = machine.registers * 5 // 8
    if channels_last:
        lanes, block = _channel_block(shape.channels, shape.reach, shape.step, shape.image, machine)
        room = max(1, room // multiplier)
    else:
        lanes, block = _row_lanes(width, machine), 1
    taps_x = _least_waste(kernel[0], list(range(1, min(room, 9) + 1)), 1.0)
    taps_y = _least_waste(kernel[1], list(range(1, max(1, room // taps_x) + 1)), 0.2)
    taps = taps_x * taps_y * (multiplier if channels_last else 1)
    if channels_last:
        columns = _least_waste(width, [run for run in (1, 2, 4, 7) if run == 1 or run * taps <= _BODY], 0.5)
        return WeightTile(lanes, block, taps_x, taps_y, columns, 1)
    # The body is compiled twice, for whole vectors and for the row's end.
    rows = _least_waste(height, [run for run in (1, 2, 4) if run == 1 or run * taps <= _BODY // 3], 0.5)
    return WeightTile(lanes, block, taps_x, taps_y, 1, rows)


@dataclass(frozen=True)
class WeightBoxes:
    """The walk of a grad_weight kernel, in arguments: box size in pixels, and what one chunk adds up."""

    box_x: int
    box_y: int
    tiles_per_chunk: int
    images_per_chunk: int
    chunks_y: int
    chunks_n: int


def weight_boxes(shape: WeightShape, tile: WeightTile, channels_last: bool, machine: Machine) -> WeightBoxes:
    unit = tile.columns if channels_last else tile.lanes
    counts = [ceil_div(shape.image[0], unit), ceil_div(shape.image[1], tile.rows), 1]
    steps = [shape.step[0] * unit, shape.step[1] * tile.rows, 1]
    box_x, box_y, _ = _fit_box(counts, steps, shape.reach, 4 * tile.block, machine.l2_bytes // 2)
    box_x, box_y = box_x * unit, box_y * tile.rows
    wanted = ceil_div(_CHUNKS, ceil_div(shape.channels, tile.block))
    images = max(1, shape.batch // wanted)
    chunks_n = ceil_div(shape.batch, images)
    tiles_y = ceil_div(shape.image[1], box_y)
    tiles = max(1, tiles_y * chunks_n // wanted)
    return WeightBoxes(box_x, box_y, tiles, images, ceil_div(tiles_y, tiles), chunks_n)
