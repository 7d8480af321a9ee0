"""What the records say of each claim, in a table and one line."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from benchmarks.evidence.claims import RECIPES, claims
from benchmarks.evidence.runner import finished, read
from benchmarks.evidence.summary import difference, mean, plus_minus, table
from benchmarks.evidence.teachers import NAMES

LOSS = 0.02
"""Accuracy that may be given up where a claim is about cost."""
SHARE = 0.5
"""Cost that may remain there."""

Rows = list[dict[str, Any]]


def by_variant(record: dict[str, Any]) -> dict[str, Rows]:
    """The rows of each variant, seeds in order."""
    found: dict[str, Rows] = {}
    for row in sorted(record["rows"], key=lambda row: row["seed"]):
        found.setdefault(row["variant"], []).append(row)
    return found


def accuracies(rows: Rows) -> list[float]:
    return [row["accuracy"] for row in rows]


def cheaper(variants: dict[str, Rows]) -> str:
    """Of the first variant and a cheaper second one: what is saved and what it costs."""
    costly, cheap = list(variants.values())[:2]
    weights, macs = (cheap[0][key] / costly[0][key] for key in ("conv_params", "macs"))
    change, error = difference(accuracies(cheap), accuracies(costly))
    holds = weights <= SHARE and macs <= SHARE and change >= -LOSS
    return (
        f"{'confirmed' if holds else 'not confirmed'}: 1/{1 / weights:.1f} of the weights, 1/{1 / macs:.1f} of the "
        f"multiply-adds, accuracy {100 * change:+.2f} ± {100 * error:.2f} points"
    )


def more_accurate(variants: dict[str, Rows]) -> str:
    """Whether the best of the later variants is more accurate than the first, by more than two standard errors."""
    first, *others = variants.values()
    best = max(others, key=lambda rows: mean(accuracies(rows)))
    change, error = difference(accuracies(best), accuracies(first))
    verdict = "confirmed" if change > 2 * error else "refuted" if change < -2 * error else "not confirmed"
    return f"{verdict}: {best[0]['variant']} is {100 * change:+.2f} ± {100 * error:.2f} points from the first row"


def monotone(variants: dict[str, Rows]) -> str:
    """Whether each step up in cost is a step up in accuracy."""
    ordered = sorted(variants.values(), key=lambda rows: rows[0]["macs"])
    means = [mean(accuracies(rows)) for rows in ordered]
    steps = [100 * (b - a) for a, b in pairwise(means)]
    verdict = "confirmed" if min(steps) > 0 else "not confirmed"
    return f"{verdict}: from step to step {', '.join(f'{step:+.2f}' for step in steps)} points"


VERDICTS: dict[str, Callable[[dict[str, Rows]], str]] = {
    "shape": cheaper,
    "weights": more_accurate,
    "reduction": cheaper,
    "stack": more_accurate,
    "width": monotone,
    "resolution": monotone,
}


def claim_table(variants: dict[str, Rows]) -> str:
    rows = [
        [
            name,
            f"{rows[0]['conv_params']:,}",
            f"{rows[0]['macs'] / 1e6:.2f} M",
            plus_minus(accuracies(rows)),
            f"{mean([row['training_cpu_seconds'] for row in rows]):.0f}",
            f"{mean([row['test_cpu_seconds'] for row in rows]):.2f}",
        ]
        for name, rows in variants.items()
    ]
    return table(["network", "conv weights", "multiply-adds", "accuracy", "training, core-s", "test, core-s"], rows)


def document() -> str:
    """The measured part of docs/claims.md."""
    parts = []
    for data in RECIPES:
        for claim in claims(data):
            name = f"claim-{data}-{claim.key}"
            if finished(name):
                variants = by_variant(read(name))
                parts += [f"### {claim.text}\n", f"{NAMES[data]}: **{VERDICTS[claim.key](variants)}**.\n"]
                parts += [claim_table(variants)]
    return "\n".join(parts)
