"""Loop sizes of the kernels of bytes: blocks of sums, channels that are filtered together, rows of a tile."""

from __future__ import annotations

from typing import NamedTuple

from sepconv.kernels.halide.schedule.gemm import Tile
from sepconv.kernels.halide.schedule.machine import Machine

# Of shorter sums, or of fewer pixels, tiles are filled and emptied for less than they gain (Granite Rapids).
_LEAST_TERMS, _LEAST_PIXELS = 97, 8
# Outputs and pixels of one block of sums on tiles: these are read again from the first cache.
_TILE_OUTPUTS, _TILE_PIXELS = 128, 128
# Time that a block of sums in registers takes besides its vectors of outputs, over that for one of these.
_BLOCK_COST = 0.6
# Output rows that share what they read.
_MOST_ROWS = 4
# Time for a channel in vectors of so many registers of sums, over that in the widest: narrower ones take more
# instructions.
_VECTOR_COST = {4: 1.0, 2: 1.15, 1: 1.5}
# Sums that are kept in registers, of 32; their filters and what they multiply need some, too.
_SUMS, _MOST_COLUMNS = 12, 4
# Pixels of a tile of a separable convolution: reading the weights takes a small part of multiplying by them.
SEPARABLE_PIXELS = 192
# Numbers that the pixels of a tile of a normal convolution read, and how many pixels there are.
_ROW_NUMBERS, _LEAST_ROW_PIXELS, _MOST_ROW_PIXELS = 1 << 17, 64, 256


def worth_tiles(terms: int, pixels: int) -> bool:
    """Whether sums of so many terms are made faster on tiles than in registers."""
    return terms >= _LEAST_TERMS and pixels >= _LEAST_PIXELS


def on_tiles(outputs: int, pixels: int, rows: int) -> Tile:
    """Sums of so many outputs by so many pixels at a time; a tile has so many ``rows`` of outputs."""
    blocks = -(-outputs // _TILE_OUTPUTS)
    return Tile(rows, -(-outputs // (rows * blocks)), min(_TILE_PIXELS, pixels))


def in_registers(machine: Machine, outputs: int, pixels: int) -> Tile:
    """The same for sums in registers: many vectors share the loads of x; the last block should not be half empty."""
    whole, most = -(-outputs // machine.lanes), 4 if machine.registers == 32 else 2
    vectors = min(range(1, min(most, whole) + 1), key=lambda many: -(-whole // many) * (many + _BLOCK_COST))
    most = 6 if vectors > 2 else 10
    return Tile(machine.lanes, vectors, max(1, min((machine.registers - vectors - 1) // vectors, most, pixels)))


def packs(machine: Machine) -> bool:
    """Whether numbers of 32 bits are packed to bytes two vectors at a time, cutting off what is beyond (AVX2); wider
    machines have an instruction that takes the last byte of each."""
    return machine.lanes == 8


def blocks_together(machine: Machine, row_bytes: int) -> int:
    """Blocks of pixels, with rows of so many bytes, that stay in the cache while all outputs are made of them."""
    return max(1, machine.l1_bytes // 2 // row_bytes)


class FilterTile(NamedTuple):
    """Channels of a vector of bytes and of a block; rows and columns of sums in registers."""

    lanes: int
    block: int
    rows: int
    columns: int


def filter_tile(machine: Machine, channels: int, size: tuple[int, int], rows: int, column_bytes: int) -> FilterTile:
    """``size``: of the result; ``rows``: how many output rows could share what they read; ``column_bytes``: of one
    channel for all columns that are read of these rows."""
    lanes = _lanes(machine, channels)
    vectors, rows = -(-channels // lanes), max(1, min(rows, _MOST_ROWS, size[0]))
    most = max(1, min(channels // lanes, machine.l1_bytes * 5 // 8 // (lanes * column_bytes)))
    many = min(range(1, most + 1), key=lambda n: (-(-vectors // n) * n, -n))
    sums = _SUMS * machine.registers // 32 // (max(1, lanes // machine.lanes) * rows)
    return FilterTile(lanes, many * lanes, rows, max(1, min(sums, _MOST_COLUMNS, size[1])))


def _lanes(machine: Machine, channels: int) -> int:
    """The last vector is shifted to end with the last channel."""
    choices = [
        (-(-channels // (n * machine.lanes)) * n * cost, n * machine.lanes)
        for n, cost in _VECTOR_COST.items()
        if n * machine.lanes <= channels
    ]
    return min(choices)[1] if choices else 1 << (channels.bit_length() - 1)


def row_pixels(terms: int) -> int:
    """Pixels of a tile of a normal convolution with so many terms in a sum."""
    return min(max(_ROW_NUMBERS // terms, _LEAST_ROW_PIXELS), _MOST_ROW_PIXELS)
