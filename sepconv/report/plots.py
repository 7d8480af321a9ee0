"""The charts of a run: training curves and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sepconv.report import charts, formats
from sepconv.report.charts import Chart
from sepconv.report.records import mapping, number, records_of, text
from sepconv.report.suites import other_precision

Rows = list[dict[str, Any]]

_LEAST_LIMIT = 1e-9  # of a machine, in its billions a second


def training(rows: Rows) -> list[Chart]:
    """Loss, and accuracy or error, over the epochs; phases (training, distillation) one after the other."""
    placed, dividers = _epochs(rows)
    kinds = (("Loss", "loss", 1), ("Accuracy, %", "accuracy", 100), ("Error of the outputs", "error", 1))
    drawn = [_curves(title, ending, factor, placed, dividers) for title, ending, factor in kinds]
    return [chart for chart in drawn if chart is not None]


def _epochs(rows: Rows) -> tuple[list[tuple[float, dict[str, Any]]], list[tuple[float, str]]]:
    """Rows with their place on the axis, and where each phase starts."""
    placed: list[tuple[float, dict[str, Any]]] = []
    dividers: list[tuple[float, str]] = []
    offset, last, phase = 0.0, 0.0, None
    for row in rows:
        epoch = number(row.get("epoch"))
        if epoch is None:
            continue
        if text(row.get("phase")) != phase:
            offset, phase = last, text(row.get("phase"))
            dividers.append((offset, phase))
        last = offset + epoch
        placed.append((last, row))
    return placed, dividers if len(dividers) > 1 else []


def _curves(
    title: str,
    ending: str,
    factor: int,
    placed: list[tuple[float, dict[str, Any]]],
    dividers: list[tuple[float, str]],
) -> Chart | None:
    keys = dict.fromkeys(key for _, row in placed for key in row if key.endswith(ending))
    curves: dict[tuple[str, str], list[charts.Point]] = {}
    for epoch, row in placed:
        for key in keys:
            if (value := number(row.get(key))) is not None:
                curves.setdefault((key, text(row.get("phase"))), []).append((epoch, factor * value))
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return None
    x = charts.linear([epoch for epoch, _ in points], "epoch", whole=True)
    y = charts.linear([value for _, value in points], title, zero=ending != "accuracy")
    series = [
        charts.series(
            key.replace("_", " "),
            "normal dashed" if key.startswith("train") else "separable line",
            x,
            y,
            curve,
            [f"{key.replace('_', ' ')}, epoch {epoch:g}: {formats.figures(value)}" for epoch, value in curve],
        )
        for (key, _), curve in curves.items()
    ]
    return Chart(title, x, y, series, [(charts.across(x, max(at, x.low)), name) for at, name in dividers])


def roofline(layers: Rows, result: dict[str, Any], benchmarks: Rows) -> dict[str, Any]:
    """The machine's two limits and every measured layer under them; empty where nothing was measured.

    One multiply-add counts as two operations here and nowhere else.

    Reference: Williams, Waterman & Patterson 2009, "Roofline", Communications of the ACM 52(4).
    """
    found = [*_layer_points(layers, result), *_record_points(benchmarks)]
    points = [point for point in found if min(point["intensity"], point["gflops"]) > 0]
    if not points:
        return {}
    threads = max(point["threads"] for point in points)
    machines = [mapping(m) for m in (result.get("machine"), *(b.get("machine") for b in benchmarks))]
    machine = next((m for m in machines if _limit(m, "fma_peak_gflops", threads)), {})
    peak, bandwidth = (_limit(machine, name, threads) for name in ("fma_peak_gflops", "memory_gb_per_s"))
    x = charts.logarithmic(
        _limits([p["intensity"] for p in points], [peak / bandwidth] if bandwidth and peak else []),
        "operations per byte",
    )
    y = charts.logarithmic(_limits([p["gflops"] for p in points], [peak] if peak else []), "Gop/s")
    series = _roofs(x, y, peak, bandwidth)
    for group, style in dict.fromkeys((p["group"], p["style"]) for p in points):
        chosen = [p for p in points if p["group"] == group]
        says = [f"{p['name']}: {formats.figures(p['gflops'])} Gop/s" for p in chosen]
        places = [(p["intensity"], p["gflops"]) for p in chosen]
        if chosen:
            series.append(charts.series(group, f"{style} dots", x, y, places, says))
    for point in points:
        limits = (_limit(machine, name, point["threads"]) for name in ("fma_peak_gflops", "memory_gb_per_s"))
        attainable = _attainable(point["intensity"], *limits)
        point["share"] = point["gflops"] / attainable if attainable else None
    chart = Chart("Billions of operations per second (Gop/s)", x, y, series)
    return {"chart": chart, "points": points, "peak": peak, "bandwidth": bandwidth, "threads": threads}


def _limit(machine: dict[str, Any], name: str, threads: int) -> float:
    """A limit of the machine for so many threads, 0 where it was not measured for them.

    Measured for several thread counts it is an object by their number; a single number is the arithmetic of one core,
    or the memory of all.
    """
    found = machine.get(name)
    if isinstance(found, dict):
        limit = number(found.get(str(threads))) or 0.0
    else:
        limit = (number(found) or 0.0) * (threads if name == "fma_peak_gflops" else 1)
    return limit if limit > _LEAST_LIMIT else 0.0


def _attainable(intensity: float, peak: float, bandwidth: float) -> float:
    return min(peak, intensity * bandwidth) if bandwidth else peak


def _limits(values: Sequence[float], limits: Sequence[float]) -> list[float]:
    """The values with the limits, and a little room, so that no point lies on the frame."""
    every = [*values, *limits]
    return [min(every) / 1.25, max(every) * 1.25]


def _roofs(x: charts.Axis, y: charts.Axis, peak: float, bandwidth: float) -> list[charts.Series]:
    roofs = []
    if peak:
        start = peak / bandwidth if bandwidth else x.low
        roofs.append(
            charts.series("arithmetic limit", "roof", x, y, [(min(max(start, x.low), x.high), peak), (x.high, peak)])
        )
    if bandwidth:
        # The slope is cut where it leaves the drawing on either side.
        low = max(x.low, y.low / bandwidth)
        high = min(x.high, (peak or y.high) / bandwidth)
        if low < high:
            ends = [(low, low * bandwidth), (high, high * bandwidth)]
            roofs.append(charts.series("memory limit", "roof", x, y, ends))
    return roofs


def _layer_points(layers: Rows, result: dict[str, Any]) -> Rows:
    points = []
    for side, style in enumerate(("normal", "separable")):
        threads = number(mapping(result.get(style)).get("threads")) or 1
        for row in layers:
            macs, moved, ms = (row[key][side] for key in ("macs", "bytes", "ms"))
            points += _point(row["name"], style, f"{style} network", threads, macs, moved, ms)
    return points


def _record_points(benchmarks: Rows) -> Rows:
    points = []
    for file in benchmarks:
        # The roof is that of float32.
        for record in (record for record in records_of(file) if not other_precision(record)):
            contender, case = text(record.get("contender")), text(record.get("case"))
            own = contender == "sepconv"
            look = ("separable", "sepconv") if own else ("normal", "other kernels")
            values = (number(record.get(key)) for key in ("macs", "bytes", "median_ms"))
            points += _point(f"{case}, {contender}", *look, number(record.get("threads")) or 1, *values)
    return points


def _point(name: str, style: str, group: str, threads: Any, macs: Any, moved: Any, ms: Any) -> Rows:
    if not (macs and moved and ms) or min(macs, moved, ms) <= 0:
        return []
    operations = 2 * macs
    return [
        {
            "name": name,
            "style": style,
            "group": group,
            "threads": threads,
            "intensity": operations / moved,
            "gflops": operations / ms * 1e-6,
            "ms": ms,
        }
    ]
