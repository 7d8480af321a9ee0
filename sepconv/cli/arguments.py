"""What is typed, turned into values; each error says what was expected."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sepconv.data import Crop, Preprocessing
from sepconv.runs.card import LARGEST_INPUT, MOST_DIMENSIONS, Card, is_input_shape
from sepconv.runs.model_file import model_path
from sepconv.system.files import check_output, refuse_inputs


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` pairs; a value is a Python literal, or else text.

    Example:
        >>> parse_settings(["width_mult=0.5", "shortcut=projection"])
        {'width_mult': 0.5, 'shortcut': 'projection'}
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--set needs key=value, such as width_mult=0.5, but got {pair!r}")
        if key in settings:
            raise ValueError(f"--set gives {key} twice, {settings[key]!r} and then {value}")
        settings[key] = _literal(value)
    return settings


def _literal(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def parse_weights(pairs: Sequence[str]) -> dict[str, float] | None:
    """`name=weight` pairs of outputs; None where there are none.

    Example:
        >>> parse_weights(["boxes=2", "heads.0=0.5"])
        {'boxes': 2.0, 'heads.0': 0.5}
    """
    weights: dict[str, float] = {}
    for pair in pairs:
        name, equals, value = pair.rpartition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            weights[name] = math.nan
        if not equals or not 0 <= weights[name] < math.inf:
            raise ValueError(f"--output-weight needs name=weight, such as boxes=2, but got {pair!r}")
    return weights or None


def parse_task(text: str | None) -> bool | None:
    """Whether the data's classes count; None where nobody says."""
    if text not in (None, "classes", "outputs"):
        raise ValueError(f"--task must be classes or outputs, but got {text!r}")
    return None if text is None else text == "classes"


def check_precision(text: str) -> None:
    """ValueError for what a converted network cannot be made in."""
    if text not in ("float32", "int8"):
        raise ValueError(f"--precision must be float32 or int8, but got {text!r}")


def is_size(text: str, most: int) -> bool:
    """Whether this is a positive whole number in the digits 0 to 9."""
    return text.isascii() and text.isdecimal() and len(text) < 10 and 0 < int(text) <= most


def parse_shape(text: str) -> tuple[int, ...]:
    """Sizes without the batch.

    Example:
        >>> parse_shape("3x224x224")
        (3, 224, 224)
    """
    sizes = text.lower().split("x")
    if not all(is_size(size, LARGEST_INPUT) for size in sizes) or not is_input_shape(shape := [*map(int, sizes)]):
        raise ValueError(
            f"--input needs positive sizes without the batch, such as 3x224x224, {MOST_DIMENSIONS} and a product of "
            f"{LARGEST_INPUT:,} at most, but got {text!r}"
        )
    return tuple(shape)


def parse_budget(text: str) -> float:
    """A share of the original's cost.

    Example:
        >>> parse_budget("1/8")
        0.125
    """
    part, slash, whole = text.partition("/")
    try:
        budget = float(part) / (float(whole) if slash else 1)
    except (ValueError, ZeroDivisionError):
        budget = math.nan
    if not 0 < budget <= 1:
        raise ValueError(f"--budget must be above 0 and at most 1, such as 1/8 or 0.125, but got {text!r}")
    return budget


def shape_of(text: str | None, card: Card) -> tuple[int, ...]:
    """The input's shape as typed, else as the weights say it."""
    if text is not None:
        return parse_shape(text)
    if not card.input_shape:
        raise ValueError("the weights do not say which input the network takes: give --input, such as 3x224x224")
    return card.input_shape


def parse_numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """One number for each channel.

    Example:
        >>> parse_numbers("--mean", "0.485,0.456,0.406")
        (0.485, 0.456, 0.406)
    """
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{option} needs 1 or 3 numbers with commas between them, such as 0.5, but got {text!r}")
    return numbers


@dataclass(frozen=True)
class Typed:
    """What was typed about the preparation of images; None for what was not."""

    image_size: int | None = None
    crop: float | None = None
    interpolation: str | None = None
    mean: str | None = None
    std: str | None = None
    bgr: bool = False

    def over(self, known: Preprocessing | None) -> Preprocessing | None:
        """What the network is known to want, with what was typed instead.

        Raises:
            ValueError: an option says nothing without another, or has no such value.
        """
        if (self.mean is None) != (self.std is None):
            raise ValueError("--mean and --std go together: give both")
        if self == Typed():
            return known
        base = known or Preprocessing()
        mean, std = parse_numbers("--mean", self.mean), parse_numbers("--std", self.std)
        source = "what was typed" if mean else base.source
        return base.changed(fit=self._fit(base.fit), mean=mean, std=std, bgr=self.bgr or None, source=source)

    def _fit(self, known: Crop | None) -> Crop | None:
        if self.image_size is None and self.crop is None and self.interpolation is None:
            return None
        size = self.image_size or (known and known.size)
        if not size:
            raise ValueError("--crop and --interpolation need --image-size: the network does not say its size")
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f"--crop must be above 0 and at most 1, such as 0.875, but got {self.crop:g}")
        share = self.crop or (known.size / known.resize if known else 1.0)
        interpolation = self.interpolation or (known.interpolation if known else "bilinear")
        return Crop(size, math.floor(size / share + 1e-9), interpolation, known is not None and known.squash)


def inputs(model: str, weights: Path | None = None, data: str | None = None) -> list[Path]:
    """The files and folders that a command reads, as far as they are here."""
    found = [model_path(model), weights]
    if data is not None and data != "digits":
        path = Path(data)
        found += [path] if path.exists() else path.parent.glob(path.name)
    return [path for path in found if path is not None]


def check_outputs(read: Sequence[Path], *, taken: Sequence[Path] = (), **outputs: Path | None) -> None:
    """Find out before any work that every output can be written and is neither an input nor another output.

    Args:
        read: what the command reads.
        taken: what it writes anyway.
        outputs: the files by the names of their options; None is not asked for, and - is the output of the command.

    Raises:
        ValueError: an output would replace what is read, or another output.
        OSError: it cannot be written.
    """
    places = {path.resolve(): str(path) for path in taken}
    for option, path in outputs.items():
        if path is None or path == Path("-"):
            continue
        refuse_inputs(f"--{option}", path, read)
        check_output(path)
        if path.resolve() in places:
            raise ValueError(f"--{option} {path} would be overwritten: {places[path.resolve()]} is written there too")
        places[path.resolve()] = f"--{option}"
