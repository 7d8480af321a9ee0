"""Small networks as C libraries, exported once, and programs that call them."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import shared
import torch
from quantizable import with_statistics
from torch import Tensor, nn

import sepconv
from sepconv.device import ExportedLibrary, check, targets
from sepconv.layers import SeparableConv2d

EXAMPLE = torch.randn(1, 3, 13, 11, generator=torch.Generator().manual_seed(3))
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


class Small(nn.Module):
    """A stem, a separable layer with a residual, a pool and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.block = SeparableConv2d(8, 8, 3, padding=1, norm=nn.BatchNorm2d, activation=nn.ReLU)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        scores: Tensor = self.head(x + self.block(x))
        return scores


@cache
def small() -> nn.Module:
    torch.manual_seed(0)
    found: nn.Module = with_statistics(Small())
    return found


def native() -> str:
    """The level for this processor."""
    for level in ("-avx512", "-avx2", ""):
        name = f"x86-64-linux{level}"
        if not check.missing(targets.TARGETS[name]):
            return name
    pytest.skip("no C compiler for this machine's own programs")


def exported(target: str, name: str = "small", threads: int = 1) -> Path:
    """The folder of the small network's library; every network of that kind has the same kernels."""

    def make(folder: Path) -> None:
        classes = ["a", "b", "c", "d", "e"]
        settings: dict[str, Any] = {"name": name, "threads": threads, "mean": MEAN, "std": STD, "classes": classes}
        sepconv.export_c(small(), EXAMPLE, folder, target=target, **settings)

    return shared.once(f"device-{target}-{name}-{threads}", make)


def described(folder: Path, target: str) -> ExportedLibrary:
    facts = json.loads((folder / "manifest.json").read_text())
    names = ("name", "precision", "macs", "code_bytes", "weights_bytes", "arena_bytes", "threads")
    sizes = {kind: tuple(map(tuple, facts[kind])) for kind in ("inputs", "outputs")}
    return ExportedLibrary(folder=folder, target=target, **{n: facts[n] for n in names}, **sizes)


def loaded(library: Path, name: str, folder: Path) -> ctypes.CDLL:
    """A library in this process."""
    program = folder / f"{name}.so"
    archive = str(library / f"lib{name}.a")
    whole = ["-Wl,--whole-archive", archive, "-Wl,--no-whole-archive", "-Wl,-z,defs"]
    subprocess.run(["gcc", "-shared", "-o", str(program), *whole, "-lm"], check=True)
    return ctypes.CDLL(str(program))


def needs(target: str) -> None:
    """Skip where programs for it cannot be built and run here."""
    goal = targets.TARGETS[target]
    reason = check.missing(goal)
    if reason:
        pytest.skip(reason)


def needs_program(name: str) -> None:
    if not shutil.which(name):
        pytest.skip(f"there is no {name} here")


def answer(x: Tensor = EXAMPLE) -> Tensor:
    with torch.no_grad():
        found: Tensor = small()(x)
    return found


def close(got: Tensor, wanted: Tensor) -> None:
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def normalised(pixels: Tensor) -> Tensor:
    """Bytes of an image (H, W, 3) as the network was trained on."""
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))
    return (pixels.permute(2, 0, 1)[None] / 255 - mean) / std


def at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())
