"""The main job in small for the tests of kills: what a killed call left is gone on with."""

from __future__ import annotations

from pathlib import Path

import torch

from sepconv.data import load
from sepconv.runs.model_file import Card
from sepconv.runs.workflow import Job, convert_model
from sepconv.train import Recipe

EPOCHS = 4


def main(out: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    card = Card("vgg_small", {"in_channels": 1, "num_classes": 10, "width_mult": 0.125})
    job = Job(budget=1 / 4, recipe=Recipe(epochs=EPOCHS, batch_size=128, lr=0.05), calibration_images=100)
    convert_model(card.build(), card, load("digits"), job, out, resume=True)
