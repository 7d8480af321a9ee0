"""Results as tables."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import Any

from sepconv.bench.tables import Table
from sepconv.bench.tune import Tuned
from sepconv.cli.console import Screen
from sepconv.cost import Cost
from sepconv.data import Data, SampleData
from sepconv.device import ExportedLibrary
from sepconv.models import BUILT_IN
from sepconv.runs.model_file import FILE
from sepconv.runs.predict import Prediction
from sepconv.system.doctor import PROBE, Diagnosis

NAMES = {"conv_params": "convolution weights", "params": "parameters", "macs": "multiply-adds"}


def notes(screen: Screen, data: Data | SampleData) -> None:
    """What was left out of a data set, and which of its splits serves for what."""
    for note in data.notes:
        screen.say(note)
    if isinstance(data, Data) and data.skipped:
        screen.say(f"Broken images left out: {len(data.skipped)} ({', '.join(data.skipped[:5])})")


def preparation(screen: Screen, data: Data | SampleData) -> None:
    """How the network's images are prepared, and who says so."""
    if isinstance(data, SampleData):
        screen.say(f"Samples as their files have them: {data.calibration(1)}")
        return
    if data.prepared_for:
        screen.say(f"Images as {data.prepared_for} has them:")
    else:
        screen.say(f"Images by the statistics of {data.name}; for others give --mean and --std:")
    for part in data.preprocessing.sentences():
        screen.say(f"  {part}")
    if not data.classes and not data.prepared_for:
        screen.say("  Without classes nothing shows whether the network was trained on such images.")


def before_and_after(screen: Screen, record: dict[str, Any], out: Path) -> None:
    """The main table: the network as it was, as it is, and what changed."""
    before, after = record["normal"], record["separable"]
    rows: list[tuple[str, str, str, str]] = [
        (name, f"{before[key]:,}", f"{after[key]:,}", _factor(before[key], after[key])) for key, name in NAMES.items()
    ]
    if "accuracy" in after:
        points = 100 * (after["accuracy"] - before["accuracy"])
        rows.append(("accuracy", f"{before['accuracy']:.2%}", f"{after['accuracy']:.2%}", f"{points:+.2f} points"))
    rows += [
        (name, f"{old:.4g}", f"{(new := after['metrics'][name]):.4g}", f"{new - old:+.4g}")
        for name, old in before.get("metrics", {}).items()
    ]
    rows += _latency_rows(before, after)
    screen.table(f"{record['model']} on {record['data']}", ("", "normal", "separable", "change"), rows)
    _precisions(screen, record.get("precisions", []))
    what = "image(s)" if "accuracy" in after else "sample(s)"
    if found := record.get("closeness"):
        outputs(screen, found)
    else:
        screen.say(f"Accuracy of {record['test_images']} test images.")
    if after["latency_ms"]:
        screen.say(f"Time of {after['latency_batch']} {what} on {after['threads']} thread(s).")
    onnx = record["onnx"]
    if not onnx["written"]:
        screen.say(f"No model.onnx: {onnx['reason']}")
    if not (live := record.get("live", {"written": True}))["written"]:
        screen.say(f"The page does not run the networks: {live['reason']}")
    files(screen, out, record["model"])


def _precisions(screen: Screen, rows: list[dict[str, Any]]) -> None:
    """The networks in fewer bits, by sepconv.compile."""
    if not rows:
        return
    score = "accuracy" if any("accuracy" in row for row in rows) else "error"
    cells = [
        (
            row["network"],
            row["precision"],
            "" if row["ms"] is None else f"{row['ms']:.3f}",
            "" if row["bytes"] is None else f"{row['bytes']:,}",
            "" if score not in row else f"{row[score]:.2%}" if score == "accuracy" else f"{row[score]:.3g}",
        )
        for row in rows
    ]
    title = "In fewer bits, by sepconv.compile"
    screen.table(title, ("network", "numbers", "milliseconds", "bytes of weights", score), cells, text_columns=2)
    for row in rows:
        if row["reason"]:
            for line in wrap(f"{row['network']} in {row['precision']}: {row['reason']}", 80):
                screen.say(line)


def outputs(screen: Screen, closeness: dict[str, Any]) -> None:
    """How close each output is to that of the original."""
    rows = [
        (
            row["name"] or "the output",
            f"{row['relative_error']:.3g}",
            f"{row['psnr']:.2f} dB" if "psnr" in row else "",
            f"{row['agreement']:.2%}" if "agreement" in row else "",
        )
        for row in closeness["outputs"]
    ]
    screen.table("Outputs, compared with the original's", ("output", "relative error", "PSNR", "same class"), rows)
    screen.say(
        f"Relative error of all outputs on {closeness['samples']} test samples: {closeness['relative_error']:.3g}"
    )


def _latency_rows(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    pairs = {name: (before["latency_ms"][name], after["latency_ms"][name]) for name in after["latency_ms"]}
    return [
        (f"milliseconds, {name}", f"{old:.3f}", f"{new:.3f}", _factor(old, new)) for name, (old, new) in pairs.items()
    ]


def _factor(before: float, after: float) -> str:
    """How many times smaller, or larger."""
    if not before or not after:
        return ""
    return f"1/{before / after:.2f}" if after <= before else f"{after / before:.2f} x"


def tuned(screen: Screen, found: list[Tuned]) -> None:
    """Every kernel that was tuned, and how much faster it became."""
    rows = [
        (
            one.kind,
            one.size,
            str(one.threads),
            f"{one.usual_ms:.4f}",
            f"{one.best_ms:.4f}",
            _factor(one.usual_ms, one.best_ms),
        )
        for one in found
    ]
    screen.table("Kernels, milliseconds", ("kind", "input", "threads", "rules", "best", "change"), rows)


FILES = {
    "report.html": "the page to look at first",
    "model.safetensors": "the network; predict, export and count take this folder",
    "model.onnx": "the same for other runtimes",
    "result.json": "every number of the page",
}


def files(screen: Screen, out: Path, model: str) -> None:
    """Where everything is, what matters most first."""
    screen.say(f"Written to {out}:")
    # A file alone does not choose the code of anybody else's network.
    named = {} if model in BUILT_IN else {FILE: f"the network; opened by {model} --weights {out / FILE}"}
    for name, words in {**FILES, **named}.items():
        if (out / name).exists():
            screen.say(f"  {name:19}{words}")


def stages(screen: Screen, record: dict[str, Any]) -> None:
    of_outputs = record.get("task") == "outputs"
    score, what = ("output error", "samples") if of_outputs else ("accuracy", "images")
    rows = [(stage["name"], _score(stage), f"{stage['seconds']:.1f}") for stage in record["stages"]]
    screen.table("Steps", ("step", score, "seconds"), rows)
    if held := record["held_out_images"]:
        screen.say(f"{score.capitalize()} of {held} {what} held out from conversion and distillation.")
    for note in record["notes"]:
        screen.say(note)
    if record["kept"] != rows[-1][0]:
        screen.say("The distillation ended below its start and was undone: the network is kept as converted.")


def _score(stage: dict[str, Any]) -> str:
    return f"{stage['accuracy']:.2%}" if "accuracy" in stage else f"{stage['error']:.3g}"


def trained(screen: Screen, record: dict[str, Any], out: Path) -> None:
    normal = record["normal"]
    rows = [(name, f"{normal[key]:,}") for key, name in NAMES.items()]
    rows.append(("accuracy", f"{normal['accuracy']:.2%}"))
    screen.table(f"{record['model']} on {record['data']}", ("", "trained"), rows)
    screen.say(f"Accuracy of {record['test_images']} test images.")
    files(screen, out, record["model"])


def cost(screen: Screen, name: str, found: Cost) -> None:
    """Layers with multiply-adds, and the totals."""
    rows = [
        (
            layer.name or "(model)",
            layer.kind,
            "x".join(map(str, layer.output_shape)),
            f"{layer.params:,}",
            f"{layer.macs:,}",
            "" if layer.ratio is None else f"{layer.ratio:.3f}",
        )
        for layer in found.layers
        if layer.macs
    ]
    screen.table(name, ("layer", "kind", "output", "weights", "multiply-adds", "ratio"), rows)
    totals = [
        ("parameters", f"{found.params:,}", f"{found.separable_params:,}"),
        ("multiply-adds", f"{found.macs:,}", f"{found.separable_macs:,}"),
        ("convolution weights", f"{found.conv_params:,}", ""),
        ("bytes moved", f"{found.bytes:,}", ""),
    ]
    screen.table("In all", ("", "as it is", "all separable"), totals)
    screen.say("ratio: multiply-adds of the separable form / of the normal one, for one image.")


def quantized(screen: Screen, record: dict[str, Any]) -> None:
    """The network as it was and in int8, and what stayed in float32."""
    before, after = record["normal"], record["quantized"]
    name = "accuracy" if "accuracy" in after else "error"
    written = "{:.2%}" if name == "accuracy" else "{:.3g}"
    size = _factor(before["bytes_of_weights"], after["bytes_of_weights"])
    rows = [
        ("bytes of weights", f"{before['bytes_of_weights']:,}", f"{after['bytes_of_weights']:,}", size),
        (name, written.format(before[name]), written.format(after[name]), _points(before[name], after[name], name)),
    ]
    screen.table(f"{record['model']} on {record['data']}", ("", "float32", "int8", "change"), rows)
    screen.say(f"{name.capitalize()} of {record['test_images']} test samples.")
    if record["kept"] != record["stages"][-1]["name"]:
        screen.say("The fine-tuning ended below its start and was undone: the network is kept as quantized.")
    stayed_in_float32(screen, record["plan"])


def _points(before: float, after: float, name: str) -> str:
    return f"{100 * (after - before):+.2f} points" if name == "accuracy" else ""


def stayed_in_float32(screen: Screen, plan: dict[str, Any]) -> None:
    for row in plan["layers"]:
        if not row["integers"]:
            screen.say(f"{row['name']} stays in float32: {row['reason']}")


def quantized_beside(screen: Screen, found: dict[str, Any], out: Path) -> None:
    """The quantized network of a conversion, in its folder."""
    if not found["written"]:
        screen.say(f"No int8: {found['reason']}")
        return
    after = found["quantized"]
    score = f"accuracy {after['accuracy']:.2%}" if "accuracy" in after else f"error {after['error']:.3g}"
    screen.say(f"With 8-bit integers: {score}, {after['bytes_of_weights']:,} bytes of weights, in {out / 'int8'}")
    stayed_in_float32(screen, found["plan"])


def library(screen: Screen, found: ExportedLibrary) -> None:
    """A C library that was written."""
    rows = [("code", found.code_bytes), ("weights", found.weights_bytes), ("memory for a call", found.arena_bytes)]
    screen.table(
        f"{found.name} for {found.target} in {found.precision}",
        ("part", "bytes"),
        [(part, f"{count:,}") for part, count in rows],
    )
    if found.checked:
        screen.say(f"{found.checked[0].upper()}{found.checked[1:]}")
    screen.say(f"Written: {found.folder}")


def predictions(screen: Screen, found: list[Prediction]) -> None:
    rows = [
        (prediction.image, prediction.classes[0], f"{prediction.probabilities[0]:.1%}", _others(prediction))
        for prediction in found
    ]
    screen.table("Predictions", ("image", "class", "probability", "else"), rows)


def _others(prediction: Prediction) -> str:
    pairs = zip(prediction.classes[1:], prediction.probabilities[1:], strict=True)
    return ", ".join(f"{name} {probability:.1%}" for name, probability in pairs)


def summary(screen: Screen, title: str, found: Table) -> None:
    """A table that README and docs have as Markdown."""
    screen.table(title, found.header, found.rows)


def diagnosis(screen: Screen, found: Diagnosis) -> None:
    for finding in found.findings:
        screen.say(f"{finding.status:8}{finding.name}: {finding.detail}")
        if finding.remedy:
            screen.say(f"{'':8}{finding.remedy}")
    screen.table("Kernels", ("operation", "runs on"), list(found.kernels.items()), text_columns=2)
    screen.say(f"Kernels for {PROBE}.")
