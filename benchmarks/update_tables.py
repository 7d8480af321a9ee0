"""Write the tables of README.md, benchmarks/README.md and docs from the records under benchmarks/results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import compile_times, conversion_cost, export_tables, quantization, record, sizes
from benchmarks.evidence import documents as evidence
from benchmarks.evidence import speed, verdicts
from benchmarks.published import documents as published
from sepconv.bench import tables, training_tables

ROOT = Path(__file__).parents[1]


def before_and_after(run: dict[str, Any]) -> str:
    """One conversion: the normal network beside the separable one."""
    normal, separable = run["normal"], run["separable"]
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
    stages = ", ".join(f"{stage['name']} {stage['accuracy']:.2%} ({stage['seconds']:.0f} s)" for stage in run["stages"])
    undone = "" if run["kept"] == run["stages"][-1]["name"] else ", undone"
    held_out = run.get("held_out_images")
    of = f", on {held_out:,} images held out from conversion and distillation" if held_out else ""
    return "\n".join(lines) + f"\n\nStages{of}: {stages}{undone}.\n"


def _networks(content: dict[str, Any]) -> str:
    """All contenders by thread count, what each needs, and who could not take part."""
    machine = content["machine"]
    peak = machine["fma_peak_gflops"]["1"]
    parts = [f"On {machine['cpu']}, {peak:.0f} GFLOP/s a thread, code of {content['commit']}.\n"]
    for precision in tables.precisions(content):
        title = "" if precision == "float32" else f", {precision}"
        parts += [f"{n} thread(s){title}:\n\n{tables.networks(content, n, precision)}" for n in (1, 2)]
    if len(tables.precisions(content)) > 1:
        parts += [f"By precision, {n} thread(s):\n\n{tables.shorter(content, n)}" for n in (1, 2)]
        parts.append(f"Answers to 48 images, against float32:\n\n{tables.agreement(content)}")
    if content["footprints"]:
        parts.append(f"MobileNet v1, a process each:\n\n{tables.footprints(content)}")
    missing = "; ".join(f"{name}: {reason}" for name, reason in sorted(content["absent"].items()))
    return "\n".join([*parts, f"Absent: {missing or 'none'}.\n"])


def _zoo(content: dict[str, Any]) -> str:
    """A summary, every network by thread count, and which could not be measured."""
    machine = content["machine"]
    parts = [f"On {machine['cpu']}, code of {content['commit']}.\n", f"{tables.zoo_summary(content)}"]
    parts += [f"{n} thread(s):\n\n{tables.zoo(content, n)}" for n in (1, 2)]
    failed = "; ".join(f"{one['network']}, {one['threads']} thread(s): {one['reason']}" for one in content["failed"])
    return "\n".join([*parts, f"Not measured: {failed or 'none'}.\n"])


def _training(content: dict[str, Any]) -> str:
    """A summary, the parts of a step, and who could not take part."""
    about = f"On {content['machine']['cpu']}, code of {content['commit']}.\n"
    missing = "; ".join(f"{name}: {reason}" for name, reason in sorted(content["absent"].items()))
    parts = [about, f"{training_tables.summary(content)}", f"{training_tables.parts(content)}"]
    return "\n".join([*parts, f"Absent: {missing or 'none'}.\n"])


def documents() -> dict[Path, str]:
    """The documents as they should be; parts whose record does not exist stay as they are."""
    readme, details = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
    names = ("conversion", "claims", "compile", "kernels", "scale", "quantize", "training", "deploy")
    guides = [ROOT / "docs" / f"{name}.md" for name in names]
    conversion, claims, compiled, kernels, scale, integers, trained, deployed = guides
    found = {path: path.read_text() for path in (readme, details, *guides)}

    def put(path: Path, name: str, content: str | tables.Table) -> None:
        found[path] = tables.replace_between(found[path], name, f"\n{content}\n")

    for name, source in (("demo", "digits-demo"), ("cifar10", "cifar10-convert")):
        if record.path(source).exists():
            put(readme, name, before_and_after(record.read(source)))
    if record.path("ops").exists():
        content = tables.read(record.path("ops"))
        put(readme, "ops", tables.operations_summary(content))
        put(details, "ops", "\n".join(f"{n} thread(s):\n\n{tables.operations(content, n)}" for n in (1, 2)))
    if record.path("blocks").exists():
        content = tables.read(record.path("blocks"))
        put(readme, "blocks", tables.blocks_summary(content))
        put(details, "blocks", "\n".join(f"{n} thread(s):\n\n{tables.blocks(content, n)}" for n in (1, 2)))
    for name, summary in (("ops-zen4", tables.operations_summary), ("blocks-zen4", tables.blocks_summary)):
        if record.path(name).exists():
            put(details, name, summary(tables.read(record.path(name))))
    if record.path("evidence-training-speed").exists():
        put(scale, "training-speed", speed.table(record.read("evidence-training-speed")))
    if record.path("network").exists():
        content = tables.read(record.path("network"))
        put(readme, "network", tables.networks_summary(content))
        put(compiled, "network", _networks(content))
    if record.path("zoo").exists():
        content = tables.read(record.path("zoo"))
        put(readme, "zoo", tables.zoo_summary(content))
        put(compiled, "zoo", _zoo(content))
    for name in ("network-precisions", "network-zen4"):
        if record.path(name).exists():
            put(compiled, name, _networks(tables.read(record.path(name))))
    for name, make in ((sizes.NAME, sizes.table), (compile_times.NAME, compile_times.summary)):
        if record.path(name).exists():
            put(kernels, name, make(record.read(name)))
    if record.path("training").exists():
        content = tables.read(record.path("training"))
        put(trained, "training", _training(content))
    if record.path("training-zen3").exists():
        put(trained, "training-zen3", _training(tables.read(record.path("training-zen3"))))
    put(conversion, "evidence", evidence.conversion())
    put(conversion, "published", published.table())
    if record.path(conversion_cost.NAME).exists():
        put(conversion, "conversion-cost", conversion_cost.table(record.read(conversion_cost.NAME)["rows"]))
    if record.path(quantization.NAME).exists():
        put(integers, "quantization", quantization.table(record.read(quantization.NAME)["rows"]))
    if record.path("export").exists():
        put(deployed, "export", export_tables.table(record.read("export")))
    put(claims, "claims", verdicts.document())
    return found


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text)
