"""Write the tables of README.md, benchmarks/README.md and docs from the records under benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import compile_times, sizes
from benchmarks.evidence import documents as evidence
from benchmarks.evidence import verdicts
from sepconv.bench import tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def before_and_after(record: dict[str, Any]) -> str:
    """One conversion: the normal network beside the separable one."""
    normal, separable = record["normal"], record["separable"]
    rows = [
        ("convolution weights", "conv_params", "{:,}"),
        ("parameters", "params", "{:,}"),
        ("multiply-adds", "macs", "{:,}"),
        ("accuracy on test images", "accuracy", "{:.2%}"),
    ]
    lines = ["| | normal | separable |", "| --- | ---: | ---: |"]
    lines += [f"| {title} | {form.format(normal[key])} | {form.format(separable[key])} |" for title, key, form in rows]
    for contender in ("torch", "sepconv"):
        times = [f"{network['latency_ms'][contender]:.3f}" for network in (normal, separable)]
        lines.append(f"| ms an image, {contender}, {normal['threads']} threads | {times[0]} | {times[1]} |")
    stages = ", ".join(
        f"{stage['name']} {stage['accuracy']:.2%} ({stage['seconds']:.0f} s)" for stage in record["stages"]
    )
    return "\n".join(lines) + f"\n\nStages: {stages}.\n"


def _networks(content: dict[str, Any]) -> str:
    """All contenders by thread count, what each needs, and who could not take part."""
    parts = [f"{n} thread(s):\n\n{tables.networks(content, n)}" for n in (1, 2)]
    if content["footprints"]:
        parts.append(f"MobileNet v1, a process each:\n\n{tables.footprints(content)}")
    missing = "; ".join(f"{name}: {reason}" for name, reason in sorted(content["absent"].items()))
    return "\n".join([*parts, f"Absent: {missing or 'none'}.\n"])


def documents() -> dict[Path, str]:
    """The documents as they should be; parts whose record does not exist stay as they are."""
    readme, details = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
    names = ("conversion", "claims", "compile", "kernels")
    conversion, claims, compiled, kernels = (ROOT / "docs" / f"{name}.md" for name in names)
    found = {path: path.read_text() for path in (readme, details, conversion, claims, compiled, kernels)}

    def put(path: Path, name: str, content: str) -> None:
        found[path] = tables.replace_between(found[path], name, "\n" + content + "\n")

    for name, file in (("demo", "digits-demo.json"), ("cifar10", "cifar10-convert.json")):
        if (RESULTS / file).exists():
            put(readme, name, before_and_after(json.loads((RESULTS / file).read_text())))
    if (RESULTS / "ops.json").exists():
        content = tables.read(RESULTS / "ops.json")
        put(readme, "ops", tables.operations_summary(content))
        put(details, "ops", "\n".join(f"{n} thread(s):\n\n{tables.operations(content, n)}" for n in (1, 2)))
    if (RESULTS / "blocks.json").exists():
        content = tables.read(RESULTS / "blocks.json")
        put(readme, "blocks", tables.blocks_summary(content))
        put(details, "blocks", "\n".join(f"{n} thread(s):\n\n{tables.blocks(content, n)}" for n in (1, 2)))
    if (RESULTS / "network.json").exists():
        content = tables.read(RESULTS / "network.json")
        put(readme, "network", tables.networks_summary(content))
        put(compiled, "network", _networks(content))
    if sizes.RECORD.exists():
        put(kernels, "sizes", sizes.table(json.loads(sizes.RECORD.read_text())))
    if compile_times.RECORD.exists():
        put(kernels, "compile_times", compile_times.summary(json.loads(compile_times.RECORD.read_text())))
    put(conversion, "evidence", evidence.conversion())
    put(claims, "claims", verdicts.document())
    return found


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text)
