"""Errors of all ranks of a layer from those of a few: a smooth curve, nearly straight on logarithmic axes."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence

LEAST = 1e-300
"""In the place of an error of 0, which has no logarithm."""


def spread(ranks: Sequence[int], count: int) -> list[int]:
    """So many of these rising ranks, with the first and the last, at steps that are about equal as ratios."""
    if len(ranks) <= count:
        return list(ranks)  # also none
    step = math.log(ranks[-1] / ranks[0]) / (count - 1)
    wanted = [math.log(ranks[0]) + step * i for i in range(count)]
    return sorted({min(ranks, key=lambda rank: abs(math.log(rank) - place)) for place in wanted})


def interpolated(known: Mapping[int, float], ranks: Sequence[int]) -> dict[int, float]:
    """The error of each rank, given those of some, the least and the greatest among them."""
    places = sorted(known)
    return {rank: known[rank] if rank in known else _between(known, places, rank) for rank in ranks}


def _between(known: Mapping[int, float], places: Sequence[int], rank: int) -> float:
    after = bisect_left(places, rank)
    low, high = places[after - 1], places[after]
    part = math.log(rank / low) / math.log(high / low)
    before, behind = (math.log(max(LEAST, known[place])) for place in (low, high))
    return math.exp(before + part * (behind - before))
