"""How far two networks' outputs are apart, in the unit in which all of one network's outputs are added up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.convert.passes import run
from sepconv.leaves import Inputs, leaves
from sepconv.leaves.closeness import check_shapes
from sepconv.leaves.outputs import Spread, checked_weights


def tensors(output: Any) -> list[Tensor]:
    """The floating tensors in whatever a network returns."""
    return list(leaves(output).values())


def difference(
    wanted: Sequence[Tensor], given: Sequence[Tensor], approximated: str, scales: Sequence[float] = ()
) -> float:
    """The squared difference of two networks' outputs, each times its scale.

    Raises:
        ValueError: they have different sizes.
    """
    before, after = ({str(i): t for i, t in enumerate(outputs)} for outputs in (wanted, given))
    check_shapes(before, after, approximated, "convert")
    squares = [float((w.double() - g.double()).square().sum()) for w, g in zip(wanted, given, strict=True)]
    return sum(s * scale for s, scale in zip(squares, scales or [1.0] * len(squares), strict=True))


def output_scales(model: nn.Module, batches: Iterable[Inputs], weights: Mapping[str, float] | None) -> list[float]:
    """By what the squared errors of the outputs are multiplied, so that each counts by its own variance and its weight.

    Of a network with a single output it is 1.

    Raises:
        ValueError: the weights name what is no output.
    """
    spreads: dict[str, Spread] = {}
    with torch.no_grad():
        for x in batches:
            found = leaves(run(model, x))
            shares = checked_weights(found, weights, "convert")
            if len(found) < 2:
                return [1.0] * len(found)
            for name, leaf in found.items():
                spreads.setdefault(name, Spread()).add(leaf)
    return [shares[name] / (spread.variance() / max(1, spread.samples)) for name, spread in spreads.items()]
