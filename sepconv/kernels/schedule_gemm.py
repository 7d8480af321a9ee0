"""Loop sizes of the kernels that multiply matrices: pointwise, separable and stem convolution.

Their inner loop keeps a tile of the result in registers: ``vectors`` registers wide and ``scalars`` deep. Every step
of the sum loads ``vectors`` vectors and ``scalars`` broadcast numbers and makes ``vectors * scalars`` multiply-adds.
All sizes follow from the machine's vector length, register count and caches.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from sepconv.kernels.machine import Machine

# Two multiply-add units of four cycles latency need 8 independent sums; 14 leave slack, and more only make tails worse.
_LEAST_SUMS = 8
_ENOUGH_SUMS = 14
# A vector of half the length does its work in more instructions; it must save this factor elsewhere to be chosen.
_HALF_VECTOR_COST = 1.2
# Share of the time of a multiply-add that a load beside it costs.
_LOAD_COST = 0.125
# Handing work to the thread pool a second time, as a share of the kernel's time.
_SECOND_LOOP_COST = 1.05


class Tile(NamedTuple):
    """A block of the result held in registers: ``vectors`` of ``lanes`` numbers by ``scalars``."""

    lanes: int
    vectors: int
    scalars: int

    @property
    def wide(self) -> int:
        """Numbers along the vectorised dimension."""
        return self.lanes * self.vectors


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _scalars(machine: Machine, vectors: int) -> int:
    """As many as registers allow, one loaded vector each and one broadcast number kept beside the sums."""
    return min((machine.registers - vectors - 1) // vectors, -(-_ENOUGH_SUMS // vectors))


def _tile_cost(tile: Tile, machine: Machine, wide: int) -> float:
    """Relative time per useful multiply-add: what the tile computes beyond ``wide``, and its loads."""
    loads = (tile.vectors + tile.scalars) / (tile.vectors * tile.scalars)
    halves = _HALF_VECTOR_COST if tile.lanes < machine.lanes else 1.0
    return _round_up(wide, tile.wide) / wide * halves * (1.0 + _LOAD_COST * loads)


@lru_cache(maxsize=1024)
def gemm_tile(machine: Machine, wide: int) -> Tile:
    """The register tile for a result that is ``wide`` numbers long in its vectorised dimension."""
    tiles = [
        Tile(lanes, vectors, _scalars(machine, vectors))
        for lanes in (machine.lanes, max(machine.lanes // 2, 4))
        for vectors in (2, 3, 4, 1)
        if vectors * _scalars(machine, vectors) >= _LEAST_SUMS
    ]
    return min(tiles, key=lambda tile: _tile_cost(tile, machine, wide))


def fit_scalars(tile: Tile, count: int) -> Tile:
    """The tile, or one scalar less where that wastes less of ``count`` scalars; never more than there are."""
    if count <= tile.scalars:
        return tile._replace(scalars=max(count, 1))
    depths = (tile.scalars, tile.scalars - 1) if tile.scalars > 2 else (tile.scalars,)
    return tile._replace(scalars=min(depths, key=lambda depth: (_round_up(count, depth), -depth)))


class Pointwise(NamedTuple):
    """``chunk``: register tiles of pixels that pass over one block of weights; ``parallel``: pixels or channels."""

    tile: Tile
    chunk: int
    parallel: str


@lru_cache(maxsize=4096)
def pointwise_schedule(
    machine: Machine, channels_last: bool, channels: int, out_channels: int, pixels: int, images: int, threads: int
) -> Pointwise:
    """Pixels in memory order: (N * H * W) of them where channels_last, else H * W in each of ``images``."""
    if channels_last:
        tile = fit_scalars(gemm_tile(machine, out_channels), pixels)
        step, blocks, outer = tile.scalars, -(-out_channels // tile.wide), 1
    else:
        tile = fit_scalars(gemm_tile(machine, pixels), out_channels)
        step, blocks, outer = tile.wide, -(-out_channels // tile.scalars), images
    steps = -(-pixels // step)
    fitting = max(1, machine.l2_bytes // 4 // (4 * channels * step))
    by_pixels = _rounds(outer * -(-steps // min(fitting, -(-steps // threads))), threads)
    by_channels = _rounds(blocks, threads)
    if by_pixels <= by_channels or not channels_last:
        shares = -(-steps // fitting)
        if outer * shares < 4 * threads:
            shares = min(steps, _round_up(shares, threads))
        return Pointwise(tile, -(-steps // shares), "pixels")
    return Pointwise(tile, min(fitting, steps), "channels")


def _rounds(tasks: int, threads: int) -> float:
    """Time of equal tasks on so many threads, over the time if they could be shared out evenly."""
    return _round_up(tasks, threads) / tasks
