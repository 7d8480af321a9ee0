"""A network with random weights, the files that other runtimes read it from, and what a contender is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

import sepconv
from sepconv.leaves import Inputs
from sepconv.models import MobileNetV1, MobileNetV2
from sepconv.quantize import saving
from sepconv.runs.latency import with_torch_layers
from sepconv.system.files import replacing

SEED = 0
HELD_OUT = 48
_CALIBRATION, _BATCH = 64, 8
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

    @cached_property
    def quantized(self) -> nn.Module:
        """The network in integers, by this library; it says itself which layers it leaves in float32.

        From its file: what was needed to find the integers is not part of a process that only runs them.
        """
        path = self.file("-int8.safetensors", self._quantize)
        with torch.inference_mode(False), safe_open(path, "pt") as file:
            example, left = Inputs((self.images(2),)), file.metadata().values()
            found: nn.Module = saving.rebuilt(copy.deepcopy(self.model), example, left)
            found.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            saving.unpack(found)
        return found.eval()

    def _quantize(self, path: Path) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            found = sepconv.quantize(self.model, self.calibration(), force=True)[0]
        left = {str(i): name for i, name in enumerate(saving.left_in(found))}
        state = {name: tensor.contiguous().clone() for name, tensor in saving.packed(found).items()}
        with replacing(path) as file:
            file.write(save(state, left))

    def forget(self) -> None:
        """Let go of the network; it is built anew when asked for again."""
        self.__dict__.pop("model", None)
        self.__dict__.pop("quantized", None)

    def images(self, batch: int, seed: int = SEED) -> Tensor:
        """Random images (batch, 3, side, side), contiguous."""
        return random_images(batch, self.side, seed)

    def calibration(self) -> list[Tensor]:
        """Batches of images to find the ranges of integers on: none that anything is measured with."""
        return list(self.images(_CALIBRATION, SEED + 1).split(_BATCH))

    def held_out(self) -> Tensor:
        """Images that no contender has seen before its answers to them are compared."""
        return self.images(HELD_OUT, SEED + 2)

    @cached_property
    def scores(self) -> Tensor:
        """What the network itself says to them, in float32."""
        with torch.inference_mode():
            return torch.cat([self.model(batch) for batch in self.held_out().split(_BATCH)])

    def file(self, suffix: str, write: Callable[[Path], None]) -> Path:
        """The file of that suffix, written on first use."""
        path = self.folder / f"{self.name}{suffix}"
        if not path.exists():
            write(path)
        return path


def random_images(batch: int, side: int, seed: int) -> Tensor:
    """Noise of every size at once, as photographs have it: networks tell such images apart, which they do not with
    white noise, whose means over many pixels are all the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([_image(side, generator) for _ in range(batch)])


def _image(side: int, generator: torch.Generator) -> Tensor:
    sizes = [2**i for i in range(side.bit_length())]
    noise = [torch.randn(1, 3, size, size, generator=generator) for size in sizes]
    layers = [F.interpolate(layer, (side, side), mode="bilinear", align_corners=False) for layer in noise]
    return sum(layers, torch.zeros(1, 3, side, side))[0] / len(layers) ** 0.5


@torch.no_grad()
def randomised(model: nn.Module, images: Tensor) -> nn.Module:
    """Scales and shifts of all batch norms at random, statistics as the images have them; evaluation mode.

    So a norm that was folded wrongly shows in the result, and activations keep their size through the network: no layer
    overflows a short number or leaves most of its steps unused. Shifts are upwards: where activations cut off half of
    what comes, networks with random weights multiply every rounding by a fifth more in each layer.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(0, 2)
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
        precision: in which it computes what takes the time, of "float32", "bfloat16" and "int8".
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
    precision: str = "float32"

    @property
    def ours(self) -> bool:
        return "sepconv" in self.name

    @property
    def by_dynamo(self) -> bool:
        """Whether ``torch.compile`` runs it, whose results every ``torch.export`` of others throws away."""
        return self.name.startswith("torch-compile")

    @property
    def title(self) -> str:
        """The name, with the precision where it is not the usual one."""
        return self.name if self.precision == "float32" else f"{self.name} {self.precision}"


def source_of(network: str, folder: Path) -> Network:
    """The network of such a name (version, width multiplier, image side); files made from it go into the folder."""
    version, size = network.split()
    width, side = size.split("-")
    return Network(network.replace(" ", "-"), partial(_MODELS[version], float(width)), int(side), folder)
