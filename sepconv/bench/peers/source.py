"""A network with random weights, the files that other runtimes read it from, and what a contender is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.models import MobileNetV1, MobileNetV2
from sepconv.runs.latency import with_torch_layers

SEED = 0
_MODELS = {"v1": MobileNetV1, "v2": MobileNetV2}
NETWORKS = ("v1 1.0-224", "v1 0.5-160", "v1 0.25-128", "v2 1.0-224", "v2 0.5-160")


class Network:
    """One network, built when first asked for, and a folder for the files made from it.

    ``name`` names the files: a file that is there already is used again.
    """

    def __init__(self, name: str, make: Callable[[], nn.Module], side: int, folder: Path) -> None:
        self.name, self.side, self.folder = name, side, folder
        self._make = make

    @cached_property
    def model(self) -> nn.Module:
        """The network in PyTorch's own layers, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return randomised(with_torch_layers(self._make()), self.images(4))

    def forget(self) -> None:
        """Let go of the network; it is built anew when asked for again."""
        self.__dict__.pop("model", None)

    def images(self, batch: int) -> Tensor:
        """Random images (batch, 3, side, side), contiguous."""
        return torch.randn(batch, 3, self.side, self.side, generator=torch.Generator().manual_seed(SEED))

    def file(self, suffix: str, write: Callable[[Path], None]) -> Path:
        """The file of that suffix, written on first use."""
        path = self.folder / f"{self.name}{suffix}"
        if not path.exists():
            write(path)
        return path


@torch.no_grad()
def randomised(model: nn.Module, images: Tensor) -> nn.Module:
    """Scales and shifts of all batch norms at random, statistics as the images have them; evaluation mode.

    So a norm that was folded wrongly shows in the result, and activations keep their size through the network.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.5, 0.5)
            module.momentum = 1.0
    model.train()(images)
    return model.eval()


@dataclass(frozen=True)
class Contender:
    """Something that runs the network.

    Attributes:
        packages: that must be installed.
        modules: to import before the clock runs that says how long it takes to be ready.
        layout: of the images it is given.
        of_module: whether it runs a module in memory, and not a file.
        single: whether it is measured with single images only, because it takes so long to be ready.
        build: for a network, images and a number of threads, the call that computes the scores of those images, a
            tensor or NumPy array (N, classes) in any shape of as many numbers. What is in the images may change
            between calls, where they lie may not.
    """

    name: str
    packages: tuple[str, ...]
    modules: tuple[str, ...]
    layout: str
    build: Callable[[Network, Tensor, int], Callable[[], Any]]
    of_module: bool = False
    single: bool = False


def source_of(network: str, folder: Path) -> Network:
    """The network of such a name (version, width multiplier, image side); files made from it go into the folder."""
    version, size = network.split()
    width, side = size.split("-")
    return Network(network.replace(" ", "-"), partial(_MODELS[version], float(width)), int(side), folder)
