"""What a quantization did to each layer and each value, and what it measured: data, and a table of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

WIDTH = 110


@dataclass
class QuantizedLayer:
    """One layer of a quantized network.

    Attributes:
        name: of the module in the original.
        kind: "conv2d", "linear", ...
        shape: of its weight.
        integers: whether it is computed in integers.
        equalized: whether its output channels were brought to like ranges.
        weight_error: what rounding its weights adds to its output, squared, relative to the output's variance.
        input_error: what rounding its input adds.
        output_error: all that has come together up to its output.
        reason: why it stays in float32.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    integers: bool
    equalized: bool = False
    weight_error: float | None = None
    input_error: float | None = None
    output_error: float | None = None
    reason: str = ""


@dataclass
class QuantizedValue:
    """One value between layers: its range and its steps."""

    name: str
    scale: float
    zero_point: int
    low: float
    high: float


@dataclass
class QuantizationPlan:
    """The whole quantization.

    Attributes:
        options: what was done beside rounding, by the names of the arguments of ``quantize``.
        images: calibration images that were looked at.
        held_out: of all images those on which ``error`` and ``agreement`` were measured; 0 where it is the same ones.
        error: squared error of the network's outputs on these, relative to their variance.
        agreement: share of them with the same class; None where the outputs are no classes.
    """

    layers: list[QuantizedLayer]
    values: list[QuantizedValue]
    options: dict[str, Any]
    images: int
    held_out: int
    error: float
    agreement: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> list[str]:
        """Names of the layers that stay in float32."""
        return [row.name for row in self.layers if not row.integers]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {
            **asdict(self),
            "layers": [{**asdict(row), "shape": list(row.shape)} for row in self.layers],
            "left": self.left,
        }

    def __str__(self) -> str:
        header = ["layer", "weight", "weights err", "input errs", "output errs", ""]
        rows = [header, *(_cells(row) for row in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
        lines = []
        for row in rows:
            cells = [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:], strict=True)),
                row[-1],
            ]
            lines.append(_short(" ".join(cells).rstrip()))
        done = [name if value is True else f"{name} {value}" for name, value in self.options.items() if value]
        lines.append(f"{', '.join(done)}; {self.images} images")
        of = f"{self.held_out} images held out" if self.held_out else "the images that were looked at"
        same = "" if self.agreement is None else f", the same class for {self.agreement:.1%}"
        lines.append(f"error of the outputs {self.error:.2g} of their variance{same}, on {of}")
        return "\n".join([*lines, *map(_short, self.notes)])


def _short(text: str) -> str:
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def _cells(row: QuantizedLayer) -> list[str]:
    errors = (row.weight_error, row.input_error, row.output_error)
    return [
        row.name if len(row.name) <= 32 else "..." + row.name[-29:],
        "x".join(map(str, row.shape)),
        *("-" if one is None else f"{one:.1e}" for one in errors),
        f"stays in float32: {row.reason}" if not row.integers else "equalized" if row.equalized else "",
    ]
