"""What the page says, taken from the files of a run: rows, comparisons and charts, ready for the template."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sepconv.report import formats
from sepconv.report.records import dicts, items, mapping, number, records_of, text
from sepconv.report.suites import other_precision

PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}")
MOST_PICTURES = 48
MATRIX_CLASSES = 12
"""Above so many classes the page lists the confusions that occur most instead of drawing matrices."""

MOST_CONFUSIONS = 12


@dataclass(frozen=True)
class Comparison:
    """One quantity of the two networks.

    Attributes:
        kind: how its numbers are written: "count", "percent", "figures" or "milliseconds".
        change: the difference in words, such as "1/8.4".
        notes: what stands under the two numbers, such as the kernels that ran.
    """

    name: str
    kind: str
    before: int | float
    after: int | float
    change: str
    notes: tuple[str, str] = ("", "")

    @property
    def shares(self) -> tuple[float, float]:
        """Lengths of the two bars, in percent; accuracies are drawn from 0 to 100 %."""
        longest = 1 if self.kind == "percent" else max(abs(self.before), abs(self.after)) or 1
        return 100 * abs(self.before) / longest, 100 * abs(self.after) / longest


def comparisons(result: dict[str, Any]) -> list[Comparison]:
    """Weights, multiply-adds, accuracy and latency, as far as both networks have them."""
    normal, separable = mapping(result.get("normal")), mapping(result.get("separable"))
    found = []
    in_all = (_of_all(normal), _of_all(separable))
    for name, key, notes in (("Convolution weights", "conv_params", in_all), ("Multiplications", "macs", ("", ""))):
        before, after = number(normal.get(key)), number(separable.get(key))
        if before is not None and after is not None:
            found.append(Comparison(name, "count", before, after, formats.share(before, after), notes))
    before, after = number(normal.get("accuracy")), number(separable.get("accuracy"))
    if before is not None and after is not None:
        tested = number(result.get("test_images"))
        of = "" if tested is None else f"of {tested} test images"
        found.append(Comparison("Accuracy", "percent", before, after, formats.points(before, after), (of, of)))
    fastest = [min(latencies(network), default=None, key=lambda row: row[1]) for network in (normal, separable)]
    found += _metrics(normal, separable)
    if fastest[0] and fastest[1]:
        (first, before), (second, after) = fastest[0], fastest[1]
        notes = (f"{first}{_threads(normal)}", f"{second}{_threads(separable)}")
        batch = number(normal.get("latency_batch")) or 1
        name = "Time per image" if batch == 1 else f"Time for {batch} images"
        found.append(Comparison(name, "milliseconds", before, after, formats.share(before, after), notes))
    return found


def _metrics(normal: dict[str, Any], separable: dict[str, Any]) -> Iterator[Comparison]:
    """The numbers of the user's own function."""
    before, after = mapping(normal.get("metrics")), mapping(separable.get("metrics"))
    for name in before:
        old, new = number(before[name]), number(after.get(name))
        if old is not None and new is not None:
            yield Comparison(name, "figures", old, new, formats.difference(old, new))


def outputs(result: dict[str, Any]) -> list[dict[str, Any]]:
    """How close each output is to that of the original, of a run without classes."""
    return [
        {
            "name": text(row.get("name")),
            **{key: number(row.get(key)) for key in ("relative_error", "psnr", "agreement")},
        }
        for row in dicts(mapping(result.get("closeness")).get("outputs"))
    ]


def single(result: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """The numbers of a run with one network, such as a training: name, kind, number."""
    network = mapping(result.get("normal")) or mapping(result.get("separable"))
    rows = (
        ("Convolution weights", "count", "conv_params"),
        ("Weights", "count", "params"),
        ("Multiplications", "count", "macs"),
        ("Accuracy", "percent", "accuracy"),
    )
    known = [(name, kind, number(network.get(key))) for name, kind, key in rows]
    return [row for row in known if row[2] is not None]


def _of_all(network: dict[str, Any]) -> str:
    params = number(network.get("params"))
    return "" if params is None else f"of {formats.count(params)} in all"


def latencies(network: dict[str, Any]) -> list[tuple[str, float]]:
    """Measured contenders of a network and their times; a time may stand alone or beside its range."""
    rows = []
    for contender, value in mapping(network.get("latency_ms")).items():
        time = number(mapping(value).get("median_ms") if isinstance(value, dict) else value)
        if time is not None and time > 0:
            rows.append((contender, time))
    return rows


def _threads(network: dict[str, Any]) -> str:
    threads = number(network.get("threads"))
    return "" if threads is None else f", {threads} thread{'' if threads == 1 else 's'}"


def latency_table(result: dict[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """One row a contender: its time for the normal and for the separable network."""
    normal, separable = (dict(latencies(mapping(result.get(key)))) for key in ("normal", "separable"))
    return [(name, normal.get(name), separable.get(name)) for name in dict.fromkeys([*normal, *separable])]


def precisions(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each network in each kind of numbers: time, bytes of its weights, score, or why it has none."""
    found = dicts(result.get("precisions"))
    times = [number(row.get("ms")) for row in found]
    longest = max((time or 0 for time in times), default=0) or 1
    return [
        {
            **{key: text(row.get(key)) for key in ("network", "precision", "reason")},
            **{key: number(row.get(key)) for key in ("ms", "bytes", "accuracy", "error")},
            "share": None if time is None else 100 * max(0, time) / longest,
        }
        for row, time in zip(found, times, strict=True)
    ]


STEPS = {
    "separable": "depthwise and pointwise in one pass",
    "normal": "normal convolution",
    "depthwise": "depthwise convolution",
    "pointwise": "pointwise convolution",
    "grouped": "grouped convolution",
    "linear": "classifier",
    "pool": "average pooling",
    "elementwise": "number by number",
    "row_norm": "norm of rows",
    "group_norm": "norm of groups",
    "resize": "another size",
    "aten.max_pool2d_with_indices.default": "max pooling",
}
"""Words for the kinds of steps that a compiled network has; others keep their name."""


def kernels(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Which kernel ran each kind of step of the separable network; copies between them are no step of their own."""
    ran = mapping(mapping(result.get("separable")).get("kernels"))
    return [(STEPS.get(op, op), text(kernel)) for op, kernel in ran.items() if op != "copy"]


def stages(result: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [
        {"name": text(row.get("name")), **{key: number(row.get(key)) for key in ("accuracy", "error", "seconds")}}
        for row in dicts(result.get("stages"))
    ]
    return [row for row in rows if row["accuracy"] is not None or row["error"] is not None]


def stages_of(result: dict[str, Any]) -> str:
    """Which images the accuracies of the stages are of, in words; records of before held none out."""
    held, tested = number(result.get("held_out_images")), number(result.get("test_images"))
    what = "samples" if result.get("task") == "outputs" else "images"
    if held is None:
        return "" if tested is None else f"{tested} test {what}"
    return f"{held} {what} held out from conversion and distillation" if held else f"the training {what}"


def layers(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table of layers; a pair is (before, after), each None where it is unknown."""
    return [
        {
            "name": text(row.get("name")),
            "kind": text(row.get("kind")),
            "kernel": "\N{MULTIPLICATION SIGN}".join(text(side) for side in items(row.get("kernel")))
            or text(row.get("kernel")),
            "channels": " → ".join(filter(None, (text(row.get("in_channels")), text(row.get("out_channels"))))),
            "rank": number(row.get("rank")),
            "closed_form": number(row.get("error_closed_form")),
            "error": number(row.get("error")),
            "reason": text(row.get("reason")),
            **{key: _pair(row.get(key)) for key in ("params", "macs", "bytes", "ms")},
        }
        for row in dicts(result.get("layers"))
    ]


def _pair(value: Any) -> tuple[Any, Any]:
    found = [number(one) for one in items(value)]
    return (found[0], found[1]) if len(found) == 2 else (None, None)


METRICS = (("params", "Weights", "count"), ("macs", "Multiplications", "count"), ("ms", "Time", "milliseconds"))


OTHER_STEPS = "all other steps"


def bars(rows: list[dict[str, Any]], other_ms: Any = None) -> list[dict[str, Any]]:
    """For each metric that any layer has: two bars a layer, as shares of the longest.

    Below the times stands that of everything that belongs to no layer, so that they add up to the network's steps.
    """
    drawn = []
    rest = {"name": OTHER_STEPS, "kind": "", "ms": _pair(other_ms)}
    for key, title, kind in METRICS:
        known = [row for row in rows if None not in row[key]]
        if key == "ms" and known and None not in rest["ms"]:
            known.append(rest)
        longest = max((max(row[key]) for row in known), default=0)
        if longest > 0:
            lines = [{"name": row["name"], "values": row[key], "kind": row["kind"]} for row in known]
            for line in lines:
                line["shares"] = [100 * max(0, value) / longest for value in line["values"]]
            drawn.append({"key": key, "title": title, "kind": kind, "lines": lines})
    return drawn


def class_name(result: dict[str, Any], index: Any) -> str:
    names = items(result.get("classes"))
    if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(names):
        return text(names[index])
    return text(index)


def confusion(result: dict[str, Any]) -> dict[str, Any]:
    """Matrices of both networks for few classes, the most frequent confusions for many."""
    found = {key: _matrix(mapping(result.get("confusion")).get(key)) for key in ("normal", "separable")}
    known = {key: matrix for key, matrix in found.items() if matrix}
    size = max((len(matrix) for matrix in known.values()), default=0)
    shown = items(result.get("confusion_classes")) or range(size)
    names = [class_name(result, i) for i in shown] if len(shown) == size else list(map(str, range(size)))
    drawn = known if size <= MATRIX_CLASSES else {}
    return {"names": names, "matrices": drawn, "pairs": list(_confused(found, names))}


def _matrix(value: Any) -> list[list[int]]:
    rows = [items(row) for row in items(value)]
    square = rows and all(len(row) == len(rows) and all(isinstance(n, int) for n in row) for row in rows)
    return rows if square else []


def _confused(found: dict[str, list[list[int]]], names: list[str]) -> Iterator[dict[str, Any]]:
    counts: dict[tuple[int, int], list[int | None]] = {}
    for side, matrix in enumerate(found.values()):
        for i, row in enumerate(matrix):
            for j, count in enumerate(row):
                if count and i != j:
                    counts.setdefault((i, j), [0 if known else None for known in found.values()])[side] = count
    most = sorted(counts, key=lambda pair: -max(n or 0 for n in counts[pair]))[:MOST_CONFUSIONS]
    for i, j in most:
        yield {"label": names[i], "predicted": names[j], "counts": counts[i, j]}


def disagreements(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Images the networks answer differently; one whose data is not a PNG is shown by its words alone."""
    return [
        {
            "image": row["image"] if PICTURE.fullmatch(text(row.get("image"))) else "",
            "name": text(row.get("name")),
            "label": class_name(result, row.get("label")),
            "answers": [
                {
                    "network": network,
                    "answer": class_name(result, row.get(network)),
                    "right": row.get(network) == row.get("label"),
                }
                for network in ("normal", "separable")
            ],
        }
        for row in dicts(result.get("disagreements"))[:MOST_PICTURES]
    ]


def left_out(explanation: dict[str, Any]) -> list[tuple[str, str]]:
    """The convolutions that the explanation does not show, and why."""
    return [(text(row.get("name")), text(row.get("reason"))) for row in dicts(explanation.get("left_out"))]


def raw_records(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the table of benchmark records."""
    words, times = ("case", "contender", "pass", "threads", "kernel"), ("median_ms", "low_ms", "high_ms")
    found = []
    for record in (record for file in files for record in records_of(file)):
        row: dict[str, Any] = {key: text(record.get(key)) for key in words} | {
            key: number(record.get(key)) for key in times
        }
        row["contender"] = ", ".join([row["contender"], *other_precision(record)])
        found.append(row)
    return found
