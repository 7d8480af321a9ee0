"""Where lines, points and ticks of a chart stand; the template draws them as SVG.

Written here because a page must stand alone, small, in both colour schemes and for screen readers: libraries that draw
bring a script of megabytes or fixed pictures. A drawing is 420 units wide, so that its text stays readable when a
phone shows it on 350 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 20, 36

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """The range of one direction of a chart, and its ticks as (position, label)."""

    low: float
    high: float
    label: str
    logarithmic: bool = False
    ticks: list[tuple[float, str]] = field(default_factory=list)

    def share(self, value: float) -> float:
        """Where a value stands between low (0) and high (1)."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Series:
    """One line, or one set of points, in drawing units.

    Attributes:
        style: class name of the template's styles: "normal" or "separable" with "line", "dashed", "dots" or "roof".
        marks: (x, y, what the point says).
    """

    name: str
    style: str
    line: str
    marks: list[tuple[float, float, str]]

    @property
    def middle(self) -> Point:
        """Where the name of a straight line stands."""
        ends = [[float(unit) for unit in point.split(",")] for point in self.line.split(" ")]
        return (ends[0][0] + ends[-1][0]) / 2, (ends[0][1] + ends[-1][1]) / 2


@dataclass(frozen=True)
class Chart:
    title: str
    x: Axis
    y: Axis
    series: list[Series]
    dividers: list[tuple[float, str]] = field(default_factory=list)
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def linear(values: Sequence[float], label: str, zero: bool = False, whole: bool = False) -> Axis:
    """An axis over the values with about five round ticks, from 0 where `zero`; `whole`: no tick between integers."""
    low, high = min(values), max(values)
    low = min(low, 0.0) if zero else low
    if high - low < 1e-12 * max(abs(high), 1e-12):
        low, high = low - 0.5, high + 0.5
    step = _round_step((high - low) / 5)
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    numbers = [round(i * step, 12) for i in range(first, last + 1)]
    if whole:
        return _with_ticks(Axis(low, high, label), [n for n in numbers if low <= n <= high])
    return _with_ticks(Axis(numbers[0], numbers[-1], label), numbers)


def logarithmic(values: Sequence[float], label: str) -> Axis:
    """An axis over positive values whose ticks are powers of ten, or of two where there are few of those."""
    low, high = min(values), max(values)
    base = 10.0 if high / low > 300 else 2.0
    first, last = math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9)
    last = max(last, first + 1)
    every = max(1, math.ceil((last - first) / 7))
    numbers = [base**i for i in range(first, last + 1)]
    return _with_ticks(Axis(numbers[0], numbers[-1], label, True), numbers[::every])


def across(axis: Axis, value: float) -> float:
    """Drawing unit of a value on a horizontal axis."""
    return round(LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT), 1)


def up(axis: Axis, value: float) -> float:
    """Drawing unit of a value on a vertical axis."""
    return round(HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM), 1)


def series(name: str, style: str, x: Axis, y: Axis, points: Sequence[Point], says: Sequence[str] = ()) -> Series:
    """Points of the two axes as one series; `says` names each point that is to be marked."""
    placed = [(across(x, px), up(y, py)) for px, py in points]
    marks = [(px, py, said) for (px, py), said in zip(placed, says, strict=False)]
    return Series(name, style, " ".join(f"{px:g},{py:g}" for px, py in placed), marks)


def _with_ticks(axis: Axis, numbers: Sequence[float]) -> Axis:
    ticks = [(n, f"{n:g}") for n in numbers]
    return Axis(axis.low, axis.high, axis.label, axis.logarithmic, ticks)


def _round_step(step: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))
