"""What a file says of its network, as plain values: checked for kind and size before anything is made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral
from reprlib import repr as shortened
from typing import Any

import torch
from torch import Tensor, fx, nn

from sepconv import models
from sepconv.data import Data, SampleData
from sepconv.data.preprocessing import INTERPOLATIONS, LARGEST_SIDE, Crop, Preprocessing, normalise
from sepconv.leaves import Inputs
from sepconv.quantize.saving import is_quantized, left_in, rebuilt
from sepconv.runs import structure

LARGEST_INPUT = 2**28
"""Numbers in one input of a network: 1 GB of float32."""
MOST_DIMENSIONS = 8
_LONGEST_TEXT = 16 << 20
_LONGEST_WORD = 1000
_MOST_VALUES = 64
_MOST_CLASSES = 10**6


@dataclass(frozen=True)
class Card:
    """What a file says of its network.

    Attributes:
        model: name, as for ``models.create``.
        settings: of that model: numbers, text, True, False, None, or short lists of these.
        changes: how the network differs from it (see ``structure``).
        input_shape: of one image, (C, H, W).
        classes: names of the classes.
        mean, std: per channel, that images are normalised with.
        resize, interpolation, squash: how images become squares of that shape, see ``data.Crop``; 0 is the side.
        bgr: whether its channels are blue, green, red.
        quantized: empty for a network in float32; else "left", the names of the layers that still are.
        data: name of the data set it was trained on.
    """

    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    input_shape: tuple[int, ...] = ()
    classes: list[str] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    data: str = ""
    resize: int = 0
    interpolation: str = "bilinear"
    squash: bool = False
    bgr: bool = False
    quantized: dict[str, list[str]] = field(default_factory=dict)

    def with_data(self, data: Data | SampleData) -> Card:
        """The same network, trained on `data`."""
        if isinstance(data, SampleData):
            return replace(self, input_shape=data.input_shape, data=data.name)
        return replace(
            self,
            input_shape=data.input_shape,
            classes=data.classes or self.classes,
            mean=data.mean.tolist(),
            std=data.std.tolist(),
            data=data.name,
            bgr=data.train.bgr,
            **({} if data.fit is None else _fit_entries(data.fit)),
        )

    def prepared_by(self, prepared: Preprocessing) -> Card:
        """The same network for images that are prepared so, if that says all of it."""
        if prepared.fit is None or not prepared.mean:
            return self
        return replace(
            self,
            input_shape=(len(prepared.mean), prepared.fit.size, prepared.fit.size),
            mean=list(prepared.mean),
            std=list(prepared.std),
            bgr=prepared.bgr,
            **_fit_entries(prepared.fit),
        )

    def changed_to(self, model: nn.Module) -> Card:
        """The card of a network made of this one by replacing modules, or by quantization."""
        if isinstance(model, fx.GraphModule) and is_quantized(model):
            return replace(self, quantized={"left": left_in(model)})
        return replace(self, changes=structure.differences(models.create(self.model, **self.settings), model))

    def build(self) -> nn.Module:
        """The network, with random weights and before it was quantized."""
        return structure.apply(models.create(self.model, **self.settings), self.changes)

    def build_quantized(self, model: nn.Module) -> nn.Module:
        """Of a network that was built, the quantized one."""
        if not self.input_shape:
            raise ValueError("a quantized network needs an input_shape")
        return rebuilt(model.eval(), Inputs((torch.zeros(2, *self.input_shape),)), self.quantized["left"])

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How images are prepared for the network; None where the card does not say it."""
        if not self.mean or len(self.input_shape) != 3:
            return None
        side = self.input_shape[-1]
        fit = Crop(side, max(self.resize, side), self.interpolation, self.squash)
        return Preprocessing(fit, tuple(self.mean), tuple(self.std), self.bgr, self.model)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float32 as the network was trained on."""
        return normalise(images, torch.tensor(self.mean), torch.tensor(self.std), self.bgr)

    def check(self) -> None:
        """ValueError where something is not what a file may hold."""
        for name, (holds, rule) in _RULES.items():
            if not holds(value := getattr(self, name)):
                raise ValueError(f"{name} must be {rule}, got {shortened(value)}")
        for name, value in self.settings.items():
            if not (isinstance(name, str) and name.isidentifier() and _is_plain(value)):
                raise ValueError(
                    f"the settings of {self.model} must be numbers, text, True, False, None or short lists of these, "
                    f"got {shortened(name)}: {shortened(value)}"
                )
        if not len(self.mean) == len(self.std) == (self.input_shape[0] if self.mean and self.input_shape else 0):
            raise ValueError(
                f"mean and std must have a number for each channel of input_shape {self.input_shape}, "
                f"got {len(self.mean)} and {len(self.std)}"
            )

    def to_text(self) -> str:
        """As JSON.

        Raises:
            ValueError: see :meth:`check`.
        """
        self.check()
        return json.dumps(asdict(self), default=int, allow_nan=False)


def from_text(text: str) -> Card:
    """The card that :meth:`Card.to_text` wrote.

    Raises:
        ValueError: the text is no such card.
    """
    if len(text) > _LONGEST_TEXT:
        raise ValueError(f"{len(text)} characters are more than any network needs")
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("lists within lists without end") from None
    if not isinstance(found, dict):
        raise ValueError(f"not an object but {shortened(found)}")
    if unknown := sorted(found.keys() - {one.name for one in fields(Card)}):
        raise ValueError(f"unknown entry {shortened(unknown[0])}")
    if "model" not in found:
        raise ValueError("no entry 'model'")
    card = Card(**found)
    card.check()
    return replace(card, input_shape=tuple(card.input_shape))


def _fit_entries(fit: Crop) -> dict[str, Any]:
    return {"resize": fit.resize, "interpolation": fit.interpolation, "squash": fit.squash}


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is no finite number")


def is_input_shape(shape: Any) -> bool:
    """Whether a network can be given one input of this shape: positive sizes, and no more numbers than memory holds."""
    if not isinstance(shape, (list, tuple)) or len(shape) > MOST_DIMENSIONS:
        return False
    return all(_is_integer(size) and size > 0 for size in shape) and math.prod(map(int, shape)) <= LARGEST_INPUT


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_WORD


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= _MOST_VALUES and all(map(_is_scalar, value))
    return _is_scalar(value)


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool) or _is_word(value) or _is_number(value)


def _names_layers(value: Any) -> bool:
    return isinstance(value, dict) and list(value) == ["left"] and _list_of(_is_word, _MOST_CLASSES)(value["left"])


def _list_of(holds: Callable[[Any], bool], most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(holds, value))


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: _is_word(value) and value != "", "the name of a model"),
    "settings": (lambda value: isinstance(value, dict) and len(value) <= _MOST_VALUES, "names with values"),
    "changes": (lambda value: isinstance(value, list), "a list"),
    "input_shape": (is_input_shape, f"positive sizes of at most {LARGEST_INPUT:,} numbers"),
    "classes": (_list_of(_is_word, _MOST_CLASSES), "a list of names"),
    "mean": (_list_of(_is_number, LARGEST_INPUT), "a list of finite numbers"),
    "std": (
        _list_of(lambda value: _is_number(value) and value > 0, LARGEST_INPUT),
        "a list of finite numbers above 0",
    ),
    "data": (_is_word, "a name"),
    "resize": (lambda value: _is_integer(value) and 0 <= value <= LARGEST_SIDE, f"pixels, {LARGEST_SIDE} at most"),
    "interpolation": (
        lambda value: isinstance(value, str) and value in INTERPOLATIONS,
        f"one of {', '.join(INTERPOLATIONS)}",
    ),
    "squash": (lambda value: isinstance(value, bool), "true or false"),
    "bgr": (lambda value: isinstance(value, bool), "true or false"),
    "quantized": (lambda value: value == {} or _names_layers(value), "empty, or the names of layers as 'left'"),
}
