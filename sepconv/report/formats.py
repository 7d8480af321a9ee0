"""Numbers as people read them: three figures that count, and a dash for what was not measured."""

from __future__ import annotations

import math
from typing import Any

from sepconv.report.records import number

MISSING = "\N{EN DASH}"
MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
SPACE = "\N{NO-BREAK SPACE}"
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def figures(value: Any, digits: int = 3) -> str:
    """A number with so many significant digits, in powers of ten only below 1/10,000.

    Example:
        >>> figures(1234.6), figures(0.0123456), figures(7), figures("7")
        ('1235', '0.0123', '7', '–')
    """
    found = number(value)
    if found is None:
        return MISSING
    if found == 0 or (isinstance(found, int) and abs(found) < 10**digits):
        return f"{found:g}"
    if abs(found) < 1e-4:
        return f"{found:.{digits - 1}e}"
    decimals = digits - 1 - math.floor(math.log10(abs(found)))
    return f"{found:.{max(0, decimals)}f}"


def count(value: Any) -> str:
    """A count with the unit that keeps it short.

    Example:
        >>> print(count(29_294_016), count(864), count(1_000), sep=", ")
        29.3\u00a0M, 864, 1.00\u00a0k
    """
    found = number(value)
    if found is None:
        return MISSING
    for size, unit in _UNITS:
        if abs(found) >= size:
            return figures(found / size) + SPACE + unit
    return figures(found)


def difference(before: float, after: float) -> str:
    """What a number gained or lost.

    Example:
        >>> print(difference(0.5, 0.75), difference(31.25, 30), difference(2, 2), sep=", ")
        +0.250, \N{MINUS SIGN}1.25, 0
    """
    change = after - before
    sign = "+" if change > 0 else MINUS if change < 0 else ""
    return sign + figures(abs(change))


def percent(value: Any) -> str:
    """A fraction in percent, with two decimals as accuracies are compared by.

    Example:
        >>> print(percent(0.9876), percent(1), sep=", ")
        98.76\u00a0%, 100.00\u00a0%
    """
    found = number(value)
    return MISSING if found is None else f"{100 * found:.2f}{SPACE}%"


def milliseconds(value: Any) -> str:
    """A time given in milliseconds, in microseconds where it is short.

    Example:
        >>> print(milliseconds(0.51234), milliseconds(0.0077), sep=", ")
        0.512\u00a0ms, 7.70\u00a0µs
    """
    found = number(value)
    if found is None:
        return MISSING
    return f"{figures(1000 * found)}{SPACE}µs" if 0 < found < 0.1 else f"{figures(found)}{SPACE}ms"


def duration(value: Any) -> str:
    """Seconds, as seconds, minutes or hours.

    Example:
        >>> print(duration(3.21), duration(185), duration(7300), sep=", ")
        3.21\u00a0s, 3\u00a0min 5\u00a0s, 2\u00a0h 1\u00a0min
    """
    found = number(value)
    if found is None:
        return MISSING
    if found < 60:
        return f"{figures(found)}{SPACE}s"
    minutes, seconds = divmod(round(found), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{SPACE}h {minutes}{SPACE}min" if hours else f"{minutes}{SPACE}min {seconds}{SPACE}s"


def share(before: Any, after: Any) -> str:
    """What is left of a quantity, as the fraction 1/n; as n-fold where it grew.

    Example:
        >>> share(90, 10), share(10, 20), share(10, 0)
        ('1/9.0', '2.0×', '–')
    """
    first, second = number(before), number(after)
    if not first or not second or first < 0 or second < 0:
        return MISSING
    ratio = first / second
    return f"1/{_one_decimal(ratio)}" if ratio >= 1 else f"{_one_decimal(1 / ratio)}{TIMES}"


def points(before: Any, after: Any) -> str:
    """The difference of two fractions in percentage points, signed.

    Example:
        >>> print(points(0.983, 0.978), points(0.5, 0.51), points(0.5, 0.5), sep=", ")
        −0.50\u00a0points, +1.00\u00a0points, unchanged
    """
    first, second = number(before), number(after)
    if first is None or second is None:
        return MISSING
    difference = round(100 * (second - first), 2)
    if difference == 0:
        return "unchanged"
    return f"{'+' if difference > 0 else MINUS}{abs(difference):.2f}{SPACE}points"


def _one_decimal(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"
