"""The normal networks that everything else starts from, trained by the library's own recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.evidence.runner import RUNS, Step
from sepconv.cost import count
from sepconv.data import Data, load
from sepconv.runs.model_file import FILE, Card, open_model, write
from sepconv.train import Recipe, evaluate, train
from sepconv.train.history import History

HAS_BF16 = torch.cpu._is_avx512_bf16_supported()
"""Elsewhere bfloat16 is computed in float32 and costs more time than it saves."""

QUICK = Recipe(
    batch_size=128,
    lr=0.2,
    warmup_epochs=2.4,
    label_smoothing=0.1,
    flip=True,
    crop_padding=2,
    mixed_precision="bf16" if HAS_BF16 else "no",
    ema=0.99,
    whiten=True,
)
LONG = replace(
    QUICK, epochs=36, batch_size=256, lr=0.4, warmup_epochs=7.0, label_smoothing=0.2, crop_padding=4, cutout=10
)
"""More passes need images that differ more from one to the next."""
MIXED = replace(LONG, epochs=42, label_smoothing=0.1, cutmix=0.5)
"""`LONG` ends with 97 % of the training images known by heart; this recipe has not learned enough by then."""


@dataclass(frozen=True)
class Teacher:
    """A normal network, its training and its images (a key of `SOURCE`)."""

    model: str
    recipe: Recipe
    settings: dict[str, Any] = field(default_factory=dict)
    data: str = "cifar10"


BROAD = {"width_mult": 2.0, "activation": "gelu"}
FASHION = replace(QUICK, epochs=6)
TEACHERS = {
    "vgg": Teacher("vgg_quick", replace(QUICK, epochs=12)),
    "resnet": Teacher("resnet_quick", replace(QUICK, epochs=8)),
    "fashion-vgg": Teacher("vgg_quick", FASHION, data="fashion"),
    "fashion-resnet": Teacher("resnet_quick", FASHION, data="fashion"),
    "wide": Teacher("vgg_quick", LONG, {"width_mult": 1.5, "activation": "gelu"}),
    "deep": Teacher("resnet_quick", replace(LONG, epochs=42), BROAD),
    "mixed": Teacher("resnet_quick", MIXED, BROAD),
}
SMALL = ("vgg", "resnet", "fashion-vgg", "fashion-resnet")
"""Minutes of training each: for whole tables."""
CONVERTED = (*SMALL, "wide", "mixed")
"""The other one shows what cutmix is worth."""
SOURCE = {"cifar10": "", "fashion": "/usr/share/datasets/fashion-mnist"}
"""Where the JPEG copy of CIFAR-10 lies, set by the command line, and where Debian's dataset-fashion-mnist does."""
NAMES = {"fashion": "Fashion-MNIST", "cifar10": "CIFAR-10 (JPEG copy)"}


@cache
def load_once(key: str) -> Data:
    return load(SOURCE[key])


def data_of(name: str) -> Data:
    """The images of the teacher `name`."""
    return load_once(TEACHERS[name].data)


def teacher(name: str) -> nn.Module:
    """The trained network of the finished step `teacher-NAME`."""
    return open_model(str(RUNS / f"teacher-{name}"))[0].eval()


def train_teacher(name: str, folder: Path) -> dict[str, Any]:
    """Train the normal network `name`; its weights stay in `folder`."""
    chosen = TEACHERS[name]
    data = data_of(name)
    settings = {**chosen.settings, "num_classes": data.num_classes, "in_channels": data.channels}
    card = Card(chosen.model, settings).with_data(data)
    torch.manual_seed(0)
    model = card.build()
    history = train(model, data, chosen.recipe, folder, resume=True)
    write(folder / FILE, model, card)
    return {"model": chosen.model, **learned(model, name, chosen.recipe, history)}


def learned(model: nn.Module, name: str, recipe: Recipe, history: History) -> dict[str, Any]:
    """What a record says of a training on the images of the teacher `name`: how, how well, at what cost."""
    data = data_of(name)
    cost = count(model, data.input_shape)
    return {
        "data": NAMES[TEACHERS[name].data],
        "recipe": asdict(recipe),
        "accuracy": evaluate(model, data.test).accuracy,
        "conv_params": cost.conv_params,
        "macs": cost.macs,
        "training_seconds": round(history.seconds, 1),
        "training_cpu_seconds": round(sum(r["cpu_seconds"] for r in history.records), 1),
        "epochs": history.records,
    }


def steps() -> list[Step]:
    return [Step(f"teacher-{name}", lambda folder, name=name: train_teacher(name, folder)) for name in TEACHERS]
