"""Benchmark records as tables: one a suite and thread count, a line a case, a column a contender."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from sepconv.report.records import number, records_of, text

OWN = "sepconv"
WRONG = " (wrong)"
"""After the name of a contender that computed something else: its time is shown, and compared with nothing."""

Times = dict[tuple[str, str], dict[str, float]]


def suites(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median times, each contender in its best layout; the faster of ours against the fastest of the others."""
    found: dict[tuple[str, str], Times] = defaultdict(lambda: defaultdict(dict))
    for record in (record for file in files for record in records_of(file)):
        ms, contender = number(record.get("median_ms")), text(record.get("contender"))
        if ms is None or ms <= 0:
            continue
        contender += "" if is_right(record) else WRONG
        suite = ", ".join([text(record.get("suite")), *other_precision(record)])
        times = found[suite, text(record.get("threads"))]
        row = times[text(record.get("case")), text(record.get("pass"))]
        row[contender] = min(ms, row.get(contender, ms))
    return [_table(suite, threads, times) for (suite, threads), times in found.items()]


def is_right(record: dict[str, Any]) -> bool:
    error = number(record.get("max_error"))
    return error is None or error <= 1


def other_precision(record: dict[str, Any]) -> list[str]:
    """In which a network was computed, where it is not float32."""
    precision = text(record.get("precision"))
    return [precision] if precision not in ("", "float32") else []


def _table(suite: str, threads: str, times: Times) -> dict[str, Any]:
    contenders = list(dict.fromkeys(contender for row in times.values() for contender in row))
    rows: list[dict[str, Any]] = [
        {
            "case": case,
            "pass": pass_.replace("_", " "),
            "times": [row.get(contender) for contender in contenders],
            "fastest": min((ms for contender, ms in row.items() if not contender.endswith(WRONG)), default=None),
            "gain": _gain(row),
        }
        for (case, pass_), row in times.items()
    ]
    gains = [row["gain"] for row in rows if row["gain"] is not None]
    return {
        "suite": suite,
        "threads": threads,
        "contenders": contenders,
        "rows": rows,
        "passes": len({row["pass"] for row in rows}) > 1,
        "compared": len(gains),
        "won": sum(gain > 1 for gain in gains),
        "mean": statistics.geometric_mean(gains) if gains else None,
    }


def _gain(row: dict[str, float]) -> float | None:
    """How many times as long the fastest of the others takes."""
    own = [ms for contender, ms in row.items() if contender.startswith(OWN)]
    others = [ms for contender, ms in row.items() if not contender.startswith(OWN) and not contender.endswith(WRONG)]
    return min(others) / min(own) if own and others else None
