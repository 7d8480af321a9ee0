"""Means with their spread, and tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of the sample; 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def plus_minus(shares: Sequence[float]) -> str:
    """Mean and standard deviation as percentages.

    Example:
        >>> plus_minus([0.90, 0.92])
        '91.00 ± 1.41 %'
    """
    if len(shares) == 1:
        return percent(shares[0])
    return f"{100 * mean(shares):.2f} ± {100 * deviation(shares):.2f} %"


def difference(better: Sequence[float], worse: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences, seed by seed, and its standard error.

    Example:
        >>> difference([0.5, 0.75], [0.25, 0.25])
        (0.375, 0.125)
    """
    pairs = [b - w for b, w in zip(better, worse, strict=True)]
    return mean(pairs), deviation(pairs) / len(pairs) ** 0.5


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right; nothing where there are no rows."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
