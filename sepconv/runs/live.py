"""The networks of a run as WebAssembly, for its page to run them in the browser."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sepconv.data import Data, SampleData
from sepconv.device import export_c
from sepconv.layers.borrowed import copied
from sepconv.runs.card import Card
from sepconv.runs.run_folder import LARGEST_LIVE, LIVE, write_json

TARGET = "wasm-32"
_SHARE = 0.75
"""Bytes in a character of base64."""
_INK, _INK_IMAGES = 64, 200


class LiveNetwork(NamedTuple):
    """A network by the name that the page gives it."""

    name: str
    precision: str
    model: nn.Module


def write_live(networks: Sequence[LiveNetwork], card: Card, data: Data | SampleData, out: Path) -> dict[str, Any]:
    """What was written, or the reason why not: the page is complete without it."""
    (out / LIVE).unlink(missing_ok=True)
    try:
        content = live(networks, card, data)
    except (ValueError, RuntimeError) as error:
        return {"written": False, "reason": str(error).removeprefix("export_c: ")}
    write_json(out / LIVE, content)
    return {"written": True, "bytes": sum(len(network["wasm"]) for network in content["networks"])}


def live(networks: Sequence[LiveNetwork], card: Card, data: Data | SampleData) -> dict[str, Any]:
    """The networks, what they take, and an image to begin with, as ``sepconv.report`` wants them.

    Args:
        card: how images are prepared for all of them.

    Raises:
        ValueError: they do not give scores of classes for images, are too large for a page, or cannot be exported.
        RuntimeError: what was exported gives other answers than the network.
    """
    prepared = card.preprocessing
    if not isinstance(data, Data) or not data.classes or prepared is None or prepared.fit is None:
        raise ValueError("the page runs networks that tell classes of images")
    _check_size(sum(_bytes(network.model) for network in networks))
    example = data.test.images.take(torch.tensor([0]))
    with tempfile.TemporaryDirectory(prefix="sepconv-") as folder:
        found = [_exported(network, i, card, Path(folder)) for i, network in enumerate(networks)]
    _check_size(sum(len(network["wasm"]) * _SHARE for network in found))
    return {
        "input": {"channels": card.input_shape[0], **asdict(prepared.fit)},
        "ink": _ink(data.test.images.take(torch.arange(min(len(data.test), _INK_IMAGES)))),
        "classes": card.classes,
        "example": {"pixels": _text(_rows(example)), "label": data.classes[int(data.test.labels[0])]},
        "networks": found,
    }


def _exported(network: LiveNetwork, number: int, card: Card, folder: Path) -> dict[str, Any]:
    symbol, place = f"network{number}", folder / str(number)
    example = torch.zeros(1, *card.input_shape)
    library = export_c(
        copied(network.model, "live").cpu(),
        example,
        place,
        target=TARGET,
        name=symbol,
        mean=card.mean,
        std=card.std,
        bgr=card.bgr,
    )
    if library.outputs != ((1, len(card.classes)),):
        raise ValueError(f"the network gives {library.outputs} and not a score for each of {len(card.classes)} classes")
    return {
        "name": network.name,
        "precision": network.precision,
        "symbol": symbol,
        "pixels": example.numel(),
        "classes": len(card.classes),
        "wasm": _text((place / f"{symbol}.wasm").read_bytes()),
    }


def _check_size(size: float) -> None:
    shown, most = size / _SHARE / (1 << 20), LARGEST_LIVE / (1 << 20)
    if shown > most:
        raise ValueError(f"the networks take {shown:.3g} MB in the page, which may hold {most:.3g} MB of them")


def _bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _rows(image: Tensor) -> bytes:
    """Shape: uint8 (1, C, H, W), red first -> bytes, row after row, pixel after pixel."""
    return image[0].permute(1, 2, 0).contiguous().numpy().tobytes()


def _ink(images: Tensor) -> dict[str, Any] | None:
    """Of grey images of strokes: whether ink is dark on bright ground, and what share of the side it takes."""
    if images.shape[1] != 1:
        return None
    images = images[:, 0].float()
    dark = bool(images.mean() > 127)
    inked = (255 - images if dark else images) > _INK
    sides = torch.maximum(inked.any(2).sum(1), inked.any(1).sum(1))
    share = sides.float().median() / images.shape[-1]
    return {"dark": dark, "share": round(max(float(share), 0.1), 3)}
