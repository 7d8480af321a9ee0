"""The sentences of the page that depend on numbers."""

from __future__ import annotations

from typing import Any

from sepconv.report import formats
from sepconv.report.facts import Comparison
from sepconv.report.records import dicts, mapping, number


def lead(found: list[Comparison], closeness: dict[str, Any]) -> str:
    """What was gained and what it cost, in one sentence; empty without numbers."""
    by_kind = {comparison.name: comparison for comparison in found}
    gains = [
        f"{by_kind[name].change} of {words}"
        for name, words in (
            ("Convolution weights", "the convolution weights"),
            ("Multiplications", "the multiplications"),
        )
        if name in by_kind
    ]
    parts = [f"It now has {' and '.join(gains)}."] if gains else []
    if accuracy := by_kind.get("Accuracy"):
        before, after = formats.percent(accuracy.before), formats.percent(accuracy.after)
        parts.append(f"Accuracy stayed at {after}." if before == after else f"Accuracy went from {before} to {after}.")
    if (error := number(closeness.get("relative_error"))) is not None:
        parts.append(
            f"Its outputs differ from the original's by {formats.figures(error)} of their variance{_more(closeness)}."
        )
    if time := next((c for c in found if c.kind == "milliseconds"), None):
        before, after = formats.milliseconds(time.before), formats.milliseconds(time.after)
        parts.append(f"{time.name}: {before} before, {after} after.")
    return " ".join(parts)


def _more(closeness: dict[str, Any]) -> str:
    """What else is known of the first output for which anything is."""
    for row in dicts(closeness.get("outputs")):
        of = f" of {row['name']}" if row.get("name") else ""
        if (psnr := number(row.get("psnr"))) is not None:
            return f" (PSNR{of} {psnr:.2f} dB)"
        if (same := number(row.get("agreement"))) is not None:
            return f" (the same class{of} for {formats.percent(same)})"
    return ""


def costs(result: dict[str, Any], layers: list[dict[str, Any]], found: list[Comparison]) -> list[tuple[str, str]]:
    """What conversion took: accuracy, changed answers, layers left, time."""
    accuracy = next((c for c in found if c.kind == "percent"), None)
    error = number(mapping(result.get("closeness")).get("relative_error"))
    changed, tested = number(result.get("disagreement_count")), number(result.get("test_images"))
    rows = []
    if accuracy:
        rows.append(("accuracy", accuracy.change))
    if error is not None:
        rows.append(("relative error of the outputs", formats.figures(error)))
    if changed is not None:
        rows.append(("answers that changed", f"{changed}" if tested is None else f"{changed} of {tested}"))
    left = sum(bool(row["reason"]) for row in layers)
    if left:
        rows.append(("layers left as they were", f"{left} of {len(layers)}"))
    if (seconds := number(result.get("seconds"))) is not None:
        rows.append(("time for the whole run", formats.duration(seconds)))
    return rows


STAGES = {
    "original": "the network as it was trained",
    "closed form": "every layer replaced by its nearest separable one, from the weights alone",
    "converted": "the same, fitted to unlabelled images layer by layer; no training yet",
    "calibrated": "the same, fitted to unlabelled images layer by layer; no training yet",
    "distilled": "trained for some epochs to answer as the original does",
}
"""What each stage of a conversion is."""


def stages(rows: list[dict[str, Any]], kept: str) -> list[dict[str, Any]]:
    """The stages with what each of them is, and a remark where the last training cost accuracy and was undone."""
    told: list[dict[str, Any]] = []
    for row in rows:
        said = STAGES.get(row["name"], "")
        if row["name"] == "distilled" and told and _is_better(told[-1], row):
            said += "; here it gained nothing"
            said += " and was undone" if kept == "converted" else ""
        told.append({**row, "words": said})
    return told


def _is_better(row: dict[str, Any], other: dict[str, Any]) -> bool:
    if row["accuracy"] is not None and other["accuracy"] is not None:
        return bool(row["accuracy"] > other["accuracy"])
    return row["error"] is not None and other["error"] is not None and row["error"] < other["error"]


def latencies(rows: list[tuple[str, float | None, float | None]]) -> str:
    """What the contenders of the table of times are, and the surprise that it may hold."""
    known = {name: (before, after) for name, before, after in rows}
    if not known.keys() & {"torch", "sepconv"}:
        return ""
    words = (
        "torch: both networks by PyTorch's own kernels. sepconv: both by sepconv.compile, which computes a depthwise "
        "convolution and the pointwise one behind it in one pass."
    )
    before, after = known.get("torch", (None, None))
    if before and after and after > before:
        words += (
            " With PyTorch's kernels the separable network takes longer than the normal one although it multiplies "
            "less: fewer multiplications save time only where the kernels are made for them."
        )
    return words


def example(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The layer that lost the most weights; empty where none did."""
    known = [row for row in layers if None not in row["params"] and row["kernel"] and row["channels"]]
    best = max(known, key=lambda row: row["params"][0] - row["params"][1], default={})
    if not best or best["params"][0] <= best["params"][1]:
        return {}
    return {**best, "side": 100 * (best["params"][1] / best["params"][0]) ** 0.5}
