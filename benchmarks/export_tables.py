"""What `python -m benchmarks.export` found, as tables."""

from __future__ import annotations

from typing import Any


def table(record: dict[str, Any]) -> str:
    rows = record["rows"]
    built = [row for row in rows if "code_bytes" in row]
    parts = [
        f"On {record['machine']['cpu']}, one thread, one image.\n",
        "Bytes; the arena is all memory that a call writes to.\n\n" + _sizes(built),
        "x86, this machine's own level, milliseconds:\n\n" + _against_compile(rows),
        "Instructions of one call, counted by qemu: how much work there is, and no board's time.\n\n"
        + _instructions(rows),
        f"Chromium, milliseconds, onnxruntime-web {record['onnxruntime_web']} with one thread:\n\n" + _browser(rows),
        "Absent: " + "; ".join(f"{what}: {reason}" for what, reason in sorted(record["absent"].items())) + ".\n",
    ]
    return "\n".join(parts)


def _lines(heads: list[str], rows: list[list[str]], words: int) -> str:
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, rule, *rows)) + "\n"


def _sizes(rows: list[dict[str, Any]]) -> str:
    heads = ["network", "numbers", "target", "library", "code", "weights", "arena"]
    keys = ("library_bytes", "code_bytes", "weights_bytes", "arena_bytes")
    return _lines(heads, [[*_named(row), row["target"], *(f"{row[key]:,}" for key in keys)] for row in rows], 3)


def _named(row: dict[str, Any]) -> list[str]:
    return [row["network"], row["precision"]]


def _against_compile(rows: list[dict[str, Any]]) -> str:
    found = [
        [
            *_named(row),
            row["target"],
            *(f"{row[f'{who}_ms']['median_ms']:.3f}" for who in ("library", "compile")),
            f"**{row['over_compile']:.2f}**",
        ]
        for row in rows
        if "over_compile" in row
    ]
    return _lines(["network", "numbers", "target", "library", "compile", "library / compile"], found, 3)


def _instructions(rows: list[dict[str, Any]]) -> str:
    known = {(row["network"], row["precision"], row["target"]): row for row in rows if "instructions" in row}
    found = []
    for (network, precision, target), row in known.items():
        own = known.get((network, precision, "x86-64-linux"))
        ratio = f"{row['instructions'] / own['instructions']:.2f}" if own else ""
        per_mac = f"{row['instructions'] / row['macs']:.3f}"
        found.append([network, precision, target, f"{row['instructions']:,}", per_mac, ratio])
    heads = ["network", "numbers", "target", "instructions", "a multiply-add", "of our own for x86-64 (SSE4.1)"]
    return _lines(heads, found, 3)


def _browser(rows: list[dict[str, Any]]) -> str:
    found = [
        [
            *_named(row),
            row["target"],
            f"{row['chromium']['median_ms']:.2f}",
            f"{row['chromium']['over_ours']:.2f}",
            f"{row['chromium']['error']:.1g}",
        ]
        for row in rows
        if "chromium" in row
    ]
    heads = ["network", "numbers", "computed by", "ms", "over ours with vectors", "relative error"]
    return _lines(heads, found, 3)
