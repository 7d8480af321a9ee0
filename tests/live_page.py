"""A page that runs small networks: made once for all tests."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import shared
import torch
from quantizable import with_statistics
from torch import nn

import sepconv
from sepconv.data import Data, Split, load
from sepconv.data.images import TensorImages
from sepconv.data.preprocessing import Crop
from sepconv.report import write_report
from sepconv.runs.card import Card
from sepconv.runs.live import LiveNetwork, write_live

GREY, COLOURED = "grey", "coloured"
CARDS = {
    GREY: Card("small", input_shape=(1, 8, 8), classes=list("0123456789"), mean=[0.3], std=[0.4]),
    COLOURED: Card(
        "small",
        input_shape=(3, 11, 11),
        classes=["</script>", "b", "c", "d"],
        mean=[0.4, 0.5, 0.6],
        std=[0.2, 0.3, 0.25],
        resize=13,
        interpolation="bicubic",
        bgr=True,
    ),
}


def data_of(kind: str) -> Data:
    """The digits, or random images in colours."""
    if kind == GREY:
        return load("digits")
    images = torch.randint(0, 256, (6, 3, 11, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    mean, std = torch.tensor(CARDS[kind].mean), torch.tensor(CARDS[kind].std)
    split = Split(TensorImages(images), torch.tensor([1, 0, 2, 3, 1, 0]), mean, std, bgr=True)
    return Data("colours", split, split, CARDS[kind].classes, fit=Crop(11, 13, "bicubic"))


@cache
def networks(kind: str) -> list[LiveNetwork]:
    """A normal one, and the same in integers."""
    torch.manual_seed(1)
    c, classes = CARDS[kind].input_shape[0], len(CARDS[kind].classes)
    layers = [nn.Conv2d(c, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = with_statistics(nn.Sequential(*layers, nn.Linear(8, classes)))
    whole, _ = sepconv.quantize(model, data_of(kind).calibration(6))
    return [LiveNetwork("normal", "float32", model), LiveNetwork("separable", "int8", whole)]


@cache
def page(kind: str) -> Path:
    def make(folder: Path) -> None:
        found = write_live(networks(kind), CARDS[kind], data_of(kind), folder)
        (folder / "found.json").write_text(json.dumps(found))
        (folder / "result.json").write_text(json.dumps({"model": "small"}))
        write_report(folder)

    return shared.once(f"live-{kind}", make) / "report.html"
