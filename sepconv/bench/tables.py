"""Benchmark records as tables: what README, docs and the terminal show is made here, never by hand."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_BASELINES = ("torch-nchw", "torch-nhwc")
_LARGE = ("v1 1.0-224 b1", "v2 1.0-224 b1")
_FOLDED = "torch-folded-nhwc"
_BACKENDS = {"torch-compile", "torch-compile-sepconv"}


def read(path: Path) -> dict[str, Any]:
    """One benchmark file.

    Raises:
        ValueError: it is no such file.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        _ = content["machine"]["fma_peak_gflops"], [row["median_ms"] for row in content["records"]]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no benchmark file ({type(error).__name__}: {error})") from None
    return content


def best_times(records: Iterable[Row]) -> dict[tuple[int, str, str], dict[str, float]]:
    """Median milliseconds by (threads, case, pass) and contender, each contender in its best layout."""
    found: dict[tuple[int, str, str], dict[str, float]] = defaultdict(dict)
    for row in records:
        times = found[row["threads"], row["case"], row["pass"]]
        times[row["contender"]] = min(row["median_ms"], times.get(row["contender"], math.inf))
    return dict(found)


def speedup(times: dict[str, float], ours: str = "sepconv") -> float:
    """PyTorch's better layout over ours."""
    return min(times[name] for name in _BASELINES if name in times) / times[ours]


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


@dataclass(frozen=True)
class Table:
    """A column of text, then columns of numbers; as a string it is Markdown."""

    header: list[str]
    rows: list[list[str]]

    def __str__(self) -> str:
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _summed(records: Iterable[Row], threads: int) -> dict[str, dict[str, float]]:
    """Milliseconds of all passes together, by case and contender, each in the layout that is better for them all."""
    sums: dict[tuple[str, str, str], float] = defaultdict(float)
    for row in records:
        if row["threads"] == threads:
            sums[row["case"], row["contender"], row["layout"]] += row["median_ms"]
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for (case, contender, _), ms in sums.items():
        found[case][contender] = min(ms, found[case].get(contender, math.inf))
    return dict(found)


def operations(content: dict[str, Any], threads: int) -> Table:
    """`bench ops`: one line per case, speed-up over PyTorch's better layout pass by pass; losses are kept."""
    times = best_times(content["records"])
    passes = ("forward", "grad_input", "grad_weight")
    rows = []
    for case, sums in _summed(content["records"], threads).items():
        each = [f"{speedup(times[threads, case, which]):.2f}" for which in passes]
        rows.append([case, *each, f"**{speedup(sums):.2f}**", f"{sums['torch-nchw'] / sums['sepconv']:.2f}"])
    return Table(["depthwise case", "forward", "grad input", "grad weight", "all three", "default layout"], rows)


def operations_summary(content: dict[str, Any]) -> Table:
    """`bench ops` per thread count: geometric means over the cases, and the worst."""
    times = best_times(content["records"])
    rows = []
    for threads in sorted({key[0] for key in times}):
        sums = _summed(content["records"], threads).values()
        each = {key: speedup(t) for key, t in times.items() if key[0] == threads}
        worst = min(each, key=lambda key: each[key])
        rows.append(
            [
                str(threads),
                f"{geometric_mean(map(speedup, sums)):.2f}",
                f"{geometric_mean(s['torch-nchw'] / s['sepconv'] for s in sums):.2f}",
                f"{geometric_mean(each.values()):.2f}",
                f"{each[worst]:.2f} ({worst[1]}, {worst[2].replace('_', ' ')})",
            ]
        )
    header = ["threads", "three passes, over PyTorch's better layout", "over its default layout", "each pass alone"]
    header.append("slowest case and pass")
    return Table(header, rows)


def _share(macs: int, ms: float, content: dict[str, Any], threads: int) -> str:
    """Of the FMA peak that was measured in the same run; a multiply-add is two operations."""
    peak = content["machine"]["fma_peak_gflops"][str(threads)]
    return f"{200 * macs / ms / 1e6 / peak:.0f} %"


def blocks(content: dict[str, Any], threads: int) -> Table:
    """`bench blocks`: one line per block; losses are kept."""
    macs = {row["case"]: row["macs"] for row in content["records"]}
    rows = [
        [
            case,
            f"{t['sepconv']:.3f}",
            f"{speedup(t):.2f}",
            f"{t['sepconv-bound']:.3f}",
            f"{speedup(t, 'sepconv-bound'):.2f}",
            _share(macs[case], t["sepconv-bound"], content, threads),
        ]
        for (count, case, _), t in best_times(content["records"]).items()
        if count == threads
    ]
    header = [
        "block",
        "function, ms",
        "over PyTorch",
        "within a network, ms",
        "over PyTorch",
        "within a network, of FMA peak",
    ]
    return Table(header, rows)


def blocks_summary(content: dict[str, Any]) -> Table:
    """`bench blocks` per thread count; v1 together counts each block as often as the network has it."""
    times, counts = best_times(content["records"]), content["counts"]
    macs = {row["case"]: row["macs"] for row in content["records"]}
    rows = []
    for threads in sorted({key[0] for key in times}):
        mine = {case: t for (count, case, _), t in times.items() if count == threads}
        once = {case: n for case, n in counts.items() if case.startswith("v1") and case.endswith(" b1")}
        work = sum(macs[case] * n for case, n in once.items())
        for contender, name in (("sepconv", "functions"), ("sepconv-bound", "within a network")):
            ms = sum(mine[case][contender] * n for case, n in once.items())
            mean = geometric_mean(speedup(t, contender) for t in mine.values())
            rows.append(
                [f"{name}, {threads} thread(s)", f"{mean:.2f}", f"{ms:.2f}", _share(work, ms, content, threads)]
            )
    return Table(["", "all blocks over PyTorch's better layout", "v1, 13 blocks, ms", "v1, of FMA peak"], rows)


PRECISIONS = ("float32", "bfloat16", "int8")
_WRONG = "~"


def _of(content: dict[str, Any], precision: str) -> list[Row]:
    """Rows of one precision; old records have one only."""
    return [row for row in content["records"] if row.get("precision", "float32") == precision]


def precisions(content: dict[str, Any]) -> list[str]:
    """Those that were measured."""
    return [precision for precision in PRECISIONS if _of(content, precision)]


def _over_best(times: dict[str, float]) -> tuple[float, str]:
    """The best contender that is not ours over ours, and its name."""
    best = min((ms, name) for name, ms in times.items() if "sepconv" not in name)
    return best[0] / times["sepconv"], best[1]


def _right(rows: Iterable[Row]) -> list[Row]:
    """Without contenders that computed something else."""
    return [row for row in rows if row.get("max_error", 0) <= 1]


def _times(rows: Iterable[Row], threads: int) -> dict[str, dict[str, float]]:
    return {case: t for (count, case, _), t in best_times(rows).items() if count == threads}


def networks(content: dict[str, Any], threads: int, precision: str = "float32") -> Table:
    """`bench network`: milliseconds of every contender in one precision, one line per case; losses are kept.

    One that computed something else has a mark, and is not the best.
    """
    rows = _of(content, precision)
    times, right, macs = (
        _times(rows, threads),
        _times(_right(rows), threads),
        {row["case"]: row["macs"] for row in rows},
    )
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lines = []
    for case, t in times.items():
        each = [f"{t[name]:.3f}{'' if name in right[case] else _WRONG}" if name in t else "" for name in names]
        lines.append([case, *each, *_compared(right[case])])
        if precision == "float32":
            lines[-1].append(_share(macs[case], t["sepconv"], content, threads) if "sepconv" in t else "")
    header = ["network", *names, "best other / sepconv"]
    return Table([*header, "sepconv, of FMA peak"] if precision == "float32" else header, lines)


def _compared(times: dict[str, float]) -> list[str]:
    """A cell: how much faster ours is than the best other, if both are there."""
    if len(_rivals(times)) == 0 or "sepconv" not in times:
        return [""]
    ratio, best = _over_best(times)
    return [f"**{ratio:.2f}** ({best})"]


def _rivals(times: dict[str, float]) -> list[str]:
    return [name for name in times if "sepconv" not in name]


def networks_summary(content: dict[str, Any]) -> Table:
    """`bench network` per precision and thread count: the large networks at batch 1, and geometric means over all."""
    rows = []
    for precision in precisions(content):
        times = {
            key: t
            for key, t in best_times(_right(_of(content, precision))).items()
            if "sepconv" in t and len(_rivals(t)) > 0
        }
        counts, title = sorted({key[0] for key in times}), "" if precision == "float32" else f", {precision}"
        for threads in counts:
            mine = {case: t for (count, case, _), t in times.items() if count == threads}
            large = [f"{_over_best(mine[case])[0]:.2f}" if case in mine else "" for case in _LARGE]
            rows.append([f"{threads}{title}", *large, *_means(mine.values())])
        if len(counts) > 1:
            rows.append([f"all{title}", *[""] * len(_LARGE), *_means(times.values())])
    header = ["threads", *(f"{case}: best other / sepconv" for case in _LARGE), "all cases"]
    return Table([*header, "torch.compile / its backend sepconv"], rows)


def _means(times: Iterable[dict[str, float]]) -> list[str]:
    every = list(times)
    pairs = [t["torch-compile"] / t["torch-compile-sepconv"] for t in every if set(t) >= _BACKENDS]
    return [f"{geometric_mean(_over_best(t)[0] for t in every):.2f}", f"{geometric_mean(pairs):.2f}" if pairs else ""]


def shorter(content: dict[str, Any], threads: int) -> Table:
    """`bench network`: what ours gains by fewer bits, case by case; the first precision has the most."""
    first, *fewer = precisions(content)
    times = {precision: _times(_of(content, precision), threads) for precision in (first, *fewer)}
    rows = []
    for case in (case for case, usual in times[first].items() if "sepconv" in usual):
        most, *mine = (times[precision].get(case, {}).get("sepconv", math.inf) for precision in times)
        each = [f"{ms:.3f}" if ms < math.inf else "" for ms in (most, *mine)]
        rows.append([case, *each, *[f"**{most / ms:.2f}**" if ms < math.inf else "" for ms in mine]])
    header = ["network", *(f"sepconv, {precision}" for precision in times)]
    return Table([*header, *(f"{first} / {precision}" for precision in fewer)], rows)


def agreement(content: dict[str, Any]) -> Table:
    """`bench network`: how far every contender's answers are those of the network in float32, over all cases."""
    rows = []
    for precision in precisions(content):
        known = [row for row in _of(content, precision) if row.get("top1") is not None]
        for name in dict.fromkeys(row["contender"] for row in known):
            same = [row["top1"] for row in known if row["contender"] == name]
            errors = [row["relative_error"] for row in known if row["contender"] == name]
            shares = f"{statistics.mean(same):.1%} ({min(same):.1%})"
            rows.append([f"{name}, {precision}", shares, f"{statistics.mean(errors):.2g} ({max(errors):.2g})"])
    return Table(["contender", "same best class: mean (least)", "relative error: mean (largest)"], rows)


def footprints(content: dict[str, Any]) -> Table:
    """`bench network`: memory while running and time to be ready, one line per network and contender."""
    rows = []
    for one in content["footprints"]:
        over = one["over_weights_bytes"]
        memory = "" if over is None else f"{over / 2**20:.1f}"
        precision = one.get("precision", "float32")
        name = one["contender"] + ("" if precision == "float32" else f", {precision}")
        rows.append([one["network"], name, memory, f"{one['cold_s']:.2f}", f"{one['warm_s']:.2f}"])
    return Table(["network", "contender", "memory over the weights, MiB", "ready cold, s", "ready again, s"], rows)


def zoo(content: dict[str, Any], threads: int) -> Table:
    """`bench zoo`: milliseconds of every contender, one line per network; losses are kept."""
    times = {case: t for (count, case, _), t in best_times(content["records"]).items() if count == threads}
    facts = {one["network"]: one for one in content["networks"] if one["threads"] == threads}
    names = list(dict.fromkeys(row["contender"] for row in content["records"]))
    rows = []
    for case, t in times.items():
        each = [f"{t[name]:.2f}" if name in t else "" for name in names]
        over_openvino = f"{t['openvino'] / t['sepconv']:.2f}" if "openvino" in t else ""
        ready = f"{facts[case]['ready_s']:.1f}"
        rows.append([case + (" (in parts)" if facts[case]["reason"] else ""), *each, f"**{speedup(t):.2f}**"])
        rows[-1] += [over_openvino, ready]
    header = ["network", *names, "PyTorch's better layout / sepconv", "OpenVINO / sepconv", "ready, s"]
    return Table(header, rows)


def zoo_summary(content: dict[str, Any]) -> Table:
    """`bench zoo` per thread count: geometric means, the network that gains least, and the longest wait."""
    times = best_times(content["records"])
    rows = []
    for threads in sorted({key[0] for key in times}):
        mine = {case: t for (count, case, _), t in times.items() if count == threads}
        least = min(mine, key=lambda case: speedup(mine[case]))
        folded = [min(t[_FOLDED] / t["sepconv"], speedup(t)) for t in mine.values() if _FOLDED in t]
        rival = [t["openvino"] / t["sepconv"] for t in mine.values() if "openvino" in t]
        waits = {one["network"]: one["ready_s"] for one in content["networks"] if one["threads"] == threads}
        longest = max(waits, key=lambda case: waits[case])
        rows.append(
            [
                str(threads),
                str(len(mine)),
                f"{geometric_mean(map(speedup, mine.values())):.2f}",
                f"{speedup(mine[least]):.2f} ({least})",
                f"{geometric_mean(folded):.2f} ({len(folded)})" if folded else "",
                f"{geometric_mean(rival):.2f} ({len(rival)})" if rival else "",
                f"{waits[longest]:.1f} ({longest})",
            ]
        )
    header = ["threads", "networks", "over PyTorch's better layout", "least", "also with folded batch norms (networks)"]
    return Table([*header, "separable ones over OpenVINO (networks)", "longest until ready, s"], rows)


def replace_between(text: str, name: str, content: str) -> str:
    """Put ``content`` between the markers ``<!-- name -->`` and ``<!-- /name -->``.

    Raises:
        ValueError: the markers are missing.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"the markers {start} and {end} must each occur once")
    head, rest = text.split(start)
    return f"{head}{start}\n{content}{end}{rest.split(end)[1]}"
