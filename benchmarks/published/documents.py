"""Records -> the table of docs/conversion.md. Rows whose record does not exist yet are left out."""

from __future__ import annotations

from typing import Any

from benchmarks import record
from sepconv.bench.tables import Table

_BUDGETS = {1 / 2: "1/2", 1 / 4: "1/4", 1 / 8: "1/8"}
_LAYOUTS = ("torch-nchw", "torch-nhwc")


def table() -> str:
    """One line per network, budget and form."""
    found = [record.read(path.stem) for path in sorted(record.RESULTS.glob("published-*.json"))]
    # Networks in the order of their names, mild budgets first.
    found.sort(key=lambda one: (one["title"], -one["budget"], one["form"]))
    rows = [_row(one, first=i == 0 or found[i - 1]["title"] != one["title"]) for i, one in enumerate(found)]
    header = ["network", "conv weights that may remain", "form", "conv weights", "multiply-adds", "score, original"]
    header += ["converted", "squared error / variance", "ms PyTorch, original", "sepconv, original"]
    return str(Table([*header, "sepconv, converted", "core-minutes"], rows)) if rows else ""


def _row(one: dict[str, Any], first: bool) -> list[str]:
    old, new, ms = one["original"], one["converted"], one["ms"]
    eager = min(ms[f"original, {layout}"] for layout in _LAYOUTS if f"original, {layout}" in ms)
    score = f"{{:.2f}} {one['unit']}" if one["unit"] == "dB" else f"{{:.2%}} {one['unit']}"
    return [
        f"{one['title']} ({one['package']})" if first else "",
        _BUDGETS[one["budget"]],
        one["form"],
        f"1/{old['conv_params'] / new['conv_params']:.2f}",
        f"1/{old['macs'] / new['macs']:.2f}",
        score.format(old["score"]),
        score.format(new["score"]),
        f"{one['relative_error']:.2g}",
        f"{eager:.2f}",
        f"{ms['original, sepconv']:.2f}",
        f"{ms['converted, sepconv']:.2f}",
        f"{one['core_seconds'] / 60:.1f}",
    ]
