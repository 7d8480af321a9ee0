"""What is typed, turned into values; each error says what was expected."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from sepconv.model_file import Card


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
        settings[key] = _literal(value)
    return settings


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse_shape(text: str) -> tuple[int, ...]:
    """Sizes without the batch.

    Example:
        >>> parse_shape("3x224x224")
        (3, 224, 224)
    """
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"--input needs positive sizes without the batch, such as 3x224x224, but got {text!r}")
    return tuple(map(int, sizes))


def parse_budget(text: str) -> float:
    """A share of the original's cost.

    Example:
        >>> parse_budget("1/8")
        0.125
    """
    try:
        budget = Fraction(text)
    except (ValueError, ZeroDivisionError):
        budget = Fraction(0)
    if not 0 < budget <= 1:
        raise ValueError(f"--budget must be above 0 and at most 1, such as 1/8 or 0.125, but got {text!r}")
    return float(budget)


def shape_of(text: str | None, card: Card) -> tuple[int, ...]:
    """The input's shape as typed, else as the weights say it."""
    if text is not None:
        return parse_shape(text)
    if not card.input_shape:
        raise ValueError("the weights do not say which input the network takes: give --input, such as 3x224x224")
    return card.input_shape
