"""What was measured, from the committed records: the tables, and the demo's report as a page of its own."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

from sepconv.report.page import render
from sepconv.report.records import Run

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RUNS = {
    "digits-demo.json": "The demo: scikit-learn's digits",
    "cifar10-convert.json": "CIFAR-10 (a JPEG copy)",
}


def page() -> str:
    """Conversions, then benchmarks/README.md, whose tables a test compares with the records."""
    table = runpy.run_path(str(BENCHMARKS / "update_tables.py"))["before_and_after"]
    parts = [
        "# Results",
        "",
        "Every number is from a record under `benchmarks/results/`; how each is made again is below.",
    ]
    for file, title in RUNS.items():
        if (BENCHMARKS / "results" / file).exists():
            record = json.loads((BENCHMARKS / "results" / file).read_text())
            parts += ["", f"## {title}", "", table(record), f"`{record['command']}`, {_machine(record)}."]
    parts += [
        "",
        "The first of them as the page that `sepconv demo` writes: [report of the demo](demo-report.html).",
        "",
    ]
    details = re.sub(r"^# .*\n", "## Benchmarks\n", (BENCHMARKS / "README.md").read_text(), count=1)
    return "\n".join([*parts, re.sub(r"^## (?!Benchmarks$)", "### ", details, flags=re.MULTILINE)])


def _machine(record: dict[str, object]) -> str:
    machine = record["machine"]
    assert isinstance(machine, dict)
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['features']}"


def demo_report() -> str:
    return render(Run(json.loads((BENCHMARKS / "results" / "digits-demo.json").read_text())))
