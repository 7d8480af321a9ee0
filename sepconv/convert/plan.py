"""What a conversion did to each layer, and why: the record that is printed, saved and compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LayerPlan:
    """One convolution.

    ``rank`` is the depth multiplier of a separable layer, or the channels inside a bottleneck; it is 0 and ``reason``
    says why if the layer stayed normal. ``error_closed_form`` and ``error`` are its squared output error, relative to
    the variance of the output and weighted by what the network makes of it, before and after calibration (None where it
    was not measured). MACs are those of one image (None without images).
    """

    name: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    rank: int
    weights_before: int
    weights_after: int
    macs_before: int | None = None
    macs_after: int | None = None
    error_closed_form: float | None = None
    error: float | None = None
    reason: str = ""


@dataclass
class Plan:
    """The whole conversion: one row per convolution in the order they run, the budget, and the stages.

    ``budget`` is None where one depth multiplier was given for all layers. ``stages`` are dicts with "name" and
    "output_error": the squared error of the network's output relative to its variance. Errors are those of ``held_out``
    of the ``images``, which nothing was fitted to; where that is 0 there were too few to hold some out.
    """

    layers: list[LayerPlan]
    form: str
    method: str
    metric: str
    budget: float | None
    images: int
    stages: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    held_out: int = 0

    @property
    def conv_params(self) -> tuple[int, int]:
        """Weights of all convolutions, before and after."""
        return sum(row.weights_before for row in self.layers), sum(row.weights_after for row in self.layers)

    @property
    def macs(self) -> tuple[int, int] | None:
        """Multiply-adds of all convolutions for one image, before and after."""
        before = [row.macs_before for row in self.layers if row.macs_before is not None]
        after = [row.macs_after for row in self.layers if row.macs_after is not None]
        return (sum(before), sum(after)) if before else None

    @property
    def converted(self) -> list[LayerPlan]:
        return [row for row in self.layers if row.rank]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        macs = self.macs
        return {
            **asdict(self),
            "layers": [{**asdict(row), "kernel_size": list(row.kernel_size)} for row in self.layers],
            "conv_params_before": self.conv_params[0],
            "conv_params_after": self.conv_params[1],
            "macs_before": macs[0] if macs else None,
            "macs_after": macs[1] if macs else None,
        }

    def __str__(self) -> str:
        header = ("layer", "shape", "kernel", "rank", "weights", "after", "MACs", "error", "fitted")
        rows = [_cells(row) for row in self.layers]
        before, after = self.conv_params
        total = ["total", "", "", "", f"{before:,}", f"{after:,}", _ratio(self.macs), "", ""]
        lines = _table([list(header), *rows, total], [row.reason for row in self.layers])
        lines.append(f"{self._aim()}: conv weights 1/{before / max(after, 1):.2f}{self._macs_part()}")
        if self.stages:
            of = f"{self.held_out} images held out" if self.held_out else "the images that were fitted to"
            lines.append(f"errors are of {of}")
        lines += [f"{s['name']}: output error {s['output_error']:.4f}" for s in self.stages]
        return "\n".join(lines + [_short(note, WIDTH) for note in self.notes])

    def _aim(self) -> str:
        what = "fixed M" if self.budget is None else f"budget {self.budget:.4g} of {self.metric}"
        return f"{self.form}, {self.method}, {what}, {self.images} images"

    def _macs_part(self) -> str:
        macs = self.macs
        return f", MACs 1/{macs[0] / max(macs[1], 1):.2f}" if macs else ""


WIDTH = 100


def _ratio(macs: tuple[int, int] | None) -> str:
    return f"1/{macs[0] / max(macs[1], 1):.2f}" if macs else "-"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _cells(row: LayerPlan) -> list[str]:
    macs = None if row.macs_before is None or row.macs_after is None else (row.macs_before, row.macs_after)
    return [
        row.name if len(row.name) <= 24 else "..." + row.name[-21:],
        f"{row.in_channels}->{row.out_channels}",
        "x".join(map(str, row.kernel_size)),
        str(row.rank or "-"),
        f"{row.weights_before:,}",
        f"{row.weights_after:,}",
        _ratio(macs),
        _number(row.error_closed_form),
        _number(row.error),
    ]


def _table(rows: list[list[str]], reasons: list[str]) -> list[str]:
    """Columns as wide as their cells; a layer that stayed has its reason on the next line."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row, reason in zip(rows, ["", *reasons, ""], strict=True):
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append(_short(" ".join(cells).rstrip(), WIDTH))
        if reason:
            lines.append(_short(f"  stays normal: {reason}", WIDTH))
    return lines
