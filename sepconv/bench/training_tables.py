"""Records of ``sepconv bench training`` as tables."""

from __future__ import annotations

from typing import Any

from sepconv.bench.tables import Row, Table

_PYTORCH = ("torch-nhwc", "torch-nchw")


def _by_case(content: dict[str, Any]) -> dict[tuple[str, str, int], dict[str, Row]]:
    """Records by (case, precision, threads) and contender with its layout."""
    found: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in content["records"]:
        name = f"torch-{row['layout']}" if row["contender"] == "torch" else row["contender"]
        found.setdefault((row["case"], row["precision"], row["threads"]), {})[name] = row
    return found


def _better(rows: dict[str, Row]) -> Row | None:
    """PyTorch's, in the layout in which it takes less time."""
    plain = [rows[name] for name in _PYTORCH if name in rows]
    return min(plain, key=lambda row: float(row["median_ms"]), default=None)


def _over(other: Row | None, ours: Row) -> str:
    return "" if other is None else f"{other['median_ms'] / ours['median_ms']:.2f}"


def _memory(content: dict[str, Any]) -> dict[tuple[str, str], dict[str, int]]:
    found: dict[tuple[str, str], dict[str, int]] = {}
    for row in content.get("memory", []):
        if row["bytes"] is not None:
            held = found.setdefault((row["case"], row["precision"]), {})
            name = f"torch-{row['layout']}" if row["contender"] == "torch" else row["contender"]
            held[name] = row["bytes"]
    return found


def summary(content: dict[str, Any]) -> Table:
    """A line for each network, precision and number of threads: our step, and how many times as long others take."""
    memory, lines = _memory(content), []
    for (case, precision, threads), rows in _by_case(content).items():
        ours = rows.get("sepconv")
        if ours is None:
            continue
        held = memory.get((case, precision), {})
        least = min((held[name] for name in _PYTORCH if name in held), default=None)
        share = f"{held['sepconv'] / least:.2f}" if least and "sepconv" in held else ""
        times = [_over(_better(rows), ours), _over(rows.get("torch.compile"), ours)]
        lines.append([case, precision, str(threads), f"{ours['images_per_second']:.0f}", *times, share])
    header = ["network", "precision", "threads", "images/s", "over PyTorch's better layout", "over torch.compile"]
    return Table([*header, "memory of a step, of PyTorch's"], lines)


def parts(content: dict[str, Any]) -> Table:
    """Milliseconds of a step and of its parts, ours and those of PyTorch's better layout."""
    lines = []
    for (case, precision, threads), rows in _by_case(content).items():
        for name, row in (("sepconv", rows.get("sepconv")), ("PyTorch", _better(rows))):
            if row is not None:
                each = [f"{row[key]:.1f}" for key in ("median_ms", "forward_ms", "backward_ms", "optimizer_ms")]
                lines.append([case, precision, str(threads), name, *each])
    return Table(["network", "precision", "threads", "", "step, ms", "forward", "backward", "optimizer"], lines)
