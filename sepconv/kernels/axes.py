"""Cases of operations along some dimensions of a tensor of any rank: reductions, softmax, numbers from other places,
and products of two matrices.

A kernel that was prepared for one is called with x (and the other matrix), and with scales where ``Case`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sepconv.kernels.case import NO_WEIGHT, Case, Geometry, Given, Outline

Places = tuple[int, ...]

REDUCTIONS = ("sum", "mean", "amax", "amin")
SOFTMAXES = ("softmax", "log_softmax")


class ReduceDetail(NamedTuple):
    """``what``: one of ``REDUCTIONS``; ``dims``: over which dimensions, none of them negative."""

    what: str
    dims: Places


class GatherDetail(NamedTuple):
    """Along each dimension of the result the place in x that each number is from: -1 for ``value``; None where it is
    the same place."""

    places: tuple[Places | None, ...]
    value: float = 0.0

    @property
    def moves(self) -> bool:
        """Whether every number of the result is one of x."""
        return all(-1 not in places for places in self.places if places is not None)


def reduce(x: Given, out: Given, detail: ReduceDetail) -> Case:
    """All numbers along some dimensions made one; ``out`` has these dimensions with size 1, or does not have them."""
    return _case("reduce", x, out, detail)


def softmax(x: Given, out: Given, kind: str) -> Case:
    """``kind`` is one of ``SOFTMAXES``, along the last dimension."""
    return _case("softmax", x, out, kind)


def gather(x: Given, out: Given, detail: GatherDetail) -> Case:
    """Numbers from other places: padding, turning, choosing."""
    return _case("gather", x, out, detail)


def product(x: Given, other: Given, out: Given) -> Case:
    """Matrices (B, M, K) by such of (B, K, N)."""
    image = Outline.of(x)
    return Case("product", image, NO_WEIGHT, Outline.of(out), Geometry.of_pixels(1), others=(Outline.of(other),))


def _case(op: str, x: Given, out: Given, detail: ReduceDetail | GatherDetail | str) -> Case:
    result = Outline.of(out)
    return Case(op, Outline.of(x), NO_WEIGHT, result, Geometry.of_pixels(max(result.dims, 0)), detail=detail)


def kept(shape: Sequence[int], dims: Sequence[int]) -> list[int]:
    """The dimensions that a reduction leaves."""
    return [d for d in range(len(shape)) if d not in dims]
