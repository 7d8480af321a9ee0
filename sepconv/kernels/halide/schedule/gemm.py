"""Loop sizes of the kernels that multiply matrices: pointwise, separable and stem convolution.

Their inner loop keeps a tile of the result in registers: ``vectors`` registers wide and ``scalars`` deep. Every step
of the sum loads ``vectors`` vectors and ``scalars`` broadcast numbers and makes ``vectors * scalars`` multiply-adds.
All sizes follow from the machine's vector length, register count and caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from sepconv.kernels.halide.schedule.machine import Machine

# Two multiply-add units of four cycles latency need 8 independent sums and some slack. From 14 on, more sums only save
# loads, which show where both units take whole AVX-512 vectors.
_LEAST_SUMS = 10
_ENOUGH_SUMS = 14
_STEM_SUMS = 16
# Every scalar has an address of its own, in one of about sixteen registers that are used for more than that.
_MOST_POINTERS = 12
# Time of a load over that of a multiply-add, as far as it shows: a vector from L1, a vector from L2 (of a broadcast
# number the machine says it). Between what sweeps over tiles and MobileNet layers say on Zen 4, which makes one
# multiply-add of 512 bits at a time, and on Granite Rapids, which makes two.
_L1_LOAD_COST = 0.2
_L2_LOAD_COST = 0.5
# Time to fetch a weight from beyond L2 once more, over that of a multiply-add. Measured on Zen 3, where the 7x7 layers
# of MobileNet v1 take 0.87 of the time with all rows at once instead of six and one.
_FETCH_COST = 5.0
# Share of L2 that a tile of depthwise results and the input under it take beside the weights: of larger ones the input
# pushes the weights out, and comes from memory in bursts while nothing is multiplied (up to 18 % on Granite Rapids).
_TILE_SHARE = 6
# A tile other than the usual one means one more kernel to compile; it must save this factor to be chosen.
_NEW_KERNEL_COST = 1.06
# Time where threads share out output channels, over that where they share out pixels: each core reads all of the input,
# some of which another has just written (Granite Rapids: 1.1 to 1.4).
_SHARED_CHANNELS_COST = 1.2
# A call more for the rows that are left over, as a share of the kernel's time.
_SECOND_CALL_COST = 1.02
# Of a product by lanes: registers beside the sums, one of each scalar, and the weights of one term.
_SPARE_REGISTERS = 3
# Neighbouring pixels that share the loads of a depthwise filter, where taps come from memory as well as where there are
# registers for them.
_COLUMNS = 4
# More rows at a time gain nothing: the weights are used for thousands of pixels by then.
_MOST_ROWS = 32


# Channels of a run that is worth being read beside others.
_LEAST_RUN = 64


class Tile(NamedTuple):
    """A block of the result held in registers: ``vectors`` of ``lanes`` numbers by ``scalars``.

    ``terms``: so many numbers of each scalar are loaded at a time, where a multiply-add takes any one of them.
    """

    lanes: int
    vectors: int
    scalars: int
    terms: int = 1

    @property
    def wide(self) -> int:
        """Numbers along the vectorised dimension."""
        return self.lanes * self.vectors

    @property
    def panels(self) -> tuple[int, int]:
        """How weights along the vectorised dimension are packed: channels in a panel, and in a block of panels.

        In one panel vectors are loaded in pairs; several runs of memory are for processors that fetch along each.
        """
        return self.lanes if self.terms == 1 else self.wide, self.wide


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def terms_together(machine: Machine, channels: int) -> int:
    """Numbers of each scalar that are loaded at a time for sums over so many channels (see ``Tile.terms``)."""
    return machine.lanes if machine.multiplies_by_lane and channels % machine.lanes == 0 else 1


def _scalars(machine: Machine, vectors: int, terms: int) -> list[int]:
    """Enough of them, and as many as registers allow, one loaded vector each and one broadcast number kept beside."""
    if terms > 1:
        return [(machine.registers - vectors - _SPARE_REGISTERS) // (vectors + 1)]
    registers, enough = (machine.registers - vectors - 1) // vectors, -(-_ENOUGH_SUMS // vectors)
    return sorted({min(registers, enough), min(registers, max(enough, _MOST_POINTERS))})


def _tile_cost(tile: Tile, machine: Machine, wide: int, depth: int) -> float:
    """Relative time per useful multiply-add: what the tile computes beyond ``wide``, and its loads."""
    block_bytes = 4 * tile.wide * depth
    vector_load = _L1_LOAD_COST if block_bytes <= machine.l1_bytes else _L2_LOAD_COST
    loads = vector_load / tile.scalars + machine.broadcast_cost / (tile.vectors * tile.terms)
    halves = machine.half_vector_cost if tile.lanes < machine.lanes else 1.0
    return round_up(wide, tile.wide) / wide * halves * (1.0 + loads)


def _tiles(machine: Machine, terms: int) -> list[Tile]:
    """The register tiles that keep the multiply-add units busy."""
    return [
        Tile(lanes, vectors, scalars, terms)
        for lanes in (machine.lanes, machine.lanes // 2)
        for vectors in (2, 3, 4, 1)
        for scalars in _scalars(machine, vectors, terms)
        if lanes >= 4 and vectors * scalars >= _LEAST_SUMS
    ]


@lru_cache(maxsize=1024)
def gemm_tile(machine: Machine, wide: int, depth: int, most_sums: int = 32, terms: int = 1) -> Tile:
    """The register tile for sums of ``depth`` terms, ``wide`` of them along the vectorised dimension."""
    tiles = [tile for tile in _tiles(machine, terms) if tile.vectors * tile.scalars <= most_sums]
    return min(tiles, key=lambda tile: _tile_cost(tile, machine, wide, depth))


def _shallower(tile: Tile) -> Tile:
    """One scalar less, where that leaves enough sums."""
    fewer = tile._replace(scalars=tile.scalars - 1)
    return fewer if fewer.vectors * fewer.scalars >= _LEAST_SUMS else tile


def fit_scalars(tile: Tile, count: int) -> Tile:
    """The tile, or one scalar less where that wastes less of ``count`` scalars; never more than there are."""
    if count <= tile.scalars:
        return tile._replace(scalars=max(count, 1))
    return min(
        (tile, _shallower(tile)), key=lambda fit: round_up(count, fit.scalars) * (1 + _L1_LOAD_COST / fit.scalars)
    )


@lru_cache(maxsize=1024)
def streams(machine: Machine, channels: int, length: int) -> int:
    """Into how many runs a sum over the channels is cut, which are then read side by side; ``length`` sums.

    Large weights come from beyond L2. A processor fetches ahead along every run of memory on its own, so that several
    bring more in time (Granite Rapids: 0.92 to 0.96 of the time); small weights and short runs gain nothing. The order
    of the sum depends on the weights' size alone, so that the result of an image does not on how many there are.
    """
    if machine.multiplies_by_lane or 4 * channels * length < machine.l2_bytes // 4:
        return 1
    return next((count for count in (4, 2) if channels % count == 0 and channels // count >= _LEAST_RUN), 1)


class PointwiseSchedule(NamedTuple):
    """``chunk``: register tiles of pixels that pass over one block of weights; ``parallel``: pixels or channels."""

    tile: Tile
    chunk: int
    parallel: str


@lru_cache(maxsize=4096)
def pointwise_schedule(
    machine: Machine, channels_last: bool, channels: int, out_channels: int, pixels: int, images: int, threads: int
) -> PointwiseSchedule:
    """Pixels in memory order: (N * H * W) of them where channels_last, else H * W in each of ``images``."""
    if channels_last:
        terms = terms_together(machine, channels)
        tile = fit_scalars(gemm_tile(machine, out_channels, channels, terms=terms), pixels)
        step, blocks, outer = tile.scalars, -(-out_channels // tile.wide), 1
    else:
        tile = fit_scalars(gemm_tile(machine, pixels, channels), out_channels)
        step, blocks, outer = tile.wide, -(-out_channels // tile.scalars), images
    steps = -(-pixels // step)
    fitting = max(1, machine.l2_bytes // 4 // (4 * channels * step))
    shares = -(-steps // fitting)
    if outer % threads:
        shares = min(steps, round_up(shares, threads))
    chunk = -(-steps // shares)
    by_channels = _SHARED_CHANNELS_COST * rounds(blocks, threads)
    if channels_last and by_channels < rounds(outer * -(-steps // chunk), threads):
        return PointwiseSchedule(tile, min(fitting, steps), "channels")
    return PointwiseSchedule(tile, chunk, "pixels")


def pointwise_alternatives(
    machine: Machine, channels_last: bool, usual: PointwiseSchedule, count: int
) -> Iterator[PointwiseSchedule]:
    """Schedules near the usual one, that the tuner tries. ``count``: pixels where channels_last, else channels."""
    for tile in _near(machine, usual.tile):
        if tile.scalars <= count:
            for chunk in dict.fromkeys((usual.chunk, max(1, usual.chunk // 2), usual.chunk * 2)):
                yield PointwiseSchedule(tile, chunk, usual.parallel)


def _near(machine: Machine, usual: Tile) -> list[Tile]:
    """The usual register tile, and all that keep the multiply-add units busy."""
    tiles = _tiles(machine, usual.terms)
    return list(dict.fromkeys([usual, *(fit for tile in tiles for fit in (tile, _shallower(tile)))]))


def rounds(tasks: int, threads: int) -> float:
    """Time of equal tasks on so many threads, over the time if they could be shared out evenly."""
    return round_up(tasks, threads) / tasks


class SeparableSchedule(NamedTuple):
    """How the separable kernel walks over an image.

    ``rows`` output rows at a time are filtered and multiplied; ``columns`` neighbouring pixels share their loads in
    the depthwise loop, whose vectors hold ``depthwise_lanes`` channels; ``parallel`` is rows or channels.
    """

    tile: Tile
    rows: int
    columns: int
    depthwise_lanes: int
    parallel: str


def channel_lanes(machine: Machine, channels: int) -> int:
    """Lanes of a vector along the channels: shorter ones where fewer of them are wasted on the last vector."""
    lengths = [n for n in (64, 32, 16, 8, 4, 2, 1) if n <= min(machine.lanes, channels)]
    return min(lengths, key=lambda n: round_up(channels, n) * machine.half_vector_cost ** lengths.index(n))


def copied_together(machine: Machine, channels: int) -> int:
    """Vectors of channels that are copied at a time where the input of a tile is; 0 where it is read in place.

    Where loads take instructions of their own, a copy with zeros around it saves more of them at the edges and in the
    addresses than it takes (see ``multiplies_by_lane``); others read what a multiply-add needs from where it is.
    """
    if terms_together(machine, channels) == 1:
        return 0
    return next(count for count in (4, 2, 1) if channels % (count * machine.lanes) == 0)


def _price(tile: Tile, usual: Tile, machine: Machine, wide: int, depth: int) -> float:
    """The tile's cost, and some more for one that makes another kernel than the usual."""
    return _tile_cost(tile, machine, wide, depth) * (1.0 if tile == usual else _NEW_KERNEL_COST)


@lru_cache(maxsize=1024)
def _priced(machine: Machine, wide: int, depth: int, terms: int) -> list[tuple[float, Tile]]:
    """All tiles that keep the multiply-add units busy, the cheapest first."""
    usual = gemm_tile(machine, wide, depth, terms=terms)
    tiles = dict.fromkeys(fit for tile in _tiles(machine, terms) for fit in (tile, _shallower(tile)))
    return sorted((_price(tile, usual, machine, wide, depth), tile) for tile in tiles)


@lru_cache(maxsize=4096)
def separable_schedule(
    machine: Machine,
    channels: int,
    multiplier: int,
    out_channels: int,
    images: int,
    size: tuple[int, int],
    step: int,
    threads: int,
) -> SeparableSchedule:
    """``size`` is the output's (Ho, Wo), for each pixel of which the image has ``step``.

    A tile of depthwise results, rows * Wo * C * M numbers, and the input under it take a small part of L2, in which the
    weights lie too; where there is no room for all of these they are fetched again for every tile, whose results may
    then be as large as L2 allows. Within that, the best number of rows keeps threads equally busy, fills register tiles
    and uses the weights for many pixels.
    """
    height, width = size
    depth, terms = channels * multiplier, terms_together(machine, channels)
    usual = gemm_tile(machine, out_channels, depth, terms=terms)
    fits = 4 * depth * out_channels <= machine.l2_bytes // 2
    row, under = 4 * depth * width, 4 * channels * width * step
    most = machine.l2_bytes // _TILE_SHARE // (row + under) if fits else machine.l2_bytes * 4 // 5 // row
    most = min(height, _MOST_ROWS, max(1, most))
    fetched = 0.0 if fits else _FETCH_COST

    def cost(price: float, tile: Tile, rows: int, images: int, threads: int) -> float:
        walk = _rows_cost(rows, height, width, images, threads, tile)
        return price * walk * (1.0 + fetched * -(-height // rows) / (height * width))

    small = fit_scalars(usual, width)
    of_small = _price(small, usual, machine, out_channels, depth)
    best = cost(of_small, small, 1, images, threads), small, -1
    for price, tile in _priced(machine, out_channels, depth, terms):
        if price > best[0]:
            break  # the other factors are at least 1
        for rows in range(1, most + 1):
            if tile.scalars <= rows * width and (height % rows == 0 or tile.scalars <= height % rows * width):
                best = min(best, (cost(price, tile, rows, images, threads), tile, -rows))
    least, tile, rows = best[0], best[1], -best[2]
    parallel = "rows"
    if threads > 1 and images == 1:
        whole = fit_scalars(usual, height * width)
        price = _price(whole, usual, machine, out_channels, depth)
        shared = (
            cost(price, whole, height, 1, 1) * _SHARED_CHANNELS_COST * rounds(-(-out_channels // whole.wide), threads)
        )
        if shared < least:
            tile, rows, parallel = whole, height, "channels"
    return SeparableSchedule(tile, rows, _COLUMNS, channel_lanes(machine, channels), parallel)


def separable_alternatives(
    machine: Machine, usual: SeparableSchedule, size: tuple[int, int]
) -> Iterator[SeparableSchedule]:
    """Schedules near the usual one, that the tuner tries; ``size`` is the output's."""
    height, width = size
    rows = dict.fromkeys((usual.rows, max(1, usual.rows // 2), min(height, usual.rows * 2)))
    for tile in _near(machine, usual.tile):
        for count in rows if usual.parallel == "rows" else (usual.rows,):
            if tile.scalars <= count * width and (height % count == 0 or tile.scalars <= height % count * width):
                yield usual._replace(tile=tile, rows=count)
    for columns in (1, 2, 4, 8):
        if columns != usual.columns:
            yield usual._replace(columns=columns)


def _rows_cost(rows: int, height: int, width: int, images: int, threads: int, tile: Tile) -> float:
    """Relative time with tiles of so many rows; the rows left over make one more, smaller tile of each image."""
    tiles, left = divmod(height, rows)
    busy = round_up(images * tiles, threads) * round_up(rows * width, tile.scalars)
    busy += round_up(images, threads) * round_up(left * width, tile.scalars)
    return busy / (images * height * width) * (_SECOND_CALL_COST if left else 1.0)


class StemSchedule(NamedTuple):
    """``rows`` output rows at a time, for which the padded input rows are copied into the cache."""

    tile: Tile
    rows: int


@lru_cache(maxsize=4096)
def stem_schedule(
    machine: Machine,
    depth: int,
    out_channels: int,
    images: int,
    size: tuple[int, int],
    row_bytes: int,
    threads: int,
) -> StemSchedule:
    """``depth`` terms in each sum; ``size`` is the output's (Ho, Wo); ``row_bytes`` of input for each output row."""
    height, width = size
    # Several terms in straight-line code need registers as well.
    tile = fit_scalars(gemm_tile(machine, out_channels, depth, _STEM_SUMS), width)
    most = max(1, min(height, machine.l1_bytes // 2 // row_bytes))
    tasks = -(-height // most)
    if images * tasks < 4 * threads:
        tasks = min(height, -(-4 * threads // images))
    return StemSchedule(tile, -(-height // tasks))
