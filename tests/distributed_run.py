"""One training for the tests of several processes: `torchrun distributed_run.py OUT [EPOCHS]` or plain `python`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sepconv.data import Data, Split
from sepconv.data.images import TensorImages
from sepconv.train import Recipe, evaluate, train
from sepconv.train.processes import processes


def random_data(train: int = 61, test: int = 37, classes: int = 5) -> Data:
    """Images whose brightness tells their class, in sizes that no number of processes divides."""
    random = torch.Generator().manual_seed(0)
    splits = []
    for n in (train, test):
        labels = torch.randint(0, classes, (n,), generator=random)
        noise = torch.randint(0, 60, (n, 1, 6, 6), generator=random)
        images = (noise + 40 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
        splits.append(Split(TensorImages(images), labels, torch.tensor([0.5]), torch.tensor([0.25])))
    return Data("random", *splits, [str(i) for i in range(classes)])


def network(norm: bool = False, dropout: float = 0.0) -> nn.Module:
    """A depthwise separable network without anything that couples the images of a batch, unless asked for."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Dropout(dropout),
        nn.Conv2d(8, 5, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if "second" not in key} for record in records]


RECIPE = Recipe(epochs=3, batch_size=15, lr=0.05, label_smoothing=0.1, flip=True, crop_padding=1, ema=0.9)


def main(out: Path, epochs: int = RECIPE.epochs) -> None:
    torch.set_num_threads(1)
    data, model = random_data(), network()
    out.mkdir(exist_ok=True)
    (out / f"pid-{processes().process_index}").write_text(str(os.getpid()))
    train(model, data, replace(RECIPE, epochs=epochs), out, resume=True)
    metrics = evaluate(model, data.test, batch_size=10)
    state = processes()
    (out / f"result-{state.process_index}.json").write_text(
        json.dumps({"world": state.num_processes, "loss": metrics.loss, "confusion": metrics.confusion.tolist()})
    )
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
