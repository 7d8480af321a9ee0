"""A network of a file as a C library: with the preparation of images and the classes that the file names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from sepconv.compile.precision import INT8
from sepconv.device import ExportedLibrary, export_c
from sepconv.layers.borrowed import because_of_weights
from sepconv.quantize.saving import is_quantized
from sepconv.runs.card import Card

PRECISIONS = ("float32", INT8)


class Device(NamedTuple):
    """What a library is for. ``precision``: None is that of the network; ``check``: run its example."""

    target: str
    precision: str | None = None
    threads: int = 1
    name: str = "model"
    check: bool = False


def export_library(
    model: nn.Module, card: Card, input_shape: Sequence[int], folder: Path, device: Device
) -> ExportedLibrary:
    """For one image at a time.

    Raises:
        ValueError: it cannot be exported, or not in the precision that is asked for, or its weights are no numbers.
        OSError: the folder cannot be written.
    """
    _check_precision(model, device.precision)
    if why := because_of_weights(model):
        raise ValueError(f"export: the outputs of the model hold NaN or infinity{why}")
    return export_c(
        model.eval(),
        torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0)),
        folder,
        target=device.target,
        name=device.name,
        threads=device.threads,
        mean=card.mean,
        std=card.std,
        bgr=card.bgr,
        classes=card.classes,
        check=device.check,
    )


def _check_precision(model: nn.Module, precision: str | None) -> None:
    quantized = isinstance(model, torch.fx.GraphModule) and is_quantized(model)
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(
            f"export: --precision must be one of {', '.join(PRECISIONS)} for a C library, got {precision!r}"
        )
    if precision == INT8 and not quantized:
        raise ValueError("export: --precision int8 needs a network of integers; make one by sepconv quantize")
    if precision == "float32" and quantized:
        raise ValueError("export: the network was quantized to int8; export the one that it was made of for float32")
