"""All numbers of a row made one: by the lanes of vectors, then these in pairs, then what is left of the row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sepconv.kernels.expression import is_nan
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule import machine

Value = Callable[..., Any]


@dataclass(frozen=True)
class Fold:
    """What two numbers of float32 become, and what the fold of no numbers is."""

    start: float
    both: Callable[[Any, Any], Any]

    def nothing(self) -> Any:
        return hl.f32(self.start)


def _larger(a: Any, b: Any) -> Any:
    """The maximum; NaN if one of them is."""
    a, b = (hl.cast(hl.Float(32), number) for number in (a, b))
    return hl.strict_float(hl.select(is_nan(hl, b) | (b > a), b, a))


def _smaller(a: Any, b: Any) -> Any:
    a, b = (hl.cast(hl.Float(32), number) for number in (a, b))
    return hl.strict_float(hl.select(is_nan(hl, b) | (b < a), b, a))


SUM = Fold(0.0, lambda a, b: a + b)
LARGEST = Fold(float("-inf"), _larger)
SMALLEST = Fold(float("inf"), _smaller)
FOLDS = {"sum": SUM, "mean": SUM, "amax": LARGEST, "amin": SMALLEST}


class RowFold:
    """The fold of ``value(i)`` for all i of a row, a Func of the row's place.

    Attributes:
        funcs: what must be computed at each row.
    """

    def __init__(self, name: str, fold: Fold, place: Sequence[Any], sizes: Sequence[Any], value: Value) -> None:
        """``sizes``: of the row, and of further dimensions that are folded with it; ``value`` takes one index each."""
        lanes, (numbers, *more) = machine.host().lanes, sizes
        lane, at = hl.Var("lane"), tuple(place)
        parts, total = hl.Func(f"{name}_parts"), hl.Func(name)
        others = [hl.Range(0, size) for size in more]
        vectors = hl.RDom([hl.Range(0, numbers / lanes), *others], f"{name}_vectors")
        rest = hl.RDom([hl.Range(0, numbers % lanes), *others], f"{name}_rest")
        inside = tuple([lane, *place])
        parts[inside] = fold.nothing()
        first, *beside = _indices(vectors, len(sizes))
        parts[inside] = fold.both(parts[inside], value(lane + lanes * first, *beside))
        halves = _halves(f"{name}_halves", fold, parts, place, lanes)
        total[at] = hl.cast(hl.Float(32), halves[-1][tuple([0, *place])])
        first, *beside = _indices(rest, len(sizes))
        total[at] = fold.both(total[at], value(numbers / lanes * lanes + first, *beside))
        parts.bound_extent(lane, lanes).vectorize(lane).update().vectorize(lane)
        total.update().unscheduled()
        self.value, self.funcs = total[at], [*halves, total]


def _indices(domain: Any, count: int) -> list[Any]:
    return [getattr(domain, name) for name in ("x", "y", "z")[:count]]


def _halves(name: str, fold: Fold, parts: Any, place: Sequence[Any], lanes: int) -> list[Any]:
    """The parts, then half as many lanes, and so on to one."""
    found, lane = [parts], hl.Var("lane")
    while lanes > 1:
        lanes //= 2
        whole, half = found[-1], hl.Func(f"{name}_{lanes}")
        half[tuple([lane, *place])] = fold.both(whole[tuple([lane, *place])], whole[tuple([lane + lanes, *place])])
        found.append(half.bound_extent(lane, lanes).vectorize(lane))
    return found
